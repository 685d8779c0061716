"""
What optimisers train, and their steps: each optimiser's own, and one of Adam or AdamW that can be compiled.

Torch compiles code again whenever a number that it has read changes. So it reads :class:`Trained`, and not the
optimiser with its learning rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch as th
from torch.optim import Adam, AdamW, Optimizer

from sb3_softsac import upstream

adam = upstream.find("torch.optim.adam:adam")  # None: steps of optimisers are not compiled
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
GLOBAL_STEP_HOOKS = {
    name: upstream.find(f"torch.optim.optimizer:{name}")
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
}
ADAM_OPTIONS = ("amsgrad", "weight_decay", "eps", "maximize", "decoupled_weight_decay", "betas")
_ADAM_KEYS = {*ADAM_OPTIONS, "differentiable"}


class AdamGroup(NamedTuple):
    """Parameters of Adam or AdamW with their state, and its options without the learning rate."""

    parameters: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    max_exp_avg_sqs: list[th.Tensor]
    steps: list[th.Tensor]
    options: dict[str, Any]


class Trained(NamedTuple):
    """What an optimiser trains."""

    optimizer: Optimizer | None  # None: nothing is trained
    parameters: list[th.Tensor]  # those that are not frozen
    groups: list[AdamGroup]  # for the pure step


class Optimizers(NamedTuple):
    """The optimisers of an update."""

    critic: Trained
    ent_coef: Trained
    actor: Trained


NOTHING = Trained(None, [], [])
"""Of a fixed entropy coefficient."""

Gradients = tuple[th.Tensor | None, ...]
Apply = Callable[[Trained, Gradients, th.Tensor, th.Tensor], th.Tensor]
"""Takes what is trained, gradients, learning rate and whether all was finite until now, and does the optimiser's step
unless a number was not finite. Returns whether all has been finite."""


def trainable(optimizer: Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimiser
    :return: its parameters that are not frozen
    """
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def use_of(optimizer: Optimizer) -> Any:
    """
    :param optimizer: any optimiser
    :return: what it trains, and how, to be compared; learning rates are an update's inputs
    """
    options = [list(map(group.get, ADAM_OPTIONS)) for group in optimizer.param_groups]
    return is_plain_adam(optimizer), list(map(id, trainable(optimizer))), options


def trained(optimizer: Optimizer) -> Trained:
    """
    :param optimizer: any optimiser
    :return: what it trains
    """
    groups = []
    for group in optimizer.param_groups if is_plain_adam(optimizer) else []:
        # Parameters that the loss does not depend on have no state
        updated = [p for p in group["params"] if p.requires_grad and optimizer.state.get(p)]
        states = [optimizer.state[p] for p in updated]
        options = {name: group[name] for name in ADAM_OPTIONS}
        options["beta1"], options["beta2"] = options.pop("betas")
        groups.append(
            AdamGroup(
                updated,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
                [state["step"] for state in states],
                options,
            )
        )
    return Trained(optimizer, trainable(optimizer), groups)


def step(trained: Trained, gradients: Gradients, learning_rate: th.Tensor, finite: th.Tensor) -> th.Tensor:
    """The optimiser's own step, as an :data:`Apply`. It reads its learning rate itself."""
    if finite and trained.parameters and trained.optimizer is not None:
        trained.optimizer.zero_grad()  # a parameter that has been frozen may have one
        for parameter, gradient in zip(trained.parameters, gradients, strict=True):
            parameter.grad = gradient
        trained.optimizer.step()
    return finite


def is_plain_adam(optimizer: Optimizer) -> bool:
    """
    :param optimizer: any optimiser
    :return: whether its steps are those of Adam or AdamW, with one learning rate, and nothing else
    """
    return (
        type(optimizer) in (Adam, AdamW)
        and "step" not in vars(optimizer)
        and not any(getattr(optimizer, name, True) for name in STEP_HOOKS)
        and all(hooks == {} for hooks in GLOBAL_STEP_HOOKS.values())
        and all(group.keys() >= _ADAM_KEYS and not group["differentiable"] for group in optimizer.param_groups)
        and all(group["lr"] == optimizer.param_groups[0]["lr"] for group in optimizer.param_groups[1:])
    )


def has_pure_step(optimizer: Optimizer) -> bool:
    """
    :param optimizer: any optimiser
    :return: whether :func:`pure_step` can do its step
    """
    return adam is not None and is_plain_adam(optimizer)


def moved_names(optimizer: Optimizer) -> list[str]:
    """
    :param optimizer: any optimiser
    :return: private names of torch's without which there is no pure step, and which are no longer there
    """
    if type(optimizer) not in (Adam, AdamW):
        return []
    names = [f"torch.optim.Optimizer.{name}" for name in STEP_HOOKS if not hasattr(optimizer, name)]
    names += [f"torch.optim.optimizer.{name}" for name, hooks in GLOBAL_STEP_HOOKS.items() if hooks is None]
    keys = {name for group in optimizer.param_groups for name in _ADAM_KEYS - group.keys()}
    names += [f"Adam's option {name}" for name in sorted(keys)]
    return names if adam is not None else [*names, "torch.optim.adam.adam"]


def pure_step(trained: Trained, gradients: Gradients, learning_rate: th.Tensor, finite: th.Tensor) -> th.Tensor:
    """
    A step of Adam or AdamW that depends on nothing but tensors, as an :data:`Apply`: it can be compiled and captured.

    All state must be there already, so the first update of a run is not done with it. Where a number was not finite,
    everything is left as it was, without a device sync.
    """
    gradient_of = dict(zip(trained.parameters, gradients, strict=True))
    for group in trained.groups:
        parameters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, options = group
        if not parameters:
            continue
        changing = [*parameters, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps]
        with th.no_grad():
            before = [tensor.clone() for tensor in changing]  # costs nothing in a compiled update
            adam(
                parameters,
                [cast(th.Tensor, gradient_of[p]) for p in parameters],
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
                foreach=False,
                capturable=finite.is_cuda,
                differentiable=False,
                fused=False,
                has_complex=False,
                lr=learning_rate,
                **options,
            )
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(th.where(finite, tensor, old))
    return finite
