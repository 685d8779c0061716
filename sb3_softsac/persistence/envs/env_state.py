"""
State of vectorised environments, with which a run that was saved in mid-episode continues bit for bit in a new process.

Every object of the chain (VecEnv wrappers, VecEnv, gym wrappers, environment) is captured attribute by attribute. If an
attribute is neither plain data nor clearly constant, its environment is "missing", with a reason that names it. A
simulator that cannot be read (Box2D) is restored by replay: from the random state before the last reset and the actions
since then, which are recorded from :func:`prepare` on. The replay must end in the same observation. Nothing is guessed.
State outside of the objects (globals, class attributes, closures) is not captured.

Your own environment, wrapper or VecEnv can describe its state with two methods::

    def get_state(self) -> Any: ...           # plain data: numbers, strings, lists, dicts, arrays, random generators
    def set_state(self, state: Any) -> None:  # takes the result of get_state(), in a newly made object

They replace all attributes of that object except Gymnasium's random states, which are always saved. ``set_state`` is
also called before a new episode, since a curriculum or a counter may live across episodes: leave settings out of it.
"""

import atexit
import contextlib
import multiprocessing as mp
import os
import signal
import sys
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize, VecTransposeImage

from sb3_softsac.persistence.codec import NotEncodable, decode, encode, full_name
from sb3_softsac.persistence.envs.episode_replay import RECORDER, prepare_env, replay_episode
from sb3_softsac.persistence.envs.known_classes import ALL, STATE
from sb3_softsac.persistence.envs.object_state import (
    OFFER,
    are_same,
    arguments_of,
    capture_chain,
    chain_of,
    class_name,
    describe_error,
    digests_of_spaces,
    is_constant,
    link_shared,
    note_large_data,
    restore_attributes,
    restore_object,
    settings_of,
    short_name,
)
from sb3_softsac.persistence.random_states import get_random_states, pack_python_state, set_random_states

CALL = "_sb3_softsac_call"
VEC_NORMALIZE = full_name(VecNormalize)
VEC_TRANSPOSE_IMAGE = full_name(VecTransposeImage)
CLOSE_SECONDS = 5.0
MAX_REASONS = 5  # in a warning
_GUARDED: "weakref.WeakSet[SubprocVecEnv]" = weakref.WeakSet()


def prepare(env: VecEnv) -> None:
    """
    Record resets and actions of environments whose simulator cannot be read, for :func:`capture`. Call it at the start
    of every ``learn()``, before the reset; a second call has no effect. BipedalWalker and CarRacing get a new Box2D
    world at each reset, see ``episode_replay``.

    :param env: environments with all wrappers
    """
    _call(chain_of(env)[-1], "prepare")


def capture(env: VecEnv) -> dict[str, Any]:
    """
    Capture the state of environments and wrappers, without changing them or drawing random numbers. It never raises:
    for an environment that cannot be captured, the result holds the reason.

    :param env: environments with all wrappers
    :return: JSON tree
    """
    try:
        chain = chain_of(env)
        base = chain[-1]
        wrappers = capture_chain(chain)
        envs = [] if "own" in wrappers[-1] else _call(base, "capture")
        state = {"n_envs": int(base.num_envs), "wrappers": wrappers, "envs": envs}
        # Arguments of the next reset
        return {**state, "seeds": encode(vars(base).get("_seeds")), "options": encode(vars(base).get("_options"))}
    except Exception as error:
        return {"missing": describe_error(error)}


def restore(env: VecEnv, state: dict[str, Any], mid_episode: bool) -> list[str]:
    """
    Restore a captured state.

    :param env: environments, made and wrapped like the captured ones
    :param state: result of :func:`capture`, possibly from an untrusted file
    :param mid_episode: True: the next ``env.step`` continues the captured episodes bit for bit. False: restore only
        what lives across episodes (random states, running means, totals), for a caller that resets the environments
        afterwards. If True fails, the effect is that of False, and the caller must reset the environments.
    :return: reasons why the restore is not exact; empty if it is
    """
    chain = chain_of(env)
    try:
        if "missing" in state:
            return [str(state["missing"])]
        if state["n_envs"] != env.num_envs:
            _restore_statistics(chain, state)
            if state["n_envs"] == 0:
                return ["the file has no state of the environments"] if mid_episode else []
            return [f"the state is that of {state['n_envs']} environments, not {env.num_envs}"]
        return _restore_vec_env(chain, state, mid_episode)
    except Exception as error:
        return [f"the state of the environments is damaged: {describe_error(error)}"]


