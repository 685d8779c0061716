"""Environments that are captured and restored go on bit for bit; what cannot be captured is named, never guessed."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import (
    DelayObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
)
from gymnasium.wrappers.common import PassiveEnvChecker
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
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_softsac.persistence.envs import env_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning", "ignore:.*settotalmass.*")

MUJOCO_TASKS = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum"]
MUJOCO_TASKS += ["InvertedPendulum", "Pusher", "Reacher", "Swimmer", "Walker2d"]
V5_TASKS = [f"{name}-v5" for name in MUJOCO_TASKS]
V4_TASKS = [f"{name}-v4" for name in MUJOCO_TASKS if name != "Pusher"]  # which needs MuJoCo 2
CLASSIC_TASKS = ["Pendulum-v1", "MountainCarContinuous-v0"]
BOX2D_TASKS = ["BipedalWalker-v3", "LunarLanderContinuous-v3"]


# --- environments of users --------------------------------------------------------------------------------------------


class Walk(gym.Env[np.ndarray, np.ndarray]):
    """A random walk of 7 to 30 steps; the observation is where it is."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), dtype=np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.position = np.zeros(2)
        self.left = 0
        self.n_episodes = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_episodes += 1
        self.left = int(self.np_random.integers(7, 30))
        self.position = self.np_random.normal(size=2) + (options or {}).get("start", 0.0)
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        self.position += action + 0.1 * self.noise()
        return self.observation(), float(self.position.sum()), self.left <= 0, False, {"left": self.left}

    def noise(self) -> np.ndarray:
        return self.np_random.normal(size=2)

    def observation(self) -> np.ndarray:
        return self.position.copy()


@dataclass
class Box:
    """No class that a file may name."""

    value: Any


