"""Environments that are captured and restored go on bit for bit; what cannot be captured is named, never guessed."""

import copy
import json
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from env_tools import (
    Aliases,
    Box,
    ImageDict,
    OwnRandomStates,
    SamplesFromItsSpace,
    SecretVecWrapper,
    Unreadable,
    Walk,
    actions_of,
    assert_goes_on,
    assert_identical,
    assert_same_future,
    dummy,
    envs_of,
    play,
    reasons_of,
    seeded,
    short,
    through_file,
    without_clock,
)
from gymnasium.wrappers import (
    DelayObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    RecordVideo,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_zoo3.wrappers import ActionNoiseWrapper, ActionSmoothingWrapper, DelayedRewardWrapper, HistoryWrapper
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from sb3_softsac.persistence.envs import env_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning", "ignore:.*settotalmass.*")

MUJOCO_TASKS = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum"]
MUJOCO_TASKS += ["InvertedPendulum", "Pusher", "Reacher", "Swimmer", "Walker2d"]
V5_TASKS = [f"{name}-v5" for name in MUJOCO_TASKS]
V4_TASKS = [f"{name}-v4" for name in MUJOCO_TASKS if name != "Pusher"]  # which needs MuJoCo 2
CLASSIC_TASKS = ["Pendulum-v1", "MountainCarContinuous-v0"]


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", V5_TASKS + V4_TASKS + CLASSIC_TASKS)
def test_tasks_go_on_bit_for_bit(env_id: str) -> None:
    [tree] = assert_goes_on(dummy(short(env_id)))
    assert "replay" not in tree


@pytest.mark.slow
@pytest.mark.parametrize("env_id", V5_TASKS)
def test_tasks_go_on_for_a_thousand_steps(env_id: str) -> None:
    for n_before in (1, 333, 999, 1000, 1001):
        assert_goes_on(dummy(lambda: Monitor(gym.make(env_id))), n_before, 1100)


@pytest.mark.parametrize("env_id", ["Ant-v5", "Pendulum-v1"])
@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_right_after_a_reset(env_id: str, n_before: int) -> None:
    assert_goes_on(dummy(short(env_id)), n_before)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1"])
def test_at_the_end_of_an_episode(env_id: str) -> None:
    assert_goes_on(dummy(short(env_id)), until_done=True)


@settings(max_examples=15)
@given(n_before=st.integers(0, 150))
def test_at_any_step(n_before: int) -> None:
    assert_goes_on(dummy(short("InvertedPendulum-v5")), n_before, 60)
    assert_goes_on(dummy(Unreadable, Aliases), n_before, 60)


WRAPPERS: dict[str, Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]] = {
    "statistics": RecordEpisodeStatistics,
    "time feature": TimeFeatureWrapper,
    "time aware": TimeAwareObservation,
    "normalised observation": NormalizeObservation,
    "normalised reward": NormalizeReward,
    "frame stack": lambda env: FrameStackObservation(env, 3),
    "delay": lambda env: DelayObservation(env, 2),
    "sticky": lambda env: StickyAction(env, 0.5),
    "history": HistoryWrapper,
    "smoothing": lambda env: ActionSmoothingWrapper(env, 0.5),
    "action noise": ActionNoiseWrapper,
    "delayed reward": lambda env: DelayedRewardWrapper(env, 5),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_go_on(name: str) -> None:
    assert_goes_on(dummy(lambda: Monitor(WRAPPERS[name](gym.make("Pendulum-v1", max_episode_steps=40)))))


def test_wrapper_around_monitor() -> None:
    assert_goes_on(dummy(lambda: TimeLimit(Monitor(NormalizeObservation(gym.make("Hopper-v5"))), 30)))


VEC_WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "normalize": VecNormalize,
    "frame stack": lambda env: VecFrameStack(env, 3),
    "monitor": VecMonitor,
    "check": VecCheckNan,
    "unknown": SecretVecWrapper,
    "many": lambda env: VecCheckNan(VecFrameStack(VecNormalize(VecMonitor(env)), 2)),
    "normalize above": lambda env: VecNormalize(VecFrameStack(env, 2)),
}


