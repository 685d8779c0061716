"""The scale of rewards, against a plain loop over a recorded series, and where it is applied."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from twins import SMALL

from sb3_softsac import ReplayBuffer, SoftSAC
from sb3_softsac.execution.device_replay import StoredBatch, with_scaled_rewards
from sb3_softsac.reward_scale import RewardScale

GAMMA = 0.9


def series(n_steps: int, n_envs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n_envs)
    return rng.normal(1.0, 3.0, (n_steps, n_envs)).astype(np.float32), rng.random((n_steps, n_envs)) < 0.1


def returns_slowly(rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
    """Discounted returns since each episode's beginning, in each step and environment."""
    returns = []
    for env in range(rewards.shape[1]):
        current: list[float] = []
        for reward, done in zip(rewards[:, env].tolist(), dones[:, env], strict=True):
            current.append(reward)
            returns.append(sum(GAMMA ** (len(current) - 1 - i) * r for i, r in enumerate(current)))
            if done:
                current = []
    return np.array(returns)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_divisor(n_envs: int) -> None:
    rewards, dones = series(200, n_envs)
    scale = RewardScale(GAMMA)
    for step in range(len(rewards)):
        scale.update(rewards[step], dones[step])
    expected = returns_slowly(rewards, dones)
    assert scale.divisor() == pytest.approx(expected.std(), rel=1e-3)
    assert scale.divisor(5.0) == pytest.approx(max(expected.std(), np.abs(expected).max() / 5.0), rel=1e-3)
    assert scale.divisor(0.5) == pytest.approx(np.abs(expected).max() / 0.5, rel=1e-6)


def test_new_episodes_and_other_environments() -> None:
    scale = RewardScale(GAMMA)
    scale.update(np.array([3.0, 4.0]), np.array([False, False]))
    scale.update(np.array([1.0, 1.0]), np.array([True, False]))
    np.testing.assert_allclose(scale.returns, [0.0, 1.0 + GAMMA * 4.0])
    scale.update(np.array([1.0, 1.0, 1.0]), np.array([False] * 3))
    np.testing.assert_allclose(scale.returns, 1.0)
    scale.end_episodes()
    scale.update(np.array([2.0, 2.0, 2.0]), np.array([False] * 3))
    np.testing.assert_allclose(scale.returns, 2.0)
    assert scale.max_return == pytest.approx(1.0 + GAMMA * 4.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("from_buffer", [False, True])
def test_rewards_that_are_not_finite_are_left_out(bad: float, from_buffer: bool) -> None:
    scale = RewardScale(GAMMA)
    rewards = np.array([[1.0, 2.0], [bad, 2.0], [1.0, bad], [bad, bad]], dtype=np.float32)
    if from_buffer:
        box = spaces.Box(-1.0, 1.0, (1,))
        buffer = SB3ReplayBuffer(8, box, box, "cpu", n_envs=2)
        for row in rewards:
            buffer.add(*np.zeros((3, 2, 1)), row, np.zeros(2), [{}, {}])
        scale.update_from(buffer)
    else:
        for row in rewards:
            scale.update(row, np.zeros(2, dtype=bool))
    kept = np.array([1.0, 2.0, 2.0 + 2.0 * GAMMA, 1.0 + GAMMA**2])
    assert scale.statistics.count == pytest.approx(4, abs=1e-3)
    assert scale.divisor() == pytest.approx(kept.std(), rel=1e-3) and scale.max_return == pytest.approx(kept.max())
    np.testing.assert_allclose(scale.returns, [GAMMA + GAMMA**3, GAMMA**2 * kept[2]])


def sampled_rewards(model: SoftSAC) -> np.ndarray:
    assert model.replay_buffer is not None
    (minibatches,) = model._draws(1, 64, None)
    return minibatches.samples.rewards.numpy()


BUFFERS: dict[str, dict[str, Any]] = {
    "own": {}, "n_steps": {"n_steps": 3}, "sb3": {"replay_buffer_class": SB3ReplayBuffer},
    "her": {"replay_buffer_class": HerReplayBuffer, "learning_starts": 40},
}  # fmt: skip


@pytest.mark.parametrize("buffer", BUFFERS)
def test_sampled_rewards_are_divided(buffer: str) -> None:
    is_her = buffer == "her"
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=True, max_steps=6)) if is_her else "Pendulum-v1"
    options = {**SMALL, "normalize_rewards": "std", "buffer_size": 1000, **BUFFERS[buffer]}
    model = SoftSAC("MultiInputPolicy" if is_her else "MlpPolicy", env, **options).learn(60)
    divisor = model._reward_divisor()
    assert divisor != pytest.approx(1.0, abs=0.05)
    assert model.logger.name_to_value["train/reward_scale"] == pytest.approx(divisor, rel=0.2)
    states = []
    for normalize_rewards in ("std", None):
        np.random.seed(0)
        if buffer in ("own", "n_steps"):
            model.replay_buffer.seed(0)  # type: ignore[union-attr]
        model.normalize_rewards = normalize_rewards
        states.append(sampled_rewards(model))
    np.testing.assert_allclose(states[0] * divisor, states[1], rtol=1e-5)


