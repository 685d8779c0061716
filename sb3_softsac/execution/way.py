"""
What the ways of running updates have in common.

A way is called with :class:`Updates`. It does one or more of them, from the first on, and returns :class:`Done`; or it
raises :class:`Declined`, with a reason, and leaves everything as it was.
"""

from typing import NamedTuple, Protocol

import torch as th

from sb3_softsac.buffers import rows_of
from sb3_softsac.execution.device_replay import Storage, StoredBatch
from sb3_softsac.gradient_step import Due, UpdateOptions
from sb3_softsac.type_aliases import ReplayBatch


class Minibatches(NamedTuple):
    """Minibatches of equal size B, one behind the other."""

    samples: ReplayBatch | StoredBatch  # (n B, ...)
    n: int

    @property
    def size(self) -> int:
        return len(self.samples.numbers if isinstance(self.samples, StoredBatch) else self.samples.rewards) // self.n

    def part(self, first: int, last: int) -> ReplayBatch | StoredBatch:
        """
        :param first: first minibatch
        :param last: one past the last
        :return: samples of these, which share memory
        """
        if (first, last) == (0, self.n):
            return self.samples
        return rows_of(self.samples, slice(first * self.size, last * self.size))


class Updates(NamedTuple):
    """Updates to do, those of some minibatches that are left."""

    minibatches: Minibatches  # one for each update, on the policy's device
    first: int  # that is left
    dues: list[Due]  # what the update of each minibatch consists of
    storage: Storage | None  # what minibatches are gathered from, if they have to be
    options: UpdateOptions
    finite: th.Tensor  # whether all numbers of the updates before were finite; scalar of booleans


class Outcome(NamedTuple):
    """Scalars of one update: their names, and their values in one tensor (M,) on the device."""

    names: tuple[str, ...]
    values: th.Tensor


class Done(NamedTuple):
    """Updates that were done."""

    finite: th.Tensor  # whether all numbers have been finite
    outcomes: list[Outcome]  # of each


class Declined(Exception):
    """
    The next update has to be run in another way.

    :param reason: a sentence for the user; empty: the way may be able to do a later update
    """


class Way(Protocol):
    """A way of running updates. All of them give the same result, up to rounding."""

    def __call__(self, updates: Updates) -> Done:
        """
        :param updates: updates to do
        :return: those that were done: the first one left, or more
        :raises Declined: if the first cannot be done in this way; nothing has then been drawn or changed
        """
