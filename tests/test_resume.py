"""A run that is saved and continued in another process is the run that was not interrupted, to the last bit."""

import copy
import io
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import resume_script
import torch as th
from resume_script import CASES, EPISODE, Records, differences, in_new_process, learn, pendulum, plain, snapshot
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, VecTransposeImage

from sb3_softsac import CheckpointCallback, CheckpointError, ReplayBuffer, SoftSAC, SoftSACPolicy, checkpoint
from sb3_softsac.persistence import buffer_state, model_file
from sb3_softsac.persistence.run_folder import RunFolder

pytestmark = pytest.mark.processes

# Cases that the default suite leaves out: others do nearly the same
SLOW = set(
    "small_ring Hopper Walker2d Swimmer InvertedPendulum all_steps gsde gsde_warmup normal_noise ou_noise n_steps "
    "frame_stack fixed_ent_coef sb3_buffer sb3_memory sb3_dict her dict_obs four_envs subproc Ant "
    "compiled_delayed".split()
)
SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16]},
    "buffer_size": 500,
    "learning_starts": 30,
    "batch_size": 8,
    "device": "cpu",
    "seed": 0,
}


def make_model(env: Any = None, **kwargs: Any) -> SoftSAC:
    return SoftSAC("MlpPolicy", pendulum() if env is None else env, **{**SMALL, **kwargs})


def load(path: Any, env: Any = None, **kwargs: Any) -> SoftSAC:
    return SoftSAC.load(path, pendulum() if env is None else env, device="cpu", **kwargs)


def saved_model(path: Path, steps: int = 50, env: Any = None, **kwargs: Any) -> SoftSAC:
    model = make_model(env, **kwargs)
    model.learn(steps)
    model.save(path)
    return model


def assert_same(expected: Any, actual: Any) -> None:
    assert differences(plain(expected), plain(actual)) == []


# --- Exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in CASES if name not in SLOW | {"crashes"}])
def test_exact_resume(case: str, tmp_path: Path) -> None:
    """Each stop in one of the two formats: model file, checkpoint of a run folder."""
    check_exact_resume(case, tmp_path, both=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "crashes"])
def test_exact_resume_in_both_formats(case: str, tmp_path: Path) -> None:
    check_exact_resume(case, tmp_path, both=True)


def check_exact_resume(name: str, folder: Path, both: bool) -> None:
    stops = CASES[name].stops
    whole = resume_script.run(CASES[name], folder)
    files = {folder / f"{stop}.zip": stop for stop in stops}
    checkpoints = {next(folder.glob(f"run/step-{stop}-*.zip")): stop for stop in stops}
    tried = {**files, **checkpoints}
    if not both:
        tried = dict(pair[i % 2] for i, pair in enumerate(zip(files.items(), checkpoints.items(), strict=True)))
    outcomes = in_new_process(resume_script.resume, name, list(tried))
    for (path, stop), outcome in zip(tried.items(), outcomes, strict=True):
        assert outcome.complaints == [], path
        assert differences(whole.state, outcome.state) == [], path
        assert differences(plain(whole.rows[whole.logged[stop] :]), plain(outcome.rows)) == [], path
    assert whole.rows[whole.logged[stops[0]] :], "nothing was logged after the stop: nothing was compared"


@pytest.mark.parametrize("case", ["plain", "her", "gsde_sampling", "vec_normalize"])
def test_saving_changes_nothing(case: str, tmp_path: Path) -> None:
    saved = resume_script.run(CASES[case], tmp_path)
    model = CASES[case].make()
    untouched = learn(model, CASES[case], CASES[case].steps, tmp_path)
    assert_same(saved.state, untouched.state)
    assert_same(saved.rows, untouched.rows)


def test_between_two_calls_of_learn(tmp_path: Path) -> None:
    """Saved when learn() has ended, by a script that then goes on; the noise of an unfinished episode goes on, too."""
    case = CASES["ou_noise"]
    model = case.make()
    model.learn(70)
    model.save(tmp_path / "70.zip")
    whole = learn(model, case, case.steps, tmp_path, reset_num_timesteps=False)
    (resumed,) = in_new_process(resume_script.resume, "ou_noise", [tmp_path / "70.zip"])
    assert resumed.complaints == []
    assert_same(whole.state, resumed.state)
    assert_same(whole.rows, resumed.rows)


@pytest.mark.parametrize(
    "crashes", [(57, 140), pytest.param((9, 12, 29, 31, 69, 71, 100, 141, 199, 259), marks=pytest.mark.slow)]
)
def test_run_that_crashes_again_and_again(crashes: tuple[int, ...], tmp_path: Path) -> None:
    """Each process begins with the last checkpoint of the one before; the ring closes in between."""
    case = CASES["crashes"]
    whole = learn(case.make(), case, case.steps, tmp_path)
    folder = tmp_path / "run"
    for at in crashes:
        with pytest.raises(BrokenProcessPool):
            in_new_process(resume_script.crash, "crashes", folder, at, 7)
        if folder.exists():
            last = RunFolder(folder).newest_valid()["num_timesteps"]
            assert last == (at - 1) // 7 * 7 or last == at - at % 7
    # A folder holds what its two checkpoints need, whatever was left behind
    assert len(RunFolder(folder).numbers()) == 2
    (resumed,) = in_new_process(resume_script.resume, "crashes", [folder], case.steps, 7)
    assert resumed.complaints == []
    assert_same(whole.state, resumed.state)
    assert RunFolder(folder).newest_valid()["num_timesteps"] == case.steps - case.steps % 7


def test_what_happens_between_load_and_learn_does_not_matter(tmp_path: Path) -> None:
    """Environments that are made, for evaluation say, draw from the global random states."""
    saved_model(tmp_path / "model.zip", 50, action_noise=NormalActionNoise(np.zeros(1), np.ones(1)))
    states = []
    for disturbed in (False, True):
        model = load(tmp_path / "model.zip", force_reset=False)
        if disturbed:
            np.random.random(7)
            th.rand(5)
            random.random()
            model.predict(model.observation_space.sample())
            model.save(tmp_path / "again.zip")
        model.learn(20)
        states.append(snapshot(model))
    assert_same(*states)
    model = load(tmp_path / "again.zip", force_reset=False)
    model.learn(20)
    assert_same(states[0], snapshot(model))
    # ... unless that is what the user wants
    model = load(tmp_path / "model.zip", force_reset=False)
    model.set_random_seed(7)
    model.learn(20)
    assert differences(states[0], snapshot(model))


def test_saved_again_before_learning(tmp_path: Path) -> None:
    """Loading and saving, to move a checkpoint to a file of its own, loses nothing."""
    case = CASES["plain"]
    whole = resume_script.run(case, tmp_path)
    model = SoftSAC.load(tmp_path / "80.zip", case.make_env(), device="cpu", force_reset=False)
    model.save(tmp_path / "copy.zip")
    (resumed,) = in_new_process(resume_script.resume, "plain", [tmp_path / "copy.zip"])
    assert_same(whole.state, resumed.state)
    assert_same(whole.rows[whole.logged[80] :], resumed.rows)


@pytest.mark.parametrize("order", ["before", "after", "best"])
def test_saved_by_sb3s_callbacks(order: str, tmp_path: Path) -> None:
    """The evaluation that is due at the same step is neither lost nor made twice, whichever callback comes first."""
    results = []
    path = tmp_path / "rl_model_60_steps.zip"
    for part in ("whole", "resumed"):
        env: VecEnv = pendulum()
        model = make_model(env) if part == "whole" else load(path, env, force_reset=False)
        eval_env = pendulum()
        eval_env.seed(3)
        best = str(tmp_path / "best") if order == "best" and part == "whole" else None
        evaluation = EvalCallback(
            eval_env, eval_freq=20, n_eval_episodes=1, log_path=str(tmp_path), best_model_save_path=best, verbose=0
        )
        saves = sb3_callbacks.CheckpointCallback(60, str(tmp_path))
        callbacks: list[BaseCallback] = [saves, evaluation] if order == "before" else [evaluation, saves]
        model.learn(110 - model.num_timesteps, callbacks)
        if order == "best":
            path = tmp_path / "best" / "best_model.zip"
        results.append([snapshot(model, evaluation), evaluation.best_mean_reward])
    assert_same(*results)
    assert list(results[0][0]["evaluations"]["0"].values()) == [20, 40, 60, 80, 100]


