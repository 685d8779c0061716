"""
Layers of actors and critics: normalised, residual, with weights of unit norm. Without these options, they are SB3's
plain networks.

Sources: CrossQ (https://arxiv.org/abs/1902.05605), DroQ (https://arxiv.org/abs/2110.02034), XQC
(https://arxiv.org/abs/2509.25174), FlashSAC (https://arxiv.org/abs/2604.04539).
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.nn import functional as F

NORMALIZATIONS = (None, "batch", "layer")
UNIT_NORMS = (None, "weights", "all")


class Architecture(NamedTuple):
    """How the layers of a network are made; see ``SoftSACPolicy``."""

    normalization: str | None = None
    normalize_input: bool = False
    residual_expansion: int | None = None
    dropout_rate: float = 0.0
    batch_norm_momentum: float = 0.01
    batch_norm_eps: float = 1e-3

    @property
    def has_batch_norm(self) -> bool:
        return self.normalization == "batch" or self.normalize_input


PLAIN = Architecture()
"""SB3's networks."""


class BatchNorm(nn.BatchNorm1d):
    """
    Batch normalisation by running statistics, except within :func:`batch_statistics`, whatever mode the module is in:
    an update needs both. sb3-contrib's ``BatchRenorm`` is not used: it branches on its data, which cannot be compiled,
    and only older designs need it.
    """

    uses_batch_statistics = False

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (B, features)
        :return: same shape
        """
        # Running statistics follow the passes with gradients: those of a target's pass would never be used
        is_tracked = not self.uses_batch_statistics or th.is_grad_enabled()
        mean, var = (self.running_mean, self.running_var) if is_tracked else (None, None)
        momentum = self.momentum or 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.uses_batch_statistics, momentum, self.eps)


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """
    :param network: any network
    :return: its :class:`BatchNorm` layers
    """
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """
    :param network: within the context, its :class:`BatchNorm` layers normalise by the mean and variance of the batch
    """
    norms = batch_norms(network)
    try:
        for norm in norms:
            norm.uses_batch_statistics = True
        yield
    finally:
        for norm in norms:
            norm.uses_batch_statistics = False


class ResidualBlock(nn.Module):
    """
    Adds the output of two layers to their input (FlashSAC, section 4).

    :param layers: network with as many outputs as inputs
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (B, width)
        :return: same shape
        """
        return x + self.layers(x)


def make_layers(
    n_inputs: int, n_outputs: int, net_arch: list[int], activation_fn: type[nn.Module], architecture: Architecture
) -> nn.Sequential:
    """
    :param n_inputs: number of inputs
    :param n_outputs: number of outputs; -1: those of the last hidden layer
    :param net_arch: widths of the hidden layers, or of the residual blocks, which must then be equal
    :param activation_fn: activation function
    :param architecture: how the layers are made
    :return: the layers
    :raises ValueError: if residual blocks have different widths
    """
    if architecture == PLAIN:
        return nn.Sequential(*create_mlp(n_inputs, n_outputs, net_arch, activation_fn))
    layers: list[nn.Module] = []
    if architecture.normalize_input:
        layers.append(_batch_norm(n_inputs, architecture))
    if architecture.residual_expansion is None:
        for width_in, width in itertools.pairwise([n_inputs, *net_arch]):
            layers += _hidden_layer(width_in, width, activation_fn, architecture)
    else:
        if not net_arch or len(set(net_arch)) > 1:
            raise ValueError(
                f"net_arch={net_arch} does not fit residual_expansion={architecture.residual_expansion}: residual "
                "blocks, one for each number, must have the same width, for instance [256, 256]."
            )
        width, inner = net_arch[0], net_arch[0] * architecture.residual_expansion
        layers.append(nn.Linear(n_inputs, width, bias=not architecture.normalize_input))
        for _ in net_arch:
            first = _hidden_layer(width, inner, activation_fn, architecture)
            layers.append(
                ResidualBlock(nn.Sequential(*first, *_hidden_layer(inner, width, activation_fn, architecture)))
            )
        layers.append(nn.RMSNorm(width, eps=1e-6))
    if n_outputs > 0:
        layers.append(nn.Linear(net_arch[-1] if net_arch else n_inputs, n_outputs))
    return nn.Sequential(*layers)


def _hidden_layer(
    n_inputs: int, width: int, activation_fn: type[nn.Module], architecture: Architecture
) -> list[nn.Module]:
    # Batch norm subtracts the mean of each output, and with it a bias
    layers: list[nn.Module] = [nn.Linear(n_inputs, width, bias=architecture.normalization != "batch")]
    if architecture.dropout_rate > 0.0:
        layers.append(nn.Dropout(architecture.dropout_rate))
    if architecture.normalization == "batch":
        layers.append(_batch_norm(width, architecture))
    elif architecture.normalization == "layer":
        layers.append(nn.LayerNorm(width))
    return [*layers, activation_fn()]


def _batch_norm(width: int, architecture: Architecture) -> BatchNorm:
    return BatchNorm(width, eps=architecture.batch_norm_eps, momentum=architecture.batch_norm_momentum)


def statistics(network: nn.Module) -> list[th.Tensor]:
    """
    :param network: any network
    :return: running means and variances of its :class:`BatchNorm` layers
    """
    norms = batch_norms(network)
    return [part for norm in norms for part in (norm.running_mean, norm.running_var) if part is not None]


def project_to_unit_norm(networks: Iterable[nn.Module], unit_norm: str, finite: th.Tensor | None = None) -> None:
    """
    Scale each row of a linear layer's weights (those of one output) to norm 1, in place, unless they are frozen.

    :param networks: with linear layers
    :param unit_norm: ``"weights"``, or ``"all"``: also the scales of each normalisation layer, together with its
        biases, to the square root of their number, the norm that they begin with
    :param finite: boolean scalar; if it is false, nothing is done
    """
    with th.no_grad():
        for module in [module for network in networks for module in network.modules()]:
            if isinstance(module, nn.Linear):
                _scale([module.weight], 1.0, finite)
            elif unit_norm == "all" and isinstance(module, BatchNorm | nn.LayerNorm | nn.RMSNorm):
                parameters = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
                _scale(parameters, math.sqrt(module.weight.numel()), finite)


def _scale(parameters: list[th.Tensor], norm: float, finite: th.Tensor | None) -> None:
    """Scale the rows of parameters to a joint norm."""
    if not all(parameter.requires_grad for parameter in parameters):
        return
    squares = th.stack([parameter.square().sum(dim=-1, keepdim=True) for parameter in parameters])
    factors = norm * th.rsqrt(squares.sum(dim=0) + 1e-16)
    for parameter in parameters:
        scaled = parameter * factors
        parameter.copy_(scaled if finite is None else th.where(finite, scaled, parameter))
