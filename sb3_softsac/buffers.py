"""
Replay buffer that stores float32, one copy of each observation, and has its own random state.

SB3's buffer stores every observation twice, in the environment's dtype (float64 for MuJoCo). Here, the next
observation of a row is the observation of the following row. Where the two differ (an episode ended, or the environment
was reset between two calls of ``learn()``), the next observation is stored separately, as is that of the newest row
until the following row is written. Truncated episodes therefore bootstrap from the right observation, unlike with SB3's
``optimize_memory_usage`` (SB3 issue 934).
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.lib.mixins import NDArrayOperatorsMixin
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softsac.type_aliases import ReplayBatch

try:  # optional, as in SB3: only checks the free memory
    import psutil
except ImportError:
    psutil = None

Obs = np.ndarray | dict[str, np.ndarray]


def map_obs(function: Callable[..., Any], *observations: Any) -> Any:
    """
    Apply a function to arrays, or key by key to dicts of arrays.

    :param function: takes one array from each of ``observations``
    :param observations: arrays, or dicts with the same keys
    :return: result, or dict of results
    """
    if isinstance(observations[0], dict):
        return {key: function(*(obs[key] for obs in observations)) for key in observations[0]}
    return function(*observations)


def rows_of(batch: Any, rows: slice) -> Any:
    """
    :param batch: samples of a replay buffer
    :param rows: some of their rows
    :return: samples that share memory with ``batch``
    """
    return type(batch)(*(None if part is None else map_obs(lambda tensor: tensor[rows], part) for part in batch))


def rows_by_age(buffer: SB3ReplayBuffer) -> np.ndarray:
    """Used rows of a buffer, oldest first."""
    return (np.arange(buffer.size()) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size


def rescaled_actions(actions: np.ndarray, there: spaces.Space[Any], here: spaces.Space[Any]) -> np.ndarray:
    """
    :param actions: scaled actions of one space, (..., A)
    :param there: that space
    :param here: another one
    :return: the same actions as scaled ones of the other space; what is out of its bounds is clipped, with a warning
    """
    if not isinstance(there, spaces.Box) or not isinstance(here, spaces.Box):
        return actions
    if there == here or there.shape != here.shape:
        return actions
    low, high = there.low.reshape(-1).astype(np.float64), there.high.reshape(-1).astype(np.float64)
    own_low, own_high = here.low.reshape(-1).astype(np.float64), here.high.reshape(-1).astype(np.float64)
    in_env_units = low + 0.5 * (actions + 1.0) * (high - low)
    rescaled = 2.0 * (in_env_units - own_low) / (own_high - own_low) - 1.0
    clipped = np.clip(rescaled, -1.0, 1.0)
    n_beyond = int((np.abs(rescaled - clipped) > 1e-6).sum())
    warnings.warn(
        f"The transitions are from an environment with actions in {there}, not {here}: they are converted"
        + (f", and {n_beyond} action component(s) that are out of bounds are clipped." if n_beyond else "."),
        stacklevel=3,
    )
    return clipped.astype(actions.dtype)


def _whole_rows(buffer: SB3ReplayBuffer) -> np.ndarray:
    """
    The rows in use, oldest first. With optimize_memory_usage, SB3 stores next observations in the following row: in a
    full buffer, the newest is where the oldest observation was.
    """
    return rows_by_age(buffer)[int(buffer.full and not hasattr(buffer, "next_observations")) :]


def named(name: str, obs: Obs) -> dict[str, np.ndarray]:
    """One name for an array, one with each key for a dict of arrays."""
    return {f"{name}.{key}": value for key, value in obs.items()} if isinstance(obs, dict) else {name: obs}


class Drawn(NamedTuple):
    """
    B sampled transitions: the places of their observations and actions, and the other values. The place of a
    transition is row * E + environment.
    """

    places: np.ndarray  # of observations and actions, (B,)
    last_places: np.ndarray  # of next observations, (B,); differ from ``places`` with n-step returns
    rewards: np.ndarray  # (B,)
    dones: np.ndarray  # 1 where the episode terminated, (B,)
    discounts: np.ndarray | None  # gamma^k with n-step returns, (B,)


class Stream(NamedTuple):
    """
    N transitions in the order of time. The next observation of one is the observation of the one after it, except at M
    ends: where an episode has ended, terminated or not, and at the last transition.
    """

    observations: Obs  # (N, ...), or a dict of them
    actions: np.ndarray  # scaled, (N, A)
    rewards: np.ndarray  # (N,)
    dones: np.ndarray  # terminated or truncated, (N,)
    timeouts: np.ndarray  # truncated, (N,)
    ends: np.ndarray  # indices of transitions, ascending, (M,)
    end_observations: Obs  # their next observations, (M, ...), or a dict of them


class ReplayBuffer(SB3ReplayBuffer):
    """
    Default replay buffer of SoftSAC, for array and Dict observations, any number of environments and n-step returns.

    It has the interface and the attributes of SB3's ``ReplayBuffer``, but ``next_observations`` is a read-only view,
    which gathers the indexed rows. If you write to the arrays yourself, call :meth:`mark_changed` afterwards.

    :param buffer_size: capacity in transitions, over all environments
    :param observation_space: observation space; float64 is stored as float32, other dtypes are kept
    :param action_space: action space; scaled actions are stored as float32, whatever its dtype
    :param device: device of the sampled batches
    :param n_envs: number of environments, E
    :param optimize_memory_usage: ignored, for compatibility with SB3: memory is always optimised
    :param handle_timeout_termination: treat time limits as truncation (bootstrap), not termination
    :param n_steps: K, number of rewards in a return; fewer at the end of an episode and at the newest row
    :param gamma: discount factor within the returns
    """

    observations: Obs  # type: ignore[assignment]
    action_space: spaces.Box

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 0.99,
    ):
        # SB3's ReplayBuffer.__init__ would allocate its own storage
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if n_steps < 1:
            raise ValueError(f"n_steps={n_steps} must be at least 1.")
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = False
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps = n_steps
        self.gamma = gamma

        # np.zeros takes memory only where it is written: a model that only predicts needs none
        rows = (self.buffer_size, self.n_envs)
        try:
            self.observations = self._zeros_obs(rows)
        except MemoryError as error:
            raise MemoryError(
                f"buffer_size={buffer_size}: {error}. Use a smaller buffer_size, or smaller observations."
            ) from error
        self.actions = np.zeros((*rows, self.action_dim), dtype=np.float32)
        self.rewards = np.zeros(rows, dtype=np.float32)
        self.dones = np.zeros(rows, dtype=np.float32)
        self.timeouts = np.zeros(rows, dtype=np.float32)
        # For next observations that differ from the following row's observation: slot in _side_obs plus 1; else 0
        self._side_slot = np.zeros(rows, dtype=np.int32)
        self._side_obs = self._zeros_obs((0,))
        self._free_slots: list[int] = []
        self._newest_next_obs = self._zeros_obs((self.n_envs,))
        self.n_added = 0  # rows ever added, including overwritten and removed ones
        self.n_imported = 0  # of these, rows that came from datasets and other buffers
        self.seed(None)
        if psutil is not None and self.nbytes > psutil.virtual_memory().available:
            warnings.warn(
                f"The replay buffer will need {self.nbytes / 1e9:.1f} GB when it is full, but only "
                f"{psutil.virtual_memory().available / 1e9:.1f} GB are free: consider a smaller buffer_size.",
                stacklevel=2,
            )

    def seed(self, seed: int | None) -> None:
        """
        Seed the random state of :meth:`sample`.

        :param seed: seed; None: draw one from NumPy's global random state, so that ``set_random_seed`` has an effect
        """
        entropy = np.random.randint(2**31) if seed is None else seed
        # Gymnasium seeds action spaces and environments with the seed itself: avoid the same random numbers
        self.rng = np.random.default_rng([entropy, 0x5AC])

    @property
    def next_observations(self) -> Any:  # type: ignore[override]
        """Stand-in for SB3's array (or dict of arrays), which gathers rows when it is indexed."""
        if isinstance(self.observations, dict):
            return {key: NextObservations(self, key) for key in self.observations}
        return NextObservations(self, None)

    @property
    def ends(self) -> np.ndarray:
        """
        :return: where the next observation is not the following row's observation, since the episode has ended or the
            environments were reset; (rows, E)
        """
        return self._side_slot != 0

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes, including rows that are not written yet."""
        arrays = [self.actions, self.rewards, self.dones, self.timeouts, self._side_slot]
        for obs in (self.observations, self._side_obs, self._newest_next_obs):
            arrays += obs.values() if isinstance(obs, dict) else [obs]
        return sum(array.nbytes for array in arrays)

    def add(
        self,
        obs: Obs,
        next_obs: Obs,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store a copy of one transition of each environment.

        :param obs: observations, (E, ...)
        :param next_obs: next observations, (E, ...); at the end of an episode the terminal one, not that of the reset
        :param action: scaled actions, (E, A)
        :param reward: rewards, (E,)
        :param done: 1 where the episode terminated or was truncated, (E,)
        :param infos: E dicts; ``TimeLimit.truncated`` marks truncation
        """
        # Whatever can fail comes first, so that an error leaves the buffer unchanged
        obs, next_obs = self._as_rows(obs), self._as_rows(next_obs)
        action = np.asarray(action).reshape(self.n_envs, self.action_dim)
        reward, done = (np.asarray(values).reshape(self.n_envs) for values in (reward, done))
        timeout = np.array([info.get("TimeLimit.truncated", False) for info in infos]).reshape(self.n_envs)

        pos = self.pos
        if pos > 0 or self.full:
            self._keep_where_stream_broke((pos - 1) % self.buffer_size, obs)
        if self.full:
            self._release_slots(pos)

        map_obs(lambda storage, new: storage.__setitem__(pos, new), self.observations, obs)
        self.actions[pos] = action
        self.rewards[pos] = reward
        self.dones[pos] = done
        if self.handle_timeout_termination:
            self.timeouts[pos] = timeout
        map_obs(lambda storage, new: storage.__setitem__(..., new), self._newest_next_obs, next_obs)
        self._keep_newest_on_side(pos, np.flatnonzero(done))

        self.n_added += 1
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

    def mark_changed(self) -> None:
        """
        Announce that rows were changed in place, without :meth:`add`. The next checkpoint and a copy on a GPU then
        include all rows, not just the new ones.
        """
        self.n_added += self.buffer_size

    def end_episodes(self) -> None:
        """The environments are about to be reset: what is added next is of other episodes, whatever it looks like."""
        if self.size() > 0:
            newest = (self.pos - 1) % self.buffer_size
            self._keep_newest_on_side(newest, np.flatnonzero(self._side_slot[newest] == 0))

    def rows_since(self, n_added: int) -> list[tuple[int, int]]:
        """
        :param n_added: value of ``n_added`` at an earlier time
        :return: ranges of rows that may have changed since then: first row, one past the last
        """
        if self.n_added == n_added:
            return []
        # One more than added: the next observation of the row before them may now be stored separately
        n_changed = min(self.n_added - n_added + 1, self.size())
        start = self.pos - n_changed
        ranges = [(max(start, 0), self.pos), (start + self.buffer_size, self.buffer_size)]
        return [(first, last) for first, last in ranges if first < last]

    def reset(self) -> None:
        """Remove all rows."""
        super().reset()
        self._side_slot[:] = 0
        self._side_obs = self._zeros_obs((0,))
        self._free_slots = []
        self.mark_changed()

    def get_rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """
        Get the contents of some rows, to save them.

        :param first: first row
        :param last: one past the last row
        :return: arrays by name, (last - first, E, ...), views where possible. The arrays ``side_observations`` and
            ``side_index`` have an entry for each next observation that is stored separately: the observation, and its
            index into the flattened rows
        """
        slots = self._side_slot[first:last].ravel()
        on_side = np.flatnonzero(slots)
        return {
            **named("observations", map_obs(lambda storage: storage[first:last], self.observations)),
            "actions": self.actions[first:last],
            "rewards": self.rewards[first:last],
            "dones": self.dones[first:last],
            "timeouts": self.timeouts[first:last],
            "side_index": on_side,
            **named("side_observations", map_obs(lambda side: side[slots[on_side] - 1], self._side_obs)),
        }

    def set_rows(self, first: int, rows: dict[str, np.ndarray]) -> None:
        """
        Set the contents of some rows of an empty buffer.

        :param first: first row
        :param rows: result of :meth:`get_rows`
        :raises ValueError: if a next observation belongs to none of these rows, or two belong to one
        """
        last = first + len(rows["actions"])
        for name, storage in named("observations", self.observations).items():
            storage[first:last] = rows[name]
        for name in ("actions", "rewards", "dones", "timeouts"):
            getattr(self, name)[first:last] = rows[name]
        on_side = rows["side_index"]
        if on_side.size and not 0 <= on_side.min() <= on_side.max() < (last - first) * self.n_envs:
            raise ValueError("side_index points outside of its rows")
        if (np.diff(on_side) <= 0).any():
            raise ValueError("side_index is not ascending")
        while len(self._free_slots) < on_side.size:
            self._grow_side()
        slots = np.array([self._free_slots.pop() for _ in range(on_side.size)], dtype=np.int32)
        self._side_slot[first:last].reshape(-1)[on_side] = slots + 1
        for name, side in named("side_observations", self._side_obs).items():
            side[slots] = rows[name]
        self.mark_changed()

    def get_state(self) -> dict[str, Any]:
        """The state besides the rows."""
        newest = map_obs(np.copy, self._newest_next_obs)
        return {
            "pos": self.pos,
            "full": self.full,
            "n_imported": self.n_imported,
            "newest_next_obs": newest,
            "rng": self.rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """
        :param state: result of :meth:`get_state`
        """
        map_obs(lambda storage, new: storage.__setitem__(..., new), self._newest_next_obs, state["newest_next_obs"])
        self.rng.bit_generator.state = state["rng"]
        self.pos, self.full = int(state["pos"]), bool(state["full"])
        self.n_imported = int(state.get("n_imported", 0))  # not in older files
        self.mark_changed()

    def copy_transitions(self, other: SB3ReplayBuffer) -> int:
        """
        Add the transitions of another buffer. It may be a buffer of SB3, and have another size or number of
        environments: the environments' transitions are then joined end to end and split evenly among this buffer's
        environments. The oldest transitions are left out if not all fit, or if they cannot be split evenly.

        :param other: buffer with the same spaces
        :return: number of transitions added
        """
        is_shifted = not hasattr(other, "next_observations")
        order = _whole_rows(other)
        n_new = min(len(order) * other.n_envs // self.n_envs, self.buffer_size)
        kept = order[len(order) - -(-n_new * self.n_envs // other.n_envs) :]
        rows = np.tile(kept, other.n_envs)[-n_new * self.n_envs :].reshape(self.n_envs, n_new)
        actions = rescaled_actions(other.actions, other.action_space, self.action_space)
        env_indices = np.repeat(np.arange(other.n_envs), len(kept))[-n_new * self.n_envs :].reshape(self.n_envs, n_new)
        ends = other.ends if isinstance(other, ReplayBuffer) else other.dones.astype(bool)
        joins = np.diff(env_indices, append=env_indices[:, -1:]) != 0  # where another environment's transitions follow
        for step in range(n_new):
            at = rows[:, step], env_indices[:, step]
            obs = map_obs(lambda storage, at=at: np.asarray(storage[at]), other.observations)
            next_at, source = at, other.observations if is_shifted else other.next_observations
            if is_shifted:
                next_at = (at[0] + 1) % other.buffer_size, at[1]
            next_obs = map_obs(lambda storage, at=next_at: np.asarray(storage[at]), source)
            infos = [{"TimeLimit.truncated": bool(timeout)} for timeout in other.timeouts[at]]
            self.add(obs, next_obs, actions[at], other.rewards[at], other.dones[at], infos)
            newest = (self.pos - 1) % self.buffer_size
            is_cut = (ends[at] | joins[:, step]) & (self._side_slot[newest] == 0)
            self._keep_newest_on_side(newest, np.flatnonzero(is_cut))
        self.n_imported += n_new
        return n_new * self.n_envs

    def add_dataset(self, dataset: Any) -> int:
        """
        Add the transitions of a dataset. If any of its data is invalid, nothing is added.

        With several environments, each gets a part, as in :meth:`copy_transitions`. If not everything fits into the
        buffer, the oldest transitions are left out, with a warning.

        :param dataset: ``minari.MinariDataset`` or its id; another replay buffer; or episodes of T steps, which are
            objects or dicts with ``observations`` (T + 1, ...) or a dict of them, ``actions`` (T, ...) in the
            environment's units, ``rewards``, ``terminations`` and ``truncations``, (T,) each
        :return: number of transitions added
        :raises ValueError: naming the episode and the field that do not fit, what was found and what was expected
        """
        from sb3_softsac import datasets  # it imports this module

        if isinstance(dataset, SB3ReplayBuffer):
            datasets.check_buffer(dataset, self)
            return self._add_buffer(dataset)
        return self.add_stream(datasets.read(dataset, self))

    def _add_buffer(self, other: SB3ReplayBuffer) -> int:
        n_all = len(_whole_rows(other)) * other.n_envs
        self.end_episodes()
        n_added = self.copy_transitions(other)
        self.end_episodes()
        self._warn_of_rest(n_all - n_added, n_all)
        return n_added

    def add_stream(self, stream: Stream) -> int:
        """
        Add transitions all at once. The episodes in progress end here. With several environments, each gets a part.

        :param stream: the transitions
        :return: number of transitions added: the newest, if not all fit or they cannot be split evenly
        """
        n_all, n_envs = len(stream.rewards), self.n_envs
        n_rows = min(n_all // n_envs, self.buffer_size)
        first = n_all - n_rows * n_envs
        self._warn_of_rest(first, n_all)
        if n_rows == 0:
            return 0
        self.end_episodes()
        rows = (self.pos + np.arange(n_rows)) % self.buffer_size
        self._release_slots(rows)

        def deal(storage: np.ndarray, new: np.ndarray) -> None:
            storage[rows] = new[first:].reshape(n_envs, n_rows, *storage.shape[2:]).swapaxes(0, 1)

        map_obs(deal, self.observations, stream.observations)
        deal(self.actions, stream.actions)
        deal(self.rewards, stream.rewards)
        deal(self.dones, stream.dones)
        deal(self.timeouts, stream.timeouts if self.handle_timeout_termination else np.zeros_like(stream.timeouts))
        # A part may end within an episode
        part_ends = first + n_rows * np.arange(1, n_envs + 1) - 1
        ends = np.union1d(stream.ends[stream.ends >= first], part_ends)
        is_own = np.isin(ends, stream.ends)
        of_own = np.searchsorted(stream.ends, ends[is_own])

        def next_obs_of_ends(obs: np.ndarray, end_obs: np.ndarray) -> np.ndarray:
            next_obs = obs[np.minimum(ends + 1, n_all - 1)]
            next_obs[is_own] = end_obs[of_own]
            return next_obs

        next_obs = map_obs(next_obs_of_ends, stream.observations, stream.end_observations)
        env_indices, steps = np.divmod(ends - first, n_rows)
        self._keep_on_side(rows[steps] * n_envs + env_indices, next_obs)
        is_part_end = np.isin(ends, part_ends)
        map_obs(lambda storage, new: storage.__setitem__(..., new[is_part_end]), self._newest_next_obs, next_obs)

        self.n_added += n_rows
        self.n_imported += n_rows
        self.full = self.full or self.pos + n_rows >= self.buffer_size
        self.pos = (self.pos + n_rows) % self.buffer_size
        return n_rows * n_envs

    def _warn_of_rest(self, n_left_out: int, n_all: int) -> None:
        """Unless that is what cannot be split evenly among the environments."""
        if n_left_out >= self.n_envs or 0 < n_left_out == n_all:
            warnings.warn(
                f"{n_left_out} of {n_all} transitions, the oldest, were left out: the replay buffer has "
                f"buffer_size={self.buffer_size * self.n_envs} for {self.n_envs} environment(s).",
                stacklevel=4,
            )

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBatch:  # type: ignore[override]
        """
        Sample transitions uniformly, with replacement, with the buffer's own random state.

        :param batch_size: B
        :param env: normalises observations and rewards, if given
        :return: batch on the buffer's device; ``discounts`` is gamma^k with n-step returns, else None
        :raises ValueError: if the buffer is empty
        """
        return self._get_samples(self._draw_rows(batch_size), env=env)

    def draw(self, batch_size: int, env: VecNormalize | None = None) -> Drawn:
        """
        Sample transitions like :meth:`sample`, but without gathering their observations and actions.

        :param batch_size: B
        :param env: normalises rewards, if given
        :return: the sampled transitions
        :raises ValueError: if the buffer is empty
        """
        return self._draw(self._draw_rows(batch_size), env)

    def get_next_obs(self, places: np.ndarray) -> Any:
        """
        Gather next observations.

        :param places: places of the transitions, row * E + environment, (B,)
        :return: next observations (B, ...), or a dict of them
        """
        slots = self._at(self._side_slot, places)
        on_side = np.flatnonzero(slots)
        newest = np.flatnonzero(places // self.n_envs == (self.pos - 1) % self.buffer_size)
        next_places = (places + self.n_envs) % (self.buffer_size * self.n_envs)

        def gather(storage: np.ndarray, side: np.ndarray, newest_next: np.ndarray) -> np.ndarray:
            next_obs = self._at(storage, next_places)
            if newest.size:
                next_obs[newest] = newest_next[places[newest] % self.n_envs]
            if on_side.size:  # possibly that of the newest row, too
                next_obs[on_side] = side[slots[on_side] - 1]
            return next_obs

        return map_obs(gather, self.observations, self._side_obs, self._newest_next_obs)

    def _draw_rows(self, batch_size: int) -> np.ndarray:
        if self.size() == 0:
            raise ValueError("The replay buffer is empty: nothing to sample. Add transitions first.")
        return self.rng.integers(self.size(), size=batch_size)

    def _draw(self, rows: np.ndarray, env: VecNormalize | None) -> Drawn:
        # With one environment, draw no random number for it
        places = rows if self.n_envs == 1 else rows * self.n_envs + self.rng.integers(self.n_envs, size=len(rows))
        returns, last_places, discounts = self._returns(places, env)
        dones = self._at(self.dones, last_places)
        if self.handle_timeout_termination:
            dones *= 1.0 - self._at(self.timeouts, last_places)
        return Drawn(places, last_places, returns, dones, discounts)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> ReplayBatch:
        places, last_places, rewards, dones, discounts = self._draw(batch_inds, env)
        obs = map_obs(lambda storage: self._at(storage, places), self.observations)
        next_obs = self.get_next_obs(last_places)

        def tensor(array: np.ndarray) -> th.Tensor:
            return self.to_torch(array, copy=False)  # indexing has copied

        batch_class: Any = DictReplayBufferSamples if isinstance(self.observations, dict) else ReplayBufferSamples
        return batch_class(
            observations=map_obs(tensor, self._normalize_obs(obs, env)),
            actions=tensor(self._at(self.actions, places)),
            next_observations=map_obs(tensor, self._normalize_obs(next_obs, env)),
            dones=tensor(dones.reshape(-1, 1)),
            rewards=tensor(rewards.reshape(-1, 1)),
            discounts=None if discounts is None else tensor(discounts.reshape(-1, 1)),
        )

    def to_torch(self, array: np.ndarray, copy: bool = True) -> th.Tensor:
        """
        Convert an array to a tensor, as in SB3, but without waiting for the transfer to a GPU.

        :param array: array of any shape
        :param copy: the tensor must not share memory with the array
        :return: tensor on the buffer's device
        """
        if self.device.type == "cuda":
            return th.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
        if self.device.type == "cpu" and not copy:
            return th.as_tensor(array)  # the same as in SB3, but twice as fast without the device argument
        return super().to_torch(array, copy)

    def _returns(
        self, places: np.ndarray, env: VecNormalize | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """
        Discounted sums of up to ``n_steps`` rewards.

        :return: returns (B,); places of their last rewards (B,); gamma^k (B,), where k is the number of rewards
        """
        if self.n_steps == 1:
            return self._normalize_reward(self._at(self.rewards, places), env), places, None
        steps = np.arange(self.n_steps)
        following = (places[:, None] + steps * self.n_envs) % (self.buffer_size * self.n_envs)  # (B, K)
        # A sequence ends at the first row without a successor: the last of an episode, or the newest
        is_newest = following // self.n_envs == (self.pos - 1) % self.buffer_size
        ends = (self._at(self._side_slot, following) != 0) | is_newest
        last_step = np.where(ends.any(axis=1), ends.argmax(axis=1), self.n_steps - 1)
        rewards = self._normalize_reward(self._at(self.rewards, following), env)
        gammas = float(self.gamma) ** np.arange(self.n_steps + 1, dtype=np.float32)
        returns = np.where(steps <= last_step[:, None], rewards * gammas[:-1], np.float32(0.0)).sum(axis=1)
        return returns, following[np.arange(len(places)), last_step], gammas[last_step + 1]

    def _at(self, storage: np.ndarray, places: np.ndarray) -> np.ndarray:
        """A copy of the values at some places. A flat index is twice as fast as rows and environments."""
        return storage.reshape(self.buffer_size * self.n_envs, *storage.shape[2:]).take(places, axis=0)

    def _keep_where_stream_broke(self, previous: int, obs: Obs) -> None:
        """Store the next observation of the previous row separately where it differs from the new observation."""
        broken = np.zeros(self.n_envs, dtype=bool)

        def compare(expected: np.ndarray, new: np.ndarray) -> None:
            if not np.array_equal(expected, new):  # rare
                both_nan = (expected != expected) & (new != new)
                differs = (expected != new) & ~both_nan
                np.logical_or(broken, differs.reshape(self.n_envs, -1).any(axis=1), out=broken)

        map_obs(compare, self._newest_next_obs, obs)
        self._keep_newest_on_side(previous, np.flatnonzero(broken & (self._side_slot[previous] == 0)))

    def _keep_newest_on_side(self, row: int, envs: np.ndarray) -> None:
        if len(envs) > 0:
            next_obs = map_obs(lambda newest_next: newest_next[envs], self._newest_next_obs)
            self._keep_on_side(row * self.n_envs + envs, next_obs)

    def _keep_on_side(self, places: np.ndarray, next_obs: Obs) -> None:
        """Next observations of places that have none on the side yet."""
        while len(self._free_slots) < len(places):
            self._grow_side()
        slots = np.array([self._free_slots.pop() for _ in places])
        map_obs(lambda side, new: side.__setitem__(slots, new), self._side_obs, next_obs)
        self._side_slot.reshape(-1)[places] = slots + 1

    def _release_slots(self, rows: int | np.ndarray) -> None:
        slots = self._side_slot[rows]
        if slots.any():
            self._free_slots += (slots[slots > 0] - 1).tolist()
            self._side_slot[rows] = 0

    def _grow_side(self) -> None:
        side = self._side_obs
        old = len(next(iter(side.values())) if isinstance(side, dict) else side)
        new = min(max(2 * old, 16), self.buffer_size * self.n_envs)
        grown = self._zeros_obs((new,))
        map_obs(lambda storage, kept: storage.__setitem__(slice(old), kept), grown, side)
        self._side_obs = grown
        self._free_slots = [*range(new - 1, old - 1, -1), *self._free_slots]

    def _as_rows(self, obs: Obs) -> Obs:
        """Check the shape and cast to the dtype of the storage; (E,) of Discrete spaces becomes (E, 1)."""

        def cast(new: np.ndarray, storage: np.ndarray) -> np.ndarray:
            rows = np.asarray(new)
            shape = storage.shape[1:]
            if rows.shape != shape and (*rows.shape, 1) != shape:
                raise ValueError(
                    f"An observation has the shape {rows.shape[1:]}, the observation space {shape[1:]}, for {shape[0]} "
                    "environment(s). VecNormalize, if in use, must be the outermost wrapper."
                )
            return rows.reshape(shape).astype(storage.dtype)

        if isinstance(self.observations, dict):
            obs = {key: obs[key] for key in self.observations}
        return map_obs(cast, obs, self.observations)

    def _zeros_obs(self, leading: tuple[int, ...]) -> Obs:
        if isinstance(self.observation_space, spaces.Dict):
            shapes: Any = self.obs_shape
            return {
                key: np.zeros((*leading, *shapes[key]), dtype=self._maybe_cast_dtype(space.dtype))
                for key, space in self.observation_space.spaces.items()
            }
        return np.zeros((*leading, *self.obs_shape), dtype=self._maybe_cast_dtype(self.observation_space.dtype))


class NextObservations(NDArrayOperatorsMixin):
    """
    Read-only stand-in for the array ``next_observations`` in SB3's buffer. Indexing gathers the indexed rows;
    ``np.asarray`` and all other array operations gather all rows.

    :param buffer: replay buffer
    :param key: key in Dict observations, or None
    """

    def __init__(self, buffer: ReplayBuffer, key: str | None):
        self._buffer = buffer
        self._key = key
        storage: Any = buffer.observations if key is None else buffer.observations[key]
        self.shape: tuple[int, ...] = storage.shape
        self.dtype: np.dtype = storage.dtype
        self.ndim: int = storage.ndim
        self.size: int = storage.size
        self.nbytes: int = storage.nbytes  # of all rows, once gathered

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.asarray(self))

    def __getattr__(self, name: str) -> Any:
        """Methods of arrays (``copy``, ``mean``, ...), applied to all rows."""
        if name.startswith("_"):  # they would interfere with copying, pickling and array protocols
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __getitem__(self, index: Any) -> np.ndarray:
        parts = index if isinstance(index, tuple) else (index,)
        (row_part, env_part), features = (*parts[:2], slice(None))[:2], parts[2:]
        if not (_is_simple(row_part) and _is_simple(env_part)) or any(not isinstance(f, int | slice) for f in features):
            return np.asarray(np.asarray(self)[index])  # masks, ellipses, ...
        rows, env_indices = _positions(row_part, self.shape[0]), _positions(env_part, self.shape[1])
        if isinstance(row_part, slice) or isinstance(env_part, slice):  # all combinations of rows and environments
            rows = rows.reshape(*rows.shape, *[1] * env_indices.ndim)
        rows, env_indices = np.broadcast_arrays(rows, env_indices)
        next_obs = self._buffer.get_next_obs((rows * self.shape[1] + env_indices).ravel())
        next_obs = next_obs if self._key is None else next_obs[self._key]
        next_obs = next_obs.reshape(*rows.shape, *self.shape[2:])
        return np.asarray(next_obs[(slice(None),) * rows.ndim + features])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        arrays = [np.asarray(x) if isinstance(x, NextObservations) else x for x in inputs]
        return getattr(ufunc, method)(*arrays, **kwargs)


def _is_simple(part: Any) -> bool:
    """Whether an index is a slice, an integer or an array of integers."""
    return isinstance(part, slice) or (part is not Ellipsis and np.issubdtype(np.asarray(part).dtype, np.integer))


def _positions(part: Any, n: int) -> np.ndarray:
    """
    :param part: slice, integer or array of integers
    :param n: length of the axis
    :return: positions in [0, n)
    """
    if isinstance(part, slice):
        return np.arange(*part.indices(n))
    positions = np.asarray(part)
    if positions.size and not -n <= positions.min() <= positions.max() < n:
        raise IndexError(f"index {part} is out of bounds for an axis of length {n}")
    return positions % n


def samples_itself(buffer: SB3ReplayBuffer) -> bool:
    """
    :param buffer: replay buffer of a model
    :return: whether it samples with :class:`ReplayBuffer`'s methods, not overridden by a user's class or function
    """
    return type(buffer) is ReplayBuffer and not {"sample", "_get_samples"} & vars(buffer).keys()
