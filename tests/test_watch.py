"""What is seen of changes in networks, and what is none."""

from collections.abc import Callable

import pytest
import torch as th
from torch import nn
from twins import make

from sb3_softsac.execution.watch import Watch
from sb3_softsac.policies import Actor, SoftSACPolicy


def policy() -> SoftSACPolicy:
    return make("defaults", compile=False).policy


def other_layer(actor: Actor) -> None:
    actor.latent_pi[0] = nn.Linear(3, 8)


def other_parameter(actor: Actor) -> None:
    actor.latent_pi[0].weight = nn.Parameter(actor.latent_pi[0].weight.detach().clone())


def further_layer(actor: Actor) -> None:
    actor.latent_pi.append(nn.ReLU())


def other_class(actor: Actor) -> None:
    actor.latent_pi[1].__class__ = type("Own", (nn.ReLU,), {})


def other_attribute(actor: Actor) -> None:
    actor.use_sde = True


def own_method(actor: Actor) -> None:
    actor.sample = actor.sample  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change", [other_layer, other_parameter, further_layer, other_class, other_attribute, own_method]
)
def test_change(change: Callable[[Actor], None]) -> None:
    watched = policy()
    watch = Watch([watched, *watched.children()])
    assert not watch.is_over()
    change(watched.actor)
    assert watch.is_over()
    assert watch.sees_own_methods() == (change is own_method) == Watch([watched.actor]).sees_own_methods()


def test_other_values_are_no_change() -> None:
    watched = policy()
    watch = Watch([watched, *watched.children()])
    with th.no_grad():
        for parameter in watched.parameters():
            parameter.add_(1.0)
    watched.set_training_mode(True)
    assert not watch.is_over() and not watch.sees_hooks() and not watch.sees_own_methods()


def test_hooks() -> None:
    watched = policy()
    watch = Watch([watched])
    handles = [
        watched.actor.mu.register_forward_hook(lambda *args: None),
        watched.actor.mu.weight.register_hook(lambda gradient: gradient),
        nn.modules.module.register_module_forward_pre_hook(lambda *args: None),
    ]
    for n_left in (2, 1, 0):
        assert watch.sees_hooks() and len(watch.hooks()) >= n_left + 1
        handles.pop().remove()
    assert not watch.sees_hooks() and watch.hooks() == []
