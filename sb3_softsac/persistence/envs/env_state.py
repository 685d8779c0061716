"""
State of vectorised environments, so that a run that was saved in mid-episode goes on bit for bit in a new process.

Every object of the chain (VecEnv wrappers, the VecEnv, gym wrappers, the environment itself) is read attribute by
attribute; what is neither plain data nor clearly constant makes its environment "missing", with a reason that names it.
A simulator that cannot be read (Box2D) is brought back by replay: random state before the last reset and the actions
since, recorded from :func:`prepare` on, and checked against what it had shown. Nothing is ever guessed. What is kept
outside of the objects (in globals, attributes of classes, closures of functions) is not seen.

An environment, wrapper or VecEnv of your own is asked first, if it has both methods::

    def get_state(self) -> Any: ...           # plain data: numbers, strings, lists, dicts, arrays, random generators
    def set_state(self, state: Any) -> None:  # what get_state() has returned; called in a newly made object

They stand for all attributes of that object but gymnasium's random states, which are kept anyway. ``set_state`` is
called before a new episode too, since a curriculum or a counter may live across episodes: leave settings out of it.
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
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecNormalize,
)

from sb3_softsac.persistence.codec import NotEncodable, decode, encode, full_name
from sb3_softsac.persistence.envs.episode_replay import RECORDER, prepare_env, replay_episode
from sb3_softsac.persistence.envs.known_classes import ALL, STATE
from sb3_softsac.persistence.envs.object_state import (
    OFFER,
    are_same,
    arguments_of,
    capture_object,
    chain_of,
    class_name,
    describe_error,
    is_constant,
    link_shared,
    note_large_data,
    restore_attributes,
    restore_own,
    restore_spaces,
    settings_of,
    short_name,
)
from sb3_softsac.persistence.random_states import get_random_states, pack_python_state, set_random_states

CALL = "_sb3_softsac_call"
VEC_NORMALIZE = full_name(VecNormalize)
CLOSE_SECONDS = 5.0
MAX_REASONS = 5  # in a warning
_GUARDED: "weakref.WeakSet[SubprocVecEnv]" = weakref.WeakSet()


def prepare(env: VecEnv) -> None:
    """
    Record resets and actions of those environments whose simulator cannot be read, so that :func:`capture` can describe
    them. To be called at the start of every ``learn()``, before the reset; does nothing the second time. BipedalWalker
    and CarRacing get a new Box2D world at each reset, see ``_renew_world``.

    :param env: with all its wrappers
    """
    _call(chain_of(env)[-1], "prepare")


def capture(env: VecEnv) -> dict[str, Any]:
    """
    The state of environments and wrappers. Neither changes them nor draws random numbers, and never raises: of an
    environment that cannot be captured, the result says why not.

    :param env: with all its wrappers
    :return: a tree of what ``json.dumps`` takes
    """
    try:
        chain = chain_of(env)
        base = chain[-1]
        wrappers = _capture_chain(chain)
        envs = [] if "own" in wrappers[-1] else _call(base, "capture")
        state = {"n_envs": int(base.num_envs), "wrappers": wrappers, "envs": envs}
        # Of a reset to come
        return {**state, "seeds": encode(vars(base).get("_seeds")), "options": encode(vars(base).get("_options"))}
    except Exception as error:
        return {"missing": describe_error(error)}


def restore(env: VecEnv, state: dict[str, Any], mid_episode: bool) -> list[str]:
    """
    Put back what :func:`capture` has returned.

    :param env: made and wrapped as the captured one
    :param state: result of :func:`capture`, perhaps from a file that somebody has tampered with
    :param mid_episode: True: the next ``env.step`` continues the captured episodes bit for bit. False, for a caller
        that resets the environments afterwards: only what lives across episodes (random states, running means, totals),
        and no settings. Where the former fails, the latter is done, and the caller has to reset.
    :return: reasons why the continuation is not exact; empty if it is
    """
    chain = chain_of(env)
    try:
        if "missing" in state:
            return [str(state["missing"])]
        if state["n_envs"] != env.num_envs:
            _restore_statistics(chain, state)
            if state["n_envs"] == 0:
                return ["the state is of VecNormalize only"] if mid_episode else []
            return [f"the state is of {state['n_envs']} environments, here are {env.num_envs}"]
        return _restore_vec_env(chain, state, mid_episode)
    except Exception as error:
        return [f"the state of the environments is damaged: {describe_error(error)}"]


def statistics(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    :param state: result of :func:`capture`
    :return: the part about ``VecNormalize``, which fits any environments; None if there is none
    """
    try:
        wrappers = [layer for layer in state["wrappers"] if layer["class"] == VEC_NORMALIZE]  # type: ignore[index]
    except (TypeError, KeyError):  # there is none, or it is damaged
        return None
    return {"n_envs": 0, "wrappers": wrappers, "envs": []} if wrappers else None


