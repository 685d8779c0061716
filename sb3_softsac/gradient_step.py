"""
One whole SAC update: sampled batch and noise in, new parameters, optimiser states, targets and metrics out.

All gradients and optimiser steps; ``update.cpp`` repeats them in C++. Noise comes from outside, in the order of
SB3's ``SAC.train``, and each loss sees the networks and the entropy coefficient that SB3's sees: equal networks, batch
and noise give equal new networks, however the update is run (:mod:`sb3_softsac.execution`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_softsac import losses, networks, upstream
from sb3_softsac.buffers import map_obs
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.heads import Outputs, ScalarHead, head_of
from sb3_softsac.optimizers import Apply, Gradients, Optimizers, Trained, pure_step, step
from sb3_softsac.policies import Critic, SoftSACPolicy, running_statistics
from sb3_softsac.type_aliases import Metrics, PolicySample, ReplayBatch, TorchObs

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
    joint_batch: str | None
    use_critic_target: bool


class Due(NamedTuple):
    """What is due in an update, by the number of updates before it."""

    actor_updates: int  # of actor and entropy coefficient
    targets: bool


class Noise(NamedTuple):
    """Standard normal noise of one update: (B, A), or with gSDE (latent dim, A) for a new exploration matrix."""

    next_actions: th.Tensor
    actions: tuple[th.Tensor, ...]  # for each update of the actor


class LearningRates(NamedTuple):
    """Learning rates as scalars on the CPU or on the networks' device: numbers would become part of compiled code."""

    critic: th.Tensor
    ent_coef: th.Tensor
    actor: th.Tensor


def due(options: UpdateOptions, n_updates: int) -> Due:
    """
    :param options: constants of the update
    :param n_updates: updates done before this one; delays and intervals are counted on it
    :return: what this update consists of
    """
    actor_is_due = (n_updates + 1) % options.policy_delay == 0
    # CleanRL's way: as many actor updates as the delay left out, each with fresh actions
    n_at_once = options.policy_delay if options.policy_delay_compensation else 1
    return Due(n_at_once if actor_is_due else 0, n_updates % options.target_update_interval == 0)


def draw_noise(policy: SoftSACPolicy, batch_size: int, n_actor_updates: int, device: th.device) -> Noise:
    """
    Draw from torch's random state, in the order of SB3's ``SAC.train``. So does ``update.cpp``.

    :param policy: the policy
    :param batch_size: B
    :param n_actor_updates: see :class:`Due`
    :param device: of the policy, which SB3 looks for among all parameters
    :return: noise of one update
    """
    if policy.actor.use_sde:
        assert isinstance(policy.actor.log_std, nn.Parameter)
        shape = policy.actor.log_std.shape
        n_actors = 1 if policy.actor_target is None else 2

        def matrices() -> list[th.Tensor]:
            # SB3 draws a matrix for all environments, and then one for each
            return [(th.randn(shape, device=device), th.randn((1, *shape), device=device))[0] for _ in range(n_actors)]

        first = matrices()
        return Noise(first[-1], tuple([first[0], *(matrices()[0] for _ in range(n_actor_updates - 1))]))

    size = batch_size, math.prod(policy.action_space.shape)

    def normal() -> th.Tensor:
        return th.randn(size, dtype=th.float32, device=device)

    noise_of_pi = [normal() for _ in range(min(n_actor_updates, 1))]
    next_actions = normal()
    noise_of_pi += [normal() for _ in range(n_actor_updates - 1)]
    return Noise(next_actions, tuple(noise_of_pi))


def update(
    policy: SoftSACPolicy,
    ent_coef: EntCoef,
    optimizers: Optimizers,
    batch: ReplayBatch,
    noise: Noise,
    learning_rates: LearningRates,
    finite: th.Tensor,
    options: UpdateOptions,
    due: Due,
    parts: "Parts",
) -> tuple[th.Tensor, Metrics]:
    """
    Update critics, entropy coefficient, actor and targets once, in place.

    :param policy: networks
    :param ent_coef: entropy coefficient
    :param optimizers: their optimisers
    :param batch: minibatch on the policy's device
    :param noise: see :func:`draw_noise`
    :param learning_rates: of the optimisers
    :param finite: whether all numbers of the updates before were finite; scalar of booleans
    :param options: constants of the update
    :param due: what it consists of
    :param parts: the functions that do its parts
    :return: whether all numbers have been finite, and scalars by log key; those of the actor only where it was updated
    """
    coefficient = ent_coef.value()  # before its own step, as in SB3
    critic, actor = optimizers.critic, optimizers.actor
    statistics = Statistics(policy.critic)
    gradients, metrics = parts.critic(policy, critic, batch, noise.next_actions, coefficient, options)
    finite = finite & th.isfinite(metrics["critic_loss"] + metrics["critic_grad_norm"])
    finite = parts.apply(critic, gradients, learning_rates.critic, finite)
    statistics.keep_if(finite)
    policy.project_to_unit_norm(policy.critic, finite)
    metrics["ent_coef"] = coefficient.squeeze()

    for actor_noise in noise.actions[: due.actor_updates]:
        coefficient = ent_coef.value()
        statistics = Statistics(policy.actor)
        gradients, ent_coef_gradients, actor_metrics = parts.actor(
            policy, ent_coef, optimizers, batch, actor_noise, coefficient, options
        )
        metrics.update(actor_metrics)
        if "ent_coef_loss" in metrics:
            finite = finite & th.isfinite(metrics["ent_coef_loss"])
            finite = parts.apply(optimizers.ent_coef, ent_coef_gradients, learning_rates.ent_coef, finite)
        finite = finite & th.isfinite(metrics["actor_loss"] + metrics["actor_grad_norm"])
        finite = parts.apply(actor, gradients, learning_rates.actor, finite)
        statistics.keep_if(finite)
        policy.project_to_unit_norm(policy.actor, finite)

    if due.targets:
        parts.targets(policy, options.tau, finite)
    return finite, metrics