@pytest.mark.parametrize("name", VEC_WRAPPERS)
def test_vec_wrappers_and_three_environments(name: str) -> None:
    makers = [partial(gym.make, "Pendulum-v1", max_episode_steps=n) for n in (13, 29, 40)]
    assert_goes_on(lambda: VEC_WRAPPERS[name](DummyVecEnv(makers)))


@pytest.mark.parametrize("name", ["frame stack", "normalize", "normalize above"])
def test_dict_observations(name: str) -> None:
    def wrap(env: VecEnv) -> VecEnv:
        if name == "frame stack":
            return VecFrameStack(env, 3)
        normalize = VecNormalize(env, norm_obs_keys=["vector"])
        return normalize if name == "normalize" else VecFrameStack(normalize, 2)

    assert_goes_on(lambda: wrap(DummyVecEnv([ImageDict, ImageDict])), 40)


SUBPROCESS_CASES: list[Callable[[], gym.Env[Any, Any]]] = [short("HalfCheetah-v5"), Unreadable, SamplesFromItsSpace]
SUBPROCESS_CASES += [lambda: WRAPPERS["action noise"](Unreadable())]


@pytest.mark.parametrize("make", SUBPROCESS_CASES)
def test_subprocesses(make: Callable[[], gym.Env[Any, Any]]) -> None:
    def make_vec() -> VecEnv:
        env = SubprocVecEnv([make, make], start_method="fork")
        return env if make is SamplesFromItsSpace else VecNormalize(env)

    env = play(seeded(make_vec()), 23)
    other = make_vec()
    try:
        assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True) == []
        draw = actions_of(env, 1)
        for _ in range(80):
            actions = draw()
            assert_identical(without_clock(other.step(actions)), without_clock(env.step(actions)))
    finally:
        env.close()
        other.close()


CHILD = """
import json, sys
import numpy as np
sys.path.insert(0, {tests!r})
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from env_tools import *
if __name__ == "__main__":
    env = {make}
    with open(sys.argv[1]) as file:
        reasons = env_state.restore(env, json.load(file), mid_episode=True)
    assert reasons == [], reasons
    results = [without_clock(env.step(actions)) for actions in np.load(sys.argv[2])]
    np.savez(sys.argv[3], observations=[r[0] for r in results],
             rewards=[r[1] for r in results], dones=[r[2] for r in results])
    env.close()
"""
IN_CHILD = [
    "VecNormalize(DummyVecEnv([short('Humanoid-v5'), short('Humanoid-v5')]))",
    "DummyVecEnv([Unreadable, Aliases])",
    "VecNormalize(SubprocVecEnv([short('Ant-v5'), short('Ant-v5')]))",
]


@pytest.mark.processes
@pytest.mark.parametrize("make", IN_CHILD)
def test_new_process(make: str, tmp_path: Path) -> None:
    env = play(seeded(eval(make)), 23)
    (tmp_path / "state.json").write_text(json.dumps(env_state.capture(env)))
    draw = actions_of(env, 1)
    actions = np.array([draw() for _ in range(110)])
    np.save(tmp_path / "actions.npy", actions)
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=str(Path(__file__).parent), make=make))
    names = [str(tmp_path / name) for name in ("state.json", "actions.npy", "results.npz")]
    subprocess.run([sys.executable, str(script), *names], check=True, timeout=120)
    found = np.load(tmp_path / "results.npz")
    results = [env.step(a) for a in actions]
    env.close()
    for i, name in enumerate(("observations", "rewards", "dones")):
        assert_identical(found[name], np.array([r[i] for r in results]))


# --- what stays as it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [short("Humanoid-v5"), Unreadable, Walk, lambda: WRAPPERS["normalised reward"](Walk())]
)
def test_capture_has_no_effect(make: Callable[[], gym.Env[Any, Any]]) -> None:
    env, untouched = (play(seeded(VecNormalize(DummyVecEnv([make]))), 20) for _ in range(2))
    before = copy.deepcopy((random.getstate(), np.random.get_state()))
    first, second = env_state.capture(env), env_state.capture(env)
    assert_identical(without_clock(first), without_clock(second))
    assert str(before) == str((random.getstate(), np.random.get_state()))
    assert_same_future(untouched, env, 100)


