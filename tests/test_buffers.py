"""The lean replay buffer against a slow, plain one and against SB3's."""

import copy
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softsac import SoftSAC
from sb3_softsac.buffers import ReplayBuffer

ACTION_SPACE = spaces.Box(-1.0, 1.0, (2,))
BOX_SPACE = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float64)
DICT_SPACE = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (1, 2, 2), dtype=np.uint8),
        "state": BOX_SPACE,
        "kind": spaces.Discrete(1000),
    }
)
GAMMA = 0.9


@dataclass
class PlainBuffer:
    """Oracle: whole transitions in a list for each environment, oldest dropped, n-step returns by a loop."""

    capacity: int
    n_steps: int
    rows: list[list[dict[str, Any]]] = field(default_factory=list)

    def add(self, transitions: list[dict[str, Any]]) -> None:
        self.rows.append(transitions)
        self.rows = self.rows[-self.capacity :]

    def transition(self, age_index: int, env_index: int) -> dict[str, Any]:
        """What sampling row ``age_index`` (0: oldest) must give."""
        first = self.rows[age_index][env_index]
        total, discount = 0.0, 1.0
        for k in range(self.n_steps):
            last = self.rows[age_index + k][env_index]
            total += discount * last["reward"]
            discount *= GAMMA
            is_newest = age_index + k == len(self.rows) - 1
            if last["done"] or is_newest or self._broke(age_index + k, env_index):
                break
        return {
            "obs": first["obs"],
            "action": first["action"],
            "reward": total,
            "discount": discount,
            "next_obs": last["next_obs"],
            "done": float(last["done"] and not last["timeout"]),
        }

    def _broke(self, age_index: int, env_index: int) -> bool:
        return self.rows[age_index][env_index]["next_obs"] != self.rows[age_index + 1][env_index]["obs"]


def make_obs(space: spaces.Space, numbers: list[int]) -> Any:
    """Observations (E, ...) that carry a number each."""
    if isinstance(space, spaces.Dict):
        return {
            "image": np.array(numbers, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 1, 2, 2), dtype=np.uint8),
            "state": make_obs(BOX_SPACE, numbers),
            "kind": np.array(numbers) % 1000,
        }
    return np.array(numbers, dtype=np.float64)[:, None] + np.array([0.0, 0.25, 0.5])


def assert_obs_equal(actual: Any, space: spaces.Space, numbers: list[int]) -> None:
    expected = make_obs(space, numbers)
    if not isinstance(expected, dict):
        actual, expected = {"": actual}, {"": expected}
    for key in expected:
        array = np.asarray(actual[key])
        np.testing.assert_array_equal(array.reshape(len(numbers), -1), expected[key].reshape(len(numbers), -1))


# What happens to one environment in one step: nothing, the end of an episode, or an unannounced reset after it
EVENTS = st.sampled_from(["go on", "go on", "go on", "terminated", "truncated", "reset"])


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[list[str]]]:
    n_envs = draw(st.integers(1, 3))
    n_rows = draw(st.integers(1, 25))
    return n_envs, [draw(st.lists(EVENTS, min_size=n_envs, max_size=n_envs)) for _ in range(n_rows)]


def play(history: tuple[int, list[list[str]]], buffers: list[Any], oracle: PlainBuffer, space: spaces.Space) -> None:
    n_envs, rows = history
    numbers = iter(range(1, 10_000))
    obs = [next(numbers) for _ in range(n_envs)]
    for events in rows:
        next_obs = [next(numbers) for _ in range(n_envs)]
        done = np.array([event in ("terminated", "truncated") for event in events])
        infos = [{"TimeLimit.truncated": True} if event == "truncated" else {} for event in events]
        reward = np.array(obs) / 7.0
        action = np.array(obs, dtype=np.float32)[:, None] / np.array([1e4, 2e4], dtype=np.float32)
        for buffer in buffers:
            buffer.add(make_obs(space, obs), make_obs(space, next_obs), action, reward, done, infos)
        oracle.add(
            [
                {
                    "obs": obs[i],
                    "next_obs": next_obs[i],
                    "action": action[i],
                    "reward": reward[i],
                    "done": done[i],
                    "timeout": events[i] == "truncated",
                }
                for i in range(n_envs)
            ]
        )
        obs = [next_obs[i] if events[i] == "go on" else next(numbers) for i in range(n_envs)]


