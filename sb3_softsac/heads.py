"""
What the outputs of a critic mean: a value, or a distribution of values over a fixed support (C51,
https://arxiv.org/abs/1707.06887). A head computes the value, the Bellman target and the loss.
"""

import math
import numbers
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_softsac import losses
from sb3_softsac.type_aliases import Metrics

Outputs = tuple[th.Tensor, ...]
"""Of N critics: values (B, 1), or logits (B, atoms)."""


class ScalarHead(nn.Module):
    """Critics that give a value."""

    n_outputs = 1

    def values(self, outputs: Outputs) -> Outputs:
        """
        :param outputs: of the critics
        :return: their values, N times (B, 1)
        """
        return outputs

    def target(
        self,
        rewards: th.Tensor,
        dones: th.Tensor,
        discounts: th.Tensor | float,
        next_outputs: Outputs,
        next_log_prob: th.Tensor,
        ent_coef: th.Tensor,
    ) -> tuple[th.Tensor, Metrics]:
        """Targets and metrics; see :func:`losses.target_q_values`, whose arguments these are."""
        target = losses.target_q_values(rewards, dones, discounts, next_outputs, next_log_prob, ent_coef)
        return target, {"target_q_value": target.mean()}

    def loss(self, outputs: Outputs, target: th.Tensor) -> th.Tensor:
        """See :func:`losses.critic_loss`."""
        return losses.critic_loss(outputs, target)


class CategoricalHead(nn.Module):
    """
    Critics that give logits of a distribution over equally spaced values (atoms).

    :param n_atoms: number of atoms
    :param v_min: first atom
    :param v_max: last atom
    """

    atoms: th.Tensor
    v_min: float
    v_max: float
    bound: float

    def __init__(self, n_atoms: int, v_min: float, v_max: float):
        super().__init__()
        self.n_outputs = n_atoms
        self.v_min, self.v_max = v_min, v_max
        self.bound = min(-v_min, v_max)  # values of either sign fit if they are not larger
        self.register_buffer("atoms", th.linspace(v_min, v_max, n_atoms), persistent=False)

    def values(self, outputs: Outputs) -> Outputs:
        """
        :param outputs: logits, N times (B, atoms)
        :return: means, N times (B, 1)
        """
        return tuple((F.softmax(logits, dim=1) * self.atoms).sum(dim=1, keepdim=True) for logits in outputs)

    def target(
        self,
        rewards: th.Tensor,
        dones: th.Tensor,
        discounts: th.Tensor | float,
        next_outputs: Outputs,
        next_log_prob: th.Tensor,
        ent_coef: th.Tensor,
    ) -> tuple[th.Tensor, Metrics]:
        """
        Distribution of the soft Bellman target: that of the critic with the lowest mean, with its atoms moved, clipped
        to the support and projected onto the fixed atoms.

        :return: probabilities (B, atoms); metrics. Arguments are those of :func:`losses.target_q_values`
        """
        values = th.cat(self.values(next_outputs), dim=1)
        logits = th.stack(next_outputs, dim=1)
        lowest = values.argmin(dim=1)[:, None, None].expand(-1, 1, logits.shape[2])
        probabilities = F.softmax(logits.gather(1, lowest).squeeze(1), dim=1)
        moved = rewards + (1.0 - dones) * discounts * (self.atoms - ent_coef * next_log_prob)
        is_outside = (moved < self.v_min) | (moved > self.v_max)
        metrics = {
            "target_q_value": (probabilities * moved).sum(dim=1).mean(),
            "clipped_target_mass": (probabilities * is_outside).sum(dim=1).mean(),
        }
        return project(probabilities, moved, self.v_min, self.v_max), metrics

    def loss(self, outputs: Outputs, target: th.Tensor) -> th.Tensor:
        """
        Cross-entropy, mean over transitions and critics.

        :param outputs: logits, N times (B, atoms)
        :param target: probabilities, without gradient, (B, atoms)
        :return: scalar
        """
        losses_of_critics = [-(target * F.log_softmax(logits, dim=1)).sum(dim=1).mean() for logits in outputs]
        return th.stack(losses_of_critics).mean()


Head = ScalarHead | CategoricalHead


def make_head(n_atoms: int | None, v_min: float, v_max: float) -> Head:
    """
    :param n_atoms: None: critics give values
    :param v_min: first atom
    :param v_max: last atom
    :return: the head
    :raises ValueError: for invalid arguments
    """
    if n_atoms is None:
        return ScalarHead()
    if isinstance(n_atoms, bool) or not isinstance(n_atoms, int | np.integer) or n_atoms < 2:
        raise ValueError(f"n_atoms={n_atoms!r} is not valid: it must be an integer >= 2, or None.")

    def is_finite(value: Any) -> bool:
        return isinstance(value, numbers.Real) and math.isfinite(value)

    if not (is_finite(v_min) and is_finite(v_max) and v_min < v_max):
        raise ValueError(f"v_min={v_min!r} and v_max={v_max!r} are not valid: they must be finite, v_min < v_max.")
    return CategoricalHead(int(n_atoms), float(v_min), float(v_max))


SCALAR = ScalarHead()


def head_of(critic: nn.Module) -> Head:
    """
    :param critic: any critic; a user's own class may have no head
    :return: what its outputs mean
    """
    return getattr(critic, "head", SCALAR)


def project(probabilities: th.Tensor, values: th.Tensor, v_min: float, v_max: float) -> th.Tensor:
    """
    Distribute probabilities over the two atoms next to each value, by linear interpolation (C51, algorithm 1).

    Written as a product over all distances. Adding to two atoms at a time takes fewer operations, but in an order that
    differs from run to run on a GPU or with several threads.

    :param probabilities: (B, atoms)
    :param values: clipped to the support, (B, atoms)
    :param v_min: first atom
    :param v_max: last atom
    :return: probabilities of the atoms, (B, atoms)
    """
    n_atoms = probabilities.shape[1]
    positions = (values.clamp(v_min, v_max) - v_min) * ((n_atoms - 1) / (v_max - v_min))
    atoms = th.arange(n_atoms, dtype=positions.dtype, device=positions.device)
    shares = (1.0 - (positions.unsqueeze(2) - atoms).abs()).clamp(min=0.0)
    return (probabilities.unsqueeze(2) * shares).sum(dim=1)
