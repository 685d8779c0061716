"""
The tanh-squashed diagonal Gaussian of SAC, as pure functions of tensors.

A Gaussian action ``u ~ N(mean, std^2)`` is squashed to the scaled action ``a = tanh(u)`` (SAC, appendix C,
https://arxiv.org/abs/1812.05905). The change of variables needs ``log(1 - tanh(u)^2)``. The common form
``log(1 - a^2 + 1e-6)`` cannot fall below -13.8, where its gradient vanishes, so it is wrong for ``|u| > 6``.
``2 (log 2 - u - softplus(-2u))`` is equal without the cancellation, and accurate to float32 rounding everywhere
(TensorFlow Probability's ``Tanh`` bijector; ``benchmarks/log_prob_error.py`` measures the errors).
"""

import math

import numpy as np
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

LOG_2 = math.log(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def log_det_tanh(gaussian_actions: th.Tensor) -> th.Tensor:
    """
    Elementwise logarithm of the derivative of tanh, ``log(1 - tanh(u)^2)``.

    :param gaussian_actions: u, any shape
    :return: values <= 0 (up to rounding), same shape; finite with finite gradient for ``|u| < 1e37`` in float32
    """
    return 2.0 * (LOG_2 - gaussian_actions - F.softplus(-2.0 * gaussian_actions))


def log_prob(gaussian_actions: th.Tensor, mean_actions: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of the scaled action ``tanh(u)``, given the Gaussian action u.

    :param gaussian_actions: u, (B, A)
    :param mean_actions: mean of the Gaussian, (B, A)
    :param log_std: logarithm of its standard deviation, (B, A)
    :return: summed over the action dimension, (B,)
    """
    noise = (gaussian_actions - mean_actions) * th.exp(-log_std)
    return _log_prob_of_noise(noise, gaussian_actions, log_std)


def sample(mean_actions: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Reparametrised sample and its log-density.

    The density of the Gaussian depends on the noise alone, and is computed from it: the gradients through u and the
    mean, which cancel exactly, are never computed.

    :param mean_actions: mean of the Gaussian, (B, A)
    :param log_std: logarithm of its standard deviation, (B, A)
    :param noise: standard normal noise, (B, A)
    :return: Gaussian actions u (B, A), log-density of ``tanh(u)`` (B,)
    """
    gaussian_actions = mean_actions + th.exp(log_std) * noise
    return gaussian_actions, _log_prob_of_noise(noise, gaussian_actions, log_std)


def squash(gaussian_actions: th.Tensor) -> th.Tensor:
    """
    Squash Gaussian actions to scaled actions. The deterministic action is that of the mean.

    :param gaussian_actions: u, any shape
    :return: ``tanh(u)`` in [-1, 1], same shape
    """
    return th.tanh(gaussian_actions)


def unsquash(actions: th.Tensor) -> th.Tensor:
    """
    Inverse of :func:`squash`, for actions whose Gaussian action is unknown (demonstrations, ``evaluate_actions``).

    In float32, tanh rounds to +-1 for ``|u| > 9``, where the inverse is not unique. Actions are therefore clamped to
    the largest float below 1 in magnitude (``|u| = 8.66`` in float32, 18.7 in float64), and saturated actions get the
    density of that value.

    :param actions: scaled actions in [-1, 1], any shape
    :return: Gaussian actions, same shape, finite
    """
    one = th.ones((), dtype=actions.dtype, device=actions.device)
    largest = th.nextafter(one, th.zeros_like(one))
    return th.atanh(th.clamp(actions, -largest, largest))


def log_action_scale(action_space: spaces.Box) -> float:
    """
    Difference between the log-densities of scaled actions and of actions in the environment's units:
    ``log_prob_env = log_prob - log_action_scale``.

    :param action_space: bounded box with A elements
    :return: sum of ``log((high - low) / 2)`` over the action dimension
    """
    width = action_space.high.astype(np.float64) - action_space.low.astype(np.float64)
    return float(np.log(width / 2.0).sum())


def _log_prob_of_noise(noise: th.Tensor, gaussian_actions: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    log_density = -0.5 * noise.square() - log_std - HALF_LOG_2PI - log_det_tanh(gaussian_actions)
    return log_density.sum(dim=-1)