def statistics(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    :param state: result of :func:`capture`
    :return: the part about ``VecNormalize``, which fits any number of environments; None if there is none
    """
    return _part(state, (VEC_NORMALIZE,))


def changed_settings(state: dict[str, Any], normalize: VecNormalize) -> list[str]:
    """
    :param state: result of :func:`capture`
    :param normalize: of the new environments
    :return: its settings by which observations differ from those of the captured one, with both values
    """
    there = (statistics(state) or {"wrappers": [{}]})["wrappers"][0].get("settings", {})
    changed = []
    for name in {"norm_obs", "clip_obs", "epsilon"} & there.keys():
        here, then = getattr(normalize, name), decode(there[name])
        if here != then:
            changed.append(f"VecNormalize has {name}={here}, not {then}")
    return sorted(changed)


def without_envs(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    :param state: result of :func:`capture`
    :return: the part that a policy needs without environments: that of ``VecNormalize`` and ``VecTransposeImage``; None
        if there is none
    """
    return _part(state, (VEC_NORMALIZE, VEC_TRANSPOSE_IMAGE))


def _part(state: dict[str, Any] | None, classes: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        wrappers = [layer for layer in state["wrappers"] if layer["class"] in classes]  # type: ignore[index]
    except (TypeError, KeyError):  # no state, or a damaged one
        return None
    return {"n_envs": 0, "wrappers": wrappers, "envs": []} if wrappers else None


def vec_normalize(state: dict[str, Any], observation_space: gym.Space[Any]) -> VecNormalize:
    """
    :param state: result of :func:`statistics`, possibly from an untrusted file
    :param observation_space: of its observations
    :return: the ``VecNormalize`` whose state it is, around an environment that cannot be stepped
    :raises ValueError: if the state is damaged
    """
    try:
        settings = {name: decode(tree) for name, tree in state["wrappers"][0]["settings"].items()}
        normalize = VecNormalize(DummyVecEnv([lambda: _SpacesOnly(observation_space)]), **settings)
    except Exception as error:
        raise ValueError(f"the state of VecNormalize is damaged: {describe_error(error)}") from error
    reasons = restore(normalize, state, mid_episode=False)
    if reasons:
        raise ValueError(reasons[0])
    return normalize


class _SpacesOnly(gym.Env[Any, Any]):
    def __init__(self, observation_space: gym.Space[Any]):
        self.observation_space = observation_space
        self.action_space = gym.spaces.Discrete(1)


def is_transposed(state: dict[str, Any] | None) -> bool:
    """
    :param state: result of :func:`capture`
    :return: whether the environments were wrapped in ``VecTransposeImage``, which puts the channels of images first
    """
    try:
        return any(
            layer["class"] == VEC_TRANSPOSE_IMAGE and layer.get("settings", {}).get("skip") is not True
            for layer in state["wrappers"]  # type: ignore[index]
        )
    except (TypeError, KeyError, AttributeError):  # no state, or a damaged one
        return False


def env_id(state: dict[str, Any] | None) -> str | None:
    """
    :param state: result of :func:`capture`
    :return: Gymnasium's id of the environments; None if it is not known
    """
    try:
        found = state["envs"][0]["layers"][-1]["made"]["id"]  # type: ignore[index]
    except (TypeError, KeyError, IndexError):  # no state, no id, or a damaged one
        return None
    return found if isinstance(found, str) else None


def owners_of_statistics(state: dict[str, Any] | None) -> list[str]:
    """
    :param state: result of :func:`capture`
    :return: classes of the wrappers within the environments that keep running means, such as ``NormalizeObservation``
    """
    try:
        layers = [layer for tree in state["envs"] for layer in tree.get("layers", [])]  # type: ignore[index]
        kinds = {layer["class"]: {kind for tree in layer["lasting"].values() for kind in tree} for layer in layers}
        return sorted(name.rpartition(".")[2] for name, found in kinds.items() if found & {"object", "objects"})
    except (TypeError, KeyError, AttributeError):  # no state, or a damaged one
        return []


def are_same_but_for_clocks(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """
    :param a: result of :func:`capture`
    :param b: another
    :return: whether nothing has happened in between
    """

    def without_clocks(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: without_clocks(value) for key, value in tree.items() if key != "elapsed"}
        return [without_clocks(value) for value in tree] if isinstance(tree, list | tuple) else tree

    return are_same(without_clocks(a), without_clocks(b))


def ignore_signals(env: VecEnv, signals: Iterable[int]) -> None:
    """
    Let the workers of a ``SubprocVecEnv`` ignore signals while the main process lives. A scheduler sends them to all
    processes of a job, but the main process cannot save without its workers. No effect on other environments.

    :param env: environments with all wrappers
    :param signals: signal numbers, for instance ``(signal.SIGTERM, signal.SIGUSR1)``
    """
    base = chain_of(env)[-1]
    if isinstance(base, SubprocVecEnv):
        _call(base, "survive_signals", [int(number) for number in signals])
        if base not in _GUARDED:
            # At exit, Python would send SIGTERM to the workers and wait for them forever
            _GUARDED.add(base)
            atexit.register(_end_workers, weakref.ref(base))


# --- the VecEnv -------------------------------------------------------------------------------------------------------


def _restore_vec_env(chain: list[Any], state: dict[str, Any], mid_episode: bool) -> list[str]:
    base, layers, envs = chain[-1], state["wrappers"], state["envs"]
    reasons, _ = _restore_layers(chain, layers, mid_episode)
    if "own" in layers[-1]:
        return reasons
    seeds, options = decode(state["seeds"]), decode(state["options"])
    if not len(envs) == len(seeds) == len(options) == base.num_envs:
        raise ValueError(f"{len(envs)} environments, {len(seeds)} seeds and {len(options)} options")
    envs_of: dict[str, list[int]] = {}
    for i, tree in enumerate(envs):
        found, is_random_state_back = _call(base, "restore", tree, mid_episode, indices=[i])[0]
        for reason in found:
            envs_of.setdefault(reason, []).append(i)
        # SB3's load() has set the seed of the run again: with it, the next reset would repeat the very first episode
        if is_random_state_back and isinstance(seeds[i], int | None):
            base._seeds[i] = seeds[i]
        if isinstance(options[i], dict):
            base._options[i] = options[i]
    return reasons + _summary(envs_of)


def _summary(envs_of: dict[str, list[int]]) -> list[str]:
    """
    :param envs_of: indices of environments by reason
    :return: one sentence for each of the first reasons, also if there are thousands of environments
    """
    sentences = []
    for reason, (first, *others) in list(envs_of.items())[:MAX_REASONS]:
        also = f" and {len(others)} others" if len(others) > 1 else f" and {others[0]}" if others else ""
        sentences.append(f"environment {first}{also}: {reason}")
    n_left = len(envs_of) - len(sentences)
    return sentences + ([f"{n_left} other reasons"] if n_left else [])


def _restore_statistics(chain: list[Any], state: dict[str, Any]) -> None:
    for obj, layer in _pairs(chain, state["wrappers"]):
        if isinstance(obj, VecNormalize):
            statistics = {name: tree for name, tree in layer["lasting"].items() if name != "returns"}
            restore_attributes(obj, statistics, chain)
            obj.returns = np.zeros(obj.num_envs)


def _call(base: Any, operation: str, *args: Any, indices: Sequence[int] | None = None) -> list[Any]:
    """Run one of ``OPERATIONS`` on some environments (None: all), in this process or in workers."""
    run, when_failed = OPERATIONS[operation]
    indices = range(base.num_envs) if indices is None else indices
    if isinstance(base, DummyVecEnv):
        return [run(base.envs[i], *args) for i in indices]
    try:
        if hasattr(base, "run_on_envs"):  # RayVecEnv
            return base.run_on_envs(_on_env, operation, *args, indices=indices)
        if not isinstance(base, SubprocVecEnv):
            raise ValueError(f"{class_name(base)} is a VecEnv that cannot be captured; {OFFER}")
        # All must live: otherwise, unread answers would be taken for those of the next command
        if base.closed or not all(map(_is_alive, base.processes, base.remotes)):
            raise ValueError("the SubprocVecEnv is closed, or one of its worker processes has ended")
        # SB3's workers have no command that runs a function on the environment. But set_attr stores a function, pickled
        # by its name, on the outermost wrapper, and env_method calls it (without self, since it is not a method).
        base.set_attr(CALL, _in_worker)
        return base.env_method(CALL, operation, *args, indices=indices)
    except Exception as error:
        return [when_failed(describe_error(error)) for _ in indices]


def _is_alive(process: Any, remote: Any) -> bool:
    if process.is_alive():
        return True
    try:
        # A SIGTERM to the whole job also ends the fork server, and Python then considers its children dead
        os.kill(process.pid, 0)
        return not remote.poll()  # a dead worker's pipe is readable: it is at its end
    except OSError:
        return False


def _in_worker(operation: str, *args: Any) -> Any:
    return _on_env(None, operation, *args)


def _on_env(env: gym.Env | None, operation: str, *args: Any) -> Any:
    """:param env: an environment of this process; None: that of SB3's worker function"""
    run, when_failed = OPERATIONS[operation]
    try:
        result = run(_env_of_worker() if env is None else env, *args)
        # The caller handles the random states of the main process
        if operation == "capture":
            states = get_random_states()
            result["process"] = encode({**states, "python": pack_python_state(states["python"])})
        elif operation == "restore" and "process" in args[0]:
            set_random_states(decode(args[0]["process"]))
        return result
    except Exception as error:  # otherwise it would end the worker
        return when_failed(describe_error(error))


def _env_of_worker() -> gym.Env:
    """The environment of this worker process: a local variable of SB3's worker function, one of our callers."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != SubprocVecEnv.__module__:
        frame = frame.f_back
    found = [] if frame is None else [value for value in frame.f_locals.values() if isinstance(value, gym.Env)]
    if len(found) != 1:
        raise ValueError("this version of SoftSAC cannot find the environment in the workers of this version of SB3")
    return found[0]


def _survive_signals(_env: gym.Env, numbers: list[int]) -> None:
    # Not SIG_IGN: programs that the environment starts would inherit it, and orphans would not end
    for number in numbers:
        signal.signal(number, _end_if_orphaned)


def _end_if_orphaned(number: int, _frame: Any) -> None:
    parent = mp.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(128 + number)


def _end_workers(reference: "weakref.ref[SubprocVecEnv]") -> None:
    base = reference()
    if base is None or base.closed:
        return
    for remote in base.remotes:
        with contextlib.suppress(OSError, ValueError):
            remote.send(("close", None))
    deadline = time.monotonic() + CLOSE_SECONDS
    for process in base.processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


# --- one environment --------------------------------------------------------------------------------------------------


def _capture_env(env: gym.Env) -> dict[str, Any]:
    try:
        chain = chain_of(env)
        layers = capture_chain(chain)
        tree: dict[str, Any] = {"layers": layers}
        missing = [reason for layer in layers[:-1] for reason in layer["unreadable"].values()]
        for unreadable in list(layers[-1]["unreadable"].values())[:1]:
            try:
                recorder = vars(chain[-1]).get(RECORDER)
                if recorder is None:
                    raise NotEncodable("it was not recorded")
                tree["replay"] = recorder.tree()
                layers[-1]["episode"] = {}
            except NotEncodable as error:
                missing.append(f"{unreadable}, and the episode cannot be replayed: {error}")
        if missing:
            tree["missing"] = f"{missing[0]}; {OFFER}"
        return tree
    except Exception as error:
        return {"missing": describe_error(error)}


def _restore_env(env: gym.Env, tree: dict[str, Any], mid_episode: bool) -> tuple[list[str], bool]:
    """Reasons why it is not exact; whether the random state of the environment is restored."""
    try:
        chain, layers = chain_of(env), tree.get("layers", [])
        missing = [str(tree["missing"])] if "missing" in tree else []
        note_large_data(chain)
        if not layers:
            return missing or ["its state is empty"], False
        reasons, is_lasting = _restore_layers(chain, layers, mid_episode and not missing, tree.get("replay"))
        is_random_state_back = is_lasting and layers[-1]["class"] == class_name(chain[-1])
        return (missing if mid_episode else []) or reasons, is_random_state_back
    except Exception as error:
        return [f"its state is damaged: {describe_error(error)}"], False


# --- a chain of objects -----------------------------------------------------------------------------------------------


def _restore_layers(
    chain: list[Any], layers: list[dict[str, Any]], mid_episode: bool, replay: dict[str, Any] | None = None
) -> tuple[list[str], bool]:
    """Reasons why it is not exact; whether all that lives across episodes is restored."""
    reasons = []
    if mid_episode:
        try:
            _restore_exactly(chain, layers, replay)
            return [], True
        except Exception as error:
            reasons.append(describe_error(error))
    lost = _restore_lasting(chain, layers)
    return reasons or lost, not lost


def _restore_exactly(chain: list[Any], layers: list[dict[str, Any]], replay: dict[str, Any] | None) -> None:
    """
    :raises Exception: of any kind, if the result would not be exact
    """
    saved, here = [layer["class"] for layer in layers], [class_name(obj) for obj in chain]
    if saved != here:
        raise ValueError(f"saved with {' > '.join(saved)}, but here is {' > '.join(here)}")
    for obj, layer in zip(chain, layers, strict=True):
        is_replayed = replay is not None and obj is chain[-1]
        if layer["unreadable"] and not is_replayed:
            raise ValueError(f"{next(iter(layer['unreadable'].values()))}; {OFFER}")
        now = arguments_of(obj)
        names = layer["made"].keys() | now.keys()
        if others := sorted(name for name in names if not are_same(layer["made"].get(name), now.get(name))):
            raise ValueError(f"{short_name(obj)} was made with different values of {', '.join(others)}")
        if not is_replayed:
            _compare_constants(obj, layer)
    if replay is not None:
        replay_episode(chain, replay)
    for obj, layer in zip(chain, layers, strict=True):
        attributes = {**layer["lasting"], **layer["episode"]}
        if replay is not None and obj is chain[-1]:
            attributes = {}
        else:
            extra = vars(obj).keys() - attributes.keys() - set(layer["constant"])
            extra = {name for name in extra if not is_constant(name, vars(obj)[name], chain)}
            if extra and "own" not in layer and STATE.get(type(obj), ALL)[1] is None:
                raise ValueError(f"{short_name(obj)} has attributes that the state lacks: {', '.join(sorted(extra))}")
        restore_object(obj, layer, attributes, chain)
    link_shared(chain, layers, ("lasting", "episode"))
    _warn_of_settings(chain, layers)


def _compare_constants(obj: Any, layer: dict[str, Any]) -> None:
    """Functions and spaces are not restored: they have to be there already."""
    if lacking := [name for name in layer.get("functions", ()) if not callable(getattr(obj, name, None))]:
        raise ValueError(f"{short_name(obj)}.{lacking[0]} was a function, which a file cannot hold")
    digests = digests_of_spaces(obj)
    if changed := sorted(name for name, old in layer.get("bounds", {}).items() if digests.get(name, old) != old):
        raise ValueError(f"{short_name(obj)} had other bounds in {', '.join(changed)}")


def _warn_of_settings(chain: list[Any], layers: list[dict[str, Any]]) -> None:
    for obj, layer in zip(chain, layers, strict=True):
        here = settings_of(obj)
        there = {name: value for name, value in layer.get("settings", {}).items() if name in here}
        changed = [
            f"{name}={decode(here[name])} (was {decode(there[name])})" for name in there if there[name] != here[name]
        ]
        if changed:
            text = f"The continuation may differ: {short_name(obj)} has {', '.join(changed)}."
            warnings.warn(text, stacklevel=7)


def _restore_lasting(chain: list[Any], layers: list[dict[str, Any]]) -> list[str]:
    """Reasons why some of it is not restored."""
    reasons = []
    pairs = _pairs(chain, layers)
    for obj, layer in pairs:
        try:
            restore_object(obj, layer, layer["lasting"], chain)
        except Exception as error:
            reasons.append(describe_error(error))
    if len(pairs) == len(chain) == len(layers) and not reasons:
        link_shared(chain, layers, ("lasting",))
    partners = [id(layer) for _, layer in pairs]
    for layer in layers:
        if id(layer) not in partners and (layer["lasting"] or "own" in layer):
            reasons.append(f"there is no {layer['class']} here to restore")
    return reasons


def _pairs(chain: list[Any], layers: list[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    """Objects with layers of their class; each layer is used once."""
    rest = list(layers)
    pairs = []
    for obj in chain:
        i = next((i for i, layer in enumerate(rest) if layer["class"] == class_name(obj)), None)
        if i is not None:
            pairs.append((obj, rest.pop(i)))
    return pairs


# Functions to run on an environment, and their results if they fail, made from the reason
OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[str], Any]]] = {
    "prepare": (prepare_env, lambda reason: None),
    "capture": (_capture_env, lambda reason: {"missing": reason}),
    "restore": (_restore_env, lambda reason: ([reason], False)),
    "survive_signals": (_survive_signals, lambda reason: None),
}
