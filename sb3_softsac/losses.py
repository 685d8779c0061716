"""SAC's losses (https://arxiv.org/abs/1812.05905): tensors in, tensors out, no side effects."""

import torch as th
from torch.nn import functional as F


def target_q_values(
    rewards: th.Tensor,
    dones: th.Tensor,
    discounts: th.Tensor | float,
    next_q_values: tuple[th.Tensor, ...],
    next_log_prob: th.Tensor,
    ent_coef: th.Tensor,
) -> th.Tensor:
    """
    Soft Bellman target with clipped double Q-learning (equations 3 and 5, minimum over all critics).

    :param rewards: reward or n-step return, (B, 1)
    :param dones: 1 where the episode *terminated* (a time limit does not count), (B, 1)
    :param discounts: gamma, or gamma^k for k-step returns, scalar or (B, 1)
    :param next_q_values: target critics at the next state and action, N times (B, 1)
    :param next_log_prob: log-density of the next action, (B, 1)
    :param ent_coef: entropy coefficient, scalar or (1,)
    :return: (B, 1)
    """
    min_next_q = th.cat(next_q_values, dim=1).amin(dim=1, keepdim=True)
    return rewards + (1.0 - dones) * discounts * (min_next_q - ent_coef * next_log_prob)


def critic_loss(current_q_values: tuple[th.Tensor, ...], target_q: th.Tensor) -> th.Tensor:
    """
    Half the mean squared Bellman error, summed over critics (equation 5).

    :param current_q_values: critics at the stored state and action, N times (B, 1)
    :param target_q: Bellman target, without gradient, (B, 1)
    :return: scalar
    """
    errors = [F.mse_loss(current_q, target_q) for current_q in current_q_values]
    return 0.5 * th.stack(errors).sum()


def actor_loss(q_values_pi: tuple[th.Tensor, ...], log_prob: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
    """
    Expected entropy-regularised value of the policy's own actions, negated (equation 7).

    :param q_values_pi: critics at the stored state and the policy's action, N times (B, 1)
    :param log_prob: log-density of that action, (B, 1)
    :param ent_coef: entropy coefficient, without gradient, scalar or (1,)
    :return: scalar
    """
    min_qf_pi = th.cat(q_values_pi, dim=1).amin(dim=1, keepdim=True)
    return (ent_coef * log_prob - min_qf_pi).mean()


def ent_coef_loss(log_ent_coef: th.Tensor, log_prob: th.Tensor, target_entropy: float, kind: str) -> th.Tensor:
    """
    Loss whose minimum keeps the policy's entropy at the target (equation 18).

    :param log_ent_coef: logarithm of the entropy coefficient, (1,)
    :param log_prob: log-density of the policy's actions; its gradient is not used, (B, 1)
    :param target_entropy: wanted entropy H, in nats, for densities in the same units as ``log_prob``
    :param kind: ``"log"``: -log_ent_coef (log_prob + H), whose steps do not shrink with the coefficient
        (https://github.com/rail-berkeley/softlearning/issues/37); ``"exp"``: -ent_coef (log_prob + H), the paper's
    :return: scalar
    """
    coefficient = log_ent_coef if kind == "log" else log_ent_coef.exp()
    return -(coefficient * (log_prob + target_entropy).detach()).mean()
