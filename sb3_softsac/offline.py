"""
Offline data as a part of each minibatch, as in RLPD (https://arxiv.org/abs/2302.02948).

A run is saved without the data, but with a reference to it, the SHA-256 of its transitions and the random state that
they are drawn with. :func:`set_up` finds the data again and checks it.
"""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer

from sb3_softsac import datasets
from sb3_softsac.buffers import ReplayBuffer, map_obs
from sb3_softsac.persistence import atomic_files
from sb3_softsac.persistence.archive import CheckpointError
from sb3_softsac.persistence.model_file import open_model_file
from sb3_softsac.type_aliases import ReplayBatch

Source = dict[str, Any]
"""What is saved about offline data: ``reference`` (the id of a Minari dataset, the absolute path or the address of a
file, or None), ``sha256`` of its transitions, and ``rng``, the generator that they are drawn with."""

DEFAULT_FRACTION = 0.5
REMEDY = "pass it (or a copy) as offline_data=... to load(), or continue without it: offline_fraction=0.0."


def set_up(model: Any) -> None:
    """
    Read a model's offline data into its own replay buffer, unless that has been done.

    :param model: ``SoftSAC``; its ``offline_data`` is then the buffer. If the user has set that to None, it stays None
    :raises ValueError: if the data cannot be read, or does not fit
    :raises CheckpointError: if the data of a loaded run is missing or different, and none is passed
    """
    drop_unwanted(model)
    data, source = model.offline_data, model._offline_source
    if model.offline_fraction == 0.0 or (data is None and source is None):
        return
    if isinstance(data, ReplayBuffer) and source is not None and data.rng is source["rng"]:
        _set_returns(data, model)
        return
    if data is not None:
        buffer, reference = _read(data, model), _reference(data)
    else:
        buffer, reference = _found_again(source, model), source["reference"]
    sha256 = digest(buffer)
    if source is not None and sha256 != source["sha256"]:
        if data is None:
            raise CheckpointError(
                f"The offline data {reference!r} is not what the run has learned from: the SHA-256 of its transitions "
                f"is {sha256[:16]}..., not {source['sha256'][:16]}... Restore the original data, {REMEDY}"
            )
        warnings.warn(
            "The continuation differs: offline_data is not what the run has learned from so far.", stacklevel=2
        )
    rng = np.random.default_rng(np.random.randint(2**31)) if source is None else source["rng"]
    buffer.rng = rng
    model.offline_data, model._offline_source = buffer, {"reference": reference, "sha256": sha256, "rng": rng}
    model._has_offline_data = True


def drop_unwanted(model: Any) -> None:
    """
    :param model: ``SoftSAC``; it goes on without offline data if the user has set ``offline_data`` to None
    """
    if model.offline_data is None and model._has_offline_data:
        model._offline_source, model._has_offline_data, model.offline_fraction = None, False, DEFAULT_FRACTION


def seed(source: Source, number: int) -> None:
    """
    :param source: that of a model's offline data; its generator is seeded in place
    :param number: the seed
    """
    # Another stream than that of the replay buffer
    source["rng"].bit_generator.state = np.random.default_rng([number, 0x0FF]).bit_generator.state


def share(model: Any, batch_size: int) -> int:
    """
    :param model: ``SoftSAC``
    :param batch_size: B
    :return: how many transitions of each minibatch are offline data
    """
    return 0 if model.offline_data is None else round(model.offline_fraction * batch_size)


def mixed(online: ReplayBatch, offline: ReplayBatch, n: int) -> ReplayBatch:
    """
    :param online: online parts of n minibatches, one after the other
    :param offline: their offline parts
    :param n: number of minibatches
    :return: the minibatches, one after the other; the online part of each comes first
    """

    def join(first: th.Tensor, second: th.Tensor) -> th.Tensor:
        parts = (part.view(n, len(part) // n, *part.shape[1:]) for part in (first, second))
        return th.cat(tuple(parts), dim=1).flatten(0, 1)

    columns = zip(online, offline, strict=True)
    batch_class: Any = type(online)
    return batch_class(*(None if pair == (None, None) else map_obs(join, *pair) for pair in columns))


def digest(buffer: ReplayBuffer) -> str:
    """
    :param buffer: a replay buffer
    :return: SHA-256 of its transitions
    """
    sha256 = hashlib.sha256()
    rows = buffer.get_rows(0, buffer.size())
    newest = buffer.get_state()["newest_next_obs"]
    rows |= {f"newest.{key}": obs for key, obs in (newest.items() if isinstance(newest, dict) else [("", newest)])}
    for name, array in sorted(rows.items()):
        sha256.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).data)
    return sha256.hexdigest()


def _found_again(source: Source, model: Any) -> ReplayBuffer:
    reference = source["reference"]
    if reference is None:
        raise CheckpointError(
            f"The run learned from offline data that is neither a model file nor a whole Minari dataset: {REMEDY}"
        )
    try:
        return _read(reference, model)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(
            f"The offline data {reference!r} of the run cannot be read: {error} Restore it, {REMEDY}"
        ) from error


def _read(data: Any, model: Any) -> ReplayBuffer:
    spaces = model.observation_space, model.action_space
    if _is_file(data):
        with open_model_file(data) as file:
            buffer = file.read_buffer(*spaces)
    elif isinstance(data, SB3ReplayBuffer):
        buffer = ReplayBuffer(max(data.size() * data.n_envs, 1), *spaces, "cpu")
        datasets.check_buffer(data, buffer)
        buffer.copy_transitions(data)
    else:
        stream = datasets.read(data, ReplayBuffer(1, *spaces, "cpu"))
        buffer = ReplayBuffer(len(stream.rewards), *spaces, "cpu")
        buffer.add_stream(stream)
    if buffer.size() == 0:
        raise ValueError("offline_data has no transitions: pass other data, or leave it out.")
    buffer.device = model.device
    _set_returns(buffer, model)
    return buffer


def _set_returns(buffer: ReplayBuffer, model: Any) -> None:
    """As in the other part of the minibatches."""
    online = model.replay_buffer
    buffer.n_steps, buffer.gamma = getattr(online, "n_steps", 1), getattr(online, "gamma", model.gamma)
    buffer.handle_timeout_termination = getattr(online, "handle_timeout_termination", True)


def _reference(data: Any) -> str | None:
    if _is_file(data):
        path = atomic_files.as_path(data)
        return str(path.resolve() if isinstance(path, Path) else path)
    if isinstance(data, str):
        return data
    # A part of a Minari dataset has the id of the whole
    indices, storage = getattr(data, "episode_indices", None), getattr(data, "storage", None)
    if indices is None or storage is None or not np.array_equal(indices, np.arange(storage.total_episodes)):
        return None
    return str(data.id)


def _is_file(data: Any) -> bool:
    if not isinstance(data, str):
        return isinstance(data, os.PathLike) or hasattr(data, "read_bytes")  # a UPath
    if "://" in data:
        return True
    path = Path(data)
    return path.is_absolute() or path.suffix == ".zip" or path.exists() or path.with_name(f"{path.name}.zip").exists()
