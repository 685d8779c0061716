"""Checks of what a user passes to ``SoftSAC``: errors that name the argument, its value and the fix."""

import warnings
from numbers import Real
from typing import Any

import numpy as np
from gymnasium import spaces

WIDE_ACTION_BOUNDS = 10.0


def check_action_space(action_space: spaces.Space[Any]) -> None:
    """
    :param action_space: of the environment
    :raises ValueError: unless it is a ``Box`` whose bounds are finite and apart; the message has the fix
    """
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"SoftSAC needs a Box action space, the environment has {action_space}: use an algorithm for discrete "
            "actions (DQN, PPO), or give the environment continuous actions."
        )
    low, high = action_space.low.ravel(), action_space.high.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~(np.isfinite(high - low) & (low < high))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"Action dimension {i} has the bounds [{low[i]}, {high[i]}]; both must be finite, low below high. Wrap the "
            "environment, for instance in gymnasium.wrappers.TransformAction with a bounded Box, or use "
            "gymnasium.wrappers.RescaleAction(env, -1, 1) once the bounds are finite."
        )
    width = float((high.astype(np.float64) - low).max())
    if width > WIDE_ACTION_BOUNDS:
        warnings.warn(
            f"The action bounds are up to {width:g} wide. SoftSAC explores the whole range from the first step; if the "
            "useful actions are a small part of it, narrow the bounds.",
            UserWarning,
            stacklevel=3,
        )


def check_options(model: Any) -> None:
    """
    :param model: ``SoftSAC`` with all options set
    :raises ValueError: naming the option, its value and what is allowed
    """

    def require(condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(model, name)!r} is not valid: it must be {allowed}.")

    def is_number(value: Any, low: float, high: float = float("inf")) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high

    def is_int(value: Any, low: int) -> bool:
        return isinstance(value, int | np.integer) and is_number(value, low)

    for name in ("buffer_size", "batch_size", "n_steps", "target_update_interval", "policy_delay"):
        require(is_int(getattr(model, name), 1), name, "an integer >= 1")
    frequency = model.train_freq[0] if isinstance(model.train_freq, tuple | list) else model.train_freq
    require(is_int(frequency, 1), "train_freq", "an integer >= 1, or (an integer >= 1, 'step' or 'episode')")
    require(is_int(model.gradient_steps, -1), "gradient_steps", "an integer >= 0, or -1: one for each step collected")
    require(is_number(model.learning_starts, 0), "learning_starts", "a number >= 0")
    require(model.random_steps is None or is_number(model.random_steps, 0), "random_steps", "a number >= 0, or None")
    for name in ("tau", "gamma"):
        require(is_number(getattr(model, name), 0.0, 1.0), name, "a number in [0, 1]")
    for name in ("learning_rate", "qf_learning_rate", "ent_coef_learning_rate"):
        rate = getattr(model, name)
        optional = name != "learning_rate" and rate is None
        number = is_number(rate, 0.0) and float(rate) < float("inf")
        require(optional or number or callable(rate), name, "a number >= 0 or a function of the remaining progress")
    for name in ("policy_delay_compensation", "use_actor_target"):
        require(isinstance(getattr(model, name), bool), name, "True or False")
    for name in ("compile", "buffer_on_device"):
        value = getattr(model, name)
        require(isinstance(value, bool) or value == "auto", name, "True, False or 'auto'")
    precisions = (None, "highest", "high", "medium")
    require(model.matmul_precision in precisions, "matmul_precision", "'highest', 'high', 'medium' or None")
    require(model.num_threads == "auto" or is_int(model.num_threads, 1), "num_threads", "an integer >= 1, or 'auto'")
    require(model.ent_coef_loss in ("log", "exp"), "ent_coef_loss", "'log' or 'exp'")
    require(model.entropy_space in ("normalized", "env"), "entropy_space", "'normalized' or 'env'")
    max_grad_norm = model.max_grad_norm
    require(
        max_grad_norm is None or (is_number(max_grad_norm, 0.0) and max_grad_norm > 0.0),
        "max_grad_norm",
        "a number > 0, or None",
    )
    try:
        target_entropy_is_number = bool(np.isfinite(float(model.target_entropy)))
    except (TypeError, ValueError):
        target_entropy_is_number = False
    require(model.target_entropy == "auto" or target_entropy_is_number, "target_entropy", "a number or 'auto'")