class Statistics:
    """
    Running statistics of batch norms, as they are now: the pass that moves them comes before it is known whether all
    is finite.

    :param network: actor or critic
    """

    def __init__(self, network: nn.Module):
        self.present = networks.statistics(network)
        self.before = [tensor.clone() for tensor in self.present]

    def keep_if(self, finite: th.Tensor) -> None:
        """
        :param finite: whether statistics may stay changed; scalar of booleans
        """
        for tensor, old in zip(self.present, self.before, strict=True):
            tensor.copy_(th.where(finite, tensor, old))


def critic_gradients(
    policy: SoftSACPolicy,
    trained: Trained,
    batch: ReplayBatch,
    noise: th.Tensor,
    coefficient: th.Tensor,
    options: UpdateOptions,
) -> tuple[Gradients, Metrics]:
    """Gradients of the critics' trained parameters; metrics."""
    head = head_of(policy.critic)
    with th.no_grad():
        next_actor = policy.actor if policy.actor_target is None else policy.actor_target
        next_pi = next_actor.sample(batch.next_observations, noise)
    outputs, next_outputs = _critic_outputs(policy, batch, next_pi.actions, options)
    with th.no_grad():
        target, metrics = head.target(
            batch.rewards,
            batch.dones,
            options.gamma if batch.discounts is None else batch.discounts,
            next_outputs,
            next_pi.log_prob - options.log_action_scale,
            coefficient,
        )
    loss = head.loss(outputs, target)
    gradients, norm = _gradients(loss, trained, options.max_grad_norm)
    return gradients, {
        "critic_loss": loss.detach(),
        "q_value": th.cat(head.values(outputs)).detach().mean(),
        **metrics,
        "critic_grad_norm": norm,
    }


def _critic_outputs(
    policy: SoftSACPolicy, batch: ReplayBatch, next_actions: th.Tensor, options: UpdateOptions
) -> tuple[Outputs, Outputs]:
    """
    :param next_actions: the policy's, at the next observations, (B, A)
    :return: outputs of the critics at the stored actions; and, without gradient, at the next ones, of the targets if
        there are any
    """
    critic = policy.critic
    target = policy.critic_target if options.use_critic_target else critic
    if options.joint_batch is None:
        with th.no_grad():
            next_outputs = _outputs(target, batch.next_observations, next_actions)
        with networks.batch_statistics(critic):
            return _outputs(critic, batch.observations, batch.actions), next_outputs
    # Both halves share their statistics (CrossQ)
    n_rows = len(batch.actions)
    observations, actions = _joined(batch), th.cat([batch.actions, next_actions])
    with networks.batch_statistics(critic):
        outputs = joint_outputs = _outputs(critic, observations, actions)
    if options.use_critic_target:
        with th.no_grad(), networks.batch_statistics(target):
            joint_outputs = _outputs(target, observations, actions)
    return tuple(each[:n_rows] for each in outputs), tuple(each[n_rows:].detach() for each in joint_outputs)


def _outputs(critic: Critic, observations: TorchObs, actions: th.Tensor) -> Outputs:
    if isinstance(head_of(critic), ScalarHead):  # a user may have hooks on the critic, or a forward() of their own
        return critic(observations, actions)
    return critic.outputs(observations, actions)


def _joined(batch: ReplayBatch) -> TorchObs:
    """Observations, and behind them next observations: (2 B, ...), or a dict of them."""
    return map_obs(lambda *parts: th.cat(parts), batch.observations, batch.next_observations)


