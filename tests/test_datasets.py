"""Datasets into replay buffers and out of them."""

import copy
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import resume_script
from fsspec.implementations.memory import MemoryFileSystem
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from resume_script import differences, pendulum, plain
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_softsac import CheckpointCallback, CheckpointError, ReplayBuffer, SoftSAC, checkpoint, datasets
from sb3_softsac.buffers import map_obs, rows_by_age
from sb3_softsac.execution import device_replay
from sb3_softsac.persistence import atomic_files

BOX = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float64)
ACTIONS = spaces.Box(np.array([-2.0, 0.0], dtype=np.float32), np.array([2.0, 10.0], dtype=np.float32))
DICT = spaces.Dict({"state": BOX, "kind": spaces.Discrete(5), "image": spaces.Box(0, 255, (3, 36, 40), np.uint8)})
SPACES: dict[str, spaces.Space[Any]] = {"box": BOX, "dict": DICT, "discrete": spaces.Discrete(4)}
PENDULUM = spaces.Box(-np.array([1, 1, 8], np.float32), np.array([1, 1, 8], np.float32)), spaces.Box(-2.0, 2.0, (1,))
GAMMA = 0.9
SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16]}, "buffer_size": 500, "learning_starts": 30, "batch_size": 8, "seed": 0,
    "device": "cpu",
}  # fmt: skip


def draw_obs(space: spaces.Space[Any], n: int, rng: np.random.Generator) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: draw_obs(part, n, rng) for key, part in space.items()}
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.n, size=n)
    assert isinstance(space, spaces.Box)
    if space.dtype == np.uint8:
        return rng.integers(256, size=(n, *space.shape), dtype=np.uint8)
    return rng.normal(size=(n, *space.shape))


def draw_episode(n_steps: int, space: spaces.Space[Any], rng: np.random.Generator, end: str = "truncations") -> Any:
    is_last = np.arange(n_steps) == n_steps - 1
    return {
        "observations": draw_obs(space, n_steps + 1, rng),
        "actions": rng.uniform(ACTIONS.low, ACTIONS.high, size=(n_steps, 2)).astype(np.float32),
        "rewards": rng.normal(size=n_steps),
        "terminations": is_last & (end == "terminations"),
        "truncations": is_last & (end == "truncations"),
    }


