"""
One whole SAC update: sampled batch and noise in, new parameters, optimiser states, targets and metrics out.

The only module that takes gradients and steps optimisers. Noise comes from outside, in the order of SB3's
``SAC.train``, and each loss sees the networks and the entropy coefficient that SB3's sees: equal networks, batch and
noise give equal new networks, whoever runs the update (:mod:`sb3_softsac.execution`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adam import adam

from sb3_softsac import losses
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.policies import Actor, SoftSACPolicy, running_statistics
from sb3_softsac.type_aliases import Metrics, PolicySample, ReplayBatch

SATURATED = 0.999  # an action this close to a bound counts as saturated: |u| > 3.8 before tanh
CHECKED = (("critic_loss", "critic_grad_norm"), ("ent_coef_loss", None), ("actor_loss", "actor_grad_norm"))


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


Gradients = tuple[th.Tensor | None, ...]
Apply = Callable[[Optimizer, Sequence[th.Tensor], Gradients, th.Tensor, th.Tensor], th.Tensor]
"""Takes an optimiser, its parameters, their gradients, its learning rate and whether all was finite until now, and does
the optimiser's step unless a number was not finite. Returns whether all has been finite."""


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


def draw_noise(policy: SoftSACPolicy, batch: ReplayBatch, n_actor_updates: int) -> Noise:
    """
    Draw from torch's random state, in the order of SB3's ``SAC.train``.

    :param policy: the policy
    :param batch: minibatch, for its shape and device
    :param n_actor_updates: see :class:`Due`
    :return: noise of one update
    """
    if policy.actor.use_sde:
        assert isinstance(policy.actor.log_std, nn.Parameter)
        shape, device = policy.actor.log_std.shape, policy.actor.log_std.device
        n_actors = 1 if policy.actor_target is None else 2

        def matrices() -> list[th.Tensor]:
            # SB3 draws a matrix for all environments, and then one for each
            return [(th.randn(shape, device=device), th.randn((1, *shape), device=device))[0] for _ in range(n_actors)]

        first = matrices()
        return Noise(first[-1], tuple([first[0], *(matrices()[0] for _ in range(n_actor_updates - 1))]))
    noise_of_pi = [th.randn_like(batch.actions) for _ in range(min(n_actor_updates, 1))]
    next_actions = th.randn_like(batch.actions)
    noise_of_pi += [th.randn_like(batch.actions) for _ in range(n_actor_updates - 1)]
    return Noise(next_actions, tuple(noise_of_pi))


def update(
    policy: SoftSACPolicy,
    ent_coef: EntCoef,
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

    :param policy: networks and their optimisers
    :param ent_coef: entropy coefficient and its optimiser
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
    gradients, metrics = parts.critic(policy, batch, noise.next_actions, coefficient, options)
    parameters = trainable(policy.critic.optimizer)
    finite = finite & th.isfinite(metrics["critic_loss"] + metrics["critic_grad_norm"])
    finite = parts.apply(policy.critic.optimizer, parameters, gradients, learning_rates.critic, finite)
    metrics["ent_coef"] = coefficient.squeeze()

    for actor_noise in noise.actions[: due.actor_updates]:
        coefficient = ent_coef.value()
        pi_gradients, ent_coef_gradients, pi_metrics = parts.actor(
            policy, ent_coef, batch, actor_noise, coefficient, options
        )
        metrics.update(pi_metrics)
        if ent_coef.optimizer is not None:
            finite = finite & th.isfinite(metrics["ent_coef_loss"])
            parameters = trainable(ent_coef.optimizer)
            finite = parts.apply(ent_coef.optimizer, parameters, ent_coef_gradients, learning_rates.ent_coef, finite)
        finite = finite & th.isfinite(metrics["actor_loss"] + metrics["actor_grad_norm"])
        parameters = trainable(policy.actor.optimizer)
        finite = parts.apply(policy.actor.optimizer, parameters, pi_gradients, learning_rates.actor, finite)

    if due.targets:
        parts.targets(policy, options.tau, finite)
    return finite, metrics


def critic_gradients(
    policy: SoftSACPolicy, batch: ReplayBatch, noise: th.Tensor, coefficient: th.Tensor, options: UpdateOptions
) -> tuple[Gradients, Metrics]:
    """
    :return: gradients of the critics' optimiser's parameters; metrics
    """
    with th.no_grad():
        next_actor = policy.actor if policy.actor_target is None else policy.actor_target
        next_pi = next_actor.sample(batch.next_observations, noise)
        target_q = losses.target_q_values(
            batch.rewards,
            batch.dones,
            options.gamma if batch.discounts is None else batch.discounts,
            policy.critic_target(batch.next_observations, next_pi.actions),
            next_pi.log_prob - options.log_action_scale,
            coefficient,
        )
    current_q_values = policy.critic(batch.observations, batch.actions)
    loss = losses.critic_loss(current_q_values, target_q)
    gradients, norm = _gradients(loss, policy.critic.optimizer, options.max_grad_norm)
    return gradients, {
        "critic_loss": loss.detach(),
        "q_value": th.cat(current_q_values).detach().mean(),
        "target_q_value": target_q.mean(),
        "critic_grad_norm": norm,
    }


def actor_gradients(
    policy: SoftSACPolicy,
    ent_coef: EntCoef,
    batch: ReplayBatch,
    noise: th.Tensor,
    coefficient: th.Tensor,
    options: UpdateOptions,
) -> tuple[Gradients, Gradients, Metrics]:
    """
    :return: gradients of the actor's and of the entropy coefficient's optimiser's parameters; metrics
    """
    pi = _sample(policy.actor, batch, noise, options)
    metrics: Metrics = {}
    ent_coef_gradients: Gradients = ()
    if ent_coef.log_ent_coef is not None and ent_coef.optimizer is not None:
        loss = losses.ent_coef_loss(ent_coef.log_ent_coef, pi.log_prob, options.target_entropy, options.ent_coef_loss)
        ent_coef_gradients, _ = _gradients(loss, ent_coef.optimizer, None)
        metrics["ent_coef_loss"] = loss.detach()
    loss = losses.actor_loss(policy.critic(batch.observations, pi.actions), pi.log_prob, coefficient)
    gradients, norm = _gradients(loss, policy.actor.optimizer, options.max_grad_norm)
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
                th._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)
                _copy_statistics(network, target)


