"""Updates operation by operation: with every network, every optimiser and on every device."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_softsac.execution.device_replay import Storage, StoredBatch, gathered
from sb3_softsac.execution.learner import Learner
from sb3_softsac.execution.way import Done, Outcome, Updates
from sb3_softsac.gradient_step import EAGER, Due, Noise, Parts, UpdateOptions, draw_noise, update
from sb3_softsac.optimizers import Optimizers
from sb3_softsac.type_aliases import ReplayBatch

Update = Callable[[Optimizers, ReplayBatch, Noise, th.Tensor], Done]
"""Does an update; takes whether all was finite before."""


class Held(NamedTuple):
    """What an update reads or changes where it is."""

    optimizers: Optimizers
    storage: Storage | None  # what minibatches are gathered from


class Inputs(NamedTuple):
    """What an update is given anew each time."""

    batch: ReplayBatch | StoredBatch
    noise: Noise
    finite: th.Tensor


Run = Callable[[Held, Inputs], Done]
"""An :data:`Update` that gathers its minibatch."""


class Eager:
    """
    :param learner: what is updated
    """

    def __init__(self, learner: Learner):
        self.learner = learner

    def __call__(self, updates: Updates) -> Done:
        """See :class:`Way`. It never declines."""
        what = updates.dues[updates.first]
        held, inputs = prepare(self.learner, updates)
        done = with_gathering(make_update(self.learner, EAGER, updates.options, what))(held, inputs)
        if done.finite:
            self.learner.mark_state(what)
        return done


def make_update(learner: Learner, parts: Parts, options: UpdateOptions, what: Due) -> Update:
    """An update with everything but its inputs and optimisers bound."""
    policy, ent_coef, learning_rates = learner.policy, learner.ent_coef, learner.learning_rates

    def run(optimizers: Optimizers, batch: ReplayBatch, noise: Noise, finite: th.Tensor) -> Done:
        finite, metrics = update(
            policy, ent_coef, optimizers, batch, noise, learning_rates, finite, options, what, parts
        )
        metrics["finite"] = finite.float()
        return Done(finite, [Outcome(tuple(metrics), th.stack([value.reshape(()) for value in metrics.values()]))])

    return run


def with_gathering(update: Update) -> Run:
    """
    :param update: takes minibatches
    :return: the same, for what minibatches are gathered from. Gathering is not compiled with the update: a graph takes
        it in as well
    """

    def run(held: Held, inputs: Inputs) -> Done:
        return update(held.optimizers, gathered(inputs.batch, held.storage), inputs.noise, inputs.finite)

    return run


def prepare(learner: Learner, updates: Updates) -> tuple[Held, Inputs]:
    """What the first of some updates needs, noise included."""
    learner.set_training_mode()
    minibatches, first = updates.minibatches, updates.first
    noise = draw_noise(learner.policy, minibatches.size, updates.dues[first].actor_updates, learner.device)
    batch = minibatches.part(first, first + 1)
    return Held(learner.optimizers(), updates.storage), Inputs(batch, noise, updates.finite)
