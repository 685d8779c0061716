"""Replay buffers in files: rows, segments, and what an incremental checkpoint may leave out."""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from test_buffers import ACTION_SPACE, BOX_SPACE, DICT_SPACE, make_obs

from sb3_softsac import CheckpointError, ReplayBuffer
from sb3_softsac.persistence import buffer_state
from sb3_softsac.persistence.archive import ArchiveReader, ArchiveWriter
from sb3_softsac.persistence.codec import NotEncodable
from sb3_softsac.persistence.run_folder import RunFolder

GOAL_SPACE = spaces.Dict({name: BOX_SPACE for name in ("observation", "achieved_goal", "desired_goal")})
KINDS_OF_EVENTS = ["go on"] * 5 + ["terminated", "truncated", "reset"]
SPACES = {"box": BOX_SPACE, "dict": DICT_SPACE}


@pytest.fixture(autouse=True)
def many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest segments that there are, of 16 rows."""
    monkeypatch.setattr(buffer_state, "SMALL", 1)
    monkeypatch.setattr(buffer_state, "LARGE", 1)


class Feed:
    """Transitions whose observations are numbered, so that no two are alike."""

    def __init__(self, n_envs: int, space: spaces.Space[Any] = BOX_SPACE):
        self.space = space
        self.n_envs = n_envs
        self.number = 0
        self.obs = [self._next() for _ in range(n_envs)]

    def _next(self) -> int:
        self.number = self.number % 250 + 1  # images hold bytes
        return self.number

    def add(self, buffers: list[Any], events: list[str]) -> None:
        next_obs = [self._next() for _ in events]
        done = np.array([event in ("terminated", "truncated") for event in events])
        infos = [{"TimeLimit.truncated": event == "truncated", "name": np.array([n])} for n, event in enumerate(events)]
        for buffer in buffers:
            buffer.add(
                observations(self.space, self.obs),
                observations(self.space, next_obs),
                np.array(self.obs)[:, None] / np.array([300.0, 600.0]),
                np.array(self.obs) / 7.0,
                done,
                infos,
            )
        self.obs = [n if event == "go on" else self._next() for n, event in zip(next_obs, events, strict=True)]


def observations(space: spaces.Space[Any], numbers: list[int]) -> Any:
    if space is GOAL_SPACE:
        return {key: make_obs(BOX_SPACE, numbers) for key in GOAL_SPACE.spaces}
    return make_obs(space, numbers)


@st.composite
def steps(draw: st.DrawFn, n_envs: int, most: int) -> list[list[str]]:
    """What happens in each of up to ``most`` steps to each environment. Lists of hypothesis' own are rarely long."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return rng.choice(KINDS_OF_EVENTS, (draw(st.integers(0, most)), n_envs)).tolist()


def contents(buffer: ReplayBuffer) -> list[bytes]:
    """Each row with its next observations, wherever they are kept, as one string."""
    parts = []
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        value = getattr(buffer, name)
        parts += list(value.values()) if isinstance(value, dict) else [value]
    arrays = [np.asarray(part) for part in parts]
    return [b"".join(array[row].tobytes() for array in arrays) for row in range(buffer.size())]


def raw(buffer: Any, segment: tuple[int, int]) -> dict[str, bytes]:
    return {name: rows.tobytes() for name, rows in buffer_state.get_rows(buffer, *segment).items()}


def restored(buffer: Any, empty: Any) -> Any:
    """What a file makes of an empty buffer."""
    file = io.BytesIO()
    with ArchiveWriter(file) as archive:
        parts = buffer_state.segments(buffer)
        buffer_state.write_rows(archive, buffer)
        archive.close({})
    replay = {"description": buffer_state.describe(buffer), "state": buffer_state.get_state(buffer), "segments": parts}
    reader = ArchiveReader(file, "file")

    def rows() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for first, last in parts:
            yield first, buffer_state.read_rows(reader, replay["description"], (first, last), f"replay/{first}/")

    buffer_state.restore(empty, replay, rows(), "file")
    return empty