def draw_dataset(space: spaces.Space[Any], lengths: list[int], seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    ends = rng.choice(["terminations", "truncations", "none"], size=len(lengths))
    return [draw_episode(n_steps, space, rng, end) for n_steps, end in zip(lengths, ends, strict=True)]


def make_buffer(space: spaces.Space[Any] = BOX, size: int = 100, n_envs: int = 1, **kwargs: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(size, space, ACTIONS, device="cpu", n_envs=n_envs, gamma=GAMMA, **kwargs)
    buffer.seed(0)
    return buffer


def contents(buffer: ReplayBuffer) -> Any:
    """Everything that the buffer consists of, the random state too."""
    state = copy.deepcopy(vars(buffer))
    state["rng"] = buffer.rng.bit_generator.state
    return {name: value for name, value in state.items() if not name.endswith("_space")}


def assert_same(expected: Any, actual: Any) -> None:
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys()
        for key in expected:
            assert_same(expected[key], actual[key])
    else:
        np.testing.assert_array_equal(expected, actual)


@dataclass
class Step:
    """Oracle: a transition with all that belongs to it, and whether its successor is the next in the list."""

    obs: Any
    action: np.ndarray
    reward: float
    next_obs: Any
    terminated: bool
    goes_on: bool


def steps_of(dataset: list[Any]) -> list[Step]:
    steps = []
    for episode in dataset:
        n_steps = len(episode["rewards"])
        for t in range(n_steps):
            steps.append(
                Step(
                    map_obs(lambda array, t=t: array[t], episode["observations"]),
                    (episode["actions"][t] - ACTIONS.low) / (ACTIONS.high - ACTIONS.low) * 2 - 1,
                    float(episode["rewards"][t]),
                    map_obs(lambda array, t=t: array[t + 1], episode["observations"]),
                    bool(episode["terminations"][t]),
                    t < n_steps - 1,
                )
            )
    return steps


def check_sample(steps: list[Step], place: int, n_steps: int, sample: Any) -> None:
    """Compare one transition, sampled as a batch of 1, with the oracle."""
    total, discount, last = 0.0, 1.0, place
    for last in range(place, place + n_steps):
        total, discount = total + discount * steps[last].reward, discount * GAMMA
        if last + 1 == len(steps) or not steps[last].goes_on:
            break
    for expected, actual in (
        (steps[place].obs, sample.observations),
        (steps[last].next_obs, sample.next_observations),
    ):
        map_obs(lambda e, a: np.testing.assert_allclose(np.ravel(e), np.ravel(a), rtol=1e-6), expected, actual)
    np.testing.assert_allclose(sample.actions[0], steps[place].action, atol=1e-6)
    np.testing.assert_allclose(sample.rewards.item(), total, rtol=1e-5, atol=1e-6)
    assert sample.dones.item() == steps[last].terminated
    if n_steps > 1:
        assert sample.discounts.item() == pytest.approx(discount)


# --- Into a buffer ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*were left out")
@given(st.data())
def test_every_transition(data: st.DataObject) -> None:
    """In any number of parts, over what is there already, in rings that close, with n-step returns."""
    space = SPACES[data.draw(st.sampled_from(["box", "dict", "discrete"]))]
    n_envs, n_steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    n_rows = data.draw(st.integers(1, 25))
    buffer = make_buffer(space, n_rows * n_envs, n_envs, n_steps=n_steps)
    columns: list[list[Step]] = [[] for _ in range(n_envs)]
    for part in range(data.draw(st.integers(1, 3))):
        dataset = draw_dataset(space, data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5)), part)
        steps = steps_of(dataset)
        if not steps:
            continue
        n_new = min(len(steps) // n_envs, n_rows)
        assert buffer.add_dataset(dataset) == n_new * n_envs
        if n_new == 0:
            continue
        kept = steps[len(steps) - n_new * n_envs :]
        for e, column in enumerate(columns):
            if column:
                column[-1].goes_on = False
            column += kept[e * n_new : (e + 1) * n_new]
            column[-1].goes_on = False
            # Some steps of the run in between, in an episode that goes on
        n_own = data.draw(st.integers(0, 3))
        rng = np.random.default_rng(part)
        obs = [draw_obs(space, n_own + 1, rng) for _ in range(n_envs)]
        for t in range(n_own):
            obs_of_t = [map_obs(lambda array, t=t: array[t], each) for each in obs]
            next_obs_of_t = [map_obs(lambda array, t=t: array[t + 1], each) for each in obs]
            buffer.add(
                map_obs(lambda *arrays: np.stack(arrays), *obs_of_t),
                map_obs(lambda *arrays: np.stack(arrays), *next_obs_of_t),
                np.zeros((n_envs, 2)), np.ones(n_envs), np.zeros(n_envs), [{}] * n_envs,
            )  # fmt: skip
            for e, column in enumerate(columns):
                column.append(Step(obs_of_t[e], np.zeros(2), 1.0, next_obs_of_t[e], False, True))
    assert buffer.size() == min(len(columns[0]), n_rows)
    for e, column in enumerate(columns):
        kept = column[-n_rows:]
        for age in range(buffer.size()):
            row = (age + (buffer.pos if buffer.full else 0)) % buffer.buffer_size
            check_sample(kept, age, n_steps, sample_at(buffer, row, e))


def sample_at(buffer: ReplayBuffer, row: int, env_index: int) -> Any:
    """A batch of one certain transition."""
    rng, buffer.rng = buffer.rng, SimpleNamespace(integers=lambda *args, **kwargs: np.array([env_index]))  # type: ignore[assignment]
    try:
        return buffer._get_samples(np.array([row]))
    finally:
        buffer.rng = rng


def test_time_limits_bootstrap() -> None:
    rng = np.random.default_rng(0)
    for end, done in (("terminations", 1.0), ("truncations", 0.0), ("none", 0.0)):
        buffer = make_buffer()
        episode = draw_episode(1, BOX, rng, end)
        # What both says is a termination, as in Gymnasium
        episode["truncations"] |= episode["terminations"]
        assert buffer.add_dataset([episode]) == 1
        sample = buffer.sample(1)
        assert sample.dones.item() == done
        np.testing.assert_allclose(sample.next_observations[0], episode["observations"][1], rtol=1e-6)
    # A user who asks for it gets time limits as terminations, but not what was cut off
    for end, done in (("truncations", 1.0), ("none", 0.0)):
        buffer = make_buffer(handle_timeout_termination=False)
        buffer.add_dataset([draw_episode(1, BOX, rng, end)])
        assert buffer.sample(1).dones.item() == done


def test_episode_that_ends_in_the_middle() -> None:
    """Some datasets hold several episodes in one, or go on behind a termination."""
    episode = draw_episode(6, BOX, np.random.default_rng(0))
    episode["terminations"][2] = True
    buffer = make_buffer(n_steps=3)
    buffer.add_dataset([episode])
    for row, n_rewards, done in ((0, 3, 1.0), (1, 2, 1.0), (2, 1, 1.0), (3, 3, 0.0), (5, 1, 0.0)):
        sample = sample_at(buffer, row, 0)
        assert sample.discounts.item() == pytest.approx(GAMMA**n_rewards)
        assert sample.dones.item() == done


def test_objects_iterators_and_images_with_channels_last() -> None:
    episodes = draw_dataset(DICT, [4, 3])
    buffers = [make_buffer(DICT) for _ in range(3)]
    buffers[0].add_dataset(episodes)
    buffers[1].add_dataset(SimpleNamespace(**episode) for episode in episodes)
    for episode in episodes:
        episode["observations"]["image"] = np.moveaxis(episode["observations"]["image"], 1, -1)
        episode["observations"]["unused"] = np.zeros(3)
    buffers[2].add_dataset(episodes)
    for buffer in buffers[1:]:
        assert_same(contents(buffers[0]), contents(buffer))


def test_other_buffers() -> None:
    theirs = SB3ReplayBuffer(10, BOX, ACTIONS, device="cpu")
    theirs.add(np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 2)), np.ones(1), np.ones(1), [{}])
    buffer = make_buffer()
    assert buffer.add_dataset(theirs) == 1
    assert buffer.sample(1).rewards.item() == 1.0
    for _ in range(15):
        theirs.add(np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 2)), np.ones(1), np.zeros(1), [{}])
    small = make_buffer(size=4)
    with pytest.warns(UserWarning, match=r"6 of 10 transitions, the oldest, were left out.*buffer_size=4") as caught:
        assert small.add_dataset(theirs) == 4
    assert caught[0].filename == __file__
    theirs.rewards[3] = np.nan
    other = spaces.Box(-1.0, 1.0, (4,))
    for wrong, message in (
        (theirs, "rewards of the other replay buffer has values that are not finite, in row 3"),
        (
            SB3ReplayBuffer(10, other, ACTIONS, "cpu"),
            r"observations .* has the shape \(0, 1, 4\), expected \(0, 1, 3\)",
        ),
        (SB3ReplayBuffer(10, BOX, other, "cpu"), r"actions .* has the shape \(0, 1, 4\), expected \(0, 1, 2\)"),
        (DictReplayBuffer(10, DICT, ACTIONS, "cpu"), "no observations, only .*'observations.state'"),
    ):
        with pytest.raises(ValueError, match=message):
            small.add_dataset(wrong)
    assert small.size() == 4 and np.isfinite(small.rewards).all()