class Unreadable(Walk):
    """Part of its state is in an object that no file can hold, but its episodes can be repeated."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.drift = Box(0.0)
        return super().reset(**kwargs)

    def noise(self) -> np.ndarray:
        self.drift.value += float(self.np_random.normal())
        return np.full(2, self.drift.value)


class UnreadableFromEntropy(Unreadable):
    def noise(self) -> np.ndarray:
        self.drift.value += os.urandom(1)[0]
        return np.full(2, self.drift.value)


class HiddenFromEntropy(Unreadable):
    """What differs does not show in the observation yet."""

    def noise(self) -> np.ndarray:
        self.drift.value += os.urandom(4)[0] if self.left > 3 else 0
        return np.full(2, self.drift.value * (self.left < 3))


class UnreadableFromGlobal(Unreadable):
    def noise(self) -> np.ndarray:
        self.drift.value += np.random.normal()
        return np.full(2, self.drift.value)


class StepsInReset(Unreadable):
    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        return self.step(np.zeros(2))[0], {}


class ClipsInPlace(Unreadable):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action *= 0.5
        return super().step(action)


class ObjectInInfo(Walk):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, truncated, {"box": BOX}


BOX = Box(1)


class OffersState(Walk):
    """Would be unreadable, and cannot be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Box(0)

    def noise(self) -> np.ndarray:
        self.box.value += os.urandom(1)[0] % 2
        return np.array([self.box.value % 3, 0.0])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        self.position += action + self.box.value % 5
        return self.observation(), 0.0, self.left <= 0, False, {}

    def get_state(self) -> dict[str, Any]:
        return {"box": self.box.value, "left": self.left, "position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.box.value, self.left, self.position = state["box"], state["left"], state["position"]


class Aliases(Walk):
    """One object under two names, and a view, which only a replay can bring back."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = self.np_random
        self.log: list[float] = []
        self.same_log = self.log

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        result = super().reset(**kwargs)
        self.rng = self.np_random
        self.log = self.same_log = []
        return result

    def noise(self) -> np.ndarray:
        self.same_log.append(self.rng.normal())
        return np.full(2, sum(self.log))


class Views(Walk):
    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        result = super().reset(**kwargs)
        self.x = self.position[:1]
        return result

    def noise(self) -> np.ndarray:
        self.x += 1.0
        return np.zeros(2)


class Cached(Walk):
    """Attributes that a new object does not have yet."""

    @cached_property
    def scale(self) -> float:
        return float(self.np_random.normal())

    def noise(self) -> np.ndarray:
        self.last_noise = np.full(2, self.scale)
        return self.last_noise


class HiddenRobot(Walk):
    """An object that lives across episodes, with a random state of its own."""

    class Robot:
        __slots__ = ("rng",)

        def __init__(self) -> None:
            self.rng = np.random.default_rng(4)

    def __init__(self) -> None:
        super().__init__()
        self.robot = self.Robot()

    def noise(self) -> np.ndarray:
        return np.full(2, self.robot.rng.normal() if self.left == 1 else 0.0)


class OwnRandomStates(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.python, self.numpy = random.Random(1), np.random.RandomState(2)

    def noise(self) -> np.ndarray:
        return np.array([self.python.gauss(0, 1), self.numpy.normal()])


class UnreadableWrapper(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        self.secret = Box(1)


class SecretVecWrapper(VecEnvWrapper):
    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self.count = 0
        self.bag: Any = deque(maxlen=3)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.count += 1
        self.bag.append(self.count)
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs + sum(self.bag), rewards, dones, infos


class ImageDict(gym.Env[Any, Any]):
    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (4, 4, 1), np.uint8), "vector": spaces.Box(-9, 9, (2,), np.float32)}
    )
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_from(self.np_random), {}

    def observation_from(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = rng.integers(0, 255, (4, 4, 1)).astype(np.uint8)
        return {"image": image, "vector": rng.normal(size=2).astype(np.float32)}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        return self.observation_from(self.np_random), float(action[0]), self.t >= 17, False, {}


class SamplesFromItsSpace(ImageDict):
    def step(self, action: np.ndarray) -> Any:
        return super().step(action + self.action_space.sample())


# --- helpers ----------------------------------------------------------------------------------------------------------


def seeded(env: VecEnv, seed: int = 3) -> VecEnv:
    env.seed(seed)
    for inner in envs_of(env):
        inner.action_space.seed(5)
    env_state.prepare(env)
    env.reset()
    return env


def actions_of(env: VecEnv, seed: int) -> Callable[[], np.ndarray]:
    rng = np.random.default_rng(seed)
    space = env.action_space
    assert isinstance(space, spaces.Box)
    return lambda: rng.uniform(space.low, space.high, (env.num_envs, *space.shape)).astype(space.dtype)


def without_clock(tree: Any) -> Any:
    """Of infos and of states: neither elapsed times nor the time column of episodes."""
    if isinstance(tree, dict):
        clocks = ("t", "elapsed", "episode_times", "time_queue")
        return {key: without_clock(value) for key, value in tree.items() if key not in clocks}
    return [without_clock(value) for value in tree] if isinstance(tree, list | tuple) else tree


def assert_identical(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    else:
        assert a == b or (a != a and b != b)


def assert_same_future(env: VecEnv, other: VecEnv, n_steps: int, seed: int = 1) -> int:
    """:return: number of episodes that have ended"""
    draw, n_episodes = actions_of(env, seed), 0
    for _ in range(n_steps):
        actions = draw()
        # Global random states belong to the caller of env_state
        before = np.random.get_state()
        result = env.step(actions.copy())
        np.random.set_state(before)
        expected = without_clock(result)
        assert_identical(without_clock(other.step(actions.copy())), expected)
        n_episodes += int(result[2].sum())
    for a, b in zip(envs_of(env), envs_of(other), strict=True):
        if a.action_space is b.action_space:  # of the class
            continue
        assert a.action_space.sample().tobytes() == b.action_space.sample().tobytes()
    return n_episodes


def envs_of(env: VecEnv) -> list[gym.Env[Any, Any]]:
    base = env.unwrapped
    return base.envs if isinstance(base, DummyVecEnv) else []


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def play(env: VecEnv, n_steps: int, seed: int = 0) -> VecEnv:
    draw = actions_of(env, seed)
    for _ in range(n_steps):
        env.step(draw())
    return env


def assert_goes_on(
    make: Callable[[], VecEnv], n_before: int = 23, n_after: int = 120, until_done: bool = False
) -> list[dict[str, Any]]:
    env = play(seeded(make()), n_before)
    for inner in envs_of(env):
        inner.action_space.sample()
    draw = actions_of(env, 7)
    while until_done and not env.step(draw())[2].any():
        pass
    state = through_file(env_state.capture(env))
    other = make()
    try:
        assert env_state.restore(other, state, mid_episode=True) == []
        # The global random states, which wrappers may use, belong to the caller
        n_episodes = assert_same_future(env, other, n_after)
        again = without_clock(through_file(env_state.capture(env)))
        assert_identical(without_clock(through_file(env_state.capture(other))), again)
    finally:
        env.close()
        other.close()
    assert n_episodes > 0 or n_after == 0
    return state["envs"]


def short(env_id: str, max_steps: int = 60, **kwargs: Any) -> Callable[[], gym.Env[Any, Any]]:
    return lambda: Monitor(gym.make(env_id, max_episode_steps=max_steps, **kwargs))


def dummy(*makers: Callable[[], gym.Env[Any, Any]]) -> Callable[[], VecEnv]:
    return lambda: DummyVecEnv(list(makers))


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", V5_TASKS + V4_TASKS + CLASSIC_TASKS)
def test_tasks_go_on_bit_for_bit(env_id: str) -> None:
    [tree] = assert_goes_on(dummy(short(env_id)))
    assert "replay" not in tree


@pytest.mark.parametrize("env_id", BOX2D_TASKS)
@pytest.mark.parametrize("n_before", [0, 1, 130, 400])
def test_box2d_goes_on_by_replay(env_id: str, n_before: int) -> None:
    pytest.importorskip("Box2D")
    pytest.importorskip("pygame")
    [tree] = assert_goes_on(dummy(short(env_id, 250)), n_before, 300)
    assert "replay" in tree


@pytest.mark.slow
@pytest.mark.parametrize("env_id", BOX2D_TASKS)
def test_box2d_goes_on_many_times(env_id: str) -> None:
    pytest.importorskip("Box2D")
    pytest.importorskip("pygame")
    for n_before in range(20, 1500, 61):
        assert_goes_on(dummy(short(env_id, 700)), n_before, 750)


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


@pytest.mark.parametrize("make", [Walk, OwnRandomStates, Aliases, Cached])
def test_own_environments_are_read(make: Callable[[], gym.Env[Any, Any]]) -> None:
    [tree] = assert_goes_on(dummy(make))
    assert "replay" not in tree


@pytest.mark.parametrize("make", [Unreadable, StepsInReset, Views, ClipsInPlace])
@pytest.mark.parametrize("n_before", [0, 5, 100])
def test_own_environments_are_replayed(make: Callable[[], gym.Env[Any, Any]], n_before: int) -> None:
    [tree] = assert_goes_on(dummy(make), n_before)
    assert "replay" in tree


def test_replay_after_a_restore_and_without_an_outer_reset() -> None:
    env = play(seeded(DummyVecEnv([Unreadable])), 3)
    for _ in range(3):
        other = DummyVecEnv([Unreadable])
        assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True) == []
        env = play(other, 1)
    reference = play(play(play(play(seeded(DummyVecEnv([Unreadable])), 3), 1), 1), 1)
    assert_same_future(reference, env, 100)


def test_options_of_the_reset_are_replayed() -> None:
    def make() -> VecEnv:
        env = DummyVecEnv([Unreadable])
        env.set_options({"start": 100.0})
        return env

    env = play(seeded(make()), 3)
    other = DummyVecEnv([Unreadable])
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True) == []
    assert_same_future(env, other, 100)


def test_environment_that_offers_its_state() -> None:
    env = play(seeded(DummyVecEnv([OffersState])), 3)
    assert env_state.RECORDER not in vars(envs_of(env)[0])
    state = through_file(env_state.capture(env))
    other = DummyVecEnv([OffersState])
    assert env_state.restore(other, state, mid_episode=True) == []
    n_left = envs_of(env)[0].left  # type: ignore[attr-defined]
    draw = actions_of(env, 1)
    for _ in range(n_left + 1):  # the next episode's start is drawn from gymnasium's random state, which is kept too
        actions = draw()
        assert_identical(other.step(actions), env.step(actions))


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_checker_whose_data_no_file_can_hold(n_before: int) -> None:
    assert_goes_on(dummy(lambda: PassiveEnvChecker(ObjectInInfo())), n_before)


def test_generators_stay_the_same_objects() -> None:
    state = through_file(env_state.capture(play(seeded(DummyVecEnv([OwnRandomStates])), 3)))
    other = seeded(DummyVecEnv([OwnRandomStates]), 4)
    inner = envs_of(other)[0]
    before = [vars(inner)[name] for name in ("_np_random", "python", "numpy")]
    assert env_state.restore(other, state, mid_episode=True) == []
    for name, rng in zip(("_np_random", "python", "numpy"), before, strict=True):
        assert vars(inner)[name] is rng


def test_without_a_seed() -> None:
    env = DummyVecEnv([Unreadable])
    env_state.prepare(env)
    env.reset()
    other = DummyVecEnv([Unreadable])
    assert env_state.restore(other, through_file(env_state.capture(play(env, 3))), mid_episode=True) == []


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
from test_env_state import *
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


def test_capture_makes_no_random_states() -> None:
    env = DummyVecEnv([Walk])
    env_state.prepare(env)
    env_state.capture(env)
    inner = envs_of(env)[0]
    assert inner._np_random is None and inner.action_space._np_random is None


def test_recorder_only_where_it_is_needed() -> None:
    cases = [("HalfCheetah-v5", False), ("Pendulum-v1", False)]
    for env_id, is_recorded in cases:
        env = seeded(DummyVecEnv([short(env_id)]))
        assert (env_state.RECORDER in vars(envs_of(env)[0].unwrapped)) is is_recorded
    env = seeded(DummyVecEnv([Walk]))
    play(env, 100)
    assert not {env_state.RECORDER, "step", "reset"} & vars(envs_of(env)[0]).keys()
    env = play(seeded(DummyVecEnv([Unreadable])), 100)
    recorder = vars(envs_of(env)[0])[env_state.RECORDER]
    env_state.prepare(env)
    assert vars(envs_of(env)[0])[env_state.RECORDER] is recorder


def test_recorded_environment_is_the_same_as_any() -> None:
    plain = DummyVecEnv([StepsInReset])
    plain.seed(3)
    plain.reset()
    plain.action_space.seed(5)
    assert_same_future(plain, seeded(DummyVecEnv([StepsInReset])), 100)


def test_copied_environment_has_its_own_recorder() -> None:
    env = play(seeded(DummyVecEnv([Unreadable])), 3)
    inner = envs_of(env)[0]
    other = copy.deepcopy(inner)
    position = inner.position.copy()  # type: ignore[attr-defined]
    other.step(np.ones(2))
    assert (inner.position == position).all()  # type: ignore[attr-defined]
    assert env_state.restore(DummyVecEnv([Unreadable]), env_state.capture(env), mid_episode=True) == []


def test_replay_leaves_global_random_states() -> None:
    env = play(seeded(DummyVecEnv([UnreadableFromGlobal])), 3)
    state = env_state.capture(env)
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    [reason] = env_state.restore(DummyVecEnv([UnreadableFromGlobal]), state, mid_episode=True)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    assert "the observation or reward" in reason


def test_totals_of_monitor_are_kept_and_quick() -> None:
    env = play(seeded(DummyVecEnv([short("Pendulum-v1", 10)])), 25)
    monitor = envs_of(env)[0]
    assert isinstance(monitor, Monitor)
    monitor.episode_returns += [float(i) for i in range(20_000)]
    monitor.episode_lengths += [10] * 20_000
    monitor.episode_times += [float(i) for i in range(20_000)]
    began = time.perf_counter()
    state = env_state.capture(env)
    assert time.perf_counter() - began < 1.0
    for mid_episode in (True, False):
        other = DummyVecEnv([short("Pendulum-v1", 10)])
        assert env_state.restore(other, through_file(state), mid_episode) == []
        new = envs_of(other)[0]
        assert isinstance(new, Monitor)
        assert new.get_episode_rewards() == monitor.get_episode_rewards()
        assert new.get_episode_lengths() == monitor.get_episode_lengths()
        assert new.get_total_steps() == monitor.get_total_steps() == 25


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize("mid_episode", [True, False])
def test_clocks_go_on(mid_episode: bool) -> None:
    def make() -> VecEnv:
        return VecMonitor(DummyVecEnv([lambda: RecordEpisodeStatistics(Monitor(gym.make("Pendulum-v1")))]))

    env = play(seeded(make()), 3)
    statistics, monitor = envs_of(env)[0], envs_of(env)[0].env  # type: ignore[attr-defined]
    monitor.t_start -= 1000.0
    env.t_start -= 2000.0  # type: ignore[attr-defined]
    statistics.episode_start_time -= 3000.0  # type: ignore[attr-defined]
    other = make()
    assert env_state.restore(other, through_file(env_state.capture(env)), mid_episode) == []
    inner = envs_of(other)[0]
    assert time.time() - inner.env.t_start == pytest.approx(1000.0, abs=60.0)  # type: ignore[attr-defined]
    assert time.time() - other.t_start == pytest.approx(2000.0, abs=60.0)
    if mid_episode:
        elapsed = time.perf_counter() - inner.episode_start_time  # type: ignore[attr-defined]
        assert elapsed == pytest.approx(3000.0, abs=60.0)


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


def reasons_of(make: Callable[[], VecEnv], make_other: Callable[[], VecEnv] | None = None, n_before: int = 3) -> str:
    env = play(seeded(make()), n_before)
    other = (make_other or make)()
    reasons = env_state.restore(other, through_file(env_state.capture(env)), mid_episode=True)
    assert reasons
    other.reset()  # what is left can start an episode
    play(other, 40)
    env.close()
    other.close()
    return "; ".join(reasons)


@pytest.mark.parametrize("make", [UnreadableFromEntropy, HiddenFromEntropy])
def test_replay_that_leads_elsewhere(make: Callable[[], gym.Env[Any, Any]]) -> None:
    assert "led to another state" in reasons_of(dummy(make))


def test_hidden_difference_from_earlier_episodes() -> None:
    assert_goes_on(dummy(HiddenRobot), 3)
    assert "its robot differ" in reasons_of(dummy(HiddenRobot), n_before=40)


def test_recording_that_began_too_late() -> None:
    env = DummyVecEnv([Unreadable])
    env.seed(3)
    env.reset()
    env_state.prepare(env)
    play(env, 2)
    [tree] = env_state.capture(env)["envs"]
    assert "Unreadable.drift" in tree["missing"] and "mid-episode" in tree["missing"]
    play(env, 40)
    assert "missing" not in env_state.capture(env)["envs"][0]


def test_unreadable_wrapper_is_named() -> None:
    reason = reasons_of(dummy(lambda: UnreadableWrapper(Walk())))
    assert "UnreadableWrapper.secret" in reason and "get_state" in reason


def test_unreadable_vec_wrapper_is_named() -> None:
    def make() -> VecEnv:
        env = SecretVecWrapper(DummyVecEnv([Walk]))
        env.secret = Box(1)  # type: ignore[attr-defined]
        return env

    assert "SecretVecWrapper.secret" in reasons_of(make)


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


class WithPrices(Walk):
    """Data that it was made with, too much to be in every checkpoint."""

    def __init__(self, seed: int = 0, n: int = 3_000_000):
        super().__init__()
        self.prices = {"close": np.random.default_rng(seed).normal(size=n), "names": ["a", "b"]}

    def noise(self) -> np.ndarray:
        return self.prices["close"][self.left : self.left + 2]  # type: ignore[return-value]


def test_large_data_is_not_written_but_compared() -> None:
    makers = [partial(WithPrices, seed=1), partial(WithPrices, seed=1, n=1000)]
    assert_goes_on(dummy(makers[0]))
    env = play(seeded(DummyVecEnv([makers[0]] * 2)), 10)
    state = through_file(env_state.capture(env))
    assert len(json.dumps(state)) < 100_000
    # Of a run that is continued twice
    other = DummyVecEnv([makers[0]] * 2)
    assert env_state.restore(other, state, mid_episode=True) == []
    env_state.prepare(other)
    assert len(json.dumps(env_state.capture(play(other, 3)))) < 100_000

    reason = reasons_of(dummy(makers[0]), dummy(partial(WithPrices, 0)))
    assert "WithPrices.prices was too large to save, and is different here" in reason
    assert "is different here" in reasons_of(dummy(makers[0]), dummy(partial(WithPrices, 1, 2_999_999)))
    assert_goes_on(dummy(makers[1]))  # small: written
    state = env_state.capture(play(seeded(DummyVecEnv([makers[1]])), 3))
    assert env_state.restore(DummyVecEnv([partial(WithPrices, 0, 1000)]), state, mid_episode=True) == []


class Fog(Walk):
    """A large map that fills as the walk goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.map = np.zeros((1500, 1500), dtype=np.float32)

    def noise(self) -> np.ndarray:
        self.map[self.left] += 1.0
        return self.map.sum(1)[self.left : self.left + 2]


def test_large_data_that_changes_is_written() -> None:
    assert_goes_on(dummy(Fog))


class MadeInReset(Walk):
    """What a new object does not have cannot be expected of one."""

    def reset(self, **kwargs: Any) -> Any:
        result = super().reset(**kwargs)
        self.table = np.arange(1_200_000, dtype=np.float64)
        return result


@pytest.mark.parametrize("is_evaluated_before", [False, True])
def test_large_data_that_is_made_in_reset(is_evaluated_before: bool) -> None:
    env = DummyVecEnv([lambda: Monitor(MadeInReset())])
    if is_evaluated_before:
        env.reset()
    env = play(seeded(env), 10)
    for _ in range(2):  # a second learn(), and a run that is continued twice
        env_state.prepare(env)
        state = through_file(env_state.capture(play(env, 3)))
        env = DummyVecEnv([lambda: Monitor(MadeInReset())])
        assert env_state.restore(env, state, mid_episode=True) == []


class SaysAll(Fog):
    def get_state(self) -> dict[str, Any]:
        return dict(vars(self))

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def test_large_data_of_an_environment_that_says_its_state() -> None:
    env = SaysAll()
    env_state.prepare(DummyVecEnv([lambda: env]))
    assert env.get_state().keys() == SaysAll().get_state().keys()


class Panorama(ImageDict):
    observation_space = spaces.Box(-1.0, 1.0, (3, 600, 600))  # type: ignore[assignment]

    def observation_from(self, rng: np.random.Generator) -> Any:
        return rng.uniform(-1, 1, (3, 600, 600)).astype(np.float32)


def test_large_statistics_are_written() -> None:
    env = play(seeded(VecNormalize(DummyVecEnv([Panorama]))), 3)
    for mid_episode in (False, True):
        other = VecNormalize(DummyVecEnv([Panorama]))
        assert env_state.restore(other, env_state.capture(env), mid_episode=mid_episode) == []
        assert_identical(vars(other.obs_rms), vars(env.obs_rms))  # type: ignore[attr-defined]


def test_settings_of_a_window_do_not_matter() -> None:
    env = play(seeded(DummyVecEnv([short("HalfCheetah-v5")])), 10)
    other = DummyVecEnv([short("HalfCheetah-v5", width=900, height=700, render_mode="rgb_array")])
    assert env_state.restore(other, env_state.capture(env), mid_episode=True) == []
    assert envs_of(other)[0].render_mode == "rgb_array"
    assert_same_future(env, other, 100)


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


def test_statistics_of_another_shape() -> None:
    env = play(seeded(VecNormalize(DummyVecEnv([Walk]))), 30)
    other = VecNormalize(DummyVecEnv([short("Pendulum-v1")]))
    reasons = env_state.restore(other, through_file(env_state.capture(env)), mid_episode=False)
    assert any("obs_rms.mean has shape (2,)" in reason for reason in reasons)
    assert np.shape(other.obs_rms.mean) == (3,)  # type: ignore[union-attr]


def test_used_environment_with_more_attributes() -> None:
    state = env_state.capture(seeded(DummyVecEnv([Cached])))
    [reason] = env_state.restore(play(seeded(DummyVecEnv([Cached])), 3), state, mid_episode=True)
    assert "last_noise, scale" in reason


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
from test_env_state import *
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


@pytest.mark.parametrize(
    "name", ["__class__", "__dict__", "step", "reset", "spec", "render_mode", "unknown", "np_random"]
)
def test_foreign_attributes_are_refused(name: str) -> None:
    state = env_state.capture(play(seeded(DummyVecEnv([Walk])), 3))
    state["envs"][0]["layers"][-1]["lasting"][name] = {"value": 1}
    for mid_episode in (True, False):
        other = DummyVecEnv([Walk])
        [reason] = env_state.restore(other, state, mid_episode)
        assert name in reason
        assert name not in vars(envs_of(other)[0])