@given(capacity=st.integers(1, 70), n_rows=st.integers(0, 100), n_envs=st.integers(1, 3))
def test_segments_hold_each_row_once(capacity: int, n_rows: int, n_envs: int) -> None:
    buffer, feed = ReplayBuffer(capacity * n_envs, BOX_SPACE, ACTION_SPACE, "cpu", n_envs), Feed(n_envs)
    before: list[tuple[int, int]] = []
    for _ in range(n_rows):
        feed.add([buffer], ["go on"] * n_envs)
        parts = buffer_state.segments(buffer)
        assert [row for part in parts for row in range(*part)] == list(range(buffer.size()))
        # Those that were full stay as they were
        assert parts[: len(before) - 1] == before[:-1]
        before = parts


@settings(max_examples=150)
@given(data=st.data(), n_envs=st.integers(1, 2), capacity=st.integers(1, 60), kind=st.sampled_from(list(SPACES)))
def test_no_change_is_overlooked(data: st.DataObject, n_envs: int, capacity: int, kind: str) -> None:
    space = SPACES[kind]
    buffer, feed = ReplayBuffer(capacity * n_envs, space, ACTION_SPACE, "cpu", n_envs), Feed(n_envs, space)
    for events in data.draw(steps(n_envs, 80), "before"):
        feed.add([buffer], events)
    then = buffer.n_added
    seen = {segment: raw(buffer, segment) for segment in buffer_state.segments(buffer)}
    newest_then = (buffer.pos - 1) % capacity
    added = data.draw(steps(n_envs, 80), "after")
    written = {(newest_then + i) % capacity for i in range(len(added) + 1)} if added else set()
    for events in added:
        feed.add([buffer], events)
    for segment in buffer_state.segments(buffer):
        if segment not in seen:
            continue  # it has grown
        may_have_changed = buffer_state.may_have_changed(buffer, segment, then)
        assert may_have_changed or raw(buffer, segment) == seen[segment]
        # ... and none is written again without need
        assert may_have_changed == any(row in written for row in range(*segment))
        assert buffer_state.may_have_changed(buffer, segment, None)


def test_what_past_add_has_changed() -> None:
    buffer, feed = ReplayBuffer(100, BOX_SPACE, ACTION_SPACE, "cpu"), Feed(1)
    for change in (buffer.mark_changed, buffer.reset, lambda: buffer.set_state(buffer.get_state())):
        for _ in range(100):
            feed.add([buffer], ["go on"])
        then = buffer.n_added
        change()
        feed.add([buffer], ["go on"])
        assert all(buffer_state.may_have_changed(buffer, segment, then) for segment in buffer_state.segments(buffer))


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 70)),
    st.tuples(st.sampled_from(["reset", "change", "reload"]), st.just(0)),
)


@pytest.mark.damage
@settings(max_examples=100)
@given(
    actions=st.lists(ACTIONS, min_size=1, max_size=8),
    data=st.data(),
    n_envs=st.integers(1, 2),
    capacity=st.integers(1, 60),
    kind=st.sampled_from(list(SPACES)),
)
def test_incremental_checkpoints_hold_everything(
    actions: list[tuple[str, int]], data: st.DataObject, n_envs: int, capacity: int, kind: str
) -> None:
    """A checkpoint after each action; the last two are kept, and each is read back as what there was at its time."""
    space = SPACES[kind]
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))

    def empty() -> ReplayBuffer:
        return ReplayBuffer(capacity * n_envs, space, ACTION_SPACE, "cpu", n_envs)

    buffer, feed = empty(), Feed(n_envs, space)
    saved: list[tuple[list[bytes], Any]] = []
    with TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        for number, (action, n) in enumerate(actions):
            if action == "add":
                for events in draw.choice(KINDS_OF_EVENTS, (n, n_envs)).tolist():
                    feed.add([buffer], events)
            elif action == "reset":
                buffer.reset()
            elif action == "change" and buffer.size() > 0:
                buffer.rewards[draw.integers(buffer.size())] = -number - 1.0
                buffer.mark_changed()
            elif action == "reload" and saved:
                buffer = load_rows(folder, len(saved) - 1, saved[-1][1], empty())
                folder = RunFolder(Path(name))
                folder.continues(folder.manifest(len(saved) - 1), buffer)
            tree = {"description": buffer_state.describe(buffer), "state": buffer_state.get_state(buffer)}
            folder.save(number, lambda file: (file.write(b"state"), "none"), buffer, keep_last=2)
            saved.append((contents(buffer), tree))
            for kept in range(max(0, number - 1), number + 1):
                again = load_rows(folder, kept, saved[kept][1], empty())
                assert contents(again) == saved[kept][0]