def test_actions_beyond_the_bounds_are_clipped_with_one_warning() -> None:
    episodes = draw_dataset(BOX, [5, 5])
    episodes[0]["actions"][0] = [-3.0, 11.0]
    episodes[1]["actions"][2, 0] = 2.5
    buffer = make_buffer()
    with pytest.warns(UserWarning, match=r"3 action component\(s\) .* by up to 25.0% of its range") as caught:
        buffer.add_dataset(episodes)
    assert len(caught) == 1 and caught[0].filename == __file__
    np.testing.assert_array_equal(buffer.actions[0, 0], [-1.0, 1.0])
    assert buffer.actions[7, 0, 0] == 1.0
    assert np.abs(buffer.actions).max() <= 1.0


def test_newest_are_kept() -> None:
    episodes = draw_dataset(BOX, [30, 30])
    buffer = make_buffer(size=20)
    with pytest.warns(UserWarning, match=r"40 of 60 transitions, the oldest, were left out.*buffer_size=20"):
        assert buffer.add_dataset(episodes) == 20
    np.testing.assert_allclose(buffer.rewards[:, 0], episodes[1]["rewards"][10:], rtol=1e-6)
    with pytest.warns(UserWarning, match=r"1 of 1 transitions, .* for 2 environment"):
        assert make_buffer(n_envs=2).add_dataset(draw_dataset(BOX, [1])) == 0


def test_next_checkpoint_has_them(tmp_path: Path) -> None:
    """A run folder writes what has changed only."""
    model = SoftSAC("MlpPolicy", pendulum(), **SMALL).learn(50)
    checkpoints = CheckpointCallback(0, tmp_path, on_signal=False)
    checkpoints.init_callback(model)
    checkpoints.save()
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer)
    buffer.add_dataset(datasets.episodes(buffer))
    assert buffer.size() == 100
    checkpoints.save()
    loaded = SoftSAC.load(tmp_path, pendulum()).replay_buffer
    assert isinstance(loaded, ReplayBuffer)
    assert_same(buffer.get_rows(0, 100), loaded.get_rows(0, 100))


def with_key(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(episode: Any) -> Any:
        episode["observations"][name] = change(episode["observations"][name])
        return episode

    return changed


def with_field(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda episode: {**episode, name: change(episode[name])}


def without(name: str) -> Callable[[Any], Any]:
    return lambda episode: {field: value for field, value in episode.items() if field != name}


MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no rewards": (without("rewards"), "episode 1 has no 'rewards', only 'observations', 'actions', 'term"),
    "no object": (lambda episode: 3, "episode 1 is of type int, which has no 'observations'"),
    "rewards": (with_field("rewards", lambda a: a[:, None]), r"rewards of episode 1 has the shape (4, 1), expected"),
    "text": (with_field("rewards", lambda a: ["x"] * 4), "rewards of episode 1 has the dtype <U1, expected float32"),
    "ragged": (with_field("actions", lambda a: [[1.0], [1.0, 2.0]]), "actions of episode 1 has the dtype object"),
    "nan": (with_field("rewards", lambda a: a * np.nan), "rewards of episode 1 has values that are not finite, in"),
    "actions": (
        with_field("actions", lambda a: a[:, :1]),
        "actions of episode 1 has the shape (4, 1), expected (4, 2) (4 rewards)",
    ),
    "flags": (with_field("truncations", lambda a: a + 0.5), "truncations of episode 1 has the dtype float64, exp"),
    "count": (with_field("terminations", lambda a: a[1:]), "terminations of episode 1 has the shape (3,), expected"),
    "no key": (
        with_field("observations", without("kind")),
        "observations of episode 1 has no 'kind', only 'image', 'state'. The observation space has 'image', ",
    ),
    "no dict": (with_field("observations", lambda obs: obs["state"]), "observations of episode 1 is of type ndarray"),
    "length": (
        with_key("state", lambda a: a[1:]),
        "observations['state'] of episode 1 has the shape (4, 3), expected (5, 3) (4 rewards)",
    ),
    "width": (with_key("state", lambda a: a[:, :2]), "observations['state'] of episode 1 has the shape (5, 2), "),
    "image": (with_key("image", lambda a: a / 255), "observations['image'] of episode 1 has the dtype float64"),
    "kind": (with_key("kind", lambda a: a + 4), "observations['kind'] of episode 1 has values from 4 to "),
    "large reward": (
        with_field("rewards", lambda a: a * [1.0, 1e39, 1.0, 1.0]),
        "rewards of episode 1 has values that float32 cannot hold, in row 1.",
    ),
    "large state": (with_key("state", lambda a: a + 1e39), "observations['state'] of episode 1 has values that float"),
    "large pixel": (
        with_key("image", lambda a: a + np.uint16(256)),
        "observations['image'] of episode 1 has values that uint8 cannot hold, in row 0.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(mistake: str) -> None:
    make_mistake, message = MISTAKES[mistake]
    buffer = make_buffer(DICT, n_envs=2)
    buffer.add_dataset(draw_dataset(DICT, [7]))
    before = contents(buffer)
    episodes = draw_dataset(DICT, [5, 4, 6])
    episodes[1] = make_mistake(episodes[1])
    with pytest.raises(ValueError, match=re.escape(message)):
        buffer.add_dataset(episodes)
    assert_same(before, contents(buffer))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "dataset=3 cannot be iterated over: pass a Minari dataset"),
        (draw_episode(3, BOX, np.random.default_rng(0)), "dataset is a dict with the keys 'observations', 'actions'"),
        ([], "has no transitions"),
        (
            [draw_episode(3, DICT, np.random.default_rng(0))],
            "observations of episode 0 is a dict with the",
        ),
    ],
    ids=["number", "one episode", "empty", "dict"],
)
def test_what_is_no_dataset(dataset: Any, message: str) -> None:
    buffer = make_buffer()
    before = contents(buffer)
    with pytest.raises(ValueError, match=message):
        buffer.add_dataset(dataset)
    assert_same(before, contents(buffer))


