"""From the metrics of single updates to what is logged, and to the error if one of them is not finite."""

import itertools
import math
from collections import defaultdict

import torch as th

from sb3_softsac.execution.way import Outcome

CHECKED = (("critic_loss", "critic_grad_norm"), ("ent_coef_loss", None), ("actor_loss", "actor_grad_norm"))


class NotFinite(ValueError):
    """
    A loss or gradient was not finite.

    :param message: what happened
    :param n_done: updates that were completed before
    """

    def __init__(self, message: str, n_done: int):
        super().__init__(message)
        self.n_done = n_done


def means(outcomes: list[Outcome], n_updates: int) -> dict[str, float]:
    """
    Means of the metrics of K updates by name, over those that have them, with one transfer from the device;
    :class:`NotFinite` is raised if a number was not finite.
    """
    if not outcomes:
        return {}
    numbers = outcomes[0].values if len(outcomes) == 1 else th.cat([outcome.values for outcome in outcomes])
    names = itertools.chain.from_iterable(outcome.names for outcome in outcomes)
    terms: dict[str, list[float]] = defaultdict(list)
    for name, number in zip(names, numbers.tolist(), strict=True):
        terms[name].append(number)
    result = {name: sum(some) / len(some) for name, some in terms.items()}
    if result.pop("finite") < 1.0:
        raise _not_finite(outcomes, n_updates)
    return result


def _not_finite(outcomes: list[Outcome], n_updates: int) -> NotFinite:
    for i, outcome in enumerate(outcomes):
        metrics = dict(zip(outcome.names, outcome.values.tolist(), strict=True))
        if metrics["finite"]:
            continue
        pairs = [
            (loss, norm)
            for loss, norm in CHECKED
            if any(not math.isfinite(metrics.get(name or loss, 0.0)) for name in (loss, norm))
        ]
        loss, norm = (pairs or CHECKED)[0]
        said = f"{loss} is {metrics[loss]}" + (f" and the norm of its gradient {metrics[norm]}" if norm else "")
        return NotFinite(
            f"{said} at update {n_updates + i + 1}: this optimiser step was not taken. Check rewards and observations "
            "for NaN, infinite or huge values; else lower the learning rate or set max_grad_norm.",
            i,
        )
    raise AssertionError("all is finite")