def load_rows(folder: RunFolder, number: int, replay: dict[str, Any], buffer: ReplayBuffer) -> ReplayBuffer:
    buffer_state.restore(buffer, replay, folder.read_segments(folder.manifest(number), replay), "folder")
    return buffer


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    buffer, feed = ReplayBuffer(160, BOX_SPACE, ACTION_SPACE, "cpu"), Feed(1)
    folder = RunFolder(tmp_path)
    for _ in range(20):
        for _ in range(20):
            feed.add([buffer], ["go on"])
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "replay").glob("*")}
        folder.save(0, lambda file: (file.write(b"state"), "none"), buffer, keep_last=1)
        new = [path for path in (tmp_path / "replay").glob("*") if before.get(path) != path.stat().st_mtime_ns]
        assert 1 <= len(new) <= 3  # 20 rows and the one before them, in segments of 16
        assert len(list((tmp_path / "replay").glob("*"))) == len(buffer_state.segments(buffer))


def test_another_buffer_in_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that takes the memory of one that is gone has its id, and may have added more rows."""
    monkeypatch.setattr("sb3_softsac.persistence.run_folder.id", lambda _: 1, raising=False)
    folder, feed = RunFolder(tmp_path), Feed(1)
    for number, n_rows in enumerate((48, 50)):
        buffer = ReplayBuffer(64, BOX_SPACE, ACTION_SPACE, "cpu")
        for _ in range(n_rows):
            feed.add([buffer], ["go on"])
        tree = {"description": buffer_state.describe(buffer), "state": buffer_state.get_state(buffer)}
        folder.save(0, lambda file: (file.write(b"state"), "none"), buffer, keep_last=1)
        again = ReplayBuffer(64, BOX_SPACE, ACTION_SPACE, "cpu")
        assert contents(load_rows(folder, number, tree, again)) == contents(buffer)


@given(data=st.data(), n_envs=st.integers(1, 3), capacity=st.integers(1, 40), kind=st.sampled_from(list(SPACES)))
def test_a_reloaded_buffer_goes_on_alike(data: st.DataObject, n_envs: int, capacity: int, kind: str) -> None:
    space = SPACES[kind]
    buffer, empty = (ReplayBuffer(capacity * n_envs, space, ACTION_SPACE, "cpu", n_envs, n_steps=2) for _ in range(2))
    feed = Feed(n_envs, space)
    for events in data.draw(steps(n_envs, 60), "before"):
        feed.add([buffer], events)
    again = restored(buffer, empty)
    assert contents(again) == contents(buffer)
    for events in data.draw(steps(n_envs, 60), "after"):
        feed.add([buffer, again], events)
        assert contents(again) == contents(buffer)
    assert (again.pos, again.full) == (buffer.pos, buffer.full)
    if buffer.size() > 0:
        for ours, theirs in zip(buffer.sample(30), again.sample(30), strict=True):
            for a, b in zip(*(x.values() if isinstance(x, dict) else [x] for x in (ours, theirs)), strict=True):
                np.testing.assert_array_equal(a, b)
    # The side storage still holds each row once
    used = sorted((again._side_slot[again._side_slot > 0] - 1).tolist())
    side = next(iter(again._side_obs.values())) if isinstance(again._side_obs, dict) else again._side_obs
    assert sorted(used + again._free_slots) == list(range(len(side)))


@given(
    data=st.data(),
    n_envs=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    kind=st.sampled_from(list(SPACES)),
)
@pytest.mark.filterwarnings("ignore:The replay buffer of file")
def test_laid_out_anew(data: st.DataObject, n_envs: tuple[int, int], sizes: tuple[int, int], kind: str) -> None:
    """The oracle: episodes of all environments one after the other in a list, cut into as many pieces as are needed."""
    space = SPACES[kind]
    buffer = ReplayBuffer(sizes[0] * n_envs[0], space, ACTION_SPACE, "cpu", n_envs[0])
    feed = Feed(n_envs[0], space)
    for events in data.draw(steps(n_envs[0], 2 * sizes[0])):
        feed.add([buffer], events)
    empty = ReplayBuffer(sizes[1] * n_envs[1], space, ACTION_SPACE, "cpu", n_envs[1])
    again = restored(buffer, empty)
    if (buffer.buffer_size, buffer.n_envs) == (again.buffer_size, again.n_envs):
        assert contents(again) == contents(buffer)
        return
    n_each = min(buffer.size() * n_envs[0] // n_envs[1], again.buffer_size)
    n_rows_each = -(-n_each * n_envs[1] // n_envs[0])  # newest rows of each environment
    streams = [stream[len(stream) - n_rows_each :] for stream in by_environment(buffer)]
    line = [transition for stream in streams for transition in stream]
    line = line[len(line) - n_each * n_envs[1] :]
    pieces = [line[i * n_each : (i + 1) * n_each] for i in range(n_envs[1])]
    assert by_environment(again) == pieces


def by_environment(buffer: ReplayBuffer) -> list[list[bytes]]:
    """Transitions of each environment, oldest first."""
    parts = []
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        value = getattr(buffer, name)
        parts += list(value.values()) if isinstance(value, dict) else [value]
    arrays = [np.asarray(part) for part in parts]
    order = [(row + (buffer.pos if buffer.full else 0)) % buffer.buffer_size for row in range(buffer.size())]
    return [[b"".join(array[row, env].tobytes() for array in arrays) for row in order] for env in range(buffer.n_envs)]


class Prioritised(ReplayBuffer):
    """A user's own buffer with something for each row, something for each environment, and something else."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.priorities = np.zeros((self.buffer_size, self.n_envs))
        self.totals = np.zeros(self.n_envs)
        self.seen: dict[str, int] = {}

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.totals += 1
        self.priorities[self.pos] = self.totals
        self.seen[str(self.pos)] = int(self.totals[0])
        super().add(*args, **kwargs)