def is_normalized(state: dict[str, Any]) -> bool:
    """
    :param state: result of :func:`capture`
    :return: whether there was a ``VecNormalize``
    """
    return any(layer["class"] == VEC_NORMALIZE for layer in state.get("wrappers", ()))


def ignore_signals(env: VecEnv, signals: Iterable[int]) -> None:
    """
    Let the worker processes of a ``SubprocVecEnv`` survive signals that a scheduler sends to all processes of a job, as
    long as the main process lives: it cannot save without them. No effect on other environments.

    :param env: with all its wrappers
    :param signals: for instance ``(signal.SIGTERM, signal.SIGUSR1)``
    """
    base = chain_of(env)[-1]
    if isinstance(base, SubprocVecEnv):
        _call(base, "survive_signals", [int(number) for number in signals])
        if base not in _GUARDED:
            # At its exit Python would send SIGTERM to the workers, and wait for them for ever
            _GUARDED.add(base)
            atexit.register(_end_workers, weakref.ref(base))


# --- the VecEnv -------------------------------------------------------------------------------------------------------


def _restore_vec_env(chain: list[Any], state: dict[str, Any], mid_episode: bool) -> list[str]:
    base, layers, envs = chain[-1], state["wrappers"], state["envs"]
    reasons: list[str] = []
    if mid_episode:
        try:
            _restore_exactly(chain, layers)
            _tell_other_settings(chain, layers)
        except Exception as error:
            reasons.append(describe_error(error))
    if not mid_episode or reasons:
        lost = _restore_lasting(chain, layers)
        reasons = reasons or lost
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
        # SB3's load() has put the seed there again, and the next reset would repeat the very first episodes
        if is_random_state_back and isinstance(seeds[i], int | None):
            base._seeds[i] = seeds[i]
        if isinstance(options[i], dict):
            base._options[i] = options[i]
    return reasons + _summary(envs_of)


def _summary(envs_of: dict[str, list[int]]) -> list[str]:
    """
    :param envs_of: by reason, the environments that have it; there may be thousands
    :return: a few sentences
    """
    sentences = []
    for reason, (first, *others) in list(envs_of.items())[:MAX_REASONS]:
        also = f" and {len(others)} others" if len(others) > 1 else f" and {others[0]}" if others else ""
        sentences.append(f"environment {first}{also}: {reason}")
    n_left = len(envs_of) - len(sentences)
    return sentences + ([f"{n_left} other reasons"] if n_left else [])


def _tell_other_settings(chain: list[Any], layers: list[dict[str, Any]]) -> None:
    for obj, layer in zip(chain, layers, strict=True):
        here = settings_of(obj)
        there = {name: value for name, value in layer.get("settings", {}).items() if name in here}
        others = [name for name in there if there[name] != here[name]]
        if others:
            said = [f"{name}={decode(here[name])} (was {decode(there[name])})" for name in others]
            text = f"The continuation may differ: {short_name(obj)} has {', '.join(said)}."
            warnings.warn(text, stacklevel=5)