# --- After a load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [None, True], ids=["goes_on", "counts_anew"])
@pytest.mark.parametrize("force_reset", [True, False])
def test_warm_up_is_not_repeated(reset: bool | None, force_reset: bool, tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip", 50)
    model = load(tmp_path / "model.zip", force_reset=force_reset)
    model.action_space.sample = None  # type: ignore[method-assign,assignment]  # no random actions any more
    model.learn(20, reset_num_timesteps=reset)
    assert model.num_timesteps == (20 if reset else 70)
    # ... nor when that run is saved and loaded in its first steps
    model.save(tmp_path / "again.zip")
    model = load(tmp_path / "again.zip", force_reset=force_reset)
    model.action_space.sample = None  # type: ignore[method-assign,assignment]
    model.learn(5)
    # A run saved in its warm-up finishes it
    saved_model(tmp_path / "early.zip", 20)
    model = load(tmp_path / "early.zip", force_reset=force_reset)
    calls = iter(range(100))
    sample = model.action_space.sample
    model.action_space.sample = lambda *_: (next(calls), sample())[1]  # type: ignore[method-assign,misc]
    model.learn(20)
    assert next(calls) == 10


@pytest.mark.parametrize("reset", [None, True], ids=["goes_on", "counts_anew"])
def test_steps_schedule_and_tensorboard(reset: bool | None, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = tmp_path / "log"
    saved_model(tmp_path / "model.zip", 60, learning_rate=LinearSchedule(1.0, 0.0, 1.0), tensorboard_log=str(log))
    model = load(tmp_path / "model.zip")
    model.learn(60, reset_num_timesteps=reset)
    assert {path.name for path in log.iterdir()} == ({"SoftSAC_1", "SoftSAC_2"} if reset else {"SoftSAC_1"})
    records = Records()
    model = load(tmp_path / "model.zip")
    model.set_logger(Logger(folder=None, output_formats=[records]))
    model.learn(60, log_interval=1, reset_num_timesteps=reset)
    # The last update before the log was one step earlier
    assert [(step, row.get("train/learning_rate")) for step, row in records.rows] == [
        (40, pytest.approx(1 - 39 / 60)) if reset else (100, pytest.approx(1 - 99 / 120))
    ]
    assert model.num_timesteps == (60 if reset else 120)


def test_new_episode_with_continued_random_states(tmp_path: Path) -> None:
    """force_reset=True: neither the old episode nor one of the first ones again, but the one that would come next."""
    model = saved_model(tmp_path / "model.zip", 50)
    assert model.replay_buffer is not None
    began = [model.replay_buffer.observations[row, 0] for row in (0, EPISODE)]
    continued = load(tmp_path / "model.zip", force_reset=False)
    assert continued.env is not None
    next_obs = continued.env.reset()[0]
    model = load(tmp_path / "model.zip")
    assert model._last_obs is None
    model.learn(10)
    np.testing.assert_array_equal(model.replay_buffer.observations[50, 0], next_obs)
    for obs in began:
        assert not np.array_equal(next_obs, obs)
    # The transition before does not lead into the new episode
    assert not np.array_equal(model.replay_buffer.next_observations[49, 0], next_obs)
    assert not model.replay_buffer.dones[49, 0]
    # All else goes on as well: a second time it is the same
    again = load(tmp_path / "model.zip")
    again.learn(10)
    assert_same(snapshot(model), snapshot(again))


def test_without_an_environment(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model.zip")
    obs = np.stack([model.observation_space.sample() for _ in range(10)])
    loaded = SoftSAC.load(tmp_path / "model.zip", device="cpu")
    assert loaded.replay_buffer is None
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    with pytest.raises(AssertionError, match="set the environment"):
        loaded.learn(10)
    loaded.set_env(pendulum())
    with pytest.warns(UserWarning, match="replay buffer in .*model.zip was not read"):
        loaded.learn(40)
    # Updates begin when there is something to learn from again
    assert (loaded.num_timesteps, loaded._n_updates) == (90, model._n_updates + 10)
    assert loaded.replay_buffer.size() == 40
    # A copy would lack them: not without a word
    loaded = SoftSAC.load(tmp_path / "model.zip", device="cpu")
    with pytest.warns(UserWarning, match="replay buffer in .*model.zip was not read, and is not in the new file"):
        loaded.save(tmp_path / "copy.zip")
    loaded.save(tmp_path / "copy.zip", exclude=["replay_buffer"])
    # Nothing to warn of when the rows were read from elsewhere
    loaded = SoftSAC.load(tmp_path / "model.zip", device="cpu")
    loaded.set_env(pendulum())
    loaded.load_replay_buffer(tmp_path / "model.zip")
    loaded.learn(10)
    assert loaded.replay_buffer.size() == 60


def test_leaving_the_replay_buffer_out(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "with.zip")
    model.save(tmp_path / "without.zip", exclude=["replay_buffer"])
    model.save_exclude = ("replay_buffer",)
    model.save(tmp_path / "by_default.zip")
    model.save(tmp_path / "after_all.zip", include=["replay_buffer"])
    for name, custom_objects, rows in (
        ("with", None, 50),
        ("with", {"replay_buffer": None}, 0),
        ("without", None, 0),
        ("by_default", None, 0),
        ("after_all", None, 50),
    ):
        loaded = load(tmp_path / f"{name}.zip", custom_objects=custom_objects)
        assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == rows
    # Nothing is learned from the first few transitions
    loaded = load(tmp_path / "without.zip")
    loaded.learn(40)
    assert loaded._n_updates == model._n_updates + 10


@pytest.mark.parametrize(("n_before", "n_after"), [(1, 4), (4, 1), (3, 2), (2, 2)])
def test_another_number_of_environments(n_before: int, n_after: int, tmp_path: Path) -> None:
    before = saved_model(tmp_path / "model.zip", 240, pendulum(n_before), n_steps=3, learning_starts=1000)
    after = load(tmp_path / "model.zip", pendulum(n_after))
    assert isinstance(after.replay_buffer, ReplayBuffer)
    assert transitions(after.replay_buffer) == transitions(before.replay_buffer)
    rows = check_n_step_returns(after.replay_buffer)
    # Streams are cut where they are dealt out, no oftener
    ends = sum(rows.values()) - rows[3]
    n_episode_ends = 240 // EPISODE * 2
    assert ends <= n_episode_ends + 2 * (n_before + n_after)
    after.learn(8)
    assert after.num_timesteps == 248
    if n_before != n_after:
        with pytest.warns(UserWarning, match=f"of {n_before} environments, not {n_after}"):
            load(tmp_path / "model.zip", pendulum(n_after), force_reset=False)


def transitions(buffer: Any) -> Counter[bytes]:
    """Multiset of all that is in the buffer."""
    names = ("observations", "actions", "rewards", "next_observations", "dones", "timeouts")
    arrays = (np.asarray(getattr(buffer, name))[: buffer.size()] for name in names)
    rows = np.concatenate([array.reshape(buffer.size() * buffer.n_envs, -1) for array in arrays], axis=1)
    return Counter(row.tobytes() for row in rows.astype(np.float32))


def check_n_step_returns(buffer: ReplayBuffer) -> Counter[int]:
    """Compare with a plain loop; returns how many returns have how many rewards."""
    lengths: Counter[int] = Counter()
    obs, next_obs = np.asarray(buffer.observations), np.asarray(buffer.next_observations)
    size = buffer.size()
    order = [(row + (buffer.pos if buffer.full else 0)) % buffer.buffer_size for row in range(size)]
    for env in range(buffer.n_envs):
        for i in range(size):
            total, k = np.float32(0.0), 0
            while True:
                row = order[i + k]
                total += np.float32(buffer.gamma) ** np.float32(k) * buffer.rewards[row, env]
                k += 1
                ended = buffer.dones[row, env] or i + k == size
                if k == buffer.n_steps or ended or not np.array_equal(next_obs[row, env], obs[order[i + k], env]):
                    break
            batch = at(buffer, order[i], env)
            assert batch.rewards.item() == pytest.approx(float(total), rel=1e-5)
            np.testing.assert_array_equal(batch.next_observations[0], next_obs[row, env])
            lengths[k] += 1
    return lengths


def at(buffer: ReplayBuffer, row: int, env: int) -> Any:
    class Fixed:
        def integers(self, high: int, size: int) -> np.ndarray:
            return np.array([env])

    rng, buffer.rng = buffer.rng, Fixed()  # type: ignore[assignment]
    try:
        return buffer._get_samples(np.array([row]))
    finally:
        buffer.rng = rng


@pytest.mark.parametrize(("n_before", "n_after"), [(1, 3), (3, 1), (3, 2)])
def test_noise_of_another_number_of_environments(n_before: int, n_after: int, tmp_path: Path) -> None:
    noise = resume_script.noise(OrnsteinUhlenbeckActionNoise, 1)
    saved_model(tmp_path / "model.zip", 30, pendulum(n_before), action_noise=noise)
    model = load(tmp_path / "model.zip", pendulum(n_after))
    model.learn(30)
    assert model.action_noise is not None and model.action_noise().shape == ((n_after, 1) if n_after > 1 else (1,))


def test_her_in_a_new_episode(tmp_path: Path) -> None:
    """The episode that is broken off ends there, by a time limit; goals are not taken from the next one."""
    case = CASES["her"]
    model = case.make()
    model.learn(50)
    model.save(tmp_path / "model.zip")
    buffer = model.replay_buffer
    assert isinstance(buffer, HerReplayBuffer) and buffer._current_ep_start[0] != buffer.pos, "choose another step"
    continued = load(tmp_path / "model.zip", case.make_env(), force_reset=False)
    assert_same(*(resume_script.buffer_contents(each.replay_buffer) for each in (model, continued)))
    fresh = load(tmp_path / "model.zip", case.make_env()).replay_buffer
    assert isinstance(fresh, HerReplayBuffer)
    assert fresh._current_ep_start[0] == fresh.pos == 50
    assert fresh.dones[49, 0] == fresh.timeouts[49, 0] == 1.0
    n = 50 - buffer._current_ep_start[0]
    assert (fresh.ep_length[50 - n : 50, 0] == n).all()


def test_her_between_two_calls_of_learn() -> None:
    """The second one begins with a reset, and SB3 would make one long episode of two."""
    model = CASES["her"].make()
    model.learn(50)
    model.learn(30, reset_num_timesteps=True)
    buffer = model.replay_buffer
    assert isinstance(buffer, HerReplayBuffer) and buffer.timeouts[49, 0] == 1.0
    assert buffer.ep_length.max() <= EPISODE


@pytest.mark.parametrize("name", ["her", "sb3_memory"])
def test_other_buffers_are_not_laid_out_anew(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.make()
    model.learn(50)
    model.save(tmp_path / "model.zip")
    env = resume_script.bits(3) if name == "her" else pendulum(3)
    with pytest.raises(CheckpointError, match=r"can be rearranged, .*same number of environments .*custom_objects="):
        load(tmp_path / "model.zip", env)
    with pytest.raises(CheckpointError, match="can be rearranged"):
        load(tmp_path / "model.zip", case.make_env(), buffer_size=77)
    model = load(tmp_path / "model.zip", env, custom_objects={"replay_buffer": None})
    assert model.replay_buffer is not None and model.replay_buffer.size() == 0
    model.learn(60)
    assert model.replay_buffer.size() * 3 == 60


@pytest.mark.parametrize("full", [False, True])
def test_another_buffer_size(full: bool, tmp_path: Path) -> None:
    before = saved_model(tmp_path / "model.zip", 130, buffer_size=100 if full else 500, n_steps=2)
    with pytest.warns(UserWarning, match=r"buffer_size=60; the (70|40) oldest transitions did not fit"):
        after = load(tmp_path / "model.zip", buffer_size=60)
    assert isinstance(after.replay_buffer, ReplayBuffer) and isinstance(before.replay_buffer, ReplayBuffer)
    newest = [(before.replay_buffer.pos - 60 + i) % before.replay_buffer.buffer_size for i in range(60)]
    oldest_first = [(after.replay_buffer.pos + i) % 60 for i in range(60)]
    for name in ("observations", "actions", "rewards", "next_observations", "dones", "timeouts"):
        there, here = (np.asarray(getattr(model.replay_buffer, name)) for model in (before, after))
        np.testing.assert_array_equal(there[newest], here[oldest_first])
    check_n_step_returns(after.replay_buffer)
    larger = load(tmp_path / "model.zip", buffer_size=1000)  # nothing to warn of
    assert transitions(larger.replay_buffer) == transitions(before.replay_buffer)
    larger.learn(20)
    assert not larger.replay_buffer.full


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (lambda env: gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, 2)), "Observation spaces"),
        (lambda env: gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)), "Action spaces"),
    ],
    ids=["observation", "action"],
)
def test_other_spaces(wrapper: Any, message: str, tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=f"{message} do not match: Box.* != Box"):
        load(tmp_path / "model.zip", wrapper(gym.make("Pendulum-v1")))