@pytest.mark.parametrize("space", [BOX_SPACE, DICT_SPACE], ids=["box", "dict"])
@given(history=histories(), capacity=st.integers(1, 12), n_steps=st.integers(1, 5))
def test_samples_equal_the_plain_buffers(
    space: spaces.Space, history: tuple[int, list[list[str]]], capacity: int, n_steps: int
) -> None:
    n_envs = history[0]
    buffer = ReplayBuffer(capacity * n_envs, space, ACTION_SPACE, "cpu", n_envs, n_steps=n_steps, gamma=GAMMA)
    oracle = PlainBuffer(capacity, n_steps)
    play(history, [buffer], oracle, space)

    assert buffer.size() == len(oracle.rows)
    oldest = buffer.pos if buffer.full else 0
    ages = np.repeat(np.arange(buffer.size()), n_envs)
    env_indices = np.tile(np.arange(n_envs), buffer.size())
    buffer.rng = FixedEnvIndices(env_indices)  # type: ignore[assignment]
    batch = buffer._get_samples((oldest + ages) % buffer.buffer_size)
    expected = [oracle.transition(age, env) for age, env in zip(ages, env_indices, strict=True)]

    assert_obs_equal(batch.observations, space, [row["obs"] for row in expected])
    assert_obs_equal(batch.next_observations, space, [row["next_obs"] for row in expected])
    np.testing.assert_array_equal(batch.actions, np.stack([row["action"] for row in expected]))
    np.testing.assert_array_equal(batch.dones.ravel(), [row["done"] for row in expected])
    np.testing.assert_allclose(batch.rewards.ravel(), [row["reward"] for row in expected], rtol=1e-5)
    if n_steps == 1:
        assert batch.discounts is None
    else:
        np.testing.assert_allclose(batch.discounts.ravel(), [row["discount"] for row in expected], rtol=1e-6)


@dataclass
class FixedEnvIndices:
    env_indices: np.ndarray

    def integers(self, high: int, size: int) -> np.ndarray:
        assert size == len(self.env_indices)
        return self.env_indices


@pytest.mark.parametrize("space", [BOX_SPACE, DICT_SPACE], ids=["box", "dict"])
@given(history=histories(), capacity=st.integers(1, 12))
def test_attributes_equal_sb3s(space: spaces.Space, history: tuple[int, list[list[str]]], capacity: int) -> None:
    n_envs = history[0]
    sb3_class = DictReplayBuffer if isinstance(space, spaces.Dict) else SB3ReplayBuffer
    buffer, sb3_buffer = (
        buffer_class(capacity * n_envs, space, ACTION_SPACE, "cpu", n_envs)
        for buffer_class in (ReplayBuffer, sb3_class)
    )
    play(history, [buffer, sb3_buffer], PlainBuffer(capacity, 1), space)
    assert (buffer.pos, buffer.full, buffer.size()) == (sb3_buffer.pos, sb3_buffer.full, sb3_buffer.size())
    written = slice(0, buffer.size())
    for name in ("actions", "rewards", "dones", "timeouts", "observations", "next_observations"):
        actual, expected = getattr(buffer, name), getattr(sb3_buffer, name)
        if not isinstance(expected, dict):
            actual, expected = {"": actual}, {"": expected}
        for key in expected:
            assert actual[key].shape == expected[key].shape
            assert len(actual[key]) == len(expected[key])
            np.testing.assert_array_equal(actual[key][written], expected[key][written])


@given(history=histories(), capacity=st.integers(1, 12))
def test_side_storage_holds_each_row_once(history: tuple[int, list[list[str]]], capacity: int) -> None:
    n_envs = history[0]
    buffer = ReplayBuffer(capacity * n_envs, BOX_SPACE, ACTION_SPACE, "cpu", n_envs)
    play(history, [buffer], PlainBuffer(capacity, 1), BOX_SPACE)
    used = sorted((buffer._side_slot[buffer._side_slot > 0] - 1).tolist())
    assert sorted(used + buffer._free_slots) == list(range(len(buffer._side_obs)))
    assert len(buffer._side_obs) <= max(16, 2 * len(used)) or buffer.full


