"""
A copy of the replay buffer on a GPU. An update gathers its minibatch there, instead of receiving it from the host.

The buffer on the host is still the one that is saved and drawn from: minibatches are the same with a copy or without.
"""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softsac.buffers import ReplayBuffer, map_obs, samples_itself
from sb3_softsac.type_aliases import ReplayBatch, TorchObs

DEVICES = ("cuda",)  # where a copy is of use
MAX_SHARE = 0.5  # of a GPU's free memory
PIECE = 1 << 24  # bytes of observations that are copied at once


class Storage(NamedTuple):
    """What minibatches are gathered from: R = rows x E transitions, those of one row side by side."""

    observations: TorchObs  # (R, ...), or a dict of them
    next_observations: TorchObs  # (R, ...), or a dict of them
    actions: th.Tensor  # (R, A)


class StoredBatch(NamedTuple):
    """A minibatch before its observations and actions are gathered."""

    places: th.Tensor  # in the storage, of observations and actions, and of next observations, (B, 2)
    numbers: th.Tensor  # reward, done and, with n-step returns, discount, (B, 2) or (B, 3)


def gathered(batch: ReplayBatch | StoredBatch, storage: Storage | None) -> ReplayBatch:
    """
    :param batch: minibatch
    :param storage: what it is gathered from
    :return: the minibatch with all its parts; without a device sync
    """
    if not isinstance(batch, StoredBatch):
        return batch
    assert storage is not None
    places, last_places = batch.places.unbind(1)
    rewards, dones, *discounts = batch.numbers.split(1, dim=1)
    batch_class: Any = DictReplayBufferSamples if isinstance(storage.observations, dict) else ReplayBufferSamples
    return batch_class(
        observations=map_obs(lambda stored: stored.index_select(0, places), storage.observations),
        actions=storage.actions.index_select(0, places),
        next_observations=map_obs(lambda stored: stored.index_select(0, last_places), storage.next_observations),
        dones=dones,
        rewards=rewards,
        discounts=discounts[0] if discounts else None,
    )


def with_scaled_rewards(samples: ReplayBatch | StoredBatch, factor: float) -> ReplayBatch | StoredBatch:
    """
    :param samples: of a replay buffer
    :param factor: of the rewards
    :return: the same samples with other rewards
    """
    if isinstance(samples, StoredBatch):
        numbers = samples.numbers.clone()
        numbers[:, 0] *= factor
        return samples._replace(numbers=numbers)
    return samples._replace(rewards=samples.rewards * factor)


class DeviceReplay:
    """
    Observations, next observations and actions of a replay buffer, copied to a device.

    Next observations are stored in full. This takes twice the buffer's own memory, but one index per transition.

    :param buffer: the replay buffer
    :param device: of the copy
    """

    def __init__(self, buffer: ReplayBuffer, device: th.device):
        self.buffer = buffer
        self.device = device
        n_rows = buffer.buffer_size * buffer.n_envs

        def empty(array: np.ndarray) -> th.Tensor:
            dtype = th.from_numpy(np.empty(0, array.dtype)).dtype
            return th.empty((n_rows, *array.shape[2:]), dtype=dtype, device=device)

        self.storage = Storage(
            map_obs(empty, buffer.observations), map_obs(empty, buffer.observations), empty(buffer.actions)
        )
        self._n_added: int | None = None  # of the buffer at the last update

    def update(self) -> Storage:
        """
        Copy the rows that are new in the buffer.

        :return: storage that is up to date until the buffer changes
        """
        buffer = self.buffer
        piece = max(1, PIECE // max(1, _row_bytes(buffer)))
        ranges = [(0, buffer.size())] if self._n_added is None else buffer.rows_since(self._n_added)
        for start, end in ranges:
            for first in range(start, end, piece):
                self._copy_rows(first, min(first + piece, end))
        self._n_added = buffer.n_added
        return self.storage

    def _copy_rows(self, first: int, last: int) -> None:
        buffer, n_envs = self.buffer, self.buffer.n_envs
        at = slice(first * n_envs, last * n_envs)

        def copy(stored: th.Tensor, new: np.ndarray) -> None:
            stored[at].copy_(self._sendable(new.reshape(stored[at].shape)), non_blocking=True)

        obs = map_obs(lambda rows: rows[first:last], buffer.observations)
        next_obs = buffer.get_next_obs(np.arange(at.start, at.stop))
        map_obs(copy, self.storage.observations, obs)
        map_obs(copy, self.storage.next_observations, next_obs)
        copy(self.storage.actions, buffer.actions[first:last])

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> StoredBatch:
        """
        Draw the same transitions as ``buffer.sample`` would.

        :param batch_size: B
        :param env: normalises rewards, if given
        :return: minibatch, to be :func:`gathered`
        """
        drawn = self.buffer.draw(batch_size, env)
        places = np.stack((drawn.places, drawn.last_places), axis=1)
        numbers = [drawn.rewards, drawn.dones, *([] if drawn.discounts is None else [drawn.discounts])]
        return StoredBatch(
            self._sendable(places).to(self.device, non_blocking=True),
            self._sendable(np.stack(numbers, axis=1, dtype=np.float32)).to(self.device, non_blocking=True),
        )

    def _sendable(self, array: np.ndarray) -> th.Tensor:
        tensor = th.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def obstacle(buffer: SB3ReplayBuffer, env: VecNormalize | None, mixes: bool = False) -> str | None:
    """
    :param buffer: a model's replay buffer
    :param env: normalises its samples; None: nothing does
    :param mixes: minibatches have transitions of other data, too
    :return: why there can be no copy on a device; None if there can
    """
    if type(buffer) is not ReplayBuffer:  # a subclass may sample differently, or change rows that were copied
        return f"replay_buffer_class={type(buffer).__name__} is not sb3_softsac.ReplayBuffer itself"
    if not samples_itself(buffer):
        return "sample() of the replay buffer has been replaced"
    if env is not None and env.norm_obs:
        return "VecNormalize(norm_obs=True) normalises observations when they are sampled"
    if mixes:
        return "offline_data is a part of each minibatch, and has no copy there"
    return None


def fits(buffer: ReplayBuffer, device: th.device) -> bool:
    """
    :param buffer: a model's replay buffer
    :param device: a GPU
    :return: whether a copy takes at most half of its free memory, including what torch holds in its cache
    """
    n_bytes = 2 * buffer.buffer_size * _row_bytes(buffer) + buffer.actions.nbytes
    free, _ = th.cuda.mem_get_info(device)
    free += th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
    return n_bytes <= MAX_SHARE * free


def _row_bytes(buffer: ReplayBuffer) -> int:
    """Bytes of the observations of all environments in one row."""
    obs = buffer.observations
    return sum(array[0].nbytes for array in (obs.values() if isinstance(obs, dict) else [obs]))
