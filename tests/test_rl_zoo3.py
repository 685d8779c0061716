"""
The RL Zoo's commands with SoftSAC, from a folder that is not the repository's.

Everything runs in processes of its own: importing the zoo changes Gymnasium for the whole process. ``run_python`` is
the command line, since registration is about how an interpreter starts; ``run_module`` does the same in a process that
has imported torch already; ``in_process`` runs a function of this file, for tests that look inside.
"""

import argparse
import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from resume_script import new_process
from stable_baselines3.common.env_util import make_vec_env

import sb3_softsac
from sb3_softsac import CheckpointCallback, SoftSAC
from sb3_softsac._rl_zoo3 import methods
from sb3_softsac.persistence import model_file

pytestmark = pytest.mark.processes

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "SDL_VIDEODRIVER": "dummy", "TRUST_REMOTE_CODE": "True"}
# The number of steps must not depend on the yml
ONE_STEP = ["n_envs:1", "train_freq:1", "gradient_steps:1", "batch_size:32"]
SHORT = ["--algo", "softsac", "--env", "Pendulum-v1", "--eval-freq", "-1"]
WATCH = ["--algo", "softsac", "--env", "Pendulum-v1", "-n", "20"]


def run_python(*args: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    with new_process() as pool:
        return pool.submit(function, *args).result(timeout=300)


def run_module(module: str, *args: str, cwd: Path) -> str:
    """As ``python -m``, without its imports."""
    code, output = in_process(main_of, module, args, cwd)
    assert code == 0, output
    return output


def main_of(module: str, args: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """
    Run a module in this process, which is one of its own.

    :return: exit status, and what was printed
    """
    os.chdir(folder)
    os.environ.update(ENVIRONMENT)
    sys.argv[1:] = args
    sys.path.insert(0, "")
    with tempfile.TemporaryFile("w+") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        log.seek(0)
        return code, log.read()


def saved_data(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        data: dict[str, Any] = json.loads(archive.read("data"))
    return data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    :return: a folder whose ``logs`` hold one short run, with evaluations, checkpoints and a callback of ours
    """
    folder = tmp_path_factory.mktemp("zoo")
    callback = 'callback:[{"sb3_softsac.SaveBestTrainingReturnCallback":{"min_episodes":1}}]'
    options = [*ONE_STEP, "learning_starts:100", "buffer_size:1000", "qf_learning_rate:'lin_1e-3'", callback]
    evaluations = ["--eval-freq", "200", "--eval-episodes", "2"]
    saving = ["--save-replay-buffer", "-n", "400"]
    command = ["-m", "rl_zoo3.train", *SHORT, *evaluations, *saving, "-params", *options]
    assert "softsac.yml" in run_python(*command, cwd=folder)
    return folder


def test_train(trained: Path) -> None:
    run = trained / "logs/softsac/Pendulum-v1_1"
    saved = {path.name for path in run.iterdir()}
    assert {"Pendulum-v1.zip", "best_model.zip", "best_training_model.zip", "evaluations.npz"} <= saved
    assert "- lin_1e-3" in (run / "Pendulum-v1/config.yml").read_text()


@pytest.mark.parametrize("with_buffer", [True, False])
def test_continue(trained: Path, tmp_path: Path, with_buffer: bool) -> None:
    """The count of steps goes on. Without the buffer, learning waits for ``learning_starts`` steps again."""
    model = trained / "logs/softsac/Pendulum-v1_1/Pendulum-v1.zip"
    before = saved_data(model)
    if not with_buffer:
        run_module("sb3_softsac.checkpoint", "export", str(model), "-o", "light.zip", cwd=tmp_path)
        model = tmp_path / "light.zip"
    seed = [] if with_buffer else ["--seed", "7"]
    changes = ["gamma:0.9", "policy_kwargs:dict(net_arch=[7])"]
    output = run_module(
        "rl_zoo3.train", *SHORT, "-n", "50", "-i", str(model), *seed, "-params", *ONE_STEP, *changes, cwd=tmp_path
    )
    run = tmp_path / "logs/softsac/Pendulum-v1_1"
    after = saved_data(run / "Pendulum-v1.zip")
    assert "gamma=0.9 instead of the file's, 0.99" in output
    assert "batch_size=" not in output and "train_freq=" not in output  # they are the file's, too
    assert "policy_kwargs={} is the file's, not {'net_arch': [7]}" in output
    assert "- - policy_kwargs\n    - {}\n" in (run / "Pendulum-v1/config.yml").read_text()
    assert f"- - seed\n    - {after['seed']}\n" in (run / "Pendulum-v1/args.yml").read_text()
    assert (before["num_timesteps"], after["num_timesteps"]) == (400, 450)
    assert after["_n_updates"] - before["_n_updates"] == (50 if with_buffer else 0)
    assert after["seed"] == (before["seed"] if with_buffer else 7), "the zoo draws one for commands that have none"


SMALL = ["learning_starts:100", "buffer_size:250", "policy_kwargs:dict(net_arch=[16])", "learning_rate:'lin_1e-3'"]
RUN = "logs/softsac/Pendulum-v1_1"


def contents(path: Path, *names: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith(names)}


def test_checkpoints_continue_to_the_same_end(tmp_path: Path) -> None:
    """From either of the checkpoints that were kept, with the evaluations in between and the schedule."""
    saving = ["--save-freq", "100", "--save-replay-buffer", "-n", "450", "--seed", "3"]
    evaluating = ["--eval-freq", "150", "--eval-episodes", "1"]
    command = ["rl_zoo3.train", *SHORT, *evaluating, "-params", *ONE_STEP, *SMALL]
    run_module(*command, *saving, cwd=tmp_path)
    run = tmp_path / RUN
    assert len(list(run.glob("rl_model_*_steps.zip"))) == 4
    kept = sorted(run.glob("checkpoints/step-*.zip"))
    assert [path.name.split("-")[1] for path in kept] == ["300", "400"]
    replay = contents(run / "Pendulum-v1.zip", "replay/")
    assert replay and not contents(run / "best_model.zip", "replay/")
    for i, path in enumerate(kept):
        output = run_module(*command, "--save-replay-buffer", "-i", str(path), cwd=tmp_path)
        assert f"Continuing at step {(i + 3) * 100}, for {150 - i * 100} steps" in output
        resumed = tmp_path / f"logs/softsac/Pendulum-v1_{i + 2}"
        for name in ("policy", "actor", "critic", "ent_coef", "replay/"):
            assert contents(resumed / "Pendulum-v1.zip", name) == contents(run / "Pendulum-v1.zip", name)
        np.testing.assert_equal(dict(np.load(resumed / "evaluations.npz")), dict(np.load(run / "evaluations.npz")))


def test_number_of_steps_is_that_of_the_command(tmp_path: Path) -> None:
    command = ["rl_zoo3.train", *SHORT, "--eval-freq", "-1", "-params", *ONE_STEP, *SMALL]
    run_module(*command, "-n", "300", "--save-freq", "200", "--save-replay-buffer", cwd=tmp_path)
    (path,) = (tmp_path / RUN).glob("checkpoints/step-200-*.zip")
    output = run_module(*command, "n_timesteps:40", "-i", str(path), cwd=tmp_path)
    assert "Continuing at step 200, for 40 steps" in output


@pytest.mark.parametrize("with_buffer", [False, True])
def test_sigterm_leaves_a_checkpoint(with_buffer: bool, tmp_path: Path) -> None:
    options = [*SHORT, "-n", "100000", *(["--save-replay-buffer"] if with_buffer else []), "-params", *ONE_STEP, *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "rl_zoo3.train", *options, "n_envs:2", "--vec-env", "subproc"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    log = tmp_path / RUN / "0.monitor.csv"
    for _ in range(1200):
        if log.is_file() and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do: the environments' processes get it too
    assert process.wait(timeout=60) == 143
    (checkpoint,) = (tmp_path / RUN / "checkpoints").glob("step-*.zip")
    assert (tmp_path / RUN / "checkpoints" / "replay").is_dir() == with_buffer
    before = saved_data(checkpoint)["num_timesteps"]
    run_module(
        "rl_zoo3.train", *options, "n_envs:2", "--vec-env", "subproc", "-i", str(checkpoint), "-n", "150", cwd=tmp_path
    )
    final = tmp_path / "logs/softsac/Pendulum-v1_2/Pendulum-v1.zip"
    assert saved_data(final)["num_timesteps"] == before + 150
    # Written when training has ended, but with the state of the environments' processes
    with model_file.open_model_file(final) as file:
        assert file.index["env"] is not None and "is closed" not in json.dumps(file.index["env"])


def test_subproc_and_parallel_training(tmp_path: Path) -> None:
    options = ["learning_starts:50", "batch_size:32", "n_envs:2", 'train_freq:(50,"step")']
    callback = 'callback:[{"rl_zoo3.callbacks.ParallelTrainCallback":{"gradient_steps":2}}]'
    run_module(
        "rl_zoo3.train", *SHORT, "-n", "300", "--vec-env", "subproc", "-params", *options, callback, cwd=tmp_path
    )
    # It is the copy that trains which is saved
    assert saved_data(tmp_path / "logs/softsac/Pendulum-v1_1/Pendulum-v1.zip")["_n_updates"] > 0


def test_optimize(tmp_path: Path) -> None:
    storage = ["--storage", "study.log", "--study-name", "study", "-params", "learning_starts:100"]
    # Trials have no folder: the callback must not end them
    callback = 'callback:"sb3_softsac.SaveBestTrainingReturnCallback"'
    search = ["-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    output = run_module("rl_zoo3.train", *SHORT, "-n", "150", *search, *storage, callback, cwd=tmp_path)
    assert output.count("finished with value") == 2 and "policy_delay" in output

    output = run_module("rl_zoo3.train", *SHORT, "-n", "110", "--trial-id", "1", *storage, cwd=tmp_path)
    assert "Loading from Optuna study" in output
    (report,) = (tmp_path / "logs/softsac").glob("report*.csv")
    trial = list(csv.DictReader(report.read_text().splitlines()))[1]
    data = saved_data(next(tmp_path.glob("logs/softsac/Pendulum-v1_*/Pendulum-v1.zip")))
    for name in ("policy_delay", "use_actor_target", "ent_coef_loss", "batch_size"):
        assert str(data[name]) == trial.get(f"params_{name}", trial.get(f"user_attrs_{name}"))


def test_optimize_with_gsde(tmp_path: Path) -> None:
    """Options that gSDE excludes are not sampled with it."""
    options = ["-n", "120", "--n-trials", "3", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    params = ["-params", "learning_starts:100", "use_sde:True", "policy_kwargs:dict(net_arch=[8])"]
    output = run_module("rl_zoo3.train", *SHORT, "-optimize", *options, *params, cwd=tmp_path)
    assert output.count("finished with value") == 3 and "policy_delay: " in output
    assert output.count("Trials sample policy_kwargs of their own, in place of the configuration's") == 1
    assert "log_std_bounding: " not in output and "weight_init: " in output


def test_plots(trained: Path) -> None:
    pytest.importorskip("seaborn")
    pytest.importorskip("scipy")
    runs = ["-a", "softsac", "-e", "Pendulum", "-f", "logs"]
    assert "SOFTSAC" in run_module("rl_zoo3.plots.all_plots", *runs, "-o", "results", cwd=trained)
    assert (trained / "results.pkl").is_file()
    run_module("rl_zoo3.plots.plot_train", *runs, "-w", "1", cwd=trained)


# Watching a model


def watched_buffer_sizes(folder: Path, module: str, args: list[str]) -> list[int]:
    """
    :return: number of rows of the replay buffer of each model that the command has loaded
    """
    os.chdir(folder)
    os.environ.update(ENVIRONMENT)
    sys.argv[1:] = args
    load = sb3_softsac.SoftSAC.load
    sizes = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        sizes.append(0 if model.replay_buffer is None else model.replay_buffer.buffer_size)
        return model

    with patch.object(sb3_softsac.SoftSAC, "load", spy):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return sizes


@pytest.mark.parametrize("command", ["rl_zoo3.enjoy", "rl_zoo3.cli enjoy", "rl_zoo3.record_video"])
def test_watch(trained: Path, command: str) -> None:
    if command == "rl_zoo3.cli enjoy":
        pytest.importorskip("seaborn")  # the console script imports the plots
    if command == "rl_zoo3.record_video":
        pytest.importorskip("moviepy")
        pytest.importorskip("pygame")
    module, *args = [*command.split(), *WATCH, "-f", "logs"]
    if "enjoy" in command:
        args.append("--no-render")
    # The model's own buffer has 1000 rows: none of them is needed to watch it
    assert max(in_process(watched_buffer_sizes, trained, module, args)) <= 1
    if command == "rl_zoo3.record_video":
        assert list(trained.glob("logs/softsac/Pendulum-v1_1/videos/*.mp4"))


def test_enjoy_from_the_command_line(trained: Path) -> None:
    watch = [*WATCH, "-f", "logs", "-n", "200", "--no-render", "--load-best"]
    assert "Episode Reward" in run_python("-m", "rl_zoo3.enjoy", *watch, cwd=trained)


# The hub, faked by a folder


def run_with_hub(hub: Path, module: str, args: list[str]) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        path = hub / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)

    class Api:
        def create_repo(self, repo_id: str, **kwargs: Any) -> str:
            (hub / repo_id).mkdir(parents=True)
            return f"fake://{repo_id}"

        def snapshot_download(self, repo_id: str, local_dir: Path) -> None:
            shutil.copytree(hub / repo_id, local_dir)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)

    os.chdir(hub.parent)
    os.environ.update(ENVIRONMENT)
    sys.argv[1:] = args
    with patch("huggingface_hub.hf_hub_download", download), patch("huggingface_hub.HfApi", Api):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_hub(trained: Path, tmp_path: Path) -> None:
    hub, model = tmp_path / "remote", ["--algo", "softsac", "--env", "Pendulum-v1", "-orga", "somebody"]
    # Broken in rl-zoo3 2.9.2 with sb3-team-hf-integration 3.2 for every algorithm, but for our hook
    in_process(run_with_hub, hub, "rl_zoo3.push_to_hub", [*model, "-f", str(trained / "logs"), "--no-render"])
    card = (hub / "somebody/softsac-Pendulum-v1/README.md").read_text()
    assert "model-index" in card and "SoftSAC" in card
    assert "'qf_learning_rate', 'lin_1e-3'" in card
    mean = json.loads((hub / "somebody/softsac-Pendulum-v1/results.json").read_text())["mean_reward"]
    assert f"Return of 10 episodes with deterministic actions: {mean:.2f} +/-" in card
    assert "learning_curve.png" in card and (hub / "somebody/softsac-Pendulum-v1/learning_curve.png").is_file()
    assert "sb3-softsac" in card and "\nTRUST_REMOTE_CODE=True python -m rl_zoo3.load_from_hub --algo softsac" in card
    # Models without VecNormalize have no vec_normalize.pkl: broken likewise with huggingface_hub >= 1.0
    in_process(run_with_hub, hub, "rl_zoo3.load_from_hub", [*model, "-f", "downloaded"])
    assert (tmp_path / "downloaded/softsac/Pendulum-v1_1/Pendulum-v1.zip").is_file()


# What is inside


def look_inside(folder: Path) -> None:
    os.chdir(folder)
    import optuna
    import torch as th
    from gymnasium import make
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_softsac import SoftSAC, presets
    from sb3_softsac._rl_zoo3.search import EXCLUDED, excluded_options
    from sb3_softsac.execution import threads

    # Hyperparameters: ours, the user's, and the zoo's for other algorithms
    def config(algo: str, **kwargs: Any) -> Path:
        return Path(ExperimentManager(argparse.Namespace(), algo, "Pendulum-v1", "logs", **kwargs).config)

    ours = presets.hyperparams_folder() / "softsac.yml"
    assert config("softsac") == ours and ours.is_file()
    assert config("softsac", config="missing.yml") == Path("missing.yml")
    assert config("softsac", config="softsac.yml") == ours
    for name in presets.PRESETS:
        assert config("softsac", config=f"{name}.yml") == ours.parent / f"{name}.yml"
    for variant in (ours.parent / "variants").glob("*.yml"):
        assert config("softsac", config=f"variants/{variant.name}") == variant
        assert config("softsac", config=f"hyperparams/variants/{variant.name}") == variant
    Path("softsac.yml").write_text("default: {}")
    assert config("softsac", config="softsac.yml") == Path("softsac.yml")
    assert config("sac").parent.parent.name == "rl_zoo3"

    # Runs that begin at once
    managers = [ExperimentManager(argparse.Namespace(), "softsac", "Pendulum-v1", "logs") for _ in range(3)]
    for manager in managers:
        manager.create_log_folder()
    assert [manager.save_path for manager in managers] == [f"logs/softsac/Pendulum-v1_{i}" for i in (1, 2, 3)]
    assert all(Path(manager.params_path).is_dir() for manager in managers)

    # The environment's arguments are also those of evaluations, unless these have their own
    Path("env.yml").write_text("default: {n_timesteps: 10, env_kwargs: {g: 1.0}}")
    for own, expected in ((None, {"g": 1.0}), ({"g": 2.0}, {"g": 2.0})):
        manager = ExperimentManager(
            argparse.Namespace(), "softsac", "Pendulum-v1", "logs", config="env.yml", eval_env_kwargs=own
        )
        manager.read_hyperparameters()
        assert manager.eval_env_kwargs == expected

    # --num-threads holds also if it is torch's own number
    number = th.get_num_threads()
    assert threads.choose(1) == 1
    ExperimentManager(argparse.Namespace(num_threads=number), "softsac", "Pendulum-v1", "logs")
    assert threads.are_chosen() and threads.choose(1) == number

    # Schedules
    rates = {"learning_rate": 1e-3, "qf_learning_rate": "cos_2e-3_1e-3", "ent_coef_learning_rate": 1e-4}
    manager = object.__new__(ExperimentManager)
    manager.algo = "softsac"
    schedules = manager._preprocess_schedules(dict(rates))
    assert schedules["learning_rate"](0.5) == pytest.approx(1e-3)
    assert schedules["qf_learning_rate"] == "cos_2e-3_1e-3"  # for SoftSAC to read
    assert schedules["ent_coef_learning_rate"] == 1e-4
    manager.algo = "sac"
    assert manager._preprocess_schedules({"learning_rate": "lin_1e-3"})["learning_rate"](0.5) == pytest.approx(5e-4)

    # A stored trial is converted to what the sampler had made of it
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for her in (False, True) * 10:
        trial = study.ask()
        sampled = HYPERPARAMS_SAMPLER["softsac"](trial, 1, 1, {"using_her_replay_buffer": her, "her_kwargs": {}})
        assert HYPERPARAMS_CONVERTER["softsac"](trial.params) == sampled
        if her:
            assert set(sampled.pop("replay_buffer_kwargs")) == {"n_sampled_goal", "goal_selection_strategy"}
        model = SoftSAC("MlpPolicy", make("Pendulum-v1"), seed=0, **sampled)
        # Whatever bounds log_std, a policy starts with noise; under unit norms, log_std is anything between the bounds
        _, log_std, _ = model.actor.get_action_dist_params(th.randn(256, 3))
        assert log_std.mean() > -3.0 or sampled["policy_kwargs"]["unit_norm"] is not None

    # A configuration's own values do not contradict what is sampled
    for name in presets.PRESETS:
        preset = {**presets.preset(name), "gradient_steps": 1}
        for _ in range(10):
            trial = study.ask()
            trial.set_user_attr(EXCLUDED, excluded_options(preset))
            sampled = HYPERPARAMS_SAMPLER["softsac"](trial, 1, 1, {"using_her_replay_buffer": False})
            SoftSAC("MlpPolicy", make("Pendulum-v1"), **{**preset, **sampled, "buffer_size": 10})

    # What the constructor refuses ends the trial, not the study
    def refused(*_: Any) -> float:
        SoftSAC("MlpPolicy", make("Pendulum-v1"), n_steps=0)
        return 0.0

    with pytest.raises(optuna.TrialPruned):
        methods._pruned_if_invalid(refused)(None, study.ask())

    # Options without a meaning beside the others are not sampled
    trial = study.ask()
    trial.set_user_attr(EXCLUDED, excluded_options({"use_sde": True, "ent_coef": 0.1, "normalize": True}))
    sampled = HYPERPARAMS_SAMPLER["softsac"](trial, 1, 1, {"using_her_replay_buffer": False})
    assert "n_atoms" not in sampled["policy_kwargs"] and "normalize_rewards" not in sampled
    assert "ent_coef_loss" not in sampled and "log_std_bounding" not in sampled["policy_kwargs"]
    SoftSAC("MlpPolicy", make("Pendulum-v1"), use_sde=True, ent_coef=0.1, **sampled)


def test_inside(tmp_path: Path) -> None:
    in_process(look_inside, tmp_path)


class FakeLoader:
    """A loader of source, or, with None, of bytecode only."""

    def __init__(self, source: str | None):
        self.source = source

    def get_source(self, name: str) -> str | None:
        return self.source

    def get_filename(self, name: str) -> str:
        return f"{name}.py"

    def get_code(self, name: str) -> CodeType:
        return compile("found = True", name, "exec")


EDITED = """
from os import *
from requests.exceptions import HTTPError
class SAC: pass
class TQC: pass
off_policy_algos = [["dqn", "sac"], "tqc"]
supported = (SAC, TQC)
others = ["ppo", "tqc"]
[SAC, TQC], (a, b) = [TQC, SAC][:2], (1, 2)
del (SAC, TQC)
"""


def test_edited_code() -> None:
    """Lists with SAC get SoftSAC; what is assigned to or deleted does not; without source, the code is as it was."""
    from sb3_softsac._rl_zoo3 import edited_code

    names: dict[str, Any] = {}
    exec(edited_code(FakeLoader(EDITED), "edited"), names)  # type: ignore[arg-type]
    assert names["off_policy_algos"] == [["dqn", "sac", "softsac"], "tqc"]
    assert names["supported"][2] is sb3_softsac.SoftSAC
    assert names["others"] == ["ppo", "tqc"]
    assert names["HTTPError"].__name__ == "EntryNotFoundError"
    exec(edited_code(FakeLoader(None), "compiled"), names)  # type: ignore[arg-type]
    assert names["found"]


# Registration

WITHOUT_PTH = """
import sys
sys.path[:] = {path}
import {first}, {second}
import rl_zoo3.exp_manager, rl_zoo3.hyperparams_opt, rl_zoo3.utils
assert "softsac" in rl_zoo3.utils.ALGOS and "softsac" in rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER
assert rl_zoo3.exp_manager.ExperimentManager.learn._knows_softsac
"""


@pytest.mark.parametrize("order", [("sb3_softsac", "rl_zoo3.train"), ("rl_zoo3.train", "sb3_softsac")])
def test_import_registers_where_no_pth_is_read(tmp_path: Path, order: tuple[str, str]) -> None:
    path = [*sys.path, str(Path(sb3_softsac.__file__).parents[1])]
    code = WITHOUT_PTH.format(path=path, first=order[0], second=order[1])
    run_python("-S", "-c", code, cwd=tmp_path)  # -S: no site-packages, so no .pth


def test_a_fault_of_ours_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sb3_softsac.py").write_text("raise RuntimeError('broken')")
    output = run_python("-c", "import rl_zoo3.train as t; print(sorted(t.ALGOS))", cwd=tmp_path)
    assert "'sac'" in output and "softsac'" not in output
    assert output.count("sb3_softsac: the RL Zoo runs without SoftSAC: RuntimeError: broken") == 1
    assert "Traceback" not in output


def test_rates_without_quotes(tmp_path: Path) -> None:
    """The shell takes them away, and the zoo evaluates what is left as Python: a NameError."""
    rates = ["learning_rate:lin_1e-3", "qf_learning_rate:lin_2e-3", "ent_coef_learning_rate:3e-4"]
    run_module("rl_zoo3.train", *SHORT, "-n", "150", "-params", *ONE_STEP, *rates, cwd=tmp_path)
    data = saved_data(tmp_path / "logs" / "softsac" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    assert (data["learning_rate"], data["qf_learning_rate"]) == ("lin_1e-3", "lin_2e-3")


@pytest.mark.parametrize("rate", ["lin_x", "fast", "lin_1e-3_x"])
def test_rate_that_is_none(rate: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"ValueError: qf_learning_rate='{rate}' is not valid.*'lin_3e-4"):
        run_module("rl_zoo3.train", *SHORT, "-n", "150", "-params", f"qf_learning_rate:{rate}", cwd=tmp_path)


def test_frames_stacked_below_vec_normalize(tmp_path: Path) -> None:
    """``normalize`` with ``frame_stack`` (SB3 issue 693, zoo issue 480): train, evaluate, enjoy and continue."""
    options = [*ONE_STEP, "learning_starts:50", "buffer_size:1000", "normalize:True", "frame_stack:3"]
    evaluations = ["--eval-freq", "100", "--eval-episodes", "1", "--save-replay-buffer"]
    run_module("rl_zoo3.train", *SHORT, *evaluations, "-n", "200", "-params", *options, cwd=tmp_path)
    run = tmp_path / "logs" / "softsac" / "Pendulum-v1_1"
    assert "VecFrameStack" in (run / "Pendulum-v1" / "config.yml").read_text()
    output = run_module("rl_zoo3.enjoy", *WATCH, "-f", "logs", "--no-render", cwd=tmp_path)
    assert "Loading running average" in output
    continued = ["-n", "100", "-i", str(run / "Pendulum-v1.zip")]
    output = run_module("rl_zoo3.train", *SHORT, *continued, "-params", *options, cwd=tmp_path)
    assert "Continuing at step 200" in output and "new episode" not in output
    assert saved_data(tmp_path / "logs" / "softsac" / "Pendulum-v1_2" / "Pendulum-v1.zip")["num_timesteps"] == 300


@pytest.mark.parametrize(
    ("callback", "is_left_out"),
    [
        ({"sb3_softsac.CheckpointCallback": {"save_freq": 100, "save_path": "folder"}}, True),
        ("sb3_softsac.callbacks.SaveBestTrainingReturnCallback", True),
        ({"stable_baselines3.common.callbacks.CheckpointCallback": {"save_freq": 100, "save_path": "folder"}}, False),
        ("my_package.CheckpointCallback", False),
    ],
)
def test_callbacks_of_one_run_are_left_out_of_trials(callback: Any, is_left_out: bool) -> None:
    """All trials would write to one folder."""
    assert methods._is_of_one_run(str(callback)) == is_left_out


def test_continued_file_that_was_saved_after_watching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By push_to_hub with an earlier version: it says buffer_size=1."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "device": "cpu"}
    SoftSAC("MlpPolicy", "Pendulum-v1", buffer_size=1, **kwargs).save(tmp_path / "model.zip")
    manager = SimpleNamespace(
        algo="softsac", trained_agent=str(tmp_path / "model.zip"), device="cpu", tensorboard_log=None,
        verbose=0, seed=0, truncate_last_trajectory=True, args=argparse.Namespace(),
    )  # fmt: skip
    env = make_vec_env("Pendulum-v1")

    def load(**hyperparams: Any) -> Any:
        return methods._load_pretrained_agent(lambda *_: None, manager, hyperparams, env)

    assert load().replay_buffer.buffer_size == 1_000_000
    assert "buffer_size=1,000,000 instead of the file's, 1" in capsys.readouterr().out
    assert load(buffer_size=5).replay_buffer.buffer_size == 5


@pytest.mark.parametrize("is_finished", [False, True])
def test_runs_from_the_end_of_one_log_to_folders_of_their_own(is_finished: bool, tmp_path: Path) -> None:
    """One that was interrupted goes on in its own."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "buffer_size": 100, "device": "cpu"}
    callback = CheckpointCallback(20, tmp_path / "run")
    model = SoftSAC("MlpPolicy", "Pendulum-v1", tensorboard_log=str(tmp_path / "logs"), **kwargs)
    model.learn(40, callback=callback).save(tmp_path / "run" / "final.zip")
    path = tmp_path / "run" / "final.zip" if is_finished else next((tmp_path / "run").glob("step-20-*.zip"))
    manager = SimpleNamespace(continue_training=True, _asks_for_n_timesteps=True, n_timesteps=5)
    for _ in range(2):
        loaded = SoftSAC.load(path, make_vec_env("Pendulum-v1"))
        methods._learn(lambda _, each: each.learn(5, reset_num_timesteps=False), manager, loaded)
    folders = sorted(each.name for each in (tmp_path / "logs").iterdir())
    assert folders == [f"SoftSAC_{i}" for i in range(1, 4 if is_finished else 2)]