def filled(n_envs: int = 2, rows: int = 30, **kwargs: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(10 * n_envs, BOX_SPACE, ACTION_SPACE, "cpu", n_envs, **kwargs)
    events = [["go on", "terminated", "truncated"][row % 3 if row % 5 == 0 else 0] for row in range(rows)]
    play((n_envs, [[event] * n_envs for event in events]), [buffer], PlainBuffer(10, 1), BOX_SPACE)
    return buffer


def test_next_observations_is_indexed_like_an_array() -> None:
    buffer = filled()
    lazy, array = buffer.next_observations, np.asarray(buffer.next_observations)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    rows, envs = np.array([3, 0, 9]), np.array([1, 0, 1])
    indices: list[Any] = [
        0, -1, slice(2, 5), slice(None, None, -2), rows, [1, 2], (rows[:, None], envs), (rows, slice(None), 1),
        (slice(None), envs), (slice(3, 1), 0), (rows, envs), (rows, envs, slice(None)), (slice(None), 0), (4, 1, 2),
        (slice(None), slice(None), 1), np.arange(10) > 2, array > 5.0,
        Ellipsis, (Ellipsis, 0), (rows, envs, np.array([0, 1, 2])),
    ]  # fmt: skip
    for index in indices:
        np.testing.assert_array_equal(lazy[index], array[index])
    for index in (10, (0, 2), np.array([0, -11])):
        with pytest.raises(IndexError):
            lazy[index]
    assert np.array_equal(list(lazy), array) and np.array_equal(lazy.copy(), array) and lazy.mean() == array.mean()
    assert (lazy.size, lazy.nbytes, lazy.T.shape) == (array.size, array.nbytes, array.T.shape)
    assert copy.deepcopy(lazy).shape == array.shape
    np.testing.assert_array_equal(lazy + 1, array + 1)
    np.testing.assert_array_equal(lazy == array, np.ones_like(array, dtype=bool))
    with pytest.raises(TypeError):
        lazy[0] = 1.0


def test_dtypes_and_memory() -> None:
    buffer = ReplayBuffer(100, DICT_SPACE, ACTION_SPACE, "cpu")
    assert {key: array.dtype for key, array in buffer.observations.items()} == {
        "image": np.uint8,
        "state": np.float32,
        "kind": np.int64,
    }


@pytest.mark.parametrize(
    ("obs_dim", "action_dim", "episode_length", "bytes_per_row"),
    [(17, 6, 1000, 110), (348, 17, 22, 1600)],
    ids=["HalfCheetah", "Humanoid"],
)
def test_memory(obs_dim: int, action_dim: int, episode_length: int, bytes_per_row: int) -> None:
    """The bounds that the documentation states for a million transitions, scaled down."""
    n_rows = 10_000
    space = spaces.Box(-np.inf, np.inf, (obs_dim,), dtype=np.float64)
    buffer = ReplayBuffer(n_rows, space, spaces.Box(-1.0, 1.0, (action_dim,)), "cpu")
    for row in range(2 * n_rows):
        obs = np.full((1, obs_dim), float(row))
        ended = row % episode_length == episode_length - 1
        buffer.add(obs, obs + 1, np.zeros((1, action_dim)), np.zeros(1), np.array([ended]), [{}])
    assert buffer.nbytes <= bytes_per_row * n_rows


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float64])
def test_actions_are_stored_as_float32(dtype: Any) -> None:
    buffer = ReplayBuffer(4, BOX_SPACE, spaces.Box(0, 5, (2,), dtype=dtype), "cpu")
    obs, action = make_obs(BOX_SPACE, [1]), np.array([[-0.25, 0.75]])
    buffer.add(obs, obs, action, np.zeros(1), np.array([False]), [{}])
    sampled = buffer.sample(3).actions
    assert sampled.dtype == th.float32
    np.testing.assert_array_equal(sampled, np.repeat(action, 3, axis=0))


