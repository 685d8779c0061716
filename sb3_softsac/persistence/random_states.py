"""Random states of the process: those of Python, NumPy and PyTorch."""

import random
from typing import Any

import numpy as np
import torch as th

from sb3_softsac.persistence.codec import check_random_state


def get_random_states(device: th.device | None = None) -> dict[str, Any]:
    """
    :param device: device of the model; a CUDA device has a random state of its own
    :return: random states by name, for :func:`set_random_states`
    """
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": th.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        states["cuda"] = th.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: th.device | None = None) -> None:
    """
    :param states: result of :func:`get_random_states`; the Python state may be packed
    :param device: device of the model
    :raises ValueError: if NumPy's state is not valid
    """
    random.setstate(unpack_python_state(states["python"]))
    np.random.set_state(check_random_state(states["numpy"]))
    th.set_rng_state(states["torch"])
    if device is not None and device.type == "cuda" and "cuda" in states:
        th.cuda.set_rng_state(states["cuda"], device)


def pack_python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """State of a ``random.Random`` with its 625 words in an array, which is shorter in a file."""
    version, words, gauss = state
    return version, np.array(words, dtype=np.uint32), gauss


def unpack_python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """State of a ``random.Random`` as Python knows it, from one that is packed or not."""
    version, words, gauss = state
    return version, tuple(map(int, words)), gauss