def test_time_limits_end_episodes_too() -> None:
    env = make_vec_env("Pendulum-v1", n_envs=2, env_kwargs={"max_episode_steps": 10})
    model = SoftSAC("MlpPolicy", env, normalize_rewards="std", **SMALL).learn(20)
    assert model._reward_scale is not None
    np.testing.assert_array_equal(model._reward_scale.returns, 0.0)
    assert model._reward_scale.statistics.count == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("with_env", [True, False])
def test_it_is_saved(with_env: bool, tmp_path: Path) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", normalize_rewards="std", **SMALL).learn(50)
    model.save(tmp_path / "model")
    assert model._reward_scale is not None and model._reward_scale.returns.any()
    loaded = SoftSAC.load(tmp_path / "model", model.env if with_env else None)
    assert loaded._reward_scale is not None and loaded._reward_divisor() == model._reward_divisor()
    if with_env:
        loaded.learn(1)  # in a new episode
        assert len(loaded._reward_scale.returns) == 1
        assert abs(loaded._reward_scale.returns[0]) < 17.0  # one step's reward is above -16.3


def test_it_can_begin_at_load(tmp_path: Path) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **SMALL).learn(30)
    model.save(tmp_path / "model")
    other = SoftSAC("MlpPolicy", "Pendulum-v1", normalize_rewards="std", **SMALL).learn(30)
    loaded = SoftSAC.load(tmp_path / "model", model.env, normalize_rewards="std")
    assert loaded._reward_divisor() == pytest.approx(other._reward_divisor(), rel=1e-5)
    loaded.learn(10)
    assert loaded._reward_scale is not None and loaded._reward_scale.statistics.count == pytest.approx(40, abs=1e-3)


@pytest.mark.parametrize("buffer_class", [ReplayBuffer, SB3ReplayBuffer])
def test_it_begins_with_a_buffer(buffer_class: type[SB3ReplayBuffer]) -> None:
    """A ring, whose episodes end nowhere but in ``ends``: they were cut off. SB3's needs ``dones``."""
    rewards, ends = series(200, 1)
    ends[-1] = True
    space = spaces.Box(-1.0, 1.0, (1,))
    buffer = buffer_class(120, space, space, device="cpu")
    for rows in np.split(np.arange(200), np.flatnonzero(ends)[:-1] + 1):
        if isinstance(buffer, ReplayBuffer):
            none = np.zeros(len(rows), dtype=bool)
            episode = {"observations": np.zeros((len(rows) + 1, 1)), "actions": np.zeros((len(rows), 1))}
            buffer.add_dataset([{**episode, "rewards": rewards[rows, 0], "terminations": none, "truncations": none}])
        else:
            for row in rows:
                buffer.add(np.zeros(1), np.zeros(1), np.zeros(1), rewards[row], ends[row], [{}])
    scale, expected = RewardScale(GAMMA), returns_slowly(rewards[80:], ends[80:])
    scale.update_from(buffer)
    assert scale.max_return == pytest.approx(np.abs(expected).max())
    assert scale.divisor() == pytest.approx(expected.std(), rel=1e-3)
    np.testing.assert_array_equal(scale.returns, 0.0)


def test_nothing_is_scaled_before_the_first_reward() -> None:
    """Relabelled rewards of hindsight replay would become thousands."""
    scale = RewardScale(GAMMA)
    for _ in range(100):
        scale.update(np.zeros(2), np.zeros(2, dtype=bool))
    assert scale.divisor() == scale.divisor(5.0) == 1.0
    scale.update(np.array([0.0, 2.0]), np.zeros(2, dtype=bool))
    assert scale.divisor(5.0) == pytest.approx(0.4)


def test_dones_may_be_integers() -> None:
    """SubprocVecEnv passes on what an environment returns."""
    scale = RewardScale(GAMMA)
    for dones in (np.array([0, 0]), np.array([0, 1])):
        scale.update(np.array([1.0, 1.0]), dones)
    np.testing.assert_allclose(scale.returns, [1.0 + GAMMA, 0.0])


def test_bound_is_that_of_the_support() -> None:
    networks = {"n_atoms": 21, "v_min": -8.0, "v_max": 20.0, "net_arch": [8]}
    options = {**SMALL, "policy_kwargs": networks, "normalize_rewards": "bounded"}
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **options).learn(60)
    assert model._reward_scale is not None
    std, largest = model._reward_scale.divisor(), model._reward_scale.max_return
    assert model._reward_divisor() == max(std, largest / 8.0)
    model._reward_scale.max_return = 100.0 * largest
    assert model._reward_divisor() == pytest.approx(100.0 * largest / 8.0)
    networks |= {"v_max": -1.0}
    with pytest.raises(ValueError, match="normalize_rewards='bounded' needs a support around 0"):
        SoftSAC("MlpPolicy", "Pendulum-v1", **options)


