"""Types that several modules share, and the shape letters of all docstrings.

B batch, N critics, A action dimension, O observation dimension, E environments, K n-step length.
Scaled actions lie in [-1, 1]^A; that is what replay buffers hold and critics read (SB3's convention).
"""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples, TensorDict

ReplayBatch = ReplayBufferSamples | DictReplayBufferSamples
"""One minibatch: observations and next_observations (B, O) or dicts, actions (B, A), and rewards, dones and,
for n-step returns, discounts: (B, 1)."""

TorchObs = th.Tensor | TensorDict

Metrics = dict[str, th.Tensor]
"""Scalars of one update by log key, detached and on the device; logging them takes one transfer."""


class PolicySample(NamedTuple):
    """Actions drawn from a policy, with what the losses and the log want to know of them."""

    actions: th.Tensor  # scaled, (B, A)
    log_prob: th.Tensor  # density of the scaled action, (B, 1)
    log_std: th.Tensor  # of the Gaussian before tanh, (B, A)
