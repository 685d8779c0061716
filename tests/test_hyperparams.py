"""The yml files: what is in them, and that SoftSAC can be built and trained from it."""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import rl_zoo3.exp_manager
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager

from sb3_softsac import SoftSAC, SoftSACPolicy

FOLDER = Path(__file__).parent.parent / "hyperparams"
MAIN = FOLDER / "softsac.yml"
VARIANTS = sorted((FOLDER / "variants").glob("*.yml"))
ZOO_SAC = Path(rl_zoo3.exp_manager.__file__).parent / "hyperparams" / "sac.yml"

# What ExperimentManager takes for itself; all else goes to the constructor
ZOO_KEYS = {
    "n_timesteps",
    "n_envs",
    "normalize",
    "frame_stack",
    "env_wrapper",
    "vec_env_wrapper",
    "env_kwargs",
    "monitor_kwargs",
    "callback",
    "noise_type",
    "noise_std",
}
CONSTRUCTOR = inspect.signature(SoftSAC).parameters
MUJOCO_V5 = """
    Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 HumanoidStandup-v5 InvertedDoublePendulum-v5 InvertedPendulum-v5
    Pusher-v5 Reacher-v5 Swimmer-v5 Walker2d-v5
""".split()
# Gymnasium's Pusher-v4 refuses MuJoCo 3 and newer
MUJOCO_IDS = [*MUJOCO_V5, *(env_id.replace("v5", "v4") for env_id in MUJOCO_V5 if env_id != "Pusher-v5")]


def read(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())


ENTRIES = [
    pytest.param(path, env_id, entry, id=f"{path.stem}-{env_id}")
    for path in (MAIN, *VARIANTS)
    for env_id, entry in read(path).items()
]
VARIANT_ENTRIES = [(path, env_id) for path in VARIANTS for env_id in read(path)]


def set_up(config: Path, env_id: str, log_folder: Path, **hyperparams: Any) -> tuple[ExperimentManager, SoftSAC]:
    """As ``python -m rl_zoo3.train --algo softsac -conf CONFIG -params HYPERPARAMS`` does it."""
    manager = ExperimentManager(
        argparse.Namespace(),
        "softsac",
        env_id,
        str(log_folder),
        n_timesteps=150,
        eval_freq=-1,
        log_interval=-1,
        config=str(config),
        hyperparams={"buffer_size": 1000, **hyperparams},
        device="cpu",
        verbose=0,
    )
    experiment = manager.setup_experiment()
    assert experiment is not None
    model = experiment[0]
    assert isinstance(model, SoftSAC)
    return manager, model


@pytest.mark.parametrize(("path", "env_id", "entry"), ENTRIES)
def test_every_key_is_known(path: Path, env_id: str, entry: dict[str, Any]):
    unknown = set(entry) - ZOO_KEYS - set(CONSTRUCTOR)
    assert not unknown
    assert float(entry["n_timesteps"]) > 0


@pytest.mark.parametrize(("path", "env_id", "entry"), ENTRIES)
def test_policy_kwargs_are_arguments_of_the_policy(path: Path, env_id: str, entry: dict[str, Any]):
    # The zoo evaluates the string where ExperimentManager is defined
    policy_kwargs = eval(entry.get("policy_kwargs", "{}"), dict(vars(rl_zoo3.exp_manager)))
    assert set(policy_kwargs) <= set(inspect.signature(SoftSACPolicy).parameters)


def test_the_required_environments_are_there():
    others = {"default", "Pendulum-v1", "LunarLanderContinuous-v3", "BipedalWalker-v3"}
    assert {*MUJOCO_IDS, *others} <= set(read(MAIN))


@pytest.mark.parametrize("env_id", [*MUJOCO_IDS, "Pendulum-v1", "LunarLanderContinuous-v3", "BipedalWalker-v3"])
def test_gymnasium_knows_the_environments(env_id: str):
    assert env_id in gym.registry


def test_entries_of_the_zoo_are_carried_over_unchanged():
    ours, zoo = read(MAIN), read(ZOO_SAC)
    # A name that Gymnasium no longer has
    zoo = json.loads(json.dumps(zoo).replace("gymnasium.wrappers.time_limit.TimeLimit", "gymnasium.wrappers.TimeLimit"))
    assert set(zoo) <= set(ours)
    assert {env_id: ours[env_id] for env_id in zoo} == zoo


def test_the_variants_are_there():
    assert [path.stem for path in VARIANTS] == [
        "ant_humanoid_softplus",
        "halfcheetah_lab",
        "inverted_pendulum_delayed",
        "pendulum_actor_target",
        "pendulum_separate_log_std",
    ]


# Gymnasium says of every v4 that there is a v5
@pytest.mark.filterwarnings("ignore:.*is out of date")
@pytest.mark.parametrize("env_id", [*MUJOCO_IDS, "Pendulum-v1", "MountainCarContinuous-v0"])
def test_models_can_be_built(env_id: str, tmp_path: Path):
    _, model = set_up(MAIN, env_id, tmp_path)
    entry = read(MAIN)[env_id]
    assert model.learning_starts == entry.get("learning_starts", CONSTRUCTOR["learning_starts"].default)
    assert model.gamma == entry.get("gamma", CONSTRUCTOR["gamma"].default)
    assert model.env is not None
    model.env.close()


@pytest.mark.parametrize(("path", "env_id"), VARIANT_ENTRIES, ids=lambda value: getattr(value, "stem", value))
def test_variants_train(path: Path, env_id: str, tmp_path: Path):
    entry = read(path)[env_id]
    short = {"learning_starts": 80, "batch_size": 32}
    if "random_steps" in entry:
        short["random_steps"] = 120
    manager, model = set_up(path, env_id, tmp_path, **short)
    for name, parameter in CONSTRUCTOR.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert getattr(model, name) == {**entry, **short}.get(name, parameter.default), name
    for name, value in eval(entry.get("policy_kwargs", "{}")).items():
        assert getattr(model.policy, name, value) == value, name

    before = [parameter.clone() for parameter in model.actor.parameters()]
    manager.learn(model)
    model.env.close()  # as save_trained_model() does
    assert model.num_timesteps == 150
    assert model._n_updates == 70
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert not all(th.equal(old, new) for old, new in zip(before, model.actor.parameters(), strict=True))
