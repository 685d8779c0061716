"""Callbacks."""

import os
import pathlib
import pickle
import signal
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softsac import CheckpointCallback, SaveBestTrainingReturnCallback, SoftSAC
from sb3_softsac.persistence import atomic_files


def make_model(env: Any = "Pendulum-v1") -> SoftSAC:
    return SoftSAC(
        "MlpPolicy", env, policy_kwargs={"net_arch": [16]}, buffer_size=500, learning_starts=20, batch_size=8,
        train_freq=10, seed=0, device="cpu",
    )  # fmt: skip


@pytest.mark.learning
@pytest.mark.parametrize("threshold", [float("-inf"), 1e6])
def test_keeps_the_best_above_the_threshold(threshold: float, tmp_path: pathlib.Path) -> None:
    callback = SaveBestTrainingReturnCallback(threshold=threshold, save_path=str(tmp_path / "new"), min_episodes=2)
    model = make_model()
    model.learn(1010, callback=callback)
    if threshold > 0:
        assert not (tmp_path / "new").exists()
        return
    SoftSAC.load(tmp_path / "new" / "best_training_model.zip", device="cpu")
    returns = [info["r"] for info in model.ep_info_buffer]
    assert callback.best_mean_return == pytest.approx(max(np.mean(returns[:n]) for n in range(2, len(returns) + 1)))


def test_small_stats_window(tmp_path: pathlib.Path) -> None:
    callback = SaveBestTrainingReturnCallback(save_path=str(tmp_path))
    model = SoftSAC(
        "MlpPolicy", "Pendulum-v1", stats_window_size=2, buffer_size=500, learning_starts=1000, device="cpu"
    )
    model.learn(610, callback=callback)
    assert (tmp_path / "best_training_model.zip").exists()


def test_warns_without_monitor(tmp_path: pathlib.Path) -> None:
    model = make_model(DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=20)]))
    with pytest.warns(UserWarning, match="wrap the environments in Monitor") as warned:
        model.learn(61, callback=SaveBestTrainingReturnCallback(save_path=str(tmp_path)))
    assert len(warned) == 1


def test_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="save_path=None"):
        make_model().learn(10, callback=SaveBestTrainingReturnCallback())


def test_saves_normalisation(tmp_path: pathlib.Path) -> None:
    venv = VecNormalize(make_vec_env("Pendulum-v1"))
    callback = SaveBestTrainingReturnCallback(save_path=str(tmp_path), min_episodes=1)
    make_model(venv).learn(210, callback=callback)
    assert (tmp_path / "best_training_model_vecnormalize.pkl").exists()


def test_continued_run_has_a_best_model_in_a_new_folder(tmp_path: pathlib.Path) -> None:
    """And none below the threshold that is given now."""

    def best_of(folder: str, threshold: float = float("-inf")) -> SaveBestTrainingReturnCallback:
        return SaveBestTrainingReturnCallback(threshold, str(tmp_path / folder), min_episodes=1)

    model = make_model()
    model.learn(210, callback=best_of("old"))
    model._callback.best_mean_return = 0.0  # type: ignore[union-attr]  # better than any other
    model.save(tmp_path / "model.zip")
    for folder, threshold in (("old", float("-inf")), ("new", float("-inf")), ("none", 1e6)):
        callback = best_of(folder, threshold)
        SoftSAC.load(tmp_path / "model.zip", gym.make("Pendulum-v1"), device="cpu").learn(210, callback=callback)
        assert (callback.best_mean_return < 0.0) == (folder == "new")
        assert (tmp_path / folder / "best_training_model.zip").exists() == (folder != "none")


def test_best_model_on_object_storage() -> None:
    folder = atomic_files.as_path("memory://bucket/best")
    callback = SaveBestTrainingReturnCallback(save_path="memory://bucket/best", min_episodes=1)
    make_model(VecNormalize(make_vec_env("Pendulum-v1"))).learn(210, callback=callback)
    assert SoftSAC.load("memory://bucket/best/best_training_model.zip", device="cpu").num_timesteps > 0
    with (folder / "best_training_model_vecnormalize.pkl").open("rb") as file:
        assert isinstance(pickle.load(file), VecNormalize)


@pytest.mark.parametrize(
    ("on_signal", "expected"),
    [
        (True, ["SIGTERM", "SIGUSR1"]),
        (False, []),
        (("SIGTERM", "SIGUSR2"), ["SIGTERM", "SIGUSR2"]),
        ([signal.SIGUSR2, 1], ["SIGUSR2", "SIGHUP"]),
    ],
)
def test_signals_that_are_handled(on_signal: Any, expected: list[str], tmp_path: pathlib.Path) -> None:
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}  # another test's may be there
    try:
        make_model().learn(1, CheckpointCallback(0, tmp_path, on_signal=on_signal))
        changed = [number.name for number in numbers if signal.getsignal(number) is not signal.SIG_DFL]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sorted(changed) == sorted(expected)


@pytest.mark.parametrize("on_signal", ["SIGTERM", ["SIGNOTHING"], [12345], 5, ["SIGKILL"]])
def test_signals_that_cannot_be(on_signal: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"^on_signal=.* is not valid: use True, False, or names"):
        CheckpointCallback(0, tmp_path, on_signal=on_signal)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_signal_to_a_child_that_was_forked_while_learning(tmp_path: pathlib.Path) -> None:
    """Such as a worker of a data loader: it ends, and the model's own process goes on."""

    class Forks(BaseCallback):
        def _on_training_start(self) -> None:
            self.child = os.fork()
            while self.child == 0:
                time.sleep(1.0)

        def _on_step(self) -> bool:
            return True

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    forks = Forks()
    try:
        make_model().learn(20, [CheckpointCallback(0, tmp_path), forks])
        os.kill(forks.child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(forks.child, 0)[1]) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.glob("*.json"))


def test_folder_that_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"^save_path='.*run' is a file: choose a folder\.$"):
        make_model().learn(5, CheckpointCallback(100, tmp_path / "run"))


@pytest.mark.parametrize("way", ["list", "every", "evaluation"])
def test_best_training_model_on_events(way: str, tmp_path: pathlib.Path) -> None:
    """SB3 does not tell callbacks within others of rollouts."""
    env = make_vec_env("Pendulum-v1", env_kwargs={"max_episode_steps": 20})
    callback: BaseCallback = SaveBestTrainingReturnCallback(save_path=str(tmp_path), min_episodes=1)
    if way == "every":
        callback = EveryNTimesteps(10, CallbackList([callback]))
    elif way == "evaluation":
        evaluation: Any = {"eval_freq": 30, "n_eval_episodes": 1, "verbose": 0}
        callback = EvalCallback(make_vec_env("Pendulum-v1"), callback_after_eval=callback, **evaluation)
    make_model(env).learn(60, callback=callback)
    assert (tmp_path / "best_training_model.zip").exists()


def test_signals_reach_checkpoints_on_new_best_models(tmp_path: pathlib.Path) -> None:
    """SB3 does not start the callback for new best models."""
    checkpoints = CheckpointCallback(1, tmp_path / "run", on_signal=("SIGUSR1",))
    evaluation = EvalCallback(
        make_vec_env("Pendulum-v1"), callback_on_new_best=checkpoints, eval_freq=1000, n_eval_episodes=1, verbose=0
    )

    class Interrupting(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            return True

    before = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(SystemExit):
            make_model().learn(20, [evaluation, Interrupting()])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert SoftSAC.load(tmp_path / "run").num_timesteps == 5