def pure_update_targets(policy: SoftSACPolicy, tau: float, finite: th.Tensor) -> None:
    """:func:`update_targets` without asking the device."""
    with th.no_grad():
        for network, target in policy.targets():
            for kept, new in zip(target.parameters(), network.parameters(), strict=True):
                kept.copy_(th.where(finite, th.lerp(kept, new, tau), kept))
            _copy_statistics(network, target)


def _copy_statistics(network: nn.Module, target: nn.Module) -> None:
    for target_statistic, statistic in zip(running_statistics(target), running_statistics(network), strict=True):
        target_statistic.copy_(statistic)


def trainable(optimizer: Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimiser
    :return: its parameters, the frozen ones left out
    """
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def step(
    optimizer: Optimizer,
    parameters: Sequence[th.Tensor],
    gradients: Gradients,
    learning_rate: th.Tensor,
    finite: th.Tensor,
) -> th.Tensor:
    """The optimiser's own step, as an :data:`Apply`. It reads its learning rate itself."""
    if finite and parameters:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return finite


def has_pure_step(optimizer: Optimizer | None) -> bool:
    """
    :param optimizer: any optimiser
    :return: whether :func:`pure_step` can do its step
    """
    if optimizer is None:
        return True
    return type(optimizer) in (Adam, AdamW) and not any(group["differentiable"] for group in optimizer.param_groups)


def pure_step(
    optimizer: Optimizer,
    parameters: Sequence[th.Tensor],
    gradients: Gradients,
    learning_rate: th.Tensor,
    finite: th.Tensor,
) -> th.Tensor:
    """
    A step of Adam or AdamW that depends on nothing but tensors, as an :data:`Apply`: it can be compiled and captured.

    All state must be there already, so the first update of a run is not done with it. Where a number was not finite,
    everything is left as it was, without asking the device.
    """
    gradient_of = dict(zip(parameters, gradients, strict=True))
    for group in optimizer.param_groups:
        # Parameters that the loss does not depend on have no gradient; their state is empty
        updated = [p for p in group["params"] if gradient_of.get(p) is not None]
        if not updated:
            continue
        states = [optimizer.state[p] for p in updated]
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []), "step"]
        changing = [*updated, *(state[name] for state in states for name in names)]
        with th.no_grad():
            before = [tensor.clone() for tensor in changing]  # costs nothing in a compiled update
            adam(
                updated,
                [gradient_of[p] for p in updated],  # type: ignore[misc]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
                [state["step"] for state in states],
                foreach=False,
                capturable=finite.is_cuda,
                differentiable=False,
                fused=False,
                has_complex=False,
                amsgrad=group["amsgrad"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=learning_rate,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(th.where(finite, tensor, old))
    return finite


class Parts(NamedTuple):
    """The functions that an update consists of."""

    critic: Callable[..., tuple[Gradients, Metrics]]
    actor: Callable[..., tuple[Gradients, Gradients, Metrics]]
    targets: Callable[[SoftSACPolicy, float, th.Tensor], None]
    apply: Apply


EAGER = Parts(critic_gradients, actor_gradients, update_targets, step)
"""Works with every optimiser."""
PURE = Parts(critic_gradients, actor_gradients, pure_update_targets, pure_step)
"""Asks the device nothing: the whole update can be compiled, and captured in a CUDA graph."""


def _sample(actor: Actor, batch: ReplayBatch, noise: th.Tensor, options: UpdateOptions) -> PolicySample:
    """The policy's own actions, with densities in the units of the entropy."""
    pi = actor.sample(batch.observations, noise)
    return pi._replace(log_prob=pi.log_prob - options.log_action_scale)


def _gradients(loss: th.Tensor, optimizer: Any, max_grad_norm: float | None) -> tuple[Gradients, th.Tensor]:
    """
    Gradient of the optimiser's own parameters, clipped.

    ``autograd.grad`` instead of ``backward()``: the actor's loss flows through the critics, whose weight gradients
    (11% of an update's arithmetic) are then not computed only to be thrown away.

    :return: gradients, None where the loss does not depend on the parameter; their norm before clipping, scalar
    """
    parameters = trainable(optimizer)
    if not parameters:  # all frozen
        return (), loss.new_zeros(())
    gradients = th.autograd.grad(loss, parameters, allow_unused=True)
    # One kernel for all is faster, but not if compiled: it would stay a call of its own
    foreach = False if th.compiler.is_compiling() else None
    norm = nn.utils.get_total_norm([g for g in gradients if g is not None], foreach=foreach)
    if max_grad_norm is not None:
        scale = th.clamp(max_grad_norm / (norm + 1e-6), max=1.0)  # nn.utils.clip_grads_with_norm_'s
        gradients = tuple(None if g is None else g * scale for g in gradients)
    return gradients, norm
