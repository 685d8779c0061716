"""Objects of an environment: attributes that are read, large ones, clocks, and those that cannot be read."""

import io
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from crash_tools import quick
from env_tools import (
    Aliases,
    Box,
    Cached,
    ImageDict,
    ObjectInInfo,
    OffersState,
    OwnRandomStates,
    SecretVecWrapper,
    UnreadableWrapper,
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
)
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, RecordEpisodeStatistics
from gymnasium.wrappers.common import PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_softsac.persistence.envs import env_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning", "ignore:.*settotalmass.*")


@pytest.mark.parametrize("make", [Walk, OwnRandomStates, Aliases, Cached])
def test_own_environments_are_read(make: Callable[[], gym.Env[Any, Any]]) -> None:
    [tree] = assert_goes_on(dummy(make))
    assert "replay" not in tree


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


def test_capture_makes_no_random_states() -> None:
    env = DummyVecEnv([Walk])
    env_state.prepare(env)
    env_state.capture(env)
    inner = envs_of(env)[0]
    assert inner._np_random is None and inner.action_space._np_random is None


def test_totals_of_monitor_are_kept_and_quick() -> None:
    env = play(seeded(DummyVecEnv([short("Pendulum-v1", 10)])), 25)
    monitor = envs_of(env)[0]
    assert isinstance(monitor, Monitor)
    monitor.episode_returns += [float(i) for i in range(20_000)]
    monitor.episode_lengths += [10] * 20_000
    monitor.episode_times += [float(i) for i in range(20_000)]
    state = quick(lambda: env_state.capture(env))
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


def test_unreadable_wrapper_is_named() -> None:
    reason = reasons_of(dummy(lambda: UnreadableWrapper(Walk())))
    assert "UnreadableWrapper.secret" in reason and "get_state" in reason


def test_unreadable_vec_wrapper_is_named() -> None:
    def make() -> VecEnv:
        env = SecretVecWrapper(DummyVecEnv([Walk]))
        env.secret = Box(1)  # type: ignore[attr-defined]
        return env

    assert "SecretVecWrapper.secret" in reasons_of(make)


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


class StateMachine(Walk):
    """Its state is one of its methods."""

    def reset(self, **kwargs: Any) -> Any:
        self.phase = self.calm
        return super().reset(**kwargs)

    def calm(self) -> np.ndarray:
        return np.zeros(2)

    def gusts(self) -> np.ndarray:
        return self.np_random.normal(size=2)

    def step(self, action: np.ndarray) -> Any:
        self.position += self.phase()
        if self.left % 5 == 0:
            self.phase = self.gusts if self.phase == self.calm else self.calm
        return super().step(action)


@pytest.mark.parametrize("n_before", [1, 5, 9])
def test_state_that_is_a_method(n_before: int) -> None:
    [tree] = assert_goes_on(dummy(StateMachine), n_before)
    assert "replay" not in tree


class MovingTarget(Walk):
    """A function that each reset makes from numbers of its own."""

    target: Any = None

    def reset(self, **kwargs: Any) -> Any:
        result = super().reset(**kwargs)
        phase = float(self.np_random.uniform())
        self.target = lambda: phase
        return result


class GrowingStart(Walk):
    """A space with other bounds in each episode."""

    def reset(self, **kwargs: Any) -> Any:
        result = super().reset(**kwargs)
        self.start = spaces.Box(-self.n_episodes, self.n_episodes, (2,))
        return result

    def __init__(self) -> None:
        super().__init__()
        self.start = spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(MovingTarget, "target was a function, which a file cannot hold"), (GrowingStart, "had other bounds in start")],
)
def test_functions_and_spaces_that_a_file_cannot_hold(make: Callable[[], gym.Env[Any, Any]], reason: str) -> None:
    env = play(seeded(DummyVecEnv([make])), 40)
    state = through_file(env_state.capture(env))
    [found] = env_state.restore(DummyVecEnv([make]), state, mid_episode=True)
    assert reason in found


class Reader(Walk):
    """Reads its noise from a file."""

    def __init__(self) -> None:
        super().__init__()
        self.file = io.BytesIO(bytes(range(256)))

    def noise(self) -> np.ndarray:
        return np.full(2, self.file.read(1)[0] / 256)


class Tensors(Walk):
    """Position and speed are parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.both = th.zeros(4)
        self.speed = self.both[2:]

    def reset(self, **kwargs: Any) -> Any:
        self.both.zero_()
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        self.speed += 0.1
        self.both[:2] += self.speed
        self.position += self.both[:2].numpy()
        return super().step(action)


@pytest.mark.parametrize("make", [Reader, Tensors])
def test_what_cannot_be_restored_is_replayed(make: Callable[[], gym.Env[Any, Any]]) -> None:
    [tree] = env_state.capture(play(seeded(DummyVecEnv([make])), 3))["envs"]
    assert "replay" in tree
    if make is Tensors:  # a replay does not bring the file to its place
        assert_goes_on(dummy(make), 3, 60)


def test_owners_of_statistics() -> None:
    env = DummyVecEnv([lambda: NormalizeObservation(Walk())])
    assert env_state.owners_of_statistics(env_state.capture(env)) == ["NormalizeObservation"]
    assert env_state.owners_of_statistics(env_state.capture(DummyVecEnv([Walk]))) == []
    assert env_state.owners_of_statistics({"missing": "all"}) == env_state.owners_of_statistics(None) == []