# --- a new episode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [short("Hopper-v5"), Walk, Unreadable, OwnRandomStates])
@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_new_episode_continues_the_random_states(make: Callable[[], gym.Env[Any, Any]], vec_env: Any) -> None:
    kwargs = {"start_method": "fork"} if vec_env is SubprocVecEnv else {}
    env = play(seeded(VecNormalize(vec_env([make, make], **kwargs))), 23)
    state = through_file(env_state.capture(env))
    other = VecNormalize(vec_env([make, make], **kwargs), norm_reward=False, clip_obs=5.0)
    other.seed(3)  # as SB3's load() does
    try:
        assert env_state.restore(other, state, mid_episode=False) == []
        assert other.unwrapped._seeds == [None, None]
        assert isinstance(env, VecNormalize)
        assert_identical(other.returns, env.returns)
        assert_identical(vars(other.obs_rms), vars(env.obs_rms))
        assert_identical(vars(other.ret_rms), vars(env.ret_rms))
        assert (other.norm_reward, other.clip_obs) == (False, 5.0)
        assert_identical(other.venv.reset(), env.venv.reset())
    finally:
        env.close()
        other.close()


@pytest.mark.parametrize("mid_episode", [False, True])
def test_videos_are_numbered_on(mid_episode: bool, tmp_path: Path) -> None:
    """Those of a continued run would be written over the earlier ones."""

    def make() -> gym.Env[Any, Any]:
        env = gym.make("Pendulum-v1", max_episode_steps=10, render_mode="rgb_array")
        return RecordVideo(env, str(tmp_path), step_trigger=no_video)

    def make_both() -> VecVideoRecorder:
        return VecVideoRecorder(DummyVecEnv([make]), str(tmp_path), no_video)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the folder is there already
        env, other = seeded(make_both()), make_both()
    play(env, 23)
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=mid_episode) == []
    recorders = [(each, envs_of(each)[0]) for each in (env, other)]
    for vec_recorder, recorder in recorders:
        assert (vec_recorder.step_id, recorder.step_id, recorder.episode_id) == (23, 22, 2)  # type: ignore[attr-defined]


def no_video(_: int) -> bool:
    return False


def test_new_episode_keeps_settings() -> None:
    env = play(seeded(DummyVecEnv([short("HalfCheetah-v5", 60)])), 10)
    other = DummyVecEnv([short("HalfCheetah-v5", 90, forward_reward_weight=7.0)])
    assert env_state.restore(other, env_state.capture(env), mid_episode=False) == []
    assert envs_of(other)[0].unwrapped._forward_reward_weight == 7.0  # type: ignore[attr-defined]
    assert envs_of(other)[0].get_wrapper_attr("_max_episode_steps") == 90
    other.reset()
    env.reset()
    assert_identical(
        envs_of(other)[0].unwrapped.data.qpos,  # type: ignore[attr-defined]
        envs_of(env)[0].unwrapped.data.qpos,  # type: ignore[attr-defined]
    )


def test_pending_seeds_and_options_are_kept() -> None:
    env = DummyVecEnv([Walk, Walk])
    env.seed(8)
    env.set_options([{"start": 3.0}, {"start": 4.0}])
    other = DummyVecEnv([Walk, Walk])
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=False) == []
    assert_identical(other.reset(), env.reset())


# --- what cannot be restored is named ---------------------------------------------------------------------------------