def _restore_statistics(chain: list[Any], state: dict[str, Any]) -> None:
    for obj, layer in _pairs(chain, state["wrappers"]):
        if isinstance(obj, VecNormalize):
            statistics = {name: tree for name, tree in layer["lasting"].items() if name != "returns"}
            restore_attributes(obj, statistics, chain)
            obj.returns = np.zeros(obj.num_envs)


def _call(base: Any, operation: str, *args: Any, indices: Sequence[int] | None = None) -> list[Any]:
    """Results of one of ``OPERATIONS`` on these environments (None: all), wherever they are."""
    run, when_failed = OPERATIONS[operation]
    indices = range(base.num_envs) if indices is None else indices
    if isinstance(base, DummyVecEnv):
        return [run(base.envs[i], *args) for i in indices]
    try:
        if not isinstance(base, SubprocVecEnv):
            raise ValueError(f"{class_name(base)} is a VecEnv that cannot be looked into; {OFFER}")
        # All must live: the answers of the others would wait, and be taken for those of the next command
        if base.closed or not all(map(_is_alive, base.processes, base.remotes)):
            raise ValueError("the SubprocVecEnv is closed, or one of its worker processes has ended")
        # SB3's workers know no command that runs a function on the environment. But set_attr puts a function, pickled
        # by its name, on the outermost wrapper, where env_method calls it (as no method, so without the environment).
        base.set_attr(CALL, _in_worker)
        return base.env_method(CALL, operation, *args, indices=indices)
    except Exception as error:
        return [when_failed(describe_error(error)) for _ in indices]


def _is_alive(process: Any, remote: Any) -> bool:
    if process.is_alive():
        return True
    try:
        # A SIGTERM to the whole job ends the fork server too, and Python then takes its children for dead
        os.kill(process.pid, 0)
        return not remote.poll()  # there would be the end of the stream
    except OSError:
        return False


def _in_worker(operation: str, *args: Any) -> Any:
    run, when_failed = OPERATIONS[operation]
    try:
        result = run(_env_of_worker(), *args)
        # The main process has its own, which are the caller's business
        if operation == "capture":
            states = get_random_states()
            result["process"] = encode({**states, "python": pack_python_state(states["python"])})
        elif operation == "restore" and "process" in args[0]:
            set_random_states(decode(args[0]["process"]))
        return result
    except Exception as error:  # it would end the worker
        return when_failed(describe_error(error))


