"""
State of a replay buffer, ours or one of SB3: its rows, in segments of a megabyte or more, and the rest as a JSON tree.
"""

import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softsac.buffers import ReplayBuffer, rescaled_actions
from sb3_softsac.persistence.archive import ArchiveReader, ArchiveWriter, CheckpointError
from sb3_softsac.persistence.codec import decode, encode, full_name

# Constructor arguments, which are not state
SETTINGS = {
    *("buffer_size", "observation_space", "action_space", "obs_shape", "action_dim", "device", "n_envs", "env"),
    *("optimize_memory_usage", "handle_timeout_termination", "n_steps", "gamma"),
    *("n_sampled_goal", "goal_selection_strategy", "her_ratio", "copy_info_dict"),
}
# Attributes that ReplayBuffer.get_rows and get_state handle
OWN = {
    *("observations", "actions", "rewards", "dones", "timeouts", "pos", "full", "rng"),
    *("n_added", "n_imported"),
    *("_side_slot", "_side_obs", "_free_slots", "_newest_next_obs"),
}
SB3_CLASSES: dict[str, type[SB3ReplayBuffer]] = {
    full_name(each): each for each in (SB3ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
}
SMALL, LARGE = 1 << 20, 1 << 24  # bytes of a segment
Segment = tuple[int, int]  # first row, one past the last


def get_rows(buffer: SB3ReplayBuffer, first: int, last: int) -> dict[str, np.ndarray]:
    """
    :param buffer: any replay buffer with SB3's interface, for E environments
    :param first: first row
    :param last: one past the last row
    :return: arrays by name, (last - first, E, ...): every array of the buffer with an entry per row and environment
    """
    rows = buffer.get_rows(first, last) if isinstance(buffer, ReplayBuffer) else {}
    for name, storage in _row_storages(buffer).items():
        part = storage[first:last]
        rows[name] = _as_text(part) if storage.dtype == object else part
    return rows


def set_rows(buffer: SB3ReplayBuffer, first: int, rows: dict[str, np.ndarray]) -> None:
    """Set rows of an empty buffer from the result of :func:`get_rows`."""
    if isinstance(buffer, ReplayBuffer):
        buffer.set_rows(first, rows)
    for name, storage in _row_storages(buffer).items():
        part = decode(json.loads(rows[name].tobytes())) if storage.dtype == object else rows[name]
        storage[first : first + len(part)] = part


def describe(buffer: SB3ReplayBuffer) -> dict[str, Any]:
    """JSON tree that must be equal in a file and a buffer: class, capacity, dtype and row shape of each array."""
    return {
        "class": full_name(type(buffer)),
        "buffer_size": buffer.buffer_size,
        "n_envs": buffer.n_envs,
        "arrays": {name: [rows.dtype.str, list(rows.shape[1:])] for name, rows in get_rows(buffer, 0, 0).items()},
    }


def action_bounds(buffer: SB3ReplayBuffer) -> Any:
    """JSON tree: lower and upper bounds of the actions that it holds as scaled ones."""
    assert isinstance(buffer.action_space, spaces.Box)
    return encode((buffer.action_space.low, buffer.action_space.high))


def get_state(buffer: SB3ReplayBuffer) -> Any:
    """
    :return: JSON tree of the state besides the rows
    :raises NotEncodable: naming an attribute of a user's class that is not plain data
    """
    state = buffer.get_state() if isinstance(buffer, ReplayBuffer) else {}
    names = _rest(buffer)
    rest = {name: value for name, value in vars(buffer).items() if name in names}
    return encode({"own": state, "rest": rest}, f"replay_buffer ({type(buffer).__name__})")


def set_state(buffer: SB3ReplayBuffer, tree: Any) -> None:
    """
    :param tree: result of :func:`get_state`
    :raises ValueError: if it is damaged
    """
    state = decode(tree)
    if isinstance(buffer, ReplayBuffer):
        buffer.set_state(state["own"])
    for name, value in state["rest"].items():
        if name.startswith("__") or name in SETTINGS or callable(getattr(buffer, name, callable)):
            raise ValueError(f"{type(buffer).__name__} has no state {name!r}")
        vars(buffer)[name] = value


def segments(buffer: SB3ReplayBuffer) -> list[Segment]:
    """Segments of the used rows; their limits stay the same as the buffer fills."""
    row_bytes = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for name, (dtype, shape) in describe(buffer)["arrays"].items()
        if not name.startswith("side_")
    )
    wanted = min(max(row_bytes * buffer.buffer_size // 1024, SMALL), LARGE)
    rows = 2 ** int(math.log2(max(wanted // max(row_bytes, 1), 16)))
    # With optimize_memory_usage, SB3 keeps the newest next observation in the row after the last
    size = min(buffer.size() + (not isinstance(buffer, ReplayBuffer)), buffer.buffer_size)
    return [(first, min(first + rows, size)) for first in range(0, size, rows)]


def check_rows(buffer: SB3ReplayBuffer) -> None:
    """Raise :class:`NotEncodable` if a used row holds an object that cannot be saved."""
    for name, storage in _row_storages(buffer).items():
        if storage.dtype == object:
            for value in storage[: buffer.size()].flat:
                if type(value) is not dict or value:  # the infos of HER are empty, unless copy_info_dict is set
                    encode(value, name.removesuffix(".json"))


def may_have_changed(buffer: SB3ReplayBuffer, segment: Segment, rows_before: int | None) -> bool:
    """
    :param segment: the rows
    :param rows_before: ``n_added`` of the buffer at an earlier time; None: not known
    :return: False only if no row of the segment has changed since then
    """
    # A user's class may change any row
    if type(buffer) is not ReplayBuffer or rows_before is None:
        return True
    first, last = segment
    return any(first < end and start < last for start, end in buffer.rows_since(rows_before))


def write_rows(archive: ArchiveWriter, buffer: SB3ReplayBuffer) -> None:
    """Write all rows of a buffer, as members ``replay/<first row>/<array>.npy``."""
    for first, last in segments(buffer):
        for name, rows in get_rows(buffer, first, last).items():
            archive.add_array(f"replay/{first}/{name}.npy", rows)


def read_rows(
    archive: ArchiveReader, description: dict[str, Any], segment: Segment, prefix: str = ""
) -> dict[str, np.ndarray]:
    """
    :param archive: archive to read from
    :param description: description of the saved buffer, see :func:`describe`
    :param segment: the rows
    :param prefix: prefix of the members' names
    :return: arrays by name, for :func:`set_rows`
    :raises CheckpointError: if an array is missing, or its dtype or shape is different
    """
    n_rows = segment[1] - segment[0]
    return {
        name: archive.array(f"{prefix}{name}.npy", np.dtype(dtype), (None if _varies(name) else n_rows, *shape))
        for name, (dtype, shape) in description["arrays"].items()
    }


def empty_like(
    description: dict[str, Any], observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> SB3ReplayBuffer:
    """
    :param description: result of :func:`describe`
    :param observation_space: of the model
    :param action_space: of the model
    :return: empty buffer with such arrays: of SB3's class if it was one, else ours
    """
    n_rows, n_envs = int(description["buffer_size"]), int(description["n_envs"])
    buffer_class = SB3_CLASSES.get(description["class"], ReplayBuffer)
    options: dict[str, Any] = {"device": "cpu", "n_envs": n_envs}
    if buffer_class is HerReplayBuffer:
        options["env"] = None  # which would compute rewards of new goals
    if buffer_class is SB3ReplayBuffer and "next_observations" not in description["arrays"]:
        options.update(optimize_memory_usage=True, handle_timeout_termination=False)
    return buffer_class(n_rows * n_envs, observation_space, action_space, **options)


def restore(
    buffer: SB3ReplayBuffer, replay: dict[str, Any], parts: Iterator[tuple[int, dict[str, np.ndarray]]], what: str
) -> None:
    """
    Fill an empty buffer from a file.

    :param buffer: empty buffer
    :param replay: ``description``, ``state`` and ``segments`` in the file's index
    :param parts: first row and arrays of each segment
    :param what: name of the file
    :raises CheckpointError: naming the array or the capacity that does not fit
    """
    there, here = replay["description"], describe(buffer)
    for name in sorted({*there["arrays"], *here["arrays"]}):
        if there["arrays"].get(name) != here["arrays"].get(name) and not _differ_by_envs(there, here, name):
            remedy = f"it is from an environment with other spaces than {buffer.observation_space}"
            if there["class"] != here["class"]:
                remedy = (
                    f"a {there['class']} was saved. Pass it as replay_buffer_class=... to load(), with its buffer_size "
                    "and replay_buffer_kwargs, or leave it out with custom_objects={'replay_buffer': None}"
                )
            raise CheckpointError(
                f"replay_buffer: {name} is {there['arrays'].get(name, 'missing')} (dtype, shape of a row) in {what}, "
                f"but {here['arrays'].get(name, 'missing')} in {type(buffer).__name__}: {remedy}."
            )
    rows, n_envs = there["buffer_size"], there["n_envs"]
    if (rows, n_envs) == (buffer.buffer_size, buffer.n_envs):
        _fill(buffer, replay, parts, what)
        return
    if type(buffer) is not ReplayBuffer:
        raise CheckpointError(
            f"replay_buffer: {what} has {rows} rows of {n_envs} environment(s), but {buffer.buffer_size} "
            f"rows of {buffer.n_envs} are needed. Only SoftSAC's own ReplayBuffer can be rearranged, not "
            f"{type(buffer).__name__}: use the same number of environments and the same buffer_size, or leave the "
            "replay buffer out with custom_objects={'replay_buffer': None}."
        )
    source = ReplayBuffer(rows * n_envs, buffer.observation_space, buffer.action_space, buffer.device, n_envs)
    _fill(source, replay, parts, what)
    total = source.size() * source.n_envs
    copied = buffer.copy_transitions(source)
    buffer.rng.bit_generator.state = source.rng.bit_generator.state
    if copied < total:
        warnings.warn(
            f"The replay buffer of {what} ({total} transitions of {source.n_envs} environment(s)) was rearranged for "
            f"{buffer.n_envs} environment(s) and buffer_size={buffer.buffer_size * buffer.n_envs}; the "
            f"{total - copied} oldest transitions did not fit.",
            stacklevel=2,
        )


def _fill(
    buffer: SB3ReplayBuffer, replay: dict[str, Any], parts: Iterator[tuple[int, dict[str, np.ndarray]]], what: str
) -> None:
    n_rows = 0
    for first, rows in parts:
        if first != n_rows:
            raise CheckpointError(f"replay_buffer: {what} lacks the rows from {n_rows} on.")
        set_rows(buffer, first, rows)
        n_rows += next(len(array) for name, array in rows.items() if not _varies(name))
    set_state(buffer, replay["state"])
    if "action_bounds" in replay:  # not in older files
        low, high = decode(replay["action_bounds"])
        there = spaces.Box(low, high, dtype=low.dtype)
        buffer.actions[...] = rescaled_actions(buffer.actions, there, buffer.action_space)
    if not 0 <= buffer.pos < buffer.buffer_size or n_rows < buffer.size():
        raise CheckpointError(
            f"replay_buffer: {what} has {n_rows} rows of {buffer.size()}, and the next to be written is {buffer.pos}."
        )


def adopt(buffer: SB3ReplayBuffer, template: SB3ReplayBuffer) -> SB3ReplayBuffer:
    """An unpickled buffer; or the model's, filled from it, if that is of our class and the other of SB3's."""
    if type(template) is not ReplayBuffer or type(buffer) is ReplayBuffer or isinstance(buffer, HerReplayBuffer):
        return buffer
    template.copy_transitions(buffer)
    template.end_episodes()
    return template


def _varies(name: str) -> bool:
    """Whether the length of an array is not the number of rows."""
    return name.startswith("side_") or name.endswith(".json")


def _differ_by_envs(there: dict[str, Any], here: dict[str, Any], name: str) -> bool:
    """Whether two descriptions of an array differ only in the number of environments."""
    a, b = there["arrays"].get(name), here["arrays"].get(name)
    if a is None or b is None or _varies(name):
        return False
    return bool(a[0] == b[0] and a[1][1:] == b[1][1:] and [a[1][0], b[1][0]] == [there["n_envs"], here["n_envs"]])


def _row_storages(buffer: SB3ReplayBuffer) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in vars(buffer).items():
        if isinstance(buffer, ReplayBuffer) and name in OWN:
            continue
        for key, array in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(array, np.ndarray) and array.shape[:2] == (buffer.buffer_size, buffer.n_envs):
                found[name + (f".{key}" if key else "") + (".json" if array.dtype == object else "")] = array
    return found


def _rest(buffer: SB3ReplayBuffer) -> set[str]:
    rows = {name.split(".")[0] for name in _row_storages(buffer)}
    own = OWN if isinstance(buffer, ReplayBuffer) else set()
    return set(vars(buffer)) - SETTINGS - rows - own


def _as_text(objects: np.ndarray) -> np.ndarray:
    return np.frombuffer(json.dumps(encode(objects, "infos")).encode(), dtype=np.uint8)
