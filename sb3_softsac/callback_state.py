"""
Counters and records of SB3's callbacks, and the random states of the environments that they evaluate in: evaluations of
a resumed run come when they would have come, and begin as they would have begun.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.vec_env import VecEnv

from sb3_softsac import env_state
from sb3_softsac.object_state import describe_error, offers_state
from sb3_softsac.state_codec import NotEncodable, decode, encode

# Attributes that change during training. What a user passes to a callback is not among them.
STATE = (
    *("n_calls", "n_episodes", "last_time_trigger", "best_mean_reward", "last_mean_reward", "best_mean_return"),
    *("evaluations_results", "evaluations_timesteps", "evaluations_length", "evaluations_successes"),
    *("_is_success_buffer", "last_best_mean_reward", "no_improvement_evals", "_episodes_seen", "_timesteps_counter"),
)


def capture(callback: BaseCallback | None) -> list[Any]:
    """
    :param callback: the callback of ``learn()``, with those it holds
    :return: JSON tree; a callback with ``get_state()`` is asked for more
    """
    states = []
    for each, sees_all_steps in _walk(callback):
        state = {name: value for name, value in vars(each).items() if name in STATE}
        own = _own_state(each)
        eval_env = getattr(each, "eval_env", None)
        env = env_state.capture(eval_env) if isinstance(eval_env, VecEnv) else None
        # A callback that saves the model is called before those that come after it in the list
        is_late = sees_all_steps and callback is not None and each.num_timesteps < callback.num_timesteps
        try:
            states.append([_name(each), encode([state, own], type(each).__name__), env, is_late])
        except NotEncodable as error:
            warnings.warn(f"The state of a callback is not saved: {error}.", stacklevel=2)
    return states


def restore(callback: BaseCallback | None, states: list[Any], counts_anew: bool) -> list[BaseCallback]:
    """
    :param callback: the callback of ``learn()``; each takes the first state that is left of its class
    :param states: what :func:`capture` has returned
    :param counts_anew: what has ended the run may not end what is trained now at once; False: it is the same run
    :return: evaluations that have not seen the last step, as a callback before them in the list had saved the model
    """
    late: list[BaseCallback] = []
    left = list(states)
    for each, _ in _walk(callback):
        for i, (name, tree, env, is_late) in enumerate(left):
            if name != _name(each):
                continue
            del left[i]
            state, own = decode(tree)
            vars(each).update({k: v for k, v in state.items() if k in STATE and k in vars(each)})
            if own is not None and offers_state(each):
                each.set_state(own)  # type: ignore[attr-defined]
            if counts_anew:
                _count_anew(each)
            if isinstance(each, EvalCallback):
                # It may have saved its best model before it noted how good that is
                each.best_mean_reward = max(each.best_mean_reward, each.last_mean_reward)
                folder = each.best_model_save_path
                if folder is not None and not os.path.exists(os.path.join(folder, "best_model.zip")):
                    each.best_mean_reward = -float("inf")  # a new folder gets a best model of its own
            if is_late and isinstance(each, EvalCallback):
                late.append(each)
            elif is_late:
                each.n_calls += 1  # what the environment answered is no longer known
            eval_env = getattr(each, "eval_env", None)
            if env is not None and isinstance(eval_env, VecEnv) and eval_env is not each.training_env:
                env_state.restore(eval_env, env, mid_episode=True)  # where it cannot, evaluations begin as in a new run
            break
    return late


def _own_state(callback: BaseCallback) -> Any:
    if not offers_state(callback):
        return None
    try:
        return callback.get_state()  # type: ignore[attr-defined]
    except Exception as error:  # of the user's; a run need not end for it
        warnings.warn(f"{_name(callback)}.get_state() is not saved: {describe_error(error)}", stacklevel=3)
        return None


def _count_anew(callback: BaseCallback) -> None:
    """What ended the run would end the next one at once: who trains on wants more than one step."""
    if isinstance(callback, StopTrainingOnMaxEpisodes) and callback.n_episodes >= callback._total_max_episodes:
        callback.n_episodes = 0
    elif isinstance(callback, StopTrainingOnNoModelImprovement) and (
        callback.no_improvement_evals > callback.max_no_improvement_evals
    ):
        callback.no_improvement_evals = 0
    else:
        return
    warnings.warn(f"{type(callback).__name__} had ended the run; for what is trained now it counts anew.", stacklevel=4)


def walk(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """
    :param callback: the callback of ``learn()``
    :return: itself and all that it holds
    """
    return (each for each, _ in _walk(callback))


def _walk(callback: BaseCallback | None, sees_all_steps: bool = True) -> Iterator[tuple[BaseCallback, bool]]:
    if callback is None:
        return
    yield callback, sees_all_steps
    inner: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        inner = list(callback.callbacks)
    elif isinstance(callback, EventCallback):
        inner = [callback.callback]
        if isinstance(callback, EvalCallback):
            inner.append(callback.callback_on_new_best)
    for each in inner:
        yield from _walk(each, sees_all_steps and isinstance(callback, CallbackList))


def _name(callback: BaseCallback) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"