OTHERS: dict[str, Any] = {
    "prioritised": lambda: Prioritised(40, BOX_SPACE, ACTION_SPACE, "cpu", 2),
    "sb3": lambda: SB3ReplayBuffer(40, BOX_SPACE, ACTION_SPACE, "cpu", 2),
    "sb3_memory": lambda: SB3ReplayBuffer(
        40, BOX_SPACE, ACTION_SPACE, "cpu", 2, optimize_memory_usage=True, handle_timeout_termination=False
    ),
    "sb3_dict": lambda: DictReplayBuffer(40, DICT_SPACE, ACTION_SPACE, "cpu", 2),
    "her": lambda: HerReplayBuffer(40, GOAL_SPACE, ACTION_SPACE, None, "cpu", 2),  # type: ignore[arg-type]
    "her_infos": lambda: HerReplayBuffer(40, GOAL_SPACE, ACTION_SPACE, None, "cpu", 2, copy_info_dict=True),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("n_rows", [0, 1, 13, 19, 20, 21, 47])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_buffers(kind: str, n_rows: int) -> None:
    buffer, empty = OTHERS[kind](), OTHERS[kind]()
    feed = Feed(2, buffer.observation_space)
    for row in range(n_rows):
        feed.add([buffer], ["terminated" if row % 5 == 4 else "go on", "truncated" if row % 7 == 6 else "go on"])
    again = restored(buffer, empty)
    for row in range(30):
        for name, value in vars(buffer).items():
            if name not in ("rng", "n_added", "_side_obs", "_side_slot", "_free_slots", *buffer_state.SETTINGS):
                np.testing.assert_equal(getattr(again, name), value)
        feed.add([buffer, again], ["terminated" if row % 5 == 4 else "go on", "go on"])
    # What may be changed by others is never taken for unchanged
    assert buffer_state.may_have_changed(buffer, (0, 1), 0)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (ReplayBuffer(20, spaces.Box(-1, 1, (4,)), ACTION_SPACE, "cpu", 2), "observations is .*4"),
        (ReplayBuffer(20, spaces.Box(0, 255, (3,), dtype=np.uint8), ACTION_SPACE, "cpu", 2), "observations is .*u1"),
        (ReplayBuffer(20, DICT_SPACE, ACTION_SPACE, "cpu", 2), "observations is .* but missing in ReplayBuffer"),
        (ReplayBuffer(20, BOX_SPACE, spaces.Box(-1, 1, (5,)), "cpu", 2), "actions is .*5"),
        (SB3ReplayBuffer(20, BOX_SPACE, ACTION_SPACE, "cpu", 2), "next_observations is missing"),
    ],
    ids=["shape", "dtype", "keys", "action", "class"],
)
def test_what_does_not_fit_is_named(other: Any, name: str) -> None:
    buffer, feed = ReplayBuffer(20, BOX_SPACE, ACTION_SPACE, "cpu", 2), Feed(2)
    for _ in range(5):
        feed.add([buffer], ["go on"] * 2)
    with pytest.raises(CheckpointError, match=name):
        restored(buffer, other)