def test_other_arguments_wrappers_and_models() -> None:
    cheetah = dummy(short("HalfCheetah-v5"))
    assert "forward_reward_weight" in reasons_of(cheetah, dummy(short("HalfCheetah-v5", forward_reward_weight=2.0)))
    assert "max_episode_steps" in reasons_of(cheetah, dummy(short("HalfCheetah-v5", 61)))
    assert "HopperEnv" in reasons_of(dummy(short("Walker2d-v5")), dummy(short("Hopper-v5")))
    assert "TimeFeatureWrapper" in reasons_of(
        dummy(lambda: Monitor(gym.make("Pendulum-v1"))),
        dummy(lambda: Monitor(TimeFeatureWrapper(gym.make("Pendulum-v1")))),
    )
    assert "VecFrameStack" in reasons_of(dummy(Walk), lambda: VecFrameStack(DummyVecEnv([Walk]), 1))

    def heavier() -> gym.Env[Any, Any]:
        env = short("HalfCheetah-v5")()
        env.unwrapped.model.body_mass[2] *= 1.5  # type: ignore[attr-defined]
        return env

    assert "MuJoCo model" in reasons_of(cheetah, dummy(heavier))


def test_other_number_of_environments() -> None:
    env = play(seeded(VecNormalize(DummyVecEnv([Walk, Walk]))), 30)
    other = play(seeded(VecNormalize(DummyVecEnv([Walk] * 3))), 2)
    assert isinstance(other, VecNormalize)
    [reason] = env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True)
    assert "2" in reason and "3" in reason
    assert isinstance(env, VecNormalize)
    assert_identical(vars(other.obs_rms), vars(env.obs_rms))
    assert_identical(vars(other.ret_rms), vars(env.ret_rms))
    assert_identical(other.returns, np.zeros(3))


def test_statistics_survive_another_chain() -> None:
    env = play(seeded(VecNormalize(DummyVecEnv([Walk]))), 30)
    other = VecFrameStack(VecNormalize(DummyVecEnv([Walk])), 1)
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True)
    assert isinstance(env, VecNormalize) and isinstance(other.venv, VecNormalize)
    assert_identical(vars(other.venv.obs_rms), vars(env.obs_rms))


def test_closed_and_dead_subprocesses() -> None:
    env = SubprocVecEnv([Walk, Walk], start_method="fork")
    seeded(env)
    state = env_state.capture(env)
    env.processes[1].kill()
    env.processes[1].join()
    assert all("worker" in tree["missing"] for tree in env_state.capture(env)["envs"])
    assert env_state.restore(env, state, mid_episode=True)
    env.processes[0].kill()
    for remote in env.remotes:
        remote.close()
    env.closed = True
    assert all("closed" in tree["missing"] for tree in env_state.capture(env)["envs"])
    env_state.prepare(env)
    env_state.ignore_signals(env, [signal.SIGTERM])
    other = DummyVecEnv([Walk, Walk])
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True)
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=False)


def test_vec_env_of_another_kind() -> None:
    class Other(DummyVecEnv):
        pass

    class Foreign(VecEnv):
        num_envs = 2
        reset = step_async = step_wait = close = get_attr = set_attr = env_method = env_is_wrapped = None  # type: ignore

        def __init__(self) -> None:
            self.secret = Box(1)
            self._seeds, self._options = [None, None], [{}, {}]

    class Offers(Foreign):
        value = 0

        def get_state(self) -> int:
            return self.value

        def set_state(self, state: int) -> None:
            self.value = state

    assert all("Foreign" in tree["missing"] for tree in env_state.capture(Foreign())["envs"])
    assert env_state.restore(Foreign(), env_state.capture(Foreign()), mid_episode=True)
    env, other = Offers(), Offers()
    env.value = 5
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True) == []
    assert other.value == 5