def test_seed_at_load(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip")
    states = []
    for seed in (5, 5, 6):
        model = load(tmp_path / "model.zip", seed=seed)
        model.learn(30)
        states.append(snapshot(model))
    assert_same(states[0], states[1])
    assert differences(states[0]["last"], states[2]["last"])
    load(tmp_path / "model.zip", seed=5)
    drawn = random.random()
    random.seed(5)
    assert drawn == random.random()


def test_ent_coef_changed_at_load(tmp_path: Path) -> None:
    saved_model(tmp_path / "learned.zip")
    fixed = load(tmp_path / "learned.zip", ent_coef=0.25)
    assert fixed.log_ent_coef is None and fixed.ent_coef_tensor == 0.25
    fixed.learn(20)
    fixed.save(tmp_path / "fixed.zip")
    assert load(tmp_path / "fixed.zip").ent_coef_tensor == 0.25
    learned = load(tmp_path / "fixed.zip", ent_coef="auto_0.5")
    assert learned.log_ent_coef is not None
    assert learned.log_ent_coef.exp().item() == pytest.approx(0.5)
    learned.learn(20)
    assert learned.log_ent_coef.exp().item() != pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(("before", "given", "expected"), [(0.1, 0.2, 0.2), ("auto_0.1", "auto_0.5", 0.5)])
def test_another_value_of_ent_coef_at_load(before: Any, given: Any, expected: float, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model.zip", ent_coef=before)
    kinds: list[dict[str, Any]] = [{"ent_coef": given}, {"custom_objects": {"ent_coef": given}}]
    for how in kinds:
        changed = load(tmp_path / "model.zip", **how)
        assert changed._ent_coef.value().item() == pytest.approx(expected)
        changed.learn(5)
    # The RL Zoo repeats that of the file, which has been learned since then
    kinds = [{"ent_coef": before}, {"custom_objects": {"ent_coef": before}}]
    for how in kinds:
        same = load(tmp_path / "model.zip", **how)
        assert same._ent_coef.value().item() == model._ent_coef.value().item()
        assert_same(model.get_parameters(), same.get_parameters())


@pytest.mark.parametrize("before", ["auto", 0.2])
@pytest.mark.parametrize("after", ["auto_0.5", 0.1])
def test_ent_coef_changed_before_saving(before: Any, after: Any, tmp_path: Path) -> None:
    """And before the next learn(), which would have made the coefficient from it."""
    model = saved_model(tmp_path / "model.zip", ent_coef=before)
    model.ent_coef = after
    model.save(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip")
    for each in (model, loaded):
        each.learn(0)
        assert each._ent_coef.value().item() == pytest.approx(0.1 if after == 0.1 else 0.5)


def test_refused_ent_coef_leaves_the_coefficient(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model.zip", ent_coef_loss="exp")
    value = model._ent_coef.value().item()
    model.ent_coef = 0.1
    with pytest.raises(ValueError, match="no effect on the fixed ent_coef=0"):
        model.learn(1)
    model.ent_coef = "auto"
    model.learn(0)
    assert model._ent_coef.value().item() == value != 1.0


@pytest.mark.parametrize("use_sde", [False, True])
def test_use_sde_cannot_change_at_load(use_sde: bool, tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip", use_sde=use_sde)
    with pytest.raises(ValueError, match=f"use_sde={not use_sde} differs from that of the file.*Leave it out"):
        load(tmp_path / "model.zip", use_sde=not use_sde)
    assert load(tmp_path / "model.zip", use_sde=use_sde).actor.use_sde == use_sde


def test_stats_window_size_at_load(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip", steps=3 * EPISODE, stats_window_size=3)
    loaded = load(tmp_path / "model.zip", stats_window_size=2)
    assert len(loaded.ep_info_buffer) == 2
    loaded.learn(EPISODE)
    assert len(loaded.ep_info_buffer) == 2


def channels_last() -> gym.Env:
    return FakeImageEnv(screen_height=36, screen_width=40, n_channels=3, discrete=False)


@pytest.mark.parametrize("skip", [False, True])
def test_order_of_channels_is_kept_without_an_environment(skip: bool, tmp_path: Path) -> None:
    """By VecTransposeImage, which need not do anything."""
    env = VecTransposeImage(DummyVecEnv([channels_last]), skip=skip)
    network = {"features_extractor_class": FlattenExtractor, "net_arch": [16]}
    model = SoftSAC("CnnPolicy", env, buffer_size=10, device="cpu", policy_kwargs=network)
    model.save(tmp_path / "0.zip", exclude=["replay_buffer"])
    for i in range(2):
        without = SoftSAC.load(tmp_path / f"{i}.zip", device="cpu")
        assert without._unread is not None and without._unread.is_transposed != skip
        without.save(tmp_path / f"{i + 1}.zip")


class ObjectAtTheEnd(BitFlippingEnv):
    """The info of an episode's last step is not plain data."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            info["object"] = object()
        return obs, reward, terminated, truncated, info


def test_infos_of_hindsight_that_cannot_be_saved(tmp_path: Path) -> None:
    """That of the newest row can be, but an older one cannot: training goes on, and the model is saved."""
    env = ObjectAtTheEnd(n_bits=4, continuous=True, max_steps=5)
    model = SoftSAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"copy_info_dict": True},
        **SMALL,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="The replay buffer is not saved: infos"):
        model.learn(13, callback=CheckpointCallback(13, tmp_path / "run", on_signal=False))
    with pytest.warns(UserWarning, match="The replay buffer is not saved: infos"):
        model.save(tmp_path / "model.zip")
    with pytest.raises(TypeError, match="infos"):
        model.save_replay_buffer(tmp_path / "buffer.zip")
    assert not (tmp_path / "buffer.zip").exists()
    for path in (tmp_path / "run", tmp_path / "model.zip"):
        assert SoftSAC.load(path, env, device="cpu").num_timesteps == 13


@pytest.mark.parametrize("use_sde", [False, True])
def test_policy_kwargs_repeated_at_load(use_sde: bool, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"net_arch": [16, 8], "activation_fn": th.nn.Tanh}
    kwargs |= {} if use_sde else {"log_std_bounds": (-5, 2)}
    model = saved_model(tmp_path / "model.zip", policy_kwargs=dict(kwargs), use_sde=use_sde)
    loaded = load(tmp_path / "model.zip", policy_kwargs=dict(kwargs))
    assert_same(model.get_parameters(), loaded.get_parameters())
    assert loaded.actor.use_sde == use_sde
    for other in ({**kwargs, "net_arch": [16]}, {}, None):
        with pytest.raises(ValueError, match="differs from that of the file"):
            load(tmp_path / "model.zip", policy_kwargs=other)


def test_learning_rate_without_a_name(tmp_path: Path) -> None:
    model = make_model(learning_rate=lambda progress: 1e-3 * progress)
    model.learn(50)
    with pytest.warns(UserWarning, match="Written with pickle: learning_rate is a .*function"):
        model.save(tmp_path / "model.zip")
    with pytest.raises(
        CheckpointError, match=r"\(learning_rate\).*custom_objects=\{'learning_rate': \.\.\.\}.*allow_pickle=True"
    ):
        load(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip", custom_objects={"learning_rate": 0.5})
    assert loaded.learning_rate == 0.5
    trusted = load(tmp_path / "model.zip", allow_pickle=True)
    assert callable(trusted.learning_rate) and trusted.learning_rate(0.5) == pytest.approx(5e-4)
    for each in (loaded, trusted):
        assert each.replay_buffer is not None and each.replay_buffer.size() == 50
        each.learn(10)


class OwnPolicy(SoftSACPolicy):
    """A user's own policy."""


class OwnExtractor(FlattenExtractor):
    """A user's own network."""


@pytest.mark.parametrize("field", ["policy_class", "policy_kwargs"])
def test_classes_of_the_users(field: str, tmp_path: Path) -> None:
    if field == "policy_class":
        model, substitute = SoftSAC(OwnPolicy, pendulum(), **SMALL), OwnPolicy
    else:
        kwargs = {"net_arch": [16], "features_extractor_class": OwnExtractor}
        model, substitute = make_model(policy_kwargs=kwargs), kwargs
    with pytest.warns(UserWarning, match=f"Written with pickle: {field}.*Own"):
        model.save(tmp_path / "model.zip")
    with pytest.raises(CheckpointError, match=rf"\({field}\)"):
        load(tmp_path / "model.zip")
    for kwargs in ({"custom_objects": {field: substitute}}, {"allow_pickle": True}):
        loaded = load(tmp_path / "model.zip", **kwargs)
        assert type(loaded.policy) is type(model.policy)
        assert type(loaded.actor.features_extractor) is type(model.actor.features_extractor)
        assert_same(model.get_parameters(), loaded.get_parameters())


@pytest.mark.parametrize(
    "field", ["torch", "threads of torch", "vector instructions", "architecture", "numpy", "device"]
)
def test_another_machine(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "model.zip")
    here = model_file.machine
    monkeypatch.setattr(model_file, "machine", lambda *args: {**here(*args), field: "another"})
    load(tmp_path / "model.zip")  # nothing to warn of: a new episode is not the old one anyway
    with pytest.warns(UserWarning, match=f"may differ in rounding: {field}: .* then, another now"):
        load(tmp_path / "model.zip", force_reset=False)


def test_mujoco_that_one_side_did_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "model.zip")
    here = model_file.machine
    for version in (None, "0.0"):
        monkeypatch.setattr(model_file, "machine", lambda *args, version=version: {**here(*args), "mujoco": version})
        saved_model(tmp_path / "model.zip")
        monkeypatch.setattr(model_file, "machine", lambda *args: {**here(*args), "mujoco": "9.9"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path / "model.zip", force_reset=False)
        assert [w for w in caught if "mujoco: 0.0 then, 9.9 now" in str(w.message)] == caught[
            : int(version is not None)
        ]
        assert len(caught) == int(version is not None)


# --- Files of the replay buffer, and of SB3 ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_ring", "her_infos", "sb3_memory", "dict_obs"])
def test_replay_buffer_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.make()
    model.learn(110)
    model.save_replay_buffer(tmp_path / "new" / "replay")
    other = case.make()
    for path in (tmp_path / "new" / "replay", tmp_path / "new" / "replay.pkl"):
        other.load_replay_buffer(path, truncate_last_traj=False)
        assert_same(*(resume_script.buffer_contents(each.replay_buffer) for each in (model, other)))
    stream = io.BytesIO()
    model.save_replay_buffer(stream)
    stream.seek(0)
    other.load_replay_buffer(stream, truncate_last_traj=False)
    other.learn(20, reset_num_timesteps=False)
    with pytest.raises(CheckpointError, match="no replay buffer"):
        model.save(tmp_path / "without.zip", exclude=["replay_buffer"])
        other.load_replay_buffer(tmp_path / "without.zip")


@pytest.mark.parametrize(
    "kwargs", [{}, {"n_steps": 3}, {"optimize_memory_usage": True}], ids=["plain", "n_steps", "memory"]
)
def test_sb3s_replay_buffer_pickle(kwargs: dict[str, Any], tmp_path: Path) -> None:
    more: dict[str, Any] = {}
    if "optimize_memory_usage" in kwargs:
        more = {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
    sac = SAC("MlpPolicy", pendulum(2), **{**SMALL, "buffer_size": 100, "learning_starts": 1000}, **kwargs, **more)
    sac.learn(140)
    sac.save_replay_buffer(tmp_path / "replay.pkl")
    model = make_model(pendulum(2), n_steps=kwargs.get("n_steps", 1))
    with pytest.raises(CheckpointError, match=r"pickle.*allow_pickle=True"):
        model.load_replay_buffer(tmp_path / "replay.pkl")
    assert model.replay_buffer is not None and model.replay_buffer.size() == 0
    model.load_replay_buffer(tmp_path / "replay", allow_pickle=True)
    assert type(model.replay_buffer) is ReplayBuffer
    theirs = sac.replay_buffer
    assert theirs is not None
    if "optimize_memory_usage" in kwargs:  # the oldest row holds the newest next observation
        theirs.next_observations = np.roll(theirs.observations, -1, axis=0)
        assert transitions(model.replay_buffer).total() == 100 - 2
        assert not transitions(model.replay_buffer) - transitions(theirs)
    else:
        assert transitions(model.replay_buffer) == transitions(theirs)
    model.learn(40)


def test_sb3s_model_file(tmp_path: Path) -> None:
    sac = SAC("MlpPolicy", pendulum(), **SMALL)
    sac.learn(50)
    sac.save(tmp_path / "sac.zip")
    with pytest.raises(CheckpointError, match=r"pickled objects.*allow_pickle=True"):
        SoftSAC.load(tmp_path / "sac.zip", device="cpu")
    model = load(tmp_path / "sac.zip", allow_pickle=True)
    assert_same(sac.get_parameters(), model.get_parameters())
    model.action_space.sample = None  # type: ignore[method-assign,assignment]
    model.learn(40)
    assert (model.num_timesteps, model._n_updates) == (90, sac._n_updates + 10)


def test_where_to_save(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "new" / "folder" / "model")
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    assert os.listdir(tmp_path / "new" / "folder") == ["model.zip"]
    paths: list[Any] = [tmp_path / "new" / "folder" / "model", str(tmp_path / "new" / "folder" / "model.zip"), stream]
    states = []
    for path in paths:
        loaded = load(path, force_reset=False)
        loaded.learn(10)
        states.append(snapshot(loaded))
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpointed(folder: Path, steps: int = 60, save_freq: int = 10, keep_last: int = 2, **kwargs: Any) -> SoftSAC:
    model = make_model(**kwargs)
    model.learn(steps, CheckpointCallback(save_freq, folder, keep_last=keep_last, on_signal=False))
    return model


def steps_in(folder: Path) -> list[int]:
    return [RunFolder(folder).manifest(number)["num_timesteps"] for number in RunFolder(folder).numbers()]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [60]), (2, [50, 60]), (9, [10, 20, 30, 40, 50, 60])])
def test_keeps_the_last_checkpoints(keep_last: int, kept: list[int], tmp_path: Path) -> None:
    checkpointed(tmp_path / "run", 65, keep_last=keep_last)
    assert steps_in(tmp_path / "run") == kept
    named = {
        entry["file"]
        for number in RunFolder(tmp_path / "run").numbers()
        for manifest in [RunFolder(tmp_path / "run").manifest(number)]
        for entry in [manifest["state"], *manifest["segments"]]
    }
    there = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*z*")}
    assert there == named
    assert load(tmp_path / "run").num_timesteps == 60
    for step in kept:
        model = load(next((tmp_path / "run").glob(f"step-{step}-*.zip")))
        assert model.num_timesteps == step
        assert model.replay_buffer is not None and model.replay_buffer.size() == step


def test_save_freq_counts_calls(tmp_path: Path) -> None:
    checkpointed(tmp_path / "run", 60, save_freq=7, keep_last=9, env=pendulum(3))
    assert steps_in(tmp_path / "run") == [21, 42]
    with pytest.raises(ValueError, match="keep_last=0"):
        CheckpointCallback(10, tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="save_freq=-1"):
        CheckpointCallback(-1, tmp_path)


@pytest.mark.parametrize("damage", ["state", "segment", "manifest"])
def test_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpointed(folder)
    newest = RunFolder(folder).newest_valid()
    name = {
        "state": newest["state"]["file"],
        "segment": newest["segments"][-1]["file"],
        "manifest": f"ckpt-{newest['number']:06d}.json",
    }[damage]
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match=rf"Falling back to checkpoint \d+ \(step 50\).*{name.rpartition('/')[2]}"):
        model = load(folder)
    assert model.num_timesteps == 50
    # ... and goes on from there, past the damaged one
    model.learn(25, CheckpointCallback(10, folder, on_signal=False))
    assert steps_in(folder) == [60, 70]
    assert load(folder).num_timesteps == 70


def test_folder_of_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpointed(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=r"checkpoints of another run: continue it with SoftSAC\.load\("):
        checkpointed(folder)
    # That of a loaded model is its own
    model = load(folder)
    assert sorted(path.name for path in folder.rglob("*")) == before
    model.learn(20, CheckpointCallback(10, folder, on_signal=False))
    assert steps_in(folder) == [70, 80]
    # ... and may be left for another
    load(folder).learn(10, CheckpointCallback(10, tmp_path / "other", on_signal=False))
    assert steps_in(tmp_path / "other") == [90] and steps_in(folder) == [70, 80]
    # A model file does not say which folder it belongs to
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="checkpoints of another run"):
        load(tmp_path / "model.zip").learn(10, CheckpointCallback(10, folder, on_signal=False))


def test_continues_an_older_checkpoint(tmp_path: Path) -> None:
    """The newest one is then what this run saves next; those that it has left behind are not taken for its own."""
    folder = tmp_path / "run"
    checkpointed(folder, keep_last=9)
    model = load(next(folder.glob("step-30-*.zip")))
    model.learn(20, CheckpointCallback(10, folder, keep_last=9, on_signal=False))
    assert steps_in(folder) == [10, 20, 30, 40, 50, 60, 40, 50]
    continued = load(folder)
    assert continued.num_timesteps == 50
    # The model has made an update since
    contents = [{**resume_script.buffer_contents(each.replay_buffer), "rng": 0} for each in (model, continued)]
    assert_same(*contents)


def test_checkpoint_that_is_replaced_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that writes there, if it keeps only one."""
    callback = CheckpointCallback(20, tmp_path, keep_last=1, on_signal=False)
    make_model().learn(20, callback=callback)
    newest_valid = RunFolder.newest_valid

    def then_replaced(folder: RunFolder) -> Any:
        manifest = newest_valid(folder)
        monkeypatch.undo()
        callback.save()
        assert not (tmp_path / manifest["state"]["file"]).exists()
        return manifest

    monkeypatch.setattr(RunFolder, "newest_valid", then_replaced)
    assert load(tmp_path).num_timesteps == 20


def test_without_the_replay_buffer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = make_model()
    model.learn(50, CheckpointCallback(10, folder, on_signal=False, save_replay_buffer=False))
    assert not (folder / "replay").exists()
    loaded = load(folder)
    assert loaded.num_timesteps == 50
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 0
    assert_same(model.get_parameters()["policy"].keys(), loaded.get_parameters()["policy"].keys())


def test_checkpoints_of_another_algorithm(tmp_path: Path) -> None:
    sac = SAC("MlpPolicy", pendulum(), **SMALL)
    with pytest.raises(ValueError, match="saves SoftSAC, not SAC"):
        sac.learn(10, CheckpointCallback(10, tmp_path))


def test_save_during_learning_is_seen_by_all_callbacks(tmp_path: Path) -> None:
    """Ours may be anywhere in the list: it saves when all others have seen the step."""
    calls: list[int] = []
    folder = tmp_path / "run"

    class Counts(BaseCallback):
        def _on_step(self) -> bool:
            calls.append(self.num_timesteps)
            assert not folder.exists() or steps_in(folder)[-1] < self.num_timesteps
            return True

    make_model().learn(20, [CheckpointCallback(10, folder, on_signal=False), Counts()])
    assert len(calls) == 20 and steps_in(folder) == [10, 20]


# --- Signals ----------------------------------------------------------------------------------------------------------


def start(case: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, resume_script.__file__, case, str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert any(line == "ready\n" for line in process.stdout)


SIGNALS = [
    ("small_ring", "SIGTERM", False),
    pytest.param("small_ring", "SIGUSR1", False, marks=pytest.mark.slow),
    ("subproc", "SIGTERM", True),
    pytest.param("subproc", "SIGUSR1", True, marks=pytest.mark.slow),
    pytest.param("vec_normalize", "SIGTERM", True, marks=pytest.mark.slow),
]


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(("case", "name", "whole_group"), SIGNALS)
def test_signal(case: str, name: str, whole_group: bool, tmp_path: Path) -> None:
    """Schedulers send it to the process, or to it and to all that it has started."""
    with start(case, tmp_path / "run", "--ready-at", "70") as process:
        wait_until_ready(process)
        (os.killpg if whole_group else os.kill)(process.pid, getattr(signal, name))
        assert process.stdout is not None
        assert f"{name}: saved a checkpoint at step 70" in process.stdout.read()
    assert process.returncode == 143
    assert steps_in(tmp_path / "run") == [70]
    whole = learn(CASES[case].make(), CASES[case], CASES[case].steps, tmp_path)
    (resumed,) = in_new_process(resume_script.resume, case, [tmp_path / "run"])
    assert resumed.complaints == []
    assert_same(whole.state, resumed.state)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_signal_after_the_last_step(tmp_path: Path) -> None:
    """Nobody reads what it prints any more, as when the scheduler has stopped ``tee``."""
    last = CASES["fixed_ent_coef"].steps
    with start("fixed_ent_coef", tmp_path / "run", "--ready-at", str(last), "--late") as process:
        wait_until_ready(process)
        assert process.stdout is not None
        process.stdout.close()
        os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 143
    assert steps_in(tmp_path / "run") == [last]


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("own_handler", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_signal_when_it_is_over(own_handler: bool, tmp_path: Path) -> None:
    """When nothing is being learned, signals do what they did before."""
    with start("fixed_ent_coef", tmp_path / "run", *(["--own-handler"] if own_handler else [])) as process:
        wait_until_ready(process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        output = process.stdout.read()
    if own_handler:
        assert (output, process.returncode) == ("the end\n", 0)
    else:
        assert (output, process.returncode) == ("", -signal.SIGTERM)
    assert not (tmp_path / "run").exists()


class Interrupting(gym.Wrapper):
    """Ctrl-C when the environment has made its 60th step, and nobody has seen it yet."""

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 60:
            raise KeyboardInterrupt
        return result


def test_interrupted_step_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    model = make_model(Interrupting(gym.make("Pendulum-v1")))
    with pytest.raises(KeyboardInterrupt):
        model.learn(100)
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="new episode.*a step or an update was interrupted"):
        loaded = load(tmp_path / "model.zip", Interrupting(gym.make("Pendulum-v1")), force_reset=False)
    assert loaded._last_obs is None and loaded.replay_buffer.size() == 59
    for each in (model, loaded):
        each.learn(30, reset_num_timesteps=False)
        buffer = each.replay_buffer
        assert not np.array_equal(buffer.next_observations[58], buffer.observations[59])  # a new episode


# What a review has found


def rows_of(model: SoftSAC) -> Counter:
    buffer: Any = model.replay_buffer
    n = buffer.size()
    parts = (buffer.observations[:n], buffer.actions[:n], buffer.rewards[:n], buffer.next_observations[:n])
    return Counter(b"".join(part[i, j].tobytes() for part in parts) for i in range(n) for j in range(buffer.n_envs))


@pytest.mark.parametrize("changes", [{"buffer_size": 200}, {"n_envs": 2}])
def test_checkpoints_after_rows_were_laid_out_anew(changes: dict[str, int], tmp_path: Path) -> None:
    """Segments of the old layout have the same limits, but other rows."""
    make_model(buffer_size=100).learn(130, callback=CheckpointCallback(130, tmp_path / "run"))
    n_envs = changes.get("n_envs", 1)
    env = [pendulum(n_envs) for _ in range(2)]
    model = load(tmp_path / "run", env[0], **{k: v for k, v in changes.items() if k != "n_envs"})
    model.learn(4, callback=CheckpointCallback(2, tmp_path / "run"))
    assert rows_of(load(tmp_path / "run", env[1])) == rows_of(model)


def test_model_file_of_an_incomplete_checkpoint(tmp_path: Path) -> None:
    make_model().learn(60, callback=CheckpointCallback(20, tmp_path / "run"))
    (tmp_path / "run" / "ckpt-000002.json").unlink()
    (path,) = (tmp_path / "run").glob("step-60-*.zip")
    with pytest.raises(CheckpointError, match=r"never completed.*Load .*step-40-000001.zip instead.*custom_objects"):
        load(path)
    assert not checkpoint.verify(path) and checkpoint.verify(tmp_path / "run")
    assert load(path, custom_objects={"replay_buffer": None}).num_timesteps == 60
    assert SoftSAC.load(path, device="cpu").num_timesteps == 60  # to predict
    assert load(tmp_path / "run").num_timesteps == 40


@pytest.mark.parametrize("frequencies", [(20, 20), (20, 40)])
def test_two_folders(frequencies: tuple[int, int], tmp_path: Path) -> None:
    def callbacks() -> list[BaseCallback]:
        return [CheckpointCallback(n, tmp_path / str(i)) for i, n in enumerate(frequencies)]

    model = make_model()
    model.learn(80, callback=callbacks())
    model.learn(40, callback=callbacks(), reset_num_timesteps=False)
    for i, n in enumerate(frequencies):
        kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / str(i)).glob("step-*.zip"))
        assert kept == ([100, 120] if n == 20 else [80, 120])


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal on this system")
@pytest.mark.parametrize("names", [["SIGUSR1"], ["SIGUSR1", "SIGTERM", "SIGTERM"]])
def test_signal_when_the_callback_is_seldom_called(names: list[str], tmp_path: Path) -> None:
    """The scheduler's warning, and then it says it again: the checkpoint has to be there before the process ends."""

    class Kill(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 20:
                for name in names:
                    os.kill(os.getpid(), getattr(signal, name))
            return True

    seldom = sb3_callbacks.EveryNTimesteps(1000, CheckpointCallback(1, tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(SystemExit) as exit_info:
            make_model().learn(100, callback=[seldom, Kill()])
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert exit_info.value.code == 143
    assert load(tmp_path / "run").num_timesteps == 20


def test_seeds_at_load_make_different_runs(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip", 60)
    runs = []
    for seed in (5, 6, 5):
        model = load(tmp_path / "model.zip", seed=seed)
        batch = model.replay_buffer.sample(16).rewards.numpy()
        model.learn(5)
        runs.append((batch, np.asarray(model._last_obs)))
    for part in range(2):
        assert not np.array_equal(runs[0][part], runs[1][part])
        np.testing.assert_array_equal(runs[0][part], runs[2][part])


def test_new_folder_gets_a_best_model(tmp_path: Path) -> None:
    def evaluations(folder: Path) -> EvalCallback:
        return EvalCallback(pendulum(), eval_freq=20, n_eval_episodes=1, best_model_save_path=str(folder))

    model = make_model()
    model.learn(40, callback=evaluations(tmp_path / "old"))
    model._callback.best_mean_reward = 0.0  # on another scale
    model.save(tmp_path / "model.zip")
    for folder, is_new in (("old", False), ("new", True)):
        callback = evaluations(tmp_path / folder)
        load(tmp_path / "model.zip").learn(20, callback=callback)
        assert (callback.best_mean_reward < 0.0) == is_new
    assert (tmp_path / "new" / "best_model.zip").exists()


def test_models_can_be_copied_after_learning() -> None:
    model = make_model()
    model.learn(40, callback=CheckpointCallback(0, "unused", on_signal=False))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(
            other.predict(np.ones((1, 3)), deterministic=True)[0], model.predict(np.ones((1, 3)), deterministic=True)[0]
        )
        other.learn(20)


def test_functions_in_the_place_of_methods_are_not_saved(tmp_path: Path) -> None:
    """The zoo's ParallelTrainCallback puts them there."""
    model = make_model()
    model.train = lambda *args, **kwargs: None  # type: ignore[method-assign]
    model.learn(40)
    model.save(tmp_path / "model.zip")
    assert "train" not in vars(load(tmp_path / "model.zip"))


def test_paths(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "Pendulum-v1.zip", tensorboard_log=tmp_path / "logs")
    (tmp_path / "Pendulum-v1").mkdir()  # as the zoo does
    assert load(tmp_path / "Pendulum-v1").tensorboard_log == tmp_path / "logs"
    (tmp_path / "Walk1.5-v0").mkdir()
    model.save(tmp_path / "Walk1.5-v0")
    assert (tmp_path / "Walk1.5-v0.zip").is_file() and load(tmp_path / "Walk1.5-v0").num_timesteps == 50
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "logs")
    with (tmp_path / "file").open("wb") as file:
        file.write(b"something else")
        with pytest.raises(ValueError, match="position 14"):
            model.save(file)


def test_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(".")
    make_model().learn(20, callback=CheckpointCallback(20, ".", on_signal=False))
    assert load(".").num_timesteps == 20


def test_what_is_given_at_load(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip", learning_starts=500)
    loaded.action_space.sample = None  # type: ignore[method-assign,assignment]  # no random actions any more
    loaded.learn(20)
    model.save(tmp_path / "included.zip", include=["lr_schedule"])
    with pytest.raises(TypeError, match=r"exclude=\['stream'\]"):
        model.stream = (i for i in range(3))
        model.save(tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()
    model.save(tmp_path / "other.zip", exclude=["stream"])


def test_continued_run_logs_to_its_own_folder(tmp_path: Path) -> None:
    first = saved_model(tmp_path / "first.zip", tensorboard_log=str(tmp_path / "logs"))
    second = saved_model(tmp_path / "second.zip", tensorboard_log=str(tmp_path / "logs"))
    assert (first.logger.dir, second.logger.dir) == tuple(str(tmp_path / f"logs/SoftSAC_{i}") for i in (1, 2))
    for name in ("first", "second"):
        model = load(tmp_path / f"{name}.zip")
        model.learn(20)
        assert model.logger.dir == {"first": first, "second": second}[name].logger.dir
        model.learn(20, reset_num_timesteps=True)
        assert model.logger.dir not in (first.logger.dir, second.logger.dir)


def test_tensorboard_folders_of_other_names_and_logs(tmp_path: Path) -> None:
    """Fine-tuned twice from one file, a run must not go on in the folder of the other."""
    pytest.importorskip("tensorboard")
    for name, log in (("with", str(tmp_path / "log")), ("without", None)):
        model = make_model(tensorboard_log=log)
        model.learn(35, tb_log_name="pretrain")
        model.save(tmp_path / f"{name}.zip")

    def folder(name: str, *names: str, **kwargs: Any) -> str:
        model = load(tmp_path / f"{name}.zip", **kwargs)
        for each in names or (None,):
            model.learn(5, tb_log_name=each)
        return str(Path(str(model.logger.dir)).relative_to(tmp_path))

    assert folder("with") == folder("with", "pretrain") == "log/pretrain_1"
    assert [folder("with", "tuned") for _ in range(2)] == ["log/tuned_1", "log/tuned_2"]
    assert folder("with", "tuned", "tuned") == "log/tuned_3"
    other = {"tensorboard_log": str(tmp_path / "other")}
    assert [folder("with", **other) for _ in range(2)] == ["other/SoftSAC_1", "other/SoftSAC_2"]
    assert folder("without", **other) == "other/SoftSAC_3"


def test_only_the_first_learn_goes_on_in_mid_episode(tmp_path: Path) -> None:
    """Later, the environment may have been used for something else, as in SB3."""
    model = saved_model(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip", force_reset=False)
    buffer = loaded.replay_buffer
    assert isinstance(buffer, ReplayBuffer)
    loaded.learn(10)
    np.testing.assert_array_equal(buffer.observations[50, 0], model._last_obs[0])
    assert loaded.env is not None
    evaluate_policy(loaded, loaded.env, 1, warn=False)
    before, first = loaded._last_obs, buffer.size()
    loaded.learn(10)
    assert loaded.num_timesteps == 70, "its steps are still counted on"
    assert not np.array_equal(buffer.observations[first, 0], before[0])
    assert buffer.ends[first - 1, 0], "an episode does not lead into the next"


def test_random_steps_of_a_loaded_model(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip")

    def n_random(change: Any = None, reset: bool | None = None, **kwargs: Any) -> int:
        model, calls = load(tmp_path / "model.zip", **kwargs), itertools.count()
        if change is not None:
            model.random_steps = change
        sample = model.action_space.sample
        model.action_space.sample = lambda *_: (next(calls), sample())[1]  # type: ignore[method-assign,misc]
        model.learn(40, reset_num_timesteps=reset)
        return next(calls)

    assert n_random() == 0
    assert n_random(random_steps=70) == n_random(change=70) == 20
    assert n_random(reset=True) == 0
    assert n_random(random_steps=15, reset=True) == 15


def test_misspelt_argument(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"learnin_rate=0.1, but .* Did you mean learning_rate\?"):
        load(tmp_path / "model.zip", learnin_rate=0.1)
    with pytest.raises(ValueError, match=r"mine=1, but .* of your own after load"):
        load(tmp_path / "model.zip", mine=1)


def test_replay_buffer_beside_the_model(tmp_path: Path) -> None:
    """SB3's names differ by their suffixes."""
    model = saved_model(tmp_path / "run")
    model.save_replay_buffer(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pkl", "run.zip"]
    loaded = load(tmp_path / "run", custom_objects={"replay_buffer": None})
    loaded.load_replay_buffer(tmp_path / "run")
    assert_same(*(resume_script.buffer_contents(each.replay_buffer) for each in (model, loaded)))


def test_exchanged_replay_buffer(tmp_path: Path) -> None:
    """``load`` is told what it was."""
    model = make_model()
    model.learn(40)
    model.replay_buffer = SB3ReplayBuffer(300, model.observation_space, model.action_space, device="cpu")
    model.learn(60, reset_num_timesteps=False)
    model.save(tmp_path / "model.zip")
    with pytest.raises(
        CheckpointError, match=r"buffers\.ReplayBuffer was saved. Pass it as replay_buffer_class=.*None"
    ):
        load(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip", replay_buffer_class=SB3ReplayBuffer, buffer_size=300)
    assert_same(*(resume_script.buffer_contents(each.replay_buffer) for each in (model, loaded)))
    loaded = load(tmp_path / "model.zip", custom_objects={"replay_buffer": None})
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 0


class ForItself(BaseCallback):
    """Its ``get_state`` has nothing to do with ours."""

    def get_state(self, env: Any) -> Any:
        return env

    def _on_step(self) -> bool:
        return True


class Failing(ForItself):
    def get_state(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not now")

    def set_state(self, state: Any) -> None:
        raise AssertionError("there is none")


def test_get_state_that_is_not_ours(tmp_path: Path) -> None:
    model = make_model()
    model.learn(30, callback=[ForItself()])
    model.save(tmp_path / "model.zip")
    load(tmp_path / "model.zip").learn(10, callback=[ForItself()])
    model.learn(30, callback=[Failing()])
    with pytest.warns(UserWarning, match="Failing.get_state.* is not saved: RuntimeError: not now"):
        model.save(tmp_path / "model.zip")
    load(tmp_path / "model.zip").learn(10, callback=[Failing()])


def test_training_on_after_a_callback_has_ended_the_run(tmp_path: Path) -> None:
    """A new callback of one who trains on counts anew. A run that is continued as it was, has ended."""
    stop = sb3_callbacks.StopTrainingOnMaxEpisodes
    model = make_model()
    model.learn(1000, callback=stop(2))
    assert model.num_timesteps == 2 * EPISODE
    model.save(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="StopTrainingOnMaxEpisodes had ended the run"):
        loaded.learn(1000, callback=stop(2))
    assert loaded.num_timesteps == 4 * EPISODE
    loaded = load(tmp_path / "model.zip", force_reset=False)
    loaded.learn(1000, callback=stop(2))
    assert loaded.num_timesteps == 2 * EPISODE + 1
    for force_reset in (False, True):  # one that was not at its end yet
        model = make_model()
        model.learn(EPISODE + 5, callback=stop(2))
        model.save(tmp_path / "model.zip")
        loaded = load(tmp_path / "model.zip", force_reset=force_reset)
        loaded.learn(1000, callback=stop(2))
        assert loaded.num_timesteps == (2 * EPISODE + 5 if force_reset else 2 * EPISODE)


def test_training_on_without_improvement(tmp_path: Path) -> None:
    def callback() -> EvalCallback:
        stop = sb3_callbacks.StopTrainingOnNoModelImprovement(1, min_evals=0)
        return EvalCallback(pendulum(), callback_after_eval=stop, eval_freq=10, n_eval_episodes=1, verbose=0)

    model = make_model(learning_starts=10_000)  # the policy stays as it is, and so do ...
    first = callback()
    first.eval_env.env_method("reset", seed=0)
    model.learn(1000, callback=first)
    ended = model.num_timesteps
    assert ended < 1000
    model.save(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="StopTrainingOnNoModelImprovement had ended the run"):
        loaded.learn(1000, callback=callback())
    assert loaded.num_timesteps - ended >= 20  # more than the first evaluation


def test_improvement_that_is_saved_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best_model.zip is written before the stop callback hears of the improvement."""
    ends = []
    for part in ("whole", "resumed"):
        model = make_model(learning_starts=10_000) if part == "whole" else load(tmp_path / "best_model.zip")
        stop = sb3_callbacks.StopTrainingOnNoModelImprovement(1, min_evals=1)
        evaluation = EvalCallback(
            pendulum(), callback_after_eval=stop, eval_freq=10, n_eval_episodes=1,
            best_model_save_path=str(tmp_path) if part == "whole" else None, verbose=0,
        )  # fmt: skip
        means = iter([1.0, 3.0, 2.0, 2.0, 2.0] if part == "whole" else [2.0, 2.0, 2.0])
        monkeypatch.setattr(sb3_callbacks, "evaluate_policy", lambda *_, means=means, **__: ([next(means)], [1]))
        model.learn(1000, callback=evaluation)
        ends.append((model.num_timesteps, stop.n_calls, stop.no_improvement_evals, stop.last_best_mean_reward))
    assert ends[0] == ends[1] == (40, 4, 2, 3.0)


class FrozenExtractor(FlattenExtractor):
    """A part is frozen from the beginning, as if it were pretrained."""

    def __init__(self, space: gym.Space[Any]):
        super().__init__(space)
        self.frozen = th.nn.Linear(self.features_dim, self.features_dim).requires_grad_(False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.frozen(super().forward(observations))


@pytest.mark.filterwarnings("ignore:Written with pickle")
@pytest.mark.parametrize("has_target", [False, True])
def test_other_actor_target_with_frozen_layers(has_target: bool, tmp_path: Path) -> None:
    policy_kwargs = {"net_arch": [8], "features_extractor_class": FrozenExtractor}
    model = make_model(use_actor_target=has_target, policy_kwargs=policy_kwargs)
    model.learn(40)
    model.save(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip", use_actor_target=not has_target, allow_pickle=True)
    loaded.learn(20)
    assert (loaded.actor_target is None) == has_target
    assert not loaded.actor.features_extractor.frozen.weight.requires_grad


def test_new_entropy_coefficient_is_not_frozen(tmp_path: Path) -> None:
    model = make_model(ent_coef="auto_0.1")
    assert model.log_ent_coef is not None
    model.log_ent_coef.requires_grad_(False)
    model.learn(40)
    model.save(tmp_path / "model.zip")
    for kwargs, is_frozen in (({}, True), ({"ent_coef": "auto_0.2"}, False)):
        loaded = load(tmp_path / "model.zip", **kwargs)
        assert loaded.log_ent_coef is not None
        before = loaded.log_ent_coef.item()
        loaded.learn(10)
        assert (loaded.log_ent_coef.item() == before) == is_frozen


@pytest.mark.parametrize("ent_coef", [0.1, "auto_0.1"])
def test_entropy_coefficient_that_was_left_out(ent_coef: Any, tmp_path: Path) -> None:
    """As with any other argument, it is then the constructor's default."""
    model = make_model(ent_coef=ent_coef)
    model.learn(30)
    model.save(tmp_path / "model.zip", exclude=["ent_coef"])
    loaded = load(tmp_path / "model.zip")
    assert loaded.ent_coef == "auto" and loaded.log_ent_coef is not None and loaded.log_ent_coef.item() == 0.0
    loaded.learn(10)


def test_policy_is_that_of_the_file(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"load\(\) got policy='CnnPolicy'"):
        load(tmp_path / "model.zip", policy="CnnPolicy")


def test_actions_that_were_converted_are_saved_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments that are there hold actions of the old range."""
    monkeypatch.setattr(buffer_state, "SMALL", 64)  # bytes of a segment

    def env(limit: float) -> VecEnv:
        action_space = gym.spaces.Box(-limit, limit, (1,))
        make = lambda: gym.wrappers.TransformAction(gym.make("Pendulum-v1"), lambda a: a, action_space)  # noqa: E731
        return DummyVecEnv([make])

    model = make_model(env(1.0), learning_starts=1000)
    model.learn(40, CheckpointCallback(40, tmp_path))
    assert model.replay_buffer is not None
    first = model.replay_buffer.actions[:10].copy()
    space = gym.spaces.Box(-2.0, 2.0, (1,))
    with pytest.warns(UserWarning, match="they are converted"):
        model = load(tmp_path, env(2.0), custom_objects={"action_space": space})
    model.learn(10, CheckpointCallback(10, tmp_path))
    loaded = load(tmp_path, env(2.0))
    assert loaded.num_timesteps == 50 and loaded.replay_buffer is not None
    np.testing.assert_allclose(loaded.replay_buffer.actions[:10], first / 2.0, rtol=1e-6)


def test_infos_of_a_monitor_that_are_not_plain(tmp_path: Path) -> None:
    class Odd(gym.Wrapper):
        def step(self, action: Any) -> Any:
            *rest, info = super().step(action)
            return *rest, {**info, "odd": object(), "even": 2}

    env = Monitor(Odd(gym.make("Pendulum-v1", max_episode_steps=EPISODE)), info_keywords=("odd", "even"))
    model = make_model(env)
    model.learn(2 * EPISODE)
    with pytest.warns(UserWarning, match=r"odd of ep_info_buffer \(Monitor's info_keywords\) is not plain data"):
        model.save(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip")
    assert loaded.ep_info_buffer is not None and len(loaded.ep_info_buffer) == 2
    assert [set(info) for info in loaded.ep_info_buffer] == [{"r", "l", "t", "even"}] * 2
    assert "odd" in model.ep_info_buffer[0]  # type: ignore[index]


class TwiceAsLarge(ReplayBuffer):
    def __init__(self, buffer_size: int, *args: Any, **kwargs: Any):
        super().__init__(2 * buffer_size, *args, **kwargs)


def test_buffer_class_with_a_size_of_its_own(tmp_path: Path) -> None:
    model = make_model(replay_buffer_class=TwiceAsLarge)
    for _ in range(2):
        model.learn(40)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Written with pickle.*")
            model.save(tmp_path / "model.zip")
        model = load(tmp_path / "model.zip", allow_pickle=True)
        assert model.replay_buffer is not None and model.replay_buffer.buffer_size == 1000


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal on this system")
def test_signal_that_was_not_answered(tmp_path: Path) -> None:
    """An exception has come before the checkpoint; the callback is used again."""

    class Kill(BaseCallback):
        def _on_step(self) -> bool:
            os.kill(os.getpid(), signal.SIGUSR1)
            if self.num_timesteps == 20:
                raise KeyError("the environment has broken")
            return True

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    callbacks = [CheckpointCallback(0, tmp_path / "run"), Kill()]
    model = make_model()
    try:
        model.num_timesteps = 19
        with pytest.raises(KeyError):
            model.learn(100, callback=callbacks, reset_num_timesteps=False)
        with pytest.raises(SystemExit):
            model.learn(100, callback=callbacks, reset_num_timesteps=False)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert load(tmp_path / "run").num_timesteps == 21


class Killing(gym.Wrapper):
    """A signal at the second reset."""

    resets = 0

    def reset(self, **kwargs: Any) -> Any:
        self.resets += 1
        if self.resets == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().reset(**kwargs)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal on this system")
def test_signal_before_the_first_step_of_a_second_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    callback = CheckpointCallback(0, tmp_path / "run")
    model = make_model(Monitor(Killing(gym.make("Pendulum-v1", max_episode_steps=EPISODE))))
    try:
        model.learn(20, callback=callback)
        with pytest.raises(SystemExit):
            model.learn(30, callback=callback)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert model.num_timesteps == 1 and len(list((tmp_path / "run").glob("step-1-*.zip"))) == 1


def test_model_that_was_trained_without_its_environment_has_no_statistics(tmp_path: Path) -> None:
    """The zoo's ParallelTrainCallback does so, with statistics of the run's first step."""
    env = VecNormalize(pendulum())
    model = saved_model(tmp_path / "first.zip", 30, env)
    other = SoftSAC.load(tmp_path / "first.zip", device="cpu")
    other.replay_buffer = model.replay_buffer
    other.set_logger(Logger(folder=None, output_formats=[]))
    other.train(1, 8)
    other.save(tmp_path / "other.zip", exclude=["replay_buffer"])
    right = VecNormalize(pendulum())
    right.obs_rms.mean[:] = 7.0  # type: ignore[union-attr]
    load(tmp_path / "other.zip", right)
    assert (right.obs_rms.mean == 7.0).all()  # type: ignore[union-attr]


def test_new_episode_of_a_model_that_was_loaded_without_an_environment(tmp_path: Path) -> None:
    saved_model(tmp_path / "model.zip")
    SoftSAC.load(tmp_path / "model.zip", device="cpu").save(tmp_path / "again.zip", exclude=["replay_buffer"])
    with pytest.warns(UserWarning, match="continues with a new episode"):
        load(tmp_path / "again.zip", force_reset=False)


def test_environment_that_was_used_between_load_and_learn(tmp_path: Path) -> None:
    """What comes next would not follow from the observation in the file."""
    saved_model(tmp_path / "model.zip")
    model = load(tmp_path / "model.zip", force_reset=False)
    evaluate_policy(model, model.get_env(), 1, warn=False)
    with pytest.warns(UserWarning, match="new episode, not in mid-episode, because the environment was used"):
        model.learn(5)
    buffer = model.replay_buffer
    assert np.abs(buffer.next_observations[50] - buffer.observations[50]).max() < 1.6  # one step of Pendulum
    model.learn(5)


class Draws(BaseCallback):
    """As one that evaluates a stochastic policy before training begins."""

    def _on_training_start(self) -> None:
        np.random.random(3), th.rand(3)

    def _on_step(self) -> bool:
        return True


def test_callback_that_draws_when_training_starts(tmp_path: Path) -> None:
    saver = sb3_callbacks.CheckpointCallback(50, str(tmp_path), save_replay_buffer=False)
    whole = make_model()
    whole.learn(80, callback=[Draws(), saver])
    model = load(tmp_path / "rl_model_50_steps.zip", force_reset=False)
    model.learn(30, callback=Draws())
    assert_same(snapshot(whole), snapshot(model))


def test_update_that_was_interrupted_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(compile=False)
    model.learn(40)
    with monkeypatch.context() as patch:
        patch.setattr(model.policy.actor.optimizer, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.learn(10, reset_num_timesteps=False)
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="new episode.*a step or an update was interrupted"):
        load(tmp_path / "model.zip", force_reset=False)


class SamplesActions(gym.Wrapper):
    """Takes a random action now and then, drawn from the action space, which the model draws from, too."""

    def step(self, action: Any) -> Any:
        return self.env.step(self.action_space.sample() if self.np_random.random() < 0.3 else action)


def test_random_actions_of_model_and_wrapper(tmp_path: Path) -> None:
    """In the warm-up, both draw from one random state."""

    def env() -> gym.Env:
        return SamplesActions(gym.make("Pendulum-v1"))

    whole = make_model(env(), learning_starts=90)
    whole.learn(50)
    whole.save(tmp_path / "model.zip")
    model = load(tmp_path / "model.zip", env(), force_reset=False)
    assert model.action_space is model.get_env().action_space
    model.learn(60)
    uninterrupted = make_model(env(), learning_starts=90)
    uninterrupted.learn(110)
    assert_same(snapshot(uninterrupted)["replay_buffer"], snapshot(model)["replay_buffer"])


def test_statistics_of_vec_normalize_after_set_env(tmp_path: Path) -> None:
    def normalized() -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))

    model = saved_model(tmp_path / "model.zip", env=normalized())
    loaded = SoftSAC.load(tmp_path / "model.zip", device="cpu")
    loaded.set_env(normalized())
    np.testing.assert_array_equal(
        loaded.get_vec_normalize_env().obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean
    )
    used = normalized()
    used.reset()
    mean = used.obs_rms.mean.copy()
    SoftSAC.load(tmp_path / "model.zip", device="cpu").set_env(used)
    np.testing.assert_array_equal(used.obs_rms.mean, mean)  # it has statistics of its own
    with pytest.warns(UserWarning, match=r"trained with VecNormalize.*set_env\(\) restores"):
        SoftSAC.load(tmp_path / "model.zip", device="cpu").set_env(pendulum())


def test_running_statistics_of_another_number_of_environments(tmp_path: Path) -> None:
    def env(n: int) -> VecEnv:
        return DummyVecEnv([lambda: gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))] * n)

    saved_model(tmp_path / "model.zip", env=env(2))
    with pytest.warns(UserWarning, match="running statistics of NormalizeObservation may not be restored"):
        load(tmp_path / "model.zip", env(1))


def test_file_beside_a_folder_of_checkpoints(tmp_path: Path) -> None:
    model = make_model()
    model.learn(50, callback=CheckpointCallback(20, tmp_path / "run"))
    model.save(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"There are both .*run and .*run.zip: the newest checkpoint.*'run.zip'"):
        assert load(tmp_path / "run").num_timesteps == 40
    assert load(tmp_path / "run.zip").num_timesteps == 50


def test_program_that_goes_to_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Goes(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 30:
                os.chdir(tmp_path / "elsewhere")
            return True

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    make_model().learn(50, callback=[CheckpointCallback(20, "run"), Goes()])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert load(tmp_path / "run").num_timesteps == 40


def test_evaluations_of_another_number_of_episodes(tmp_path: Path) -> None:
    """NumPy could not save them in one array."""

    def evaluates(n: int) -> EvalCallback:
        options: dict[str, Any] = {"n_eval_episodes": n, "eval_freq": 20, "log_path": str(tmp_path)}
        return EvalCallback(pendulum(), **options, verbose=0, warn=False)

    model = make_model()
    model.learn(50, callback=evaluates(2))
    model.save(tmp_path / "model.zip")
    callback = evaluates(3)
    with pytest.warns(UserWarning, match="evaluations were of 2 episodes, not 3: it begins a new list"):
        load(tmp_path / "model.zip").learn(30, callback=callback)
    assert np.shape(np.load(tmp_path / "evaluations.npz")["results"]) == (2, 3)


def test_saved_again_after_it_was_loaded_to_watch(tmp_path: Path) -> None:
    """The RL Zoo loads with buffer_size=1 to watch, and its push_to_hub saves that."""
    saved_model(tmp_path / "model.zip")
    load(tmp_path / "model.zip", buffer_size=1).save(tmp_path / "again.zip")
    assert load(tmp_path / "again.zip").buffer_size == 500


def test_buffer_of_another_action_range(tmp_path: Path) -> None:
    """The same torques are other scaled actions."""

    def env(limit: float) -> gym.Env:
        return gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-limit), np.float32(limit))

    model = saved_model(tmp_path / "model.zip", env=env(10.0))
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = make_model(env(20.0))
    with pytest.warns(UserWarning, match="are from an environment with actions in Box.*: they are converted"):
        other.load_replay_buffer(tmp_path / "buffer.pkl")
    np.testing.assert_allclose(other.replay_buffer.actions[:50], model.replay_buffer.actions[:50] / 2, atol=1e-6)
    narrow = make_model(env(1.0))
    with pytest.warns(UserWarning, match="out of bounds are clipped"):
        narrow.replay_buffer.copy_transitions(model.replay_buffer)
    np.testing.assert_allclose(
        narrow.replay_buffer.actions[:50], np.clip(model.replay_buffer.actions[:50] * 10, -1, 1), atol=1e-6
    )
