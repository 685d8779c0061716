"""The agents that are shipped in ``trained_agents/``: they load, do what their table says, and the zoo finds them."""

import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

from sb3_softsac import SoftSAC

pytestmark = pytest.mark.learning

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "trained_agents"
AGENTS = json.loads((FOLDER / "agents.json").read_text())
EPISODES = 5


def path_of(name: str) -> Path:
    return FOLDER / "softsac" / name / f"{AGENTS[name]['environment']}.zip"


def test_there_is_nothing_else() -> None:
    assert sorted(FOLDER.glob("softsac/*/*.zip")) == sorted(map(path_of, AGENTS))


@pytest.mark.parametrize("name", AGENTS)
def test_returns_are_those_of_the_table(name: str) -> None:
    agent, env = AGENTS[name], gym.make(AGENTS[name]["environment"])
    model = SoftSAC.load(path_of(name), device="cpu", buffer_size=1)
    returns = np.zeros(EPISODES)
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=episode)
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            returns[episode] += float(reward)
            done = terminated or truncated
    # Five standard errors, and a little for other processors
    tolerance = 5 * agent["std_return"] / EPISODES**0.5 + 0.02 * abs(agent["mean_return"])
    assert abs(returns.mean() - agent["mean_return"]) <= tolerance, (returns, agent)


@pytest.mark.parametrize("name", AGENTS)
def test_files_are_small_and_hold_the_policy_only(name: str) -> None:
    path = path_of(name)
    assert path.stat().st_size <= 6_000_000
    with zipfile.ZipFile(path) as archive:
        assert not [entry for entry in archive.namelist() if "replay" in entry]


@pytest.mark.parametrize("name", AGENTS)
def test_configuration_is_that_of_the_run(name: str) -> None:
    folder = path_of(name).with_suffix("")
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert config["n_timesteps"] == AGENTS[name]["steps"] and config["policy"] == "MlpPolicy"
    model = SoftSAC.load(path_of(name), device="cpu")
    for option in ("buffer_size", "learning_starts", "batch_size", "train_freq"):  # to be trained on
        default = inspect.signature(SoftSAC).parameters[option].default
        value = getattr(model, option)
        assert (value if isinstance(value, int) else value.frequency) == config.get(option, default)
    args = yaml.load((folder / "args.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert (args["algo"], args["env"]) == ("softsac", AGENTS[name]["environment"])
    evaluations = np.load(path_of(name).with_name("evaluations.npz"))
    assert evaluations["timesteps"][-1] == AGENTS[name]["steps"] and len(evaluations["results"]) > 5


def test_the_zoo_enjoys_them(tmp_path: Path) -> None:
    command = ["-m", "rl_zoo3.enjoy", "--algo", "softsac", "--env", "Pendulum-v1", "-f", str(FOLDER)]
    result = subprocess.run(
        [sys.executable, *command, "-n", "400", "--no-render", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 Episodes" in result.stdout