def test_rewards_of_a_batch_that_is_not_gathered_yet() -> None:
    batch = StoredBatch(th.zeros(3, 2, dtype=th.int64), th.arange(9.0).reshape(3, 3))
    scaled = with_scaled_rewards(batch, 0.5)
    assert scaled.numbers.tolist() == [[0.0, 1.0, 2.0], [1.5, 4.0, 5.0], [3.0, 7.0, 8.0]]
    assert batch.numbers[1, 0] == 3.0 and scaled.places is batch.places


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.99), (0.99, 0.5)])
@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("kind", ["std", "bounded"])
def test_other_discount_factor(tmp_path: Path, before: float, after: float, is_loaded: bool, kind: str) -> None:
    """Returns that are discounted otherwise have another scale, and the largest one would stay for good."""
    options = {**SMALL, "policy_kwargs": {"n_atoms": 21, "net_arch": [8]}, "normalize_rewards": kind}
    if kind == "std":
        options["policy_kwargs"] = {"net_arch": [8]}
    model = SoftSAC("MlpPolicy", "Pendulum-v1", gamma=before, **options).learn(120)
    if is_loaded:
        model.save(tmp_path / "model.zip")
        model = SoftSAC.load(tmp_path / "model.zip", "Pendulum-v1", gamma=after)
    model.gamma = after
    model.learn(30, reset_num_timesteps=False)
    assert model._reward_scale is not None and model.replay_buffer is not None
    expected = RewardScale(after)
    expected.update_from(model.replay_buffer)
    assert model._reward_scale.max_return == pytest.approx(expected.max_return)
    assert model._reward_scale.divisor() == pytest.approx(expected.divisor(), rel=1e-3)


def large_episode() -> dict[str, np.ndarray]:
    none = np.zeros(20, dtype=bool)
    rewards = np.full(20, -1e4)
    return {"observations": np.zeros((21, 3)), "actions": np.zeros((20, 1)), "rewards": rewards,
            "terminations": none, "truncations": none}  # fmt: skip


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("way", ["dataset", "file", "buffer", "none"])
def test_later_data_stays_within_the_bound(way: str, is_saved: bool, tmp_path: Path) -> None:
    """The first learn() begins with what is in the buffer; what comes from elsewhere after it counts as well."""
    options = {**SMALL, "policy_kwargs": {"n_atoms": 21, "net_arch": [8]}, "normalize_rewards": "bounded"}
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **options).learn(40)
    assert model.replay_buffer is not None and model._reward_scale is not None
    before, var = model._reward_scale.max_return, model._reward_scale.statistics.var
    other = SoftSAC("MlpPolicy", "Pendulum-v1", **options)
    assert other.replay_buffer is not None
    other.replay_buffer.add_dataset([large_episode()])
    if way == "dataset":
        model.replay_buffer.add_dataset([large_episode()])
    elif way == "file":
        other.save_replay_buffer(tmp_path / "buffer")
        model.load_replay_buffer(tmp_path / "buffer")
    elif way == "buffer":
        model.replay_buffer = other.replay_buffer
    if is_saved:
        model.save(tmp_path / "model")
        model = SoftSAC.load(tmp_path / "model", "Pendulum-v1")
    model.learn(0, reset_num_timesteps=False)
    assert model._reward_scale is not None and model._reward_scale.statistics.var == var
    largest = pytest.approx(1e4 * (1 - 0.99**20) / (1 - 0.99), rel=1e-5)
    assert model._reward_scale.max_return == (before if way == "none" else largest)


@pytest.mark.parametrize("buffer_class", [None, SB3ReplayBuffer])
def test_it_begins_with_episodes_that_resets_have_ended(buffer_class: type[SB3ReplayBuffer] | None) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", replay_buffer_class=buffer_class, **SMALL)
    for _ in range(4):
        model.learn(10)
    assert model.replay_buffer is not None
    model.normalize_rewards = "std"
    model.learn(0)
    rewards = model.replay_buffer.rewards[:40].astype(np.float64).reshape(4, 10)
    expected = [
        abs(sum(0.99 ** (step - i) * r for i, r in enumerate(row[: step + 1]))) for row in rewards for step in range(10)
    ]
    assert model._reward_scale is not None
    assert model._reward_scale.max_return == pytest.approx(max(expected), rel=1e-5)


def test_gamma_in_custom_objects(tmp_path: Path) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", normalize_rewards="std", **SMALL).learn(60)
    model.save(tmp_path / "model")
    divisors = [
        SoftSAC.load(tmp_path / "model", "Pendulum-v1", **kwargs)._reward_divisor()
        for kwargs in ({}, {"gamma": 0.5}, {"custom_objects": {"gamma": 0.5}})
    ]
    assert divisors[0] == model._reward_divisor() and divisors[1] == divisors[2] < 0.5 * divisors[0]