SIGNALS = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from env_tools import *
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    env = SubprocVecEnv([Walk, Walk], start_method={method!r})
    seeded(env)
    env_state.ignore_signals(env, [signal.SIGTERM, signal.SIGUSR1])
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.killpg(0, signal.SIGTERM)  # the fork server does not survive it
    os.killpg(0, signal.SIGUSR1)
    time.sleep(0.5)
    assert "missing" not in str(env_state.capture(env))
    play(env, 3)
    print(*[process.pid for process in env.processes], flush=True)
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_survive_signals_and_end_with_the_process(method: str, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(SIGNALS.format(tests=str(Path(__file__).parent), method=method))
    command = [sys.executable, str(script)]
    run = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True, start_new_session=True)
    numbers = run.stdout.split()
    assert len(numbers) == 2
    deadline = time.monotonic() + 10.0
    while any(is_running(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(number: str) -> bool:
    status = Path(f"/proc/{number}/status")
    try:
        return "State:\tZ" not in status.read_text()  # nobody may be there to ask for the exit code
    except OSError:
        return False


# --- damaged and hostile files ----------------------------------------------------------------------------------------


CASES: list[Callable[[], VecEnv]] = [
    lambda: VecNormalize(VecFrameStack(DummyVecEnv([short("InvertedPendulum-v5")]), 2)),
    lambda: VecNormalize(DummyVecEnv([Unreadable, OwnRandomStates, Aliases])),
]
STATES: dict[int, Any] = {}


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, value in items for p in paths_of(value, (*path, key)))]


@pytest.mark.damage
@settings(max_examples=300)
@given(st.data())
def test_damaged_states_give_reasons(data: st.DataObject) -> None:
    case = data.draw(st.integers(0, len(CASES) - 1))
    if case not in STATES:
        state = through_file(env_state.capture(play(seeded(CASES[case]()), 20)))
        STATES[case] = state, paths_of(state)[1:]
    state, paths = copy.deepcopy(STATES[case][0]), STATES[case][1]
    path = data.draw(st.sampled_from(paths))
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    junk = st.sampled_from([None, -1, 10**30, 1.5, float("nan"), "", "__class__", "step", [], {}, [[]], {"$": "tuple"}])
    if isinstance(parent, dict) and data.draw(st.booleans()):
        parent[data.draw(st.sampled_from(["__class__", "step", "spec", "x", "_np_random"]))] = parent.pop(path[-1])
    else:
        parent[path[-1]] = data.draw(junk)
    env = CASES[case]()
    for mid_episode in (True, False):
        reasons = env_state.restore(env, state, mid_episode)
        assert isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons)
    inner = env.unwrapped.envs[0].unwrapped  # type: ignore[attr-defined]
    assert callable(inner.step) and not vars(inner).keys() & {"__class__", "x"}


@pytest.mark.parametrize(("n_envs", "who"), [(2, "0 and 1"), (3, "0 and 2 others"), (500, "0 and 499 others")])
def test_reason_of_many_environments_is_one_sentence(n_envs: int, who: str) -> None:
    env = DummyVecEnv([Walk] * n_envs)
    env.reset()
    state = env_state.capture(env)
    for tree in state["envs"]:
        tree["missing"] = "a clock"
    (reason,) = env_state.restore(env, state, mid_episode=True)
    assert reason.startswith(f"environment {who}: ") and reason.endswith("a clock") and len(reason) < 100


def test_many_reasons_are_counted() -> None:
    env = DummyVecEnv([Walk] * 50)
    env.reset()
    state = env_state.capture(env)
    for i, tree in enumerate(state["envs"]):
        tree["missing"] = f"reason {i}"
    reasons = env_state.restore(env, state, mid_episode=True)
    assert len(reasons) == env_state.MAX_REASONS + 1 and reasons[-1] == f"{50 - env_state.MAX_REASONS} other reasons"


def test_damaged_states_do_not_end_workers() -> None:
    env = seeded(SubprocVecEnv([Walk, Walk], start_method="fork"))
    state = env_state.capture(env)
    state["envs"][0]["process"] = {"$": "tuple"}
    state["envs"][1]["layers"] = 5
    reasons = env_state.restore(env, state, mid_episode=True)
    assert {reason[:13] for reason in reasons} == {"environment 0", "environment 1"}
    assert env_state.restore(env, state, mid_episode=False)
    env.reset()
    play(env, 3)
    env.close()


@pytest.mark.parametrize("junk", [None, [], {}, 5, "x", {"n_envs": 1}, {"n_envs": 1, "wrappers": [], "envs": []}])
def test_no_state_at_all(junk: Any) -> None:
    assert env_state.restore(DummyVecEnv([Walk]), junk, mid_episode=True)
    assert env_state.restore(DummyVecEnv([Walk]), junk, mid_episode=False)
