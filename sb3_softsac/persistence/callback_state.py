"""
Counters and records of SB3's callbacks, and the state of their evaluation environments: a continued run evaluates at
the same steps and from the same states as an uninterrupted one.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.vec_env import VecEnv

from sb3_softsac.persistence.codec import NotEncodable, decode, encode, full_name
from sb3_softsac.persistence.envs import env_state
from sb3_softsac.persistence.envs.object_state import describe_error, offers_state

# Attributes that change during training, as opposed to a callback's arguments
STATE = (
    *("n_calls", "n_episodes", "last_time_trigger", "best_mean_reward", "last_mean_reward", "best_mean_return"),
    *("evaluations_results", "evaluations_timesteps", "evaluations_length", "evaluations_successes"),
    *("_is_success_buffer", "last_best_mean_reward", "no_improvement_evals", "_episodes_seen", "_timesteps_counter"),
    "eval_idx",  # of the zoo's TrialEvalCallback
)
# Callbacks without a state of their own
STATELESS: tuple[type[Any], ...] = (CallbackList, ConvertCallback, ProgressBarCallback)
OF_EVERY_CALLBACK = vars(ConvertCallback(lambda *_: True)).keys() | {"model", "eval_env", "callback_on_new_best"}
KNOWN_PACKAGES = ("stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_softsac")
OFFER = "give its class get_state() and set_state(state)"


def capture(callback: BaseCallback | None) -> list[Any]:
    """
    :param callback: callback of ``learn()``, with all that it contains
    :return: JSON tree with a state for each callback, including the result of ``get_state()`` if its class has it
    """
    states = []
    for each, sees_all_steps in _walk(callback):
        state = {name: value for name, value in vars(each).items() if name in STATE}
        own = _own_state(each)
        eval_env = getattr(each, "eval_env", None)
        env = env_state.capture(eval_env) if isinstance(eval_env, VecEnv) else None
        # If a callback saves the model, those after it in the list have not seen the step yet
        is_late = sees_all_steps and callback is not None and each.num_timesteps < callback.num_timesteps
        try:
            states.append([_name(each), encode([state, own], type(each).__name__), env, is_late, _digests(each)])
        except NotEncodable as error:
            warnings.warn(f"The state of a callback is not saved: {error}.", stacklevel=2)
    return states


def restore(
    callback: BaseCallback | None, states: list[Any], restarts_stops: bool
) -> tuple[list[BaseCallback], list[str]]:
    """
    :param callback: callback of ``learn()``, with all that it contains; each takes the first unused state of its class
    :param states: result of :func:`capture`
    :param restarts_stops: restart stop callbacks that already fired
    :return: evaluations that have not seen the last step, since a callback before them in the list saved the model;
        and a sentence for each state that could not be restored
    """
    late: list[BaseCallback] = []
    lost: list[str] = []
    left = list(states)
    without_state = []
    for each, _ in _walk(callback):
        i = next((i for i, (name, *_) in enumerate(left) if name == _name(each)), None)
        if i is None:
            without_state += [] if isinstance(each, STATELESS) else [type(each).__name__]
            continue
        lost += [f"{type(each).__name__}: {reason}" for reason in _restore_one(each, left[i], restarts_stops, late)]
        del left[i]
    # A callback may be left out or added on purpose. If both happened, a class may have been renamed
    unused = [name for name, *_ in left if name not in map(full_name, STATELESS)]
    if unused and without_state:
        lost.append(f"{', '.join(without_state)} starts from scratch: the file only has {', '.join(unused)}")
    return late, lost


def _restore_one(each: BaseCallback, saved: list[Any], restarts_stops: bool, late: list[BaseCallback]) -> list[str]:
    """
    :param saved: state of the callback in the result of :func:`capture`
    :param late: list of evaluations that have not seen the last step, to which the callback may be added
    :return: a reason for each state that could not be restored
    """
    _, tree, env, is_late, *digests = saved  # older files have no digests
    state, own = decode(tree)
    lost = [f"it has no {name} here" for name in state if name not in vars(each)]
    results = state.get("evaluations_results")
    if isinstance(each, EvalCallback) and results and len(results[0]) != each.n_eval_episodes:
        # NumPy could not save rows of different lengths
        lost.append(
            f"its evaluations were of {len(results[0])} episodes, not {each.n_eval_episodes}: it begins a new list"
        )
        state = {name: value for name, value in state.items() if not name.startswith("evaluations_")}
    vars(each).update({name: value for name, value in state.items() if name in STATE and name in vars(each)})
    if own is not None:
        if offers_state(each):
            each.set_state(own)  # type: ignore[attr-defined]
        else:
            lost.append("it has no set_state(state) for the saved result of get_state()")
    elif digests:
        here = _digests(each)
        changed = sorted(name for name, digest in digests[0].items() if here.get(name, "missing") != digest)
        if changed:
            lost.append(f"{', '.join(changed)} had different values, which were not saved; {OFFER}")
    if restarts_stops:
        _restart_stop(each)
    if isinstance(each, EvalCallback):
        # It may have been saved between saving its best model and updating best_mean_reward
        each.best_mean_reward = max(each.best_mean_reward, each.last_mean_reward)
        folder = each.best_model_save_path
        if folder is not None and not os.path.exists(os.path.join(folder, "best_model.zip")):
            each.best_mean_reward = -float("inf")  # a new folder gets its own best model
    elif isinstance(each, StopTrainingOnNoModelImprovement) and isinstance(each.parent, EvalCallback):
        if each.parent.best_mean_reward > each.last_best_mean_reward:
            each.on_step()  # it has not seen the evaluation that saved its best model
    if is_late and isinstance(each, EvalCallback):
        late.append(each)
    elif is_late:
        each.n_calls += 1  # its on_step() cannot be called again
    eval_env = getattr(each, "eval_env", None)
    if env is not None and isinstance(eval_env, VecEnv) and eval_env is not each.training_env:
        reasons = env_state.restore(eval_env, env, mid_episode=True)
        lost += [f"its evaluations may differ: {reason}" for reason in reasons]
    return lost


def _digests(callback: BaseCallback) -> dict[str, str | None]:
    """
    Digests of the attributes of a user's class. The attributes are not saved, since they may be settings, but digests
    show whether they changed. None: the attribute is not plain data.
    """
    if _name(callback).partition(".")[0] in KNOWN_PACKAGES or offers_state(callback):
        return {}
    digests: dict[str, str | None] = {}
    for name, value in vars(callback).items():
        if name in STATE or name in OF_EVERY_CALLBACK:
            continue
        try:
            digests[name] = hashlib.sha256(json.dumps(encode(value)).encode()).hexdigest()[:16]
        except NotEncodable:
            digests[name] = None
    return digests


def _own_state(callback: BaseCallback) -> Any:
    if not offers_state(callback):
        return None
    try:
        return callback.get_state()  # type: ignore[attr-defined]
    except Exception as error:  # an error in the user's code must not end the run
        warnings.warn(f"{_name(callback)}.get_state() is not saved: {describe_error(error)}", stacklevel=3)
        return None


def _restart_stop(callback: BaseCallback) -> None:
    """Restart a stop callback that already fired: it would end the next run after one step."""
    if isinstance(callback, StopTrainingOnMaxEpisodes) and callback.n_episodes >= callback._total_max_episodes:
        callback.n_episodes = 0
    elif isinstance(callback, StopTrainingOnNoModelImprovement) and (
        callback.no_improvement_evals > callback.max_no_improvement_evals
    ):
        callback.no_improvement_evals = 0
    else:
        return
    warnings.warn(f"{type(callback).__name__} had ended the run: it restarts its count.", stacklevel=4)


def walk(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """
    :param callback: callback of ``learn()``
    :return: the callback and all that it contains
    """
    return (each for each, _ in _walk(callback))


def is_on_event(callback: BaseCallback, root: BaseCallback | None) -> bool:
    """
    :param callback: callback within ``root``
    :param root: callback of ``learn()``
    :return: whether it is only called on an event of another one, such as ``EveryNTimesteps``
    """
    return any(each is callback and not sees_all_steps for each, sees_all_steps in _walk(root))


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
    return full_name(type(callback))