@pytest.mark.parametrize("shape", [(1, 4), (3,), (1, 3, 1), (2, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    buffer = ReplayBuffer(4, BOX_SPACE, ACTION_SPACE, "cpu")
    with pytest.raises(ValueError, match="the observation space"):
        buffer.add(np.zeros(shape), np.zeros(shape), np.zeros((1, 2)), np.zeros(1), np.array([False]), [{}])


@pytest.mark.parametrize("wrong", ["action", "reward", "done", "infos"])
def test_refused_transition_leaves_nothing_behind(wrong: str) -> None:
    buffer = filled(n_envs=2)
    before = pickle.dumps(buffer)
    arguments: dict[str, Any] = {
        "obs": make_obs(BOX_SPACE, [1, 2]), "next_obs": make_obs(BOX_SPACE, [3, 4]), "action": np.zeros((2, 2)),
        "reward": np.zeros(2), "done": np.zeros(2, dtype=bool), "infos": [{}, {}],
    }  # fmt: skip
    arguments[wrong] = arguments[wrong][:1]
    with pytest.raises(ValueError):
        buffer.add(**arguments)
    assert pickle.dumps(buffer) == before


def test_reading_one_row_does_not_read_the_buffer() -> None:
    """Indexing asks the buffer for just the rows it names."""
    buffer = filled(n_envs=2)
    asked: list[int] = []
    get = buffer.get_next_obs
    buffer.get_next_obs = lambda places: asked.append(len(places)) or get(places)  # type: ignore[method-assign,func-returns-value]
    _ = buffer.next_observations[3], buffer.next_observations[np.array([1, 2, 3]), 0], buffer.next_observations[4:6, 1]
    assert asked == [2, 3, 2]


def test_nan_observations_are_no_break() -> None:
    buffer = ReplayBuffer(50, BOX_SPACE, ACTION_SPACE, "cpu")
    obs = np.array([[np.nan, 1.0, 2.0]])
    for _ in range(40):
        buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.array([False]), [{}])
    assert not buffer._side_slot.any()


def test_warns_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10))
    monkeypatch.setattr("sb3_softsac.buffers.psutil", fake)
    with pytest.warns(UserWarning, match="consider a smaller buffer_size"):
        ReplayBuffer(4, BOX_SPACE, ACTION_SPACE, "cpu")


def test_random_stream_is_not_the_action_spaces() -> None:
    buffer = ReplayBuffer(4, BOX_SPACE, ACTION_SPACE, "cpu")
    buffer.seed(5)
    assert not np.array_equal(buffer.rng.random(4), np.random.default_rng(5).random(4))


def test_batch_is_a_copy() -> None:
    buffer = filled()
    buffer.seed(0)
    batch = buffer.sample(64)
    before = copy.deepcopy(buffer.observations)
    for tensor in (batch.observations, batch.next_observations, batch.actions, batch.rewards):
        tensor.fill_(-1.0)
    np.testing.assert_array_equal(buffer.observations, before)
    assert all(tensor.dtype == th.float32 for tensor in batch if tensor is not None)


def test_add_keeps_nothing_by_reference() -> None:
    buffer = ReplayBuffer(4, BOX_SPACE, ACTION_SPACE, "cpu")
    obs, next_obs = make_obs(BOX_SPACE, [1]), make_obs(BOX_SPACE, [2])
    buffer.add(obs, next_obs, np.zeros((1, 2)), np.zeros(1), np.array([False]), [{}])
    obs[:], next_obs[:] = 77.0, 77.0
    assert_obs_equal(buffer.observations[:1, 0], BOX_SPACE, [1])
    assert_obs_equal(buffer.next_observations[:1, 0], BOX_SPACE, [2])


def test_extend_adds_unrelated_transitions() -> None:
    """Demonstrations, say: nothing says that a row follows from the one before."""
    buffer = ReplayBuffer(10, BOX_SPACE, ACTION_SPACE, "cpu")
    obs, next_obs = (np.stack([make_obs(BOX_SPACE, [first + 10 * i]) for i in range(6)]) for first in (1, 2))
    zeros = np.zeros((6, 1))
    buffer.extend(obs, next_obs, np.zeros((6, 1, 2)), zeros, zeros, [[{}]] * 6)
    np.testing.assert_array_equal(buffer.observations[:6], obs)
    np.testing.assert_array_equal(buffer.next_observations[:6], next_obs)


def test_sampling_has_a_random_state_of_its_own() -> None:
    buffer = filled()
    buffer.seed(3)
    np.random.seed(0)
    first = buffer.sample(50)
    buffer.seed(3)
    np.random.seed(1)
    second = buffer.sample(50)
    assert th.equal(first.observations, second.observations)
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    buffer.sample(50)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_sampling_is_uniform() -> None:
    buffer = filled(n_envs=3)
    buffer.seed(0)
    numbers = buffer.sample(60_000).observations[:, 0].numpy()
    values, counts = np.unique(numbers, return_counts=True)
    assert len(values) == 30
    assert np.abs(counts / 2000.0 - 1.0).max() < 0.15  # 6.7 standard deviations