def test_settings_are_not_in_the_file() -> None:
    """n_steps, gamma and the treatment of time limits are the model's; they may differ from those of the file."""
    buffer, feed = ReplayBuffer(40, BOX_SPACE, ACTION_SPACE, "cpu", 2), Feed(2)
    for _ in range(30):
        feed.add([buffer], ["go on", "truncated"])
    again = restored(buffer, ReplayBuffer(40, BOX_SPACE, ACTION_SPACE, "cpu", 2, n_steps=3, gamma=0.5))
    assert (again.n_steps, again.gamma) == (3, 0.5)
    assert contents(again) == contents(buffer)


def test_adopts_what_sb3_has_pickled() -> None:
    theirs, ours = (
        SB3ReplayBuffer(40, BOX_SPACE, ACTION_SPACE, "cpu", 2),
        ReplayBuffer(60, BOX_SPACE, ACTION_SPACE, "cpu"),
    )
    feed = Feed(2)
    for row in range(27):
        feed.add([theirs], ["terminated" if row % 5 == 4 else "go on", "reset" if row % 3 == 0 else "go on"])
    assert buffer_state.adopt(theirs, ours) is ours
    rows = [Counter(row for stream in by_environment(each) for row in stream) for each in (float32(theirs), ours)]
    assert rows[0] == rows[1] and rows[0].total() == 40
    # Of the same class, or of a class of its own: taken as it is
    other = OTHERS["sb3"]()
    assert buffer_state.adopt(theirs, other) is theirs
    assert buffer_state.adopt(ours, ReplayBuffer(60, BOX_SPACE, ACTION_SPACE, "cpu")) is ours


def float32(buffer: Any) -> Any:
    for name in ("observations", "next_observations", "actions"):
        setattr(buffer, name, getattr(buffer, name).astype(np.float32))
    return buffer


def test_rows_of_a_users_class_may_be_arrays() -> None:
    class WithArrays(SB3ReplayBuffer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.extras = np.full((self.buffer_size, self.n_envs), None, dtype=object)
            for i in range(self.buffer_size):
                self.extras[i, 0] = np.zeros(3)

    buffer = WithArrays(4, BOX_SPACE, ACTION_SPACE, "cpu")
    buffer.full = True
    buffer_state.check_rows(buffer)
    buffer.extras[2, 0] = object()
    with pytest.raises(NotEncodable, match="extras"):
        buffer_state.check_rows(buffer)