# --- Minari -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def command(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, args)])
    return checkpoint.main()


@pytest.mark.parametrize("kind", ["file", "folder", "full"])
def test_run_to_minari_to_new_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new run's buffer has the transitions of the old one, to the last bit for Pendulum's actions in [-2, 2]."""
    n_envs = 1 if kind == "file" else 2
    options = {**SMALL, "buffer_size": 90 if kind == "full" else 500}
    model = SoftSAC("MlpPolicy", VecNormalize(pendulum(n_envs)), **options)
    checkpoints = CheckpointCallback(50, tmp_path / "run", on_signal=False)
    model.learn(100, checkpoints)
    model.learn(30, checkpoints, reset_num_timesteps=True)  # the episodes in progress are cut off
    model.save(tmp_path / "model")
    path = tmp_path / ("run" if kind == "folder" else "model.zip")
    assert command(monkeypatch, "export-dataset", path, "pendulum/softsac-v0") == 0
    dataset = minari.load_dataset("pendulum/softsac-v0")
    assert dataset.env_spec is not None and dataset.env_spec.id == "Pendulum-v1"
    old = SoftSAC.load(path, VecNormalize(pendulum(n_envs)))
    new = SoftSAC("MlpPolicy", pendulum(1), **options)
    assert isinstance(old.replay_buffer, ReplayBuffer) and isinstance(new.replay_buffer, ReplayBuffer)
    assert new.replay_buffer.add_dataset(dataset) == old.replay_buffer.size() * n_envs == dataset.total_steps
    assert transitions(new.replay_buffer) == transitions(old.replay_buffer)
    for episode in dataset:
        ends = episode.terminations | episode.truncations
        assert ends[-1] and not ends[:-1].any()


def transitions(buffer: ReplayBuffer) -> list[bytes]:
    """All of them, sorted; an episode in progress counts as one that goes on elsewhere."""
    found = []
    for row in range(buffer.size()):
        for e in range(buffer.n_envs):
            place = np.array([row * buffer.n_envs + e])
            next_obs = buffer.get_next_obs(place)
            terminated = buffer.dones[row, e] * (1.0 - buffer.timeouts[row, e])
            parts = (buffer.observations[row, e], next_obs, buffer.actions[row, e], buffer.rewards[row, e], terminated)  # type: ignore[index]
            found.append(b"".join(np.asarray(part, dtype=np.float32).tobytes() for part in parts))
    return sorted(found)


SB3_BUFFERS: dict[str, dict[str, Any]] = {
    "sb3": {"replay_buffer_class": SB3ReplayBuffer},
    "frugal": {
        "replay_buffer_class": SB3ReplayBuffer, "optimize_memory_usage": True,
        "replay_buffer_kwargs": {"handle_timeout_termination": False},
    },
    "n_steps": {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3}},
    "dict": {"replay_buffer_class": DictReplayBuffer},
    "her": {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"copy_info_dict": True}},
}  # fmt: skip


@pytest.mark.parametrize("kind", SB3_BUFFERS)
def test_files_with_buffers_of_sb3(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps such a buffer is as good a source of data as any other."""
    has_goals = kind in ("dict", "her")
    policy = "MultiInputPolicy" if has_goals else "MlpPolicy"

    def env() -> VecEnv:
        bits = {"n_bits": 3, "continuous": True, "max_steps": 5}
        return make_vec_env(lambda: BitFlippingEnv(**bits), n_envs=2) if has_goals else pendulum(2)

    model = SoftSAC(policy, env(), **{**SMALL, "buffer_size": 90, "learning_starts": 200}, **SB3_BUFFERS[kind])
    model.learn(120).save(tmp_path / "model")
    theirs = model.replay_buffer
    assert theirs is not None
    # The next observation of the oldest row that is kept frugally is overwritten
    order = rows_by_age(theirs)[int(kind == "frugal") :]
    other = SoftSAC(policy, env(), offline_data=tmp_path / "model.zip", **SMALL)
    ours = other.offline_data
    assert isinstance(ours, ReplayBuffer) and ours.size() == len(order)
    places = np.arange(ours.size() * 2)
    obs = map_obs(lambda storage: storage[: len(order)], ours.observations)
    next_obs = np.roll(theirs.observations, -1, axis=0) if kind == "frugal" else theirs.next_observations
    for mine, his in ((obs, theirs.observations), (ours.get_next_obs(places), next_obs)):
        for part, whole in zip(*map(list_of_parts, (mine, his)), strict=True):
            np.testing.assert_array_equal(part.reshape(-1), whole[order].reshape(-1))
    for name in ("actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(ours, name)[: ours.size()], getattr(theirs, name)[order])
    assert command(monkeypatch, "export-dataset", tmp_path / "model", f"some/{kind}-v0") == 0
    assert minari.load_dataset(f"some/{kind}-v0").total_steps == len(places)


def list_of_parts(obs: Any) -> list[np.ndarray]:
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def test_new_episodes_of_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(pendulum(1))
    model = SoftSAC("MlpPolicy", env, **SMALL).learn(60)
    model.save(tmp_path / "model")
    assert command(monkeypatch, "export-dataset", tmp_path / "model", "pendulum/new-v0", "--episodes", 2) == 0
    dataset = minari.load_dataset("pendulum/new-v0")
    assert [len(episode) for episode in dataset] == [200, 200]  # the time limit of the id
    env.training = False
    for episode in dataset:
        assert episode.truncations[-1] and not episode.terminations.any()
        action, _ = model.predict(env.normalize_obs(episode.observations[:-1]), deterministic=True)
        np.testing.assert_allclose(episode.actions, action, atol=1e-4)
        # It is the environment's own step
        cos, sin, speed = episode.observations[0].astype(np.float64)
        cost = np.arctan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * float(episode.actions[0, 0]) ** 2
        assert episode.rewards[0] == pytest.approx(-cost, rel=1e-4)
    # Another environment
    args = "export-dataset", tmp_path / "model", "pendulum/ant-v0", "--episodes", 1, "--env", "Ant-v5"
    assert command(monkeypatch, *args) == 1


def test_dict_observations_through_minari() -> None:
    buffer = make_buffer(DICT, size=60, n_envs=2)
    buffer.add_dataset(draw_dataset(DICT, [9, 8, 7]))
    datasets.write("dict/all-v0", datasets.episodes(buffer), DICT, ACTIONS)
    dataset = minari.load_dataset("dict/all-v0")
    assert dataset.env_spec is None
    other = make_buffer(DICT, size=60, n_envs=2)
    assert other.add_dataset(dataset) == 24
    for name, rows in buffer.get_rows(0, 12).items():
        if name not in ("dones", "timeouts"):  # those that were cut off are truncated now
            np.testing.assert_allclose(other.get_rows(0, 12)[name], rows, rtol=1e-6, atol=1e-6)


def test_errors_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minari_folder: Path
) -> None:
    model = SoftSAC("MlpPolicy", pendulum(), **SMALL).learn(10)
    model.save(tmp_path / "model")
    model.save(tmp_path / "light", exclude=["replay_buffer"])
    model.save_replay_buffer(tmp_path / "buffer.zip")
    export = "export-dataset"
    assert command(monkeypatch, export, tmp_path / "model.zip", "some/one-v0") == 0
    for args, message in (
        (("model.zip", "some/one-v0"), "There is a dataset in"),
        (("model.zip", "some/one"), "'some/one' is not a Minari id"),
        (("light.zip", "some/two-v0"), "light.zip has no replay buffer"),
        (("buffer.zip", "some/two-v0"), "has no member data"),
        (("nothing", "some/two-v0"), "No such file"),
    ):
        assert command(monkeypatch, export, tmp_path / args[0], args[1]) == 1
        assert message in capsys.readouterr().err
    for options, message in (
        (("--episodes", "0"), "n_episodes=0 must be at least 1"),
        (("--stochastic",), "are for new episodes"),
        (("--env", "Pendulum-v1"), "are for new episodes"),
    ):
        assert command(monkeypatch, export, tmp_path / "model.zip", "some/two-v0", *options) == 1
        assert message in capsys.readouterr().err
    assert not (minari_folder / "some" / "two-v0").exists()

    def broken() -> Any:
        yield from datasets.episodes(model.replay_buffer)  # type: ignore[arg-type]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        datasets.write("some/two-v0", broken(), model.observation_space, model.action_space)
    assert not (minari_folder / "some" / "two-v0").exists()