def actor_gradients(
    policy: SoftSACPolicy,
    ent_coef: EntCoef,
    optimizers: Optimizers,
    batch: ReplayBatch,
    noise: th.Tensor,
    coefficient: th.Tensor,
    options: UpdateOptions,
) -> tuple[Gradients, Gradients, Metrics]:
    """Gradients of the actor's and of the entropy coefficient's trained parameters; metrics."""
    pi = _sample(policy, batch, noise, options)
    metrics: Metrics = {}
    ent_coef_gradients: Gradients = ()
    if ent_coef.log_ent_coef is not None:
        loss = losses.ent_coef_loss(ent_coef.log_ent_coef, pi.log_prob, options.target_entropy, options.ent_coef_loss)
        ent_coef_gradients, _ = _gradients(loss, optimizers.ent_coef, None)
        metrics["ent_coef_loss"] = loss.detach()
    loss = losses.actor_loss(policy.critic(batch.observations, pi.actions), pi.log_prob, coefficient)
    gradients, norm = _gradients(loss, optimizers.actor, options.max_grad_norm)
    metrics["actor_loss"] = loss.detach()
    metrics["entropy"] = -pi.log_prob.detach().mean()
    metrics["log_std"] = pi.log_std.detach().mean()
    metrics["saturated_actions"] = (pi.actions.detach().abs() > SATURATED).float().mean()
    metrics["actor_grad_norm"] = norm
    return gradients, ent_coef_gradients, metrics


def update_targets(policy: SoftSACPolicy, tau: float, finite: th.Tensor) -> None:
    """Polyak averaging of parameters; batch-norm statistics are copied (SB3 issue 996)."""
    if finite:
        with th.no_grad():
            for network, target in policy.targets():
                _average(list(target.parameters()), list(network.parameters()), tau)
                for statistic, new in zip(running_statistics(target), running_statistics(network), strict=True):
                    statistic.copy_(new)


def _average(kept: list[th.Tensor], new: list[th.Tensor], tau: float) -> None:
    if hasattr(th, "_foreach_lerp_"):
        th._foreach_lerp_(kept, new, tau)
        return
    upstream.say_moved("torch:_foreach_lerp_", "targets are averaged one tensor at a time, which is slower on a GPU.")
    for parameter, value in zip(kept, new, strict=True):
        parameter.lerp_(value, tau)


def pure_update_targets(policy: SoftSACPolicy, tau: float, finite: th.Tensor) -> None:
    """:func:`update_targets` without a device sync."""
    with th.no_grad():
        for network, target in policy.targets():
            averaged = zip(target.parameters(), network.parameters(), strict=True)
            copied = zip(running_statistics(target), running_statistics(network), strict=True)
            for kept, new in averaged:
                kept.copy_(th.where(finite, th.lerp(kept, new, tau), kept))
            for statistic, new_statistic in copied:
                statistic.copy_(th.where(finite, new_statistic, statistic))


class Parts(NamedTuple):
    """The functions that an update consists of."""

    critic: Callable[..., tuple[Gradients, Metrics]]
    actor: Callable[..., tuple[Gradients, Gradients, Metrics]]
    targets: Callable[[SoftSACPolicy, float, th.Tensor], None]
    apply: Apply


EAGER = Parts(critic_gradients, actor_gradients, update_targets, step)
"""Works with every optimiser."""
PURE = Parts(critic_gradients, actor_gradients, pure_update_targets, pure_step)
"""Without a device sync: the whole update can be compiled, and captured in a CUDA graph."""


def _sample(policy: SoftSACPolicy, batch: ReplayBatch, noise: th.Tensor, options: UpdateOptions) -> PolicySample:
    """The policy's own actions, with densities in the units of the entropy."""
    with networks.batch_statistics(policy.actor):
        if options.joint_batch == "all":
            pi = policy.actor.sample(_joined(batch), noise, len(batch.actions))
        else:
            pi = policy.actor.sample(batch.observations, noise)
    return pi._replace(log_prob=pi.log_prob - options.log_action_scale)


def _gradients(loss: th.Tensor, trained: Trained, max_grad_norm: float | None) -> tuple[Gradients, th.Tensor]:
    """
    Gradients of the trained parameters, clipped.

    ``autograd.grad`` instead of ``backward()``: the actor's loss flows through the critics, whose weight gradients
    (11% of an update's arithmetic) are then not computed only to be thrown away.

    :return: gradients, None where the loss does not depend on the parameter; their norm before clipping, scalar
    """
    if not trained.parameters:  # all frozen
        return (), loss.new_zeros(())
    gradients = th.autograd.grad(loss, trained.parameters, allow_unused=True)
    # One kernel for all is faster, but not if compiled: it would stay a call of its own
    foreach = False if th.compiler.is_compiling() else None
    norm = nn.utils.get_total_norm([g for g in gradients if g is not None], foreach=foreach)
    if max_grad_norm is not None:
        scale = th.clamp(max_grad_norm / (norm + 1e-6), max=1.0)  # nn.utils.clip_grads_with_norm_'s
        gradients = tuple(None if g is None else g * scale for g in gradients)
    return gradients, norm
