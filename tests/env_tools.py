"""Environments as users write them, and what compares a restored environment with the captured one."""

import json
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_softsac.persistence.envs import env_state


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
        self.drift.value += int.from_bytes(os.urandom(4), "little") if self.left > 3 else 0
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