class Constant(gym.Env[int, np.ndarray]):
    """Observations are ints, as in Gymnasium's toy texts."""

    def __init__(self, value: int = 1) -> None:
        self.value = value
        self.observation_space, self.action_space = spaces.Discrete(9), spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 3
        return self.value, {}

    def step(self, action: np.ndarray) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self.value, 1.0, self.left == 0, False, {}


@pytest.fixture
def constant_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = gym.envs.registration.EnvSpec("Constant-v0", f"{__name__}:Constant")
    monkeypatch.setitem(gym.registry, "Constant-v0", spec)
    env = gym.wrappers.ClipReward(gym.make("Constant-v0", value=5), -2.0, 2.0)
    SoftSAC("MlpPolicy", env, **SMALL).learn(10).save(tmp_path / "constant.zip")
    return tmp_path / "constant.zip"


@pytest.mark.parametrize(
    ("args", "value", "lost"),
    [
        ((), 5, ""),
        (("--episodes", 2), 5, "what the run had around Constant-v0: ClipReward(min_reward=-2.0, max_reward=2.0). If"),
        (("--episodes", 2, "--env", "Constant-v0"), 1, ""),
    ],
)
def test_environment_of_the_run(
    args: tuple[Any, ...],
    value: int,
    lost: str,
    constant_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "export-dataset", constant_run, "some/constant-v0", *args) == 0
    err = capsys.readouterr().err
    assert lost in err if lost else "around" not in err
    dataset = minari.load_dataset("some/constant-v0")
    assert dataset.total_episodes >= 2
    for episode in dataset:
        np.testing.assert_array_equal(episode.observations, value)
    assert dataset.env_spec is not None
    assert gym.make(dataset.env_spec).unwrapped.value == value  # type: ignore[attr-defined]


