"""One whole SAC update: sampled batch in, new parameters, targets and metrics out.

The only module that takes gradients and steps optimisers. Noise is drawn in the order of SB3's ``SAC.train``, and each
loss sees the networks and the entropy coefficient that SB3's sees: equal networks, batch and noise give equal new
networks.
"""

from typing import NamedTuple

import torch as th
from torch import nn

from sb3_softsac import losses
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.policies import Actor, SoftSACPolicy, running_statistics
from sb3_softsac.type_aliases import Metrics, PolicySample, ReplayBatch

SATURATED = 0.999  # an action this close to a bound counts as saturated: |u| > 3.8 before tanh


class UpdateOptions(NamedTuple):
    """What one update needs to know besides networks and data; see ``SoftSAC`` for the meaning of each."""

    gamma: float
    tau: float
    target_update_interval: int
    policy_delay: int
    policy_delay_compensation: bool
    target_entropy: float
    ent_coef_loss: str
    log_action_scale: float  # 0 with entropy_space="normalized"
    max_grad_norm: float | None


def gradient_step(
    policy: SoftSACPolicy, ent_coef: EntCoef, batch: ReplayBatch, options: UpdateOptions, n_updates: int
) -> Metrics:
    """
    Update entropy coefficient, critics, actor and targets once, in place.

    :param policy: networks and their optimisers
    :param ent_coef: entropy coefficient and its optimiser
    :param batch: minibatch on the policy's device
    :param options: constants of this update
    :param n_updates: updates done before this one; delays and intervals are counted on it
    :return: scalars by log key; those of the actor only where it was updated
    :raises ValueError: before the optimiser step whose loss or gradient is not finite
    """
    actor, critic = policy.actor, policy.critic
    actor_is_due = (n_updates + 1) % options.policy_delay == 0
    metrics: Metrics = {}

    if actor.use_sde:
        _reset_sde_noise(policy)
    pi = _sample(actor, batch, options) if actor_is_due else None
    coefficient = ent_coef.value()  # before its own step, as in SB3

    with th.no_grad():
        next_actor = actor if policy.actor_target is None else policy.actor_target
        next_pi = next_actor.sample(batch.next_observations)
        target_q = losses.target_q_values(
            batch.rewards,
            batch.dones,
            options.gamma if batch.discounts is None else batch.discounts,
            policy.critic_target(batch.next_observations, next_pi.actions),
            next_pi.log_prob - options.log_action_scale,
            coefficient,
        )
    current_q_values = critic(batch.observations, batch.actions)
    critic_loss = losses.critic_loss(current_q_values, target_q)
    metrics["critic_loss"] = critic_loss.detach()
    metrics["q_value"] = th.cat(current_q_values).detach().mean()
    metrics["target_q_value"] = target_q.mean()
    metrics["ent_coef"] = coefficient.squeeze()

    metrics["critic_grad_norm"] = _step(critic.optimizer, "critic_loss", critic_loss, options.max_grad_norm, n_updates)
    if pi is not None:
        _step_ent_coef(ent_coef, pi, options, metrics, n_updates)
        _step_actor(policy, batch, pi, coefficient, options, metrics, n_updates)
        if options.policy_delay_compensation:
            # CleanRL's way: as many actor updates as the delay left out, each with fresh actions
            for _ in range(options.policy_delay - 1):
                if actor.use_sde:
                    _reset_sde_noise(policy)
                pi, coefficient = _sample(actor, batch, options), ent_coef.value()
                _step_ent_coef(ent_coef, pi, options, metrics, n_updates)
                _step_actor(policy, batch, pi, coefficient, options, metrics, n_updates)

    if n_updates % options.target_update_interval == 0:
        with th.no_grad():
            for network, target in policy.targets():
                _update_target(network, target, options.tau)
    return metrics


def _sample(actor: Actor, batch: ReplayBatch, options: UpdateOptions) -> PolicySample:
    """The policy's own actions, with densities in the units of the entropy."""
    pi = actor.sample(batch.observations)
    return pi._replace(log_prob=pi.log_prob - options.log_action_scale)


def _step_ent_coef(
    ent_coef: EntCoef, pi: PolicySample, options: UpdateOptions, metrics: Metrics, n_updates: int
) -> None:
    if ent_coef.log_ent_coef is None or ent_coef.optimizer is None:
        return
    loss = losses.ent_coef_loss(ent_coef.log_ent_coef, pi.log_prob, options.target_entropy, options.ent_coef_loss)
    metrics["ent_coef_loss"] = loss.detach()
    _step(ent_coef.optimizer, "ent_coef_loss", loss, None, n_updates)


def _step_actor(
    policy: SoftSACPolicy,
    batch: ReplayBatch,
    pi: PolicySample,
    coefficient: th.Tensor,
    options: UpdateOptions,
    metrics: Metrics,
    n_updates: int,
) -> None:
    q_values_pi = policy.critic(batch.observations, pi.actions)
    loss = losses.actor_loss(q_values_pi, pi.log_prob, coefficient)
    metrics["actor_loss"] = loss.detach()
    metrics["entropy"] = -pi.log_prob.detach().mean()
    metrics["log_std"] = pi.log_std.detach().mean()
    metrics["saturated_actions"] = (pi.actions.detach().abs() > SATURATED).float().mean()
    metrics["actor_grad_norm"] = _step(policy.actor.optimizer, "actor_loss", loss, options.max_grad_norm, n_updates)


def _step(
    optimizer: th.optim.Optimizer, name: str, loss: th.Tensor, max_grad_norm: float | None, n_updates: int
) -> th.Tensor:
    """
    Take the gradient of the optimiser's own parameters, clip it and step.

    ``autograd.grad`` instead of ``backward()``: the actor's loss flows through the critics, whose weight gradients
    (11% of an update's arithmetic) are then not computed only to be thrown away.

    :return: norm of the gradient before clipping, scalar on the device
    :raises ValueError: if loss or gradient are not finite; the optimiser's parameters are then as they were
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:  # all frozen
        return loss.new_zeros(())
    gradients = th.autograd.grad(loss, parameters, allow_unused=True)
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    if not th.isfinite(loss + norm):
        raise ValueError(
            f"{name} is {loss.item()} and the norm of its gradient {norm.item()} at update {n_updates + 1}: this "
            "optimiser step was not taken. Check rewards and observations for NaN, infinite or huge values; else lower "
            "the learning rate or set max_grad_norm."
        )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    optimizer.step()
    return norm


def _update_target(network: nn.Module, target: nn.Module, tau: float) -> None:
    """Polyak averaging of parameters; batch-norm statistics are copied (SB3 issue 996)."""
    th._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)
    for target_statistic, statistic in zip(running_statistics(target), running_statistics(network), strict=True):
        target_statistic.copy_(statistic)


def _reset_sde_noise(policy: SoftSACPolicy) -> None:
    policy.actor.reset_noise()
    if policy.actor_target is not None:
        policy.actor_target.reset_noise()