def test_pickle_and_deepcopy_go_on_alike() -> None:
    buffer = filled(n_steps=3)
    for twin in (pickle.loads(pickle.dumps(buffer)), copy.deepcopy(buffer)):
        state = copy.deepcopy(buffer.rng.bit_generator.state)
        expected = buffer.sample(20)
        buffer.rng.bit_generator.state = state
        for ours, theirs in zip(expected, twin.sample(20), strict=True):
            assert th.equal(ours, theirs)


def test_reset_forgets_everything() -> None:
    buffer = filled()
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    play((2, [["go on", "terminated"], ["go on", "go on"]]), [buffer], PlainBuffer(10, 1), BOX_SPACE)
    assert_obs_equal(buffer.next_observations[:2].reshape(4, 3), BOX_SPACE, [3, 4, 6, 7])


def test_timeouts_can_be_treated_as_termination() -> None:
    buffer = filled(handle_timeout_termination=False)
    assert not buffer.timeouts.any()
    assert buffer.dones.any()


@pytest.mark.parametrize("n_steps", [1, 3])
def test_normalises_when_sampling(n_steps: int) -> None:
    def make_env() -> Any:
        import gymnasium as gym

        return gym.make("Pendulum-v1")

    env = VecNormalize(DummyVecEnv([make_env]))
    env.obs_rms.mean, env.obs_rms.var = np.full(3, 5.0), np.full(3, 4.0)
    env.ret_rms.var = np.array(9.0)
    buffer = filled(n_envs=1, n_steps=n_steps)
    buffer.seed(0)
    plain = buffer.sample(16)
    buffer.seed(0)
    normalised = buffer.sample(16, env=env)
    expected = th.clamp((plain.next_observations - 5) / 2, -10, 10)
    np.testing.assert_allclose(normalised.next_observations, expected, rtol=1e-5)
    expected = th.clamp((plain.observations - 5) / 2, -10, 10)
    np.testing.assert_allclose(normalised.observations, expected, rtol=1e-5)
    np.testing.assert_allclose(normalised.rewards, th.clamp(plain.rewards / 3, -10, 10), rtol=1e-5)
    assert normalised.rewards.dtype == th.float32


@pytest.mark.parametrize("n_steps", [1, 3])
def test_time_limit_bootstraps_and_termination_does_not(n_steps: int) -> None:
    """In a whole run: dones are 0 where the time limit ended the episode, with the terminal observation as next."""
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=10_000, n_steps=n_steps, device="cpu")
    model.learn(401)
    buffer = model.replay_buffer
    assert buffer.dones[199, 0] == buffer.timeouts[199, 0] == 1.0
    batch = buffer._get_samples(np.array([199, 198]))
    assert batch.dones.sum() == 0.0
    # the terminal observation follows from the last one; that of the reset does not
    assert np.linalg.norm(batch.next_observations[0].numpy() - buffer.observations[199, 0]) < 1.5
    assert not np.array_equal(batch.next_observations[0].numpy(), buffer.observations[200, 0])


def test_optimize_memory_usage_has_nothing_left_to_do() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", optimize_memory_usage=True, learning_starts=50, device="cpu")
    model.learn(60)
    model.learn(60)  # SB3 would warn and cut the last episode here
    assert isinstance(model.replay_buffer, ReplayBuffer)
    assert not model.replay_buffer.dones.any()
    # the unannounced reset between the two is kept apart
    assert not np.array_equal(model.replay_buffer.next_observations[59], model.replay_buffer.observations[60])


@pytest.mark.parametrize("index", [[0] * 30, [3, 1], [4]])
def test_rows_with_a_wrong_index_are_refused(index: list[int]) -> None:
    """It may come from a hostile file: more entries than rows had made the buffer grow without end."""
    buffer = ReplayBuffer(20, BOX_SPACE, ACTION_SPACE, "cpu")
    for _ in range(4):
        buffer.add(np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 2)), np.zeros(1), np.ones(1), [{}])
    rows = {**buffer.get_rows(0, 4), "side_index": np.array(index), "side_observations": np.zeros((len(index), 3))}
    with pytest.raises(ValueError, match="side_index"):
        ReplayBuffer(20, BOX_SPACE, ACTION_SPACE, "cpu").set_rows(0, rows)
