"""Episodes that are replayed, since the state of the environment cannot be read."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from env_tools import (
    ClipsInPlace,
    HiddenFromEntropy,
    HiddenRobot,
    StepsInReset,
    Unreadable,
    UnreadableFromEntropy,
    UnreadableFromGlobal,
    Views,
    Walk,
    assert_goes_on,
    assert_same_future,
    dummy,
    envs_of,
    play,
    reasons_of,
    seeded,
    short,
    through_file,
)
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_softsac.persistence.envs import env_state, episode_replay

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning", "ignore:.*settotalmass.*")
BOX2D_TASKS = ["BipedalWalker-v3", "LunarLanderContinuous-v3"]


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


def test_without_a_seed() -> None:
    env = DummyVecEnv([Unreadable])
    env_state.prepare(env)
    env.reset()
    other = DummyVecEnv([Unreadable])
    assert env_state.restore(other, through_file(env_state.capture(play(env, 3))), mid_episode=True) == []


def test_recorder_only_where_it_is_needed() -> None:
    cases = [("HalfCheetah-v5", False), ("Pendulum-v1", False)]
    for env_id, is_recorded in cases:
        env = seeded(DummyVecEnv([short(env_id)]))
        assert (episode_replay.RECORDER in vars(envs_of(env)[0].unwrapped)) is is_recorded
    env = seeded(DummyVecEnv([Walk]))
    play(env, 100)
    assert not {episode_replay.RECORDER, "step", "reset"} & vars(envs_of(env)[0]).keys()
    env = play(seeded(DummyVecEnv([Unreadable])), 100)
    recorder = vars(envs_of(env)[0])[episode_replay.RECORDER]
    env_state.prepare(env)
    assert vars(envs_of(env)[0])[episode_replay.RECORDER] is recorder


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
