"""
Types that several modules share, and the letters for shapes in all docstrings.

B batch size, N critics, A action dimension, O observation dimension, E environments, K length of n-step returns.
Scaled actions lie in [-1, 1]^A: replay buffers store them and critics take them, as in SB3.
"""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples, TensorDict

ReplayBatch = ReplayBufferSamples | DictReplayBufferSamples
"""One minibatch: observations and next_observations (B, O) or dicts, actions (B, A), and rewards, dones and,
for n-step returns, discounts: (B, 1)."""

TorchObs = th.Tensor | TensorDict

Metrics = dict[str, th.Tensor]
"""Scalars of one update by log key, detached and on the device: one transfer is enough to log them."""


class PolicySample(NamedTuple):
    """Actions sampled from a policy, with what the losses and the log need."""

    actions: th.Tensor  # scaled, (B, A)
    log_prob: th.Tensor  # log-density of the scaled actions, (B, 1)
    log_std: th.Tensor  # of the Gaussian before tanh, (B, A)
