"""The tanh-squashed diagonal Gaussian of SAC, as pure functions on plain tensors.

A gaussian action ``u ~ N(mean, std^2)`` is squashed to the scaled action ``a = tanh(u)`` (SAC, appendix C,
https://arxiv.org/abs/1812.05905). The change of variables needs ``log(1 - tanh(u)^2)``. The common form
``log(1 - a^2 + 1e-6)`` cannot fall below -13.8 and loses its gradient there, so it is wrong for ``|u| > 6``;
``2 (log 2 - u - softplus(-2u))`` is the same quantity without the cancellation, right to float32 rounding
everywhere (TensorFlow Probability's ``Tanh`` bijector; ``benchmarks/log_prob_error.py`` has the figures).
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
    Logarithm of the derivative of tanh, ``log(1 - tanh(u)^2)``, for each element.

    :param gaussian_actions: u, any shape
    :return: values <= 0 (up to rounding), same shape; finite with finite gradient for ``|u| < 1e37`` in float32
    """
    return 2.0 * (LOG_2 - gaussian_actions - F.softplus(-2.0 * gaussian_actions))


def log_prob(gaussian_actions: th.Tensor, mean_actions: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of the scaled action ``tanh(u)``, given the sample u from before tanh.

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

    The Gaussian's part of the density is a function of the noise alone, so it is computed from the noise: the
    gradients through u and through the mean, which cancel exactly, are never formed.

    :param mean_actions: mean of the Gaussian, (B, A)
    :param log_std: logarithm of its standard deviation, (B, A)
    :param noise: standard normal noise, (B, A)
    :return: gaussian actions u (B, A), log-density of ``tanh(u)`` (B,)
    """
    gaussian_actions = mean_actions + th.exp(log_std) * noise
    return gaussian_actions, _log_prob_of_noise(noise, gaussian_actions, log_std)


def squash(gaussian_actions: th.Tensor) -> th.Tensor:
    """
    Scaled actions; of the mean, it is the deterministic action.

    :param gaussian_actions: u, any shape
    :return: ``tanh(u)`` in [-1, 1], same shape
    """
    return th.tanh(gaussian_actions)


def unsquash(actions: th.Tensor) -> th.Tensor:
    """
    Inverse of ``squash``, for actions whose gaussian sample is not known (demonstrations, ``evaluate_actions``).

    tanh rounds to +-1 for ``|u| > 9`` in float32, so the inverse is not unique there: actions are clamped to the
    largest float below 1 in magnitude (``|u| = 8.66`` in float32, 18.7 in float64) and densities of saturated
    actions are those of that value.

    :param actions: scaled actions in [-1, 1], any shape
    :return: gaussian actions, same shape, finite
    """
    one = th.ones((), dtype=actions.dtype, device=actions.device)
    largest = th.nextafter(one, th.zeros_like(one))
    return th.atanh(th.clamp(actions, -largest, largest))


def log_action_scale(action_space: spaces.Box) -> float:
    """
    What turns a log-density of scaled actions into one of actions in the environment's units:
    ``log_prob_env = log_prob - log_action_scale``.

    :param action_space: bounded box, shape with A elements
    :return: sum over the action dimension of ``log((high - low) / 2)``
    """
    width = action_space.high.astype(np.float64) - action_space.low.astype(np.float64)
    return float(np.log(width / 2.0).sum())


def _log_prob_of_noise(noise: th.Tensor, gaussian_actions: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    log_density = -0.5 * noise.square() - log_std - HALF_LOG_2PI - log_det_tanh(gaussian_actions)
    return log_density.sum(dim=-1)
