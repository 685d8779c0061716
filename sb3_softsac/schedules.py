"""Learning rates that are given as text: the RL Zoo's ``"lin_3e-4"``, with a last value, and the cosine."""

import math
from collections.abc import Callable
from typing import Any

SYNTAX = "'lin_<first>' (linear to 0), 'lin_<first>_<last>' or 'cos_<first>_<last>', for instance 'lin_3e-4_3e-5'"


def parse(text: str) -> Callable[[float], float]:
    """
    :param text: kind, first and last value
    :return: function of the remaining progress, from 1 to 0. The last rollout may go on behind the end, where SB3's
        progress is negative: the rate then stays what it is at the end
    :raises ValueError: if the text is not valid
    """
    kind, *numbers = text.split("_")
    first, last = map(float, numbers if len(numbers) > 1 else [*numbers, "0"])
    if kind not in ("lin", "cos") or not (0.0 <= first < math.inf and 0.0 <= last < math.inf):
        raise ValueError(f"{text!r} is not valid: it must be {SYNTAX}.")
    if kind == "lin":
        return lambda progress: last + (first - last) * max(progress, 0.0)
    return lambda progress: last + (first - last) * 0.5 * (1.0 - math.cos(math.pi * max(progress, 0.0)))


def is_valid(text: Any) -> bool:
    """
    :param text: any learning rate
    :return: whether :func:`parse` reads it
    """
    try:
        return isinstance(text, str) and parse(text) is not None
    except ValueError:
        return False