def _env_of_worker() -> gym.Env:
    """The environment is a local variable of SB3's worker function, which is among our callers."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != SubprocVecEnv.__module__:
        frame = frame.f_back
    found = [] if frame is None else [value for value in frame.f_locals.values() if isinstance(value, gym.Env)]
    if len(found) != 1:
        raise ValueError("the environment is not where this version of SoftSAC looks for it in SB3's worker processes")
    return found[0]


def _survive_signals(_env: gym.Env, numbers: list[int]) -> None:
    # A handler instead of SIG_IGN: programs that the environment starts do not inherit it, and orphans still end
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
        layers = _capture_chain(chain)
        tree: dict[str, Any] = {"layers": layers}
        missing = [reason for layer in layers[:-1] for reason in layer["unreadable"].values()]
        for unreadable in list(layers[-1]["unreadable"].values())[:1]:
            try:
                recorder = vars(chain[-1]).get(RECORDER)
                if recorder is None:
                    raise NotEncodable("it has not been recorded")
                tree["replay"] = recorder.tree()
                layers[-1]["episode"] = {}
            except NotEncodable as error:
                missing.append(f"{unreadable}; nor can the episode be replayed: {error}")
        if missing:
            tree["missing"] = f"{missing[0]}; {OFFER}"
        return tree
    except Exception as error:
        return {"missing": describe_error(error)}


def _restore_env(env: gym.Env, tree: dict[str, Any], mid_episode: bool) -> tuple[list[str], bool]:
    """
    :return: reasons why it is not exact; whether the environment has its random state back
    """
    reasons: list[str] = []
    try:
        chain, layers = chain_of(env), tree.get("layers", [])
        note_large_data(chain)
        try:
            if "missing" in tree and (mid_episode or not layers):
                raise ValueError(str(tree["missing"]))
            if mid_episode:
                _restore_exactly(chain, layers, tree.get("replay"))
                return [], True
        except Exception as error:
            reasons.append(describe_error(error))
        lost = _restore_lasting(chain, layers)
        return reasons or lost, bool(layers) and layers[-1]["class"] == class_name(chain[-1]) and not lost
    except Exception as error:
        return [*reasons, f"its state is damaged: {describe_error(error)}"], False


def _capture_chain(chain: list[Any]) -> list[dict[str, Any]]:
    seen: dict[int, tuple[Any, ...]] = {}
    return [capture_object(chain, i, seen) for i in range(len(chain))]


def _restore_exactly(chain: list[Any], layers: list[dict[str, Any]], replay: dict[str, Any] | None = None) -> None:
    """
    :raises Exception: of any kind, if the result would not be exact
    """
    saved, here = [layer["class"] for layer in layers], [class_name(obj) for obj in chain]
    if saved != here:
        raise ValueError(f"saved with {' > '.join(saved)}, here is {' > '.join(here)}")
    for obj, layer in zip(chain, layers, strict=True):
        is_replayed = replay is not None and obj is chain[-1]
        for reason in () if is_replayed else layer["unreadable"].values():
            raise ValueError(f"{reason}; {OFFER}")
        now = arguments_of(obj)
        names = layer["made"].keys() | now.keys()
        if others := sorted(name for name in names if not are_same(layer["made"].get(name), now.get(name))):
            raise ValueError(f"{short_name(obj)} was made with other arguments than here: {', '.join(others)}")
    if replay is not None:
        replay_episode(chain, replay)
    for obj, layer in zip(chain, layers, strict=True):
        attributes = {**layer["lasting"], **layer["episode"]}
        if replay is None or obj is not chain[-1]:
            extra = vars(obj).keys() - attributes.keys() - set(layer["constant"])
            extra = {name for name in extra if not is_constant(name, vars(obj)[name], chain)}
            if extra and "own" not in layer and STATE.get(type(obj), ALL)[1] is None:
                raise ValueError(f"{short_name(obj)} has attributes that the state lacks: {', '.join(sorted(extra))}")
            restore_attributes(obj, attributes, chain)
        restore_own(obj, layer)
        restore_spaces(obj, layer)
    link_shared(chain, layers, ("lasting", "episode"))


def _restore_lasting(chain: list[Any], layers: list[dict[str, Any]]) -> list[str]:
    """
    :return: reasons why not all of it is back
    """
    reasons = []
    pairs = _pairs(chain, layers)
    for obj, layer in pairs:
        try:
            restore_attributes(obj, layer["lasting"], chain)
            restore_own(obj, layer)
            restore_spaces(obj, layer)
        except Exception as error:
            reasons.append(describe_error(error))
    if len(pairs) == len(chain) == len(layers) and not reasons:
        link_shared(chain, layers, ("lasting",))
    partners = [id(layer) for _, layer in pairs]
    for layer in layers:
        if id(layer) not in partners and (layer["lasting"] or "own" in layer):
            reasons.append(f"there is no {layer['class']} here, which has been saved")
    return reasons


def _pairs(chain: list[Any], layers: list[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    """Each object with a layer of its class, each layer once."""
    rest = list(layers)
    pairs = []
    for obj in chain:
        i = next((i for i, layer in enumerate(rest) if layer["class"] == class_name(obj)), None)
        if i is not None:
            pairs.append((obj, rest.pop(i)))
    return pairs


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[str], Any]]] = {
    "prepare": (prepare_env, lambda reason: None),
    "capture": (_capture_env, lambda reason: {"missing": reason}),
    "restore": (_restore_env, lambda reason: ([reason], False)),
    "survive_signals": (_survive_signals, lambda reason: None),
}
