"""
Error of the log-probability of squashed actions, and of its gradient: SB3 and SoftSAC against 50 digits.

The action is tanh(u) with u ~ N(mean, std^2). For each u the mean is put half a standard deviation below it, so that
the Gaussian's part stays harmless and what is seen is the correction for tanh, ``log(1 - tanh(u)^2)``. SB3 gets the
same u (its ``gaussian_actions`` argument): it has not lost anything to the inverse of tanh.

    python benchmarks/log_prob_error.py
"""

import math
from typing import Any

import mpmath
import torch as th
from record import RESULTS, markdown_table, write_json
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

from sb3_softsac.distributions import log_prob

GAUSSIAN_ACTIONS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 15.0, 20.0, 30.0, 50.0)
LOG_STD = -0.5
NOISE = 0.5


def exact(u: float, mean: float, log_std: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """
    :param u: gaussian action; all arguments are taken as the exact values that float32 holds
    :param mean: mean of the Gaussian
    :param log_std: logarithm of its standard deviation
    :return: log-density of tanh(u), and its derivative by u at fixed mean
    """
    u, mean, log_std = mpmath.mpf(u), mpmath.mpf(mean), mpmath.mpf(log_std)
    noise = (u - mean) / mpmath.exp(log_std)
    # 1 - tanh^2 as sech^2: no cancellation, whatever the number of digits
    log_det = -2 * mpmath.log(mpmath.cosh(u))
    value = -(noise**2) / 2 - log_std - mpmath.log(2 * mpmath.pi) / 2 - log_det
    return value, -noise / mpmath.exp(log_std) + 2 * mpmath.tanh(u)


def sb3_log_prob(u: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    :param u: gaussian actions, (B, A)
    :param mean: mean of the Gaussian, (B, A)
    :param log_std: logarithm of its standard deviation, (B, A)
    :return: log-density of ``tanh(u)`` as SB3 computes it, (B,)
    """
    distribution = SquashedDiagGaussianDistribution(u.shape[1]).proba_distribution(mean, log_std)
    return distribution.log_prob(th.tanh(u), u)


def errors() -> list[dict[str, Any]]:
    """
    :return: for each u the exact value and gradient, and the absolute errors of both implementations in float32
    """
    rows = []
    for u_value in GAUSSIAN_ACTIONS:
        u = th.tensor([[u_value]], dtype=th.float32, requires_grad=True)
        mean = u.detach() - NOISE * math.exp(LOG_STD)
        log_std = th.full_like(mean, LOG_STD)
        value, gradient = exact(u.item(), mean.item(), LOG_STD)
        row: dict[str, Any] = {"u": u_value, "log_prob": float(value), "gradient": float(gradient)}
        for name, function in (("sb3", sb3_log_prob), ("softsac", log_prob)):
            result = function(u, mean, log_std)
            (result_gradient,) = th.autograd.grad(result.sum(), u)
            row[name] = {
                "log_prob_error": float(abs(mpmath.mpf(result.item()) - value)),
                "gradient_error": float(abs(mpmath.mpf(result_gradient.item()) - gradient)),
            }
        rows.append(row)
    return rows


def main() -> None:
    mpmath.mp.dps = 50
    rows = errors()
    write_json(RESULTS / "log_prob_error.json", results=rows)
    header = ["u", "log-prob", "error: SB3", "SoftSAC", "its gradient by u", "error: SB3", "SoftSAC"]
    cells = [
        [
            f"{row['u']:g}",
            f"{row['log_prob']:.4g}",
            f"{row['sb3']['log_prob_error']:.1e}",
            f"{row['softsac']['log_prob_error']:.1e}",
            f"{row['gradient']:.4g}",
            f"{row['sb3']['gradient_error']:.1e}",
            f"{row['softsac']['gradient_error']:.1e}",
        ]
        for row in rows
    ]
    print(markdown_table(header, cells))


if __name__ == "__main__":
    main()
