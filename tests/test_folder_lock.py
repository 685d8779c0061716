"""Two runs do not write to one folder of checkpoints."""

import errno
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

from sb3_softsac import CheckpointCallback, CheckpointError, SoftSAC, checkpoint
from sb3_softsac.persistence.folder_lock import NAME
from sb3_softsac.persistence.run_folder import RunFolder

fcntl = pytest.importorskip("fcntl")

# Trains until it is killed, or until an environment in a process that was forked after the first checkpoint hangs
JOB = """
import os, sys, time
import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv
from test_folder_lock import CheckpointCallback, at_step, make_model

class Hangs(gym.Wrapper):
    def step(self, action):
        print(os.getpid(), flush=True)
        time.sleep(600)

def fork_and_hang(model):
    make = lambda: Hangs(gym.make("Pendulum-v1"))
    env = SubprocVecEnv([make], start_method="fork")
    env.reset()
    env.step([env.action_space.sample()])

def hang(model):
    print(os.getpid(), flush=True)
    time.sleep(600)

callbacks = [CheckpointCallback(2, sys.argv[1]), at_step(3, fork_and_hang if sys.argv[2] == "fork" else hang)]
make_model().learn(10, callbacks)
"""


def make_model() -> SoftSAC:
    return SoftSAC("MlpPolicy", gym.make("Pendulum-v1"), policy_kwargs={"net_arch": [4]}, buffer_size=50, device="cpu")


def load(folder: pathlib.Path) -> SoftSAC:
    return SoftSAC.load(folder, gym.make("Pendulum-v1"), device="cpu")


def saves(folder: pathlib.Path, save_freq: int = 2) -> CheckpointCallback:
    return CheckpointCallback(save_freq, folder, on_signal=False)


def at_step(step: int, function: Callable[[SoftSAC], Any]) -> BaseCallback:
    def call(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if locals_["self"].num_timesteps == step:
            function(locals_["self"])
        return True

    return ConvertCallback(call)


@contextmanager
def job(folder: pathlib.Path, what: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """:return: a process that writes to a folder, and the process in which it hangs"""
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder), what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SLURM_JOB_ID": "4711"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        hangs = int(process.stdout.readline())
        try:
            yield process, hangs
        finally:
            process.kill()
            if hangs != process.pid:
                os.kill(hangs, signal.SIGKILL)


@pytest.mark.processes
def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path: pathlib.Path) -> None:
    with job(tmp_path, "alone") as (process, _):
        model = load(tmp_path)
        who = f"process {process.pid} on {socket.gethostname()} (Slurm job 4711) since 20"
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} is in use by {who}") + ".*own folder"):
            model.learn(4, saves(tmp_path))
        assert model.num_timesteps == 2, "it is refused before it trains"
        process.kill()
        process.wait()
        model.learn(4, saves(tmp_path))
    assert load(tmp_path).num_timesteps == 6


@pytest.mark.processes
def test_forked_children_do_not_keep_the_lock(tmp_path: pathlib.Path) -> None:
    with job(tmp_path, "fork") as (process, child):
        assert child != process.pid
        with pytest.raises(CheckpointError, match=f"in use by process {process.pid}"):
            load(tmp_path).learn(4, saves(tmp_path))
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is still there
        load(tmp_path).learn(4, saves(tmp_path))
    assert load(tmp_path).num_timesteps == 6


def test_new_folders_belong_to_who_saves_first(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    late = saves(folder, 5)

    def save_late(model: SoftSAC) -> None:
        with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on"):
            late.save()

    def train_another(model: SoftSAC) -> None:
        assert not folder.exists()
        make_model().learn(4, [saves(folder), at_step(3, save_late)])

    make_model().learn(2, [late, at_step(1, train_another)])
    assert RunFolder(folder).newest_valid()["num_timesteps"] == 4


def test_readers_are_not_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(model: SoftSAC) -> None:
        assert load(tmp_path).num_timesteps == 2
        for command in (["ls"], ["verify"], ["export", "-o", str(tmp_path / "policy.zip")]):
            monkeypatch.setattr(sys, "argv", ["checkpoint", command[0], str(tmp_path), *command[1:]])
            assert checkpoint.main() == 0

    make_model().learn(4, [saves(tmp_path), at_step(3, read)])
    assert (tmp_path / "policy.zip").exists()


def test_one_process_goes_on(tmp_path: pathlib.Path) -> None:
    model = make_model()
    callback = saves(tmp_path)
    model.learn(4, callback)
    model.learn(4, callback, reset_num_timesteps=False)
    model.learn(4, saves(tmp_path), reset_num_timesteps=False)  # while the old callback is still there
    callback.save()  # between two learn()
    again = load(tmp_path)

    def fail(model: SoftSAC) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.learn(10, [saves(tmp_path), at_step(15, fail)])
    assert load(tmp_path).learn(2, saves(tmp_path)).num_timesteps == 16
    shutil.rmtree(tmp_path)
    make_model().learn(4, saves(tmp_path))
    assert load(tmp_path).num_timesteps == 4


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_file_systems_without_locks(code: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"has no locks \(.*make sure that no other job writes"):
        make_model().learn(4, saves(tmp_path))
    assert load(tmp_path).num_timesteps == 4
    assert not list(tmp_path.glob(f"{NAME}?*")), "nothing that would outlive the process"