@pytest.mark.parametrize(("entry_point", "kwargs"), [(Constant, {}), ("a:b", {"x": np.ones(2)}), ("a:b", {"x": int})])
def test_environments_that_are_no_json(
    entry_point: Any, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", entry_point))
    data = [datasets.Episode(**each) for each in draw_dataset(BOX, [3])]
    assert datasets.write("some/one-v0", data, BOX, ACTIONS, "Odd-v0", kwargs).env_spec is None


def test_environments_that_cannot_be_made(
    constant_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = "export-dataset", constant_run, "some/constant-v0", "--episodes", 1
    assert command(monkeypatch, *args, "--env", "Nothing-v0") == 1
    assert "Nothing-v0 cannot be made with the arguments {}: " in capsys.readouterr().err
    monkeypatch.setattr(Constant, "__init__", lambda self: None)
    assert command(monkeypatch, *args) == 1
    assert "Constant-v0 cannot be made with the arguments {'value': 5}: " in capsys.readouterr().err


def test_each_episode_has_its_own_gsde_noise() -> None:
    model = SoftSAC("MlpPolicy", Constant(), use_sde=True, **SMALL)
    first, second = datasets.play(model, model.env, 2, deterministic=False)  # type: ignore[arg-type]
    for episode in (first, second):
        assert (episode.actions == episode.actions[0]).all()
    assert not np.allclose(first.actions, second.actions)


def test_another_process_was_quicker() -> None:
    mine, other = ([datasets.Episode(**each) for each in draw_dataset(BOX, lengths)] for lengths in ([3, 4], [5]))

    def slow() -> Any:
        yield mine[0]
        datasets.write("some/one-v0", other, BOX, ACTIONS)
        yield mine[1]

    with pytest.raises(ValueError, match="There is a dataset in "):
        datasets.write("some/one-v0", slow(), BOX, ACTIONS)
    assert minari.load_dataset("some/one-v0").total_steps == 5


def test_two_processes_at_once(monkeypatch: pytest.MonkeyPatch, minari_folder: Path) -> None:
    """The other makes the folder after this one has looked, and is still writing."""
    folder = minari_folder / "some" / "one-v0"
    folder.mkdir(parents=True)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(ValueError, match="There is a dataset in "):
        datasets.write("some/one-v0", [], BOX, ACTIONS)
    monkeypatch.undo()
    assert folder.is_dir()


def test_half_a_dataset_is_removed(monkeypatch: pytest.MonkeyPatch, minari_folder: Path) -> None:
    def interrupt(storage: Any) -> None:
        assert storage.total_steps == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(minari, "MinariDataset", interrupt)
    with pytest.raises(KeyboardInterrupt):
        datasets.write("some/one-v0", [datasets.Episode(**each) for each in draw_dataset(BOX, [3])], BOX, ACTIONS)
    assert not (minari_folder / "some" / "one-v0").exists()


def test_datasets_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no Minari dataset 'some/thing-v0' in .*minari download some/thing-v0"):
        make_buffer().add_dataset("some/thing-v0")
    for name in ("../thing-v0", "thing", "/thing-v0"):
        with pytest.raises(ValueError, match=f"'{name}' is not a Minari id"):
            make_buffer().add_dataset(name)
    with pytest.raises(FileNotFoundError, match=r"nothing\.zip"):
        make_model(offline_data="nothing.zip")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-softsac\[minari\]'"):
        make_buffer().add_dataset("some/thing-v0")


def test_other_bounds_are_said() -> None:
    other = spaces.Box(-1.0, 1.0, (2,))
    episodes = draw_dataset(BOX, [3])
    datasets.write("other/bounds-v0", [datasets.Episode(**episodes[0])], BOX, other)
    with pytest.warns(UserWarning, match=r"actions have the bounds .*, the environment's"):
        make_buffer().add_dataset("other/bounds-v0")


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A dataset of this package's own, the environment that it names, half and half."""
    script = Path(__file__).parents[1] / "examples" / "offline_to_online.py"
    if not script.is_file():
        pytest.skip("needs the source tree")
    datasets.write(
        "pendulum/example-v0", (datasets.Episode(**e) for e in pendulum_episodes()), *PENDULUM, "Pendulum-v1"
    )
    monkeypatch.setattr(sys, "argv", [str(script), "pendulum/example-v0", "--steps", "120"])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"Return -[0-9.]+ \+- [0-9.]+ after 120 steps", capsys.readouterr().out)


# --- Offline data in minibatches --------------------------------------------------------------------------------------


def pendulum_episodes(n: int = 3, seed: int = 5) -> list[Any]:
    """Episodes of 40 steps with rewards above 0, which Pendulum never gives."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(n):
        episode = draw_episode(40, spaces.Box(-1.0, 1.0, (3,)), rng)
        episode["actions"] = rng.uniform(-2.0, 2.0, size=(40, 1))
        episode["rewards"] = rng.uniform(1.0, 2.0, size=40)
        episodes.append(episode)
    return episodes


def write_pendulum(dataset_id: str, **kwargs: Any) -> None:
    datasets.write(dataset_id, [datasets.Episode(**each) for each in pendulum_episodes(**kwargs)], *PENDULUM)


def make_model(env: Any = None, **kwargs: Any) -> SoftSAC:
    options = {**SMALL, "offline_data": pendulum_episodes(), **kwargs}
    return SoftSAC("MlpPolicy", pendulum() if env is None else env, **options)


@pytest.mark.parametrize(("fraction", "n_offline"), [(0.5, 5), (0.3, 3), (0.25, 2), (1.0, 10), (0.0, 0)])
def test_fraction_of_each_minibatch(fraction: float, n_offline: int) -> None:
    model = make_model(offline_fraction=fraction, batch_size=10).learn(40)
    (minibatches,) = model._draws(7, 10, None)
    assert minibatches.n == 7 and minibatches.size == 10
    for i in range(7):
        part: Any = minibatches.part(i, i + 1)
        is_offline = part.rewards[:, 0] > 0
        assert is_offline.sum() == n_offline
        assert is_offline[-n_offline:].all() if n_offline else not is_offline.any()
        # What belongs together stays together
        for j in np.flatnonzero(is_offline.numpy()):
            (row,) = np.flatnonzero(model.offline_data.rewards[:, 0] == part.rewards[j].item())
            np.testing.assert_array_equal(model.offline_data.observations[row, 0], part.observations[j])
            np.testing.assert_array_equal(model.offline_data.next_observations[row, 0], part.next_observations[j])
            np.testing.assert_array_equal(model.offline_data.actions[row, 0], part.actions[j])


def test_all_kinds_of_minibatches() -> None:
    """Several environments, n-step returns, VecNormalize and scaled rewards."""
    env = VecNormalize(pendulum(2), norm_reward=False)
    model = make_model(env, n_steps=3, normalize_rewards="std").learn(60)
    (minibatches,) = model._draws(2, 8, None)
    samples: Any = minibatches.samples
    offline = model.offline_data
    divisor = model._reward_divisor()
    assert divisor > 1.5
    found = 0
    for i, reward in enumerate(samples.rewards[:, 0].tolist()):
        if reward > 0:
            found += 1
            sums = [offline._returns(np.array([row]), None) for row in range(120)]
            (row,) = [row for row in range(120) if np.isclose(sums[row][0][0] / divisor, reward, rtol=1e-6)]
            np.testing.assert_allclose(samples.discounts[i], sums[row][2])
            expected = env.normalize_obs(offline.observations[row, 0])
            np.testing.assert_allclose(samples.observations[i], expected, rtol=1e-5)
    assert found == 8


def test_nothing_changes_without_it() -> None:
    options: list[dict[str, Any]] = [{"offline_data": None}, {"offline_fraction": 0.0}, {}]
    without, off, mixed = (make_model(**each).learn(60).get_parameters()["policy"] for each in options)
    assert_same(without, off)
    assert differences(plain(without), plain(mixed))


def test_device_replay_declines() -> None:
    model = make_model().learn(5)
    assert isinstance(model.replay_buffer, ReplayBuffer)
    assert device_replay.obstacle(model.replay_buffer, None) is None
    assert "offline_data" in str(model._obstacle_to_device_replay(model.replay_buffer))
    model.offline_fraction = 0.0
    assert model._obstacle_to_device_replay(model.replay_buffer) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offline_fraction": 1.5}, r"offline_fraction=1.5 is not valid: it must be a number in \[0, 1\]"),
        ({"offline_fraction": "half"}, "offline_fraction='half' is not valid"),
        ({"offline_fraction": 0.01}, "offline_fraction=0.01 of batch_size=8 is 0 transitions"),
        ({"offline_fraction": 0.3, "offline_data": None}, "offline_fraction=0.3 has no effect without offline_data"),
        ({"offline_data": 3}, "dataset=3 cannot be iterated over"),
        ({"offline_data": "no/data-v0"}, "There is no Minari dataset 'no/data-v0'"),
        ({"offline_data": [draw_episode(3, BOX, np.random.default_rng(0))]}, "actions of episode 0 has the shape"),
        ({"offline_data": SB3ReplayBuffer(10, *PENDULUM, "cpu")}, "offline_data has no transitions"),
    ],
)
def test_offline_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def as_reference(kind: str, folder: Path) -> Any:
    """Offline data that a run can find again."""
    if kind == "minari":
        write_pendulum("pendulum/offline-v0")
        return "pendulum/offline-v0"
    model = SoftSAC("MlpPolicy", pendulum(2), **{**SMALL, "seed": 3}).learn(90)
    model.save(folder / "source.zip")
    return folder / "source.zip"


CONTINUED: dict[str, tuple[str, dict[str, Any]]] = {
    "minari": ("plain", {"normalize_rewards": "std"}),
    "file": ("vec_normalize", {"n_steps": 3, "offline_fraction": 0.25}),
}


@pytest.mark.processes
def test_offline_data_can_be_left_out_at_load(tmp_path: Path) -> None:
    make_model(offline_data=pendulum_episodes()).learn(40).save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", pendulum(), offline_data=None)
    loaded.learn(10)
    assert loaded.offline_data is None and loaded._offline_source is None


def test_runs_with_offline_data_are_continued(tmp_path: Path) -> None:
    """In another process, which finds the data by itself: the runs that were not interrupted, to the last bit."""
    with resume_script.new_process() as pool:
        for kind, (name, options) in CONTINUED.items():
            folder = tmp_path / kind
            folder.mkdir()
            data = as_reference(kind, folder)
            case = replace(resume_script.CASES[name], kwargs={**options, "offline_data": data}, stops=(20, 78))
            whole = resume_script.run(case, folder)
            assert "offline" in whole.state
            paths = [folder / "20.zip", next(folder.glob("run/step-78-*.zip"))]
            outcomes = pool.submit(resume_script.resume, name, paths).result()
            for stop, outcome in zip(case.stops, outcomes, strict=True):
                assert outcome.complaints == []
                assert differences(whole.state, outcome.state) == []
                assert differences(plain(whole.rows[whole.logged[stop] :]), plain(outcome.rows)) == []


def test_checkpoints_do_not_hold_it(tmp_path: Path) -> None:
    write_pendulum("pendulum/large-v0", n=100)
    sizes = []
    for data in (None, "pendulum/large-v0"):
        make_model(offline_data=data).save(tmp_path / "model.zip")
        sizes.append((tmp_path / "model.zip").stat().st_size)
    assert sizes[1] - sizes[0] < 1000


@pytest.mark.parametrize("kind", ["minari", "file"])
def test_data_that_is_missing_or_different_at_load(kind: str, tmp_path: Path, minari_folder: Path) -> None:
    data = as_reference(kind, tmp_path)
    place = minari_folder / "pendulum" / "offline-v0" if kind == "minari" else data
    make_model(offline_data=data).learn(40).save(tmp_path / "model")
    load = partial(SoftSAC.load, tmp_path / "model", device="cpu")
    assert load(pendulum()).offline_data.size() > 0
    place.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"offline data .* cannot be read: .*offline_data=.* offline_fraction=0.0"
    ):
        load(pendulum())
    # It can predict, also in the zoo's commands that only watch, and go on without
    assert load().offline_data is None and load(pendulum(), buffer_size=1).offline_data is None
    model = load(pendulum(), offline_fraction=0.0).learn(5)
    assert model.offline_data is None
    model.save(tmp_path / "without")
    assert SoftSAC.load(tmp_path / "without", pendulum()).learn(5).offline_fraction == 0.0
    # A copy elsewhere is as good
    copy_there = minari.MinariDataset(tmp_path / "moved" / "data") if kind == "minari" else tmp_path / "moved"
    assert load(pendulum(), offline_data=copy_there).learn(5).offline_data.size() > 0
    if kind == "minari":
        write_pendulum("pendulum/offline-v0", seed=6)
    else:
        SoftSAC("MlpPolicy", pendulum(), **SMALL).learn(20).save(data)
    with pytest.raises(CheckpointError, match=r"is not what the run has learned from: the SHA-256 .* offline_data="):
        load(pendulum())
    with pytest.warns(UserWarning, match="The continuation differs: offline_data"):
        load(pendulum(), offline_data=data).learn(5)


@pytest.mark.parametrize("suffix", [".zip", ""])
@pytest.mark.parametrize("make", [str, atomic_files.as_path])
def test_data_on_object_storage(make: Callable[[str], Any], suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("upath")
    try:
        make_model(offline_data=None).learn(40).save("memory://bucket/source.zip")
        make_model(offline_data=make(f"memory://bucket/source{suffix}")).learn(40).save(tmp_path / "model")
        assert SoftSAC.load(tmp_path / "model", pendulum()).offline_data.size() == 40
    finally:
        MemoryFileSystem.store.clear()
    with pytest.raises(CheckpointError, match=f"offline data 'memory://bucket/source{suffix}' of the run cannot be re"):
        SoftSAC.load(tmp_path / "model", pendulum())


@pytest.mark.parametrize("kind", ["episodes", "buffer", "part"])
def test_data_without_a_name_is_passed_again(kind: str, tmp_path: Path) -> None:
    def offline_data() -> Any:
        if kind == "episodes":
            return pendulum_episodes()
        if kind == "part":
            return minari.load_dataset("pendulum/all-v0").filter_episodes(lambda episode: episode.id > 0)
        buffer = make_model(offline_data=None).replay_buffer
        assert isinstance(buffer, ReplayBuffer)
        buffer.add_dataset(pendulum_episodes())
        return buffer

    write_pendulum("pendulum/all-v0")
    make_model(offline_data=offline_data()).learn(40).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is neither a model file nor a whole Minari dataset"):
        SoftSAC.load(tmp_path / "model", pendulum())
    SoftSAC.load(tmp_path / "model", pendulum(), force_reset=False, offline_data=offline_data()).save(
        tmp_path / "again"
    )
    states = []
    for name in ("model", "again"):  # loading and saving changes nothing
        model = SoftSAC.load(tmp_path / name, pendulum(), force_reset=False, offline_data=offline_data())
        states.append(resume_script.snapshot(model.learn(20)))
    assert differences(*states) == []


def test_offline_data_is_a_copy() -> None:
    source = make_model(offline_data=None).learn(40).replay_buffer
    assert isinstance(source, ReplayBuffer)
    model = make_model(offline_data=source)
    source.rewards[:] = 7.0
    assert model.offline_data.rewards.max() < 7.0
    # Also of the offline data of another model
    other = make_model(offline_data=model.offline_data)
    assert other.offline_data is not model.offline_data and other.offline_data.rng is not model.offline_data.rng
    # Copies draw the same
    twin = copy.deepcopy(model)
    np.testing.assert_array_equal(model.offline_data.sample(9).rewards, twin.offline_data.sample(9).rewards)
    model.set_random_seed(3)
    first = model.offline_data.sample(9).rewards
    model.set_random_seed(3)
    np.testing.assert_array_equal(first, model.offline_data.sample(9).rewards)
