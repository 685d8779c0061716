"""
State of vectorised environments, so that a run that was saved in mid-episode goes on bit for bit in a new process.

Every object of the chain (VecEnv wrappers, the VecEnv, gym wrappers, the environment itself) is read attribute by
attribute; what is neither plain data nor clearly constant makes its environment "missing", with a reason that names it.
A simulator that cannot be read (Box2D) is brought back by replay: random state before the last reset and the actions
since, recorded from :func:`prepare` on, and checked against what it had shown. Nothing is ever guessed.

An environment, wrapper or VecEnv of your own is asked first, if it has both methods::

    def get_state(self) -> Any: ...           # plain data: numbers, strings, lists, dicts, arrays, random generators
    def set_state(self, state: Any) -> None:  # what get_state() has returned; called in a newly made object

They stand for all attributes of that object but gymnasium's random states, which are kept anyway. ``set_state`` is
called before a new episode too, since a curriculum or a counter may live across episodes: leave settings out of it.
"""

import atexit
import contextlib
import copy
import functools
import hashlib
import inspect
import io
import json
import logging
import multiprocessing as mp
import os
import random
import signal
import sys
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import HumanRendering, NormalizeReward, RecordEpisodeStatistics, RecordVideo, RenderCollection
from gymnasium.wrappers.common import PassiveEnvChecker
from gymnasium.wrappers.utils import RunningMeanStd as GymRunningMeanStd
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

from sb3_softsac.state_codec import NotEncodable, decode, encode

CALL = "_sb3_softsac_call"
RECORDER = "_sb3_softsac_recorder"
MAX_REPLAY = 100_000  # steps of one episode
CLOSE_SECONDS = 5.0
_GUARDED: "weakref.WeakSet[SubprocVecEnv]" = weakref.WeakSet()

# Attributes that live across episodes, and those of the episode; None: all others. Of classes that are not here all
# plain attributes belong to the episode, but random generators and running means.
STATE: dict[type, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    Monitor: (
        ("total_steps", "episode_returns", "episode_lengths", "episode_times", "t_start"),
        ("rewards", "needs_reset", "current_reset_info"),
    ),
    RecordEpisodeStatistics: (("episode_count", "time_queue", "return_queue", "length_queue"), None),
    NormalizeReward: (("discounted_reward",), None),
    # The settings (training, norm_reward, clip_obs, ...) are for the user to choose anew
    VecNormalize: (("obs_rms", "ret_rms", "returns"), ("old_obs", "old_reward")),
    VecMonitor: (("episode_count", "t_start"), ("episode_returns", "episode_lengths")),
    VecFrameStack: ((), ("stacked_obs",)),
    VecCheckNan: ((), ("_user_warned", "_actions", "_observations")),
    # DummyVecEnv's buffers are written anew in each step; pending seeds and options are kept apart
    **dict.fromkeys((DummyVecEnv, SubprocVecEnv, VecTransposeImage, VecExtractDictObs), ((), ())),
    **dict.fromkeys((VecVideoRecorder, RecordVideo, RenderCollection, HumanRendering), ((), ())),
}
ALL: tuple[tuple[str, ...], None] = ((), None)
# As soon as rl_zoo3 is imported gym.make() uses its own; in a VecEnv they are the same
SAME_CLASSES = {"rl_zoo3.gym_patches.PatchedTimeLimit": "gymnasium.wrappers.common.TimeLimit"}
# The checker compares the data of the first two steps by identity, which no file can keep: its checks count as done
CHECKS_DONE = {"checked_reset": True, "checked_step": True, "checked_data_reuse": True, "_previous_data": None}
# Clocks begin anew in each process: what is kept is the time that has passed
CLOCKS: dict[str, tuple[Callable[[], float], tuple[type, ...]]] = {
    "t_start": (time.time, (Monitor, VecMonitor)),
    "episode_start_time": (time.perf_counter, (RecordEpisodeStatistics,)),
}
CONSTANT_NAMES = {"spec", "_cached_spec", "metadata", "_metadata", "render_mode", "fullpath", "class_attributes"}
CONSTANT_NAMES |= {"_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"}
CONSTANT_TYPES = (type, gym.Space, types.ModuleType, EnvSpec, logging.Logger, Logger, ResultsWriter, io.IOBase)
FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, np.ufunc)
# Objects that only draw: (package, beginning of the class's name)
RENDERERS = (
    *(("pygame", name) for name in ("Surface", "Clock", "Font")),
    *(("mujoco", name) for name in ("Mjv", "Mjr", "Renderer", "GLContext", "MjModel")),  # the model's digest is kept
    ("gymnasium", "MujocoRenderer"),
    ("matplotlib", ""),
)
RENDER_ARGUMENTS = {"render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config", "max_geom"}
RENDER_ARGUMENTS |= {"visual_options"}
# Objects that are their attributes; they are written in place
NESTED = (RunningMeanStd, GymRunningMeanStd, StackedObservations)
RANDOM_TYPES = (np.random.Generator, np.random.RandomState, random.Random)
OFFER = "give its class get_state() and set_state(state), see sb3_softsac.env_state"


def prepare(env: VecEnv) -> None:
    """
    Record resets and actions of those environments whose simulator cannot be read, so that :func:`capture` can describe
    them. To be called at the start of every ``learn()``; does nothing the second time.

    :param env: with all its wrappers
    """
    _call(_chain(env)[-1], "prepare")


def capture(env: VecEnv) -> dict[str, Any]:
    """
    The state of environments and wrappers. Neither changes them nor draws random numbers, and never raises: of an
    environment that cannot be captured, the result says why not.

    :param env: with all its wrappers
    :return: a tree of what ``json.dumps`` takes
    """
    try:
        chain = _chain(env)
        base = chain[-1]
        wrappers = _capture_chain(chain)
        envs = [] if "own" in wrappers[-1] else _call(base, "capture")
        state = {"n_envs": int(base.num_envs), "wrappers": wrappers, "envs": envs}
        # Of a reset to come
        return {**state, "seeds": encode(vars(base).get("_seeds")), "options": encode(vars(base).get("_options"))}
    except Exception as error:
        return {"missing": _describe(error)}


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
    chain = _chain(env)
    try:
        if "missing" in state:
            return [str(state["missing"])]
        if state["n_envs"] != env.num_envs:
            _restore_statistics(chain, state)
            return [f"the state is of {state['n_envs']} environments, here are {env.num_envs}"]
        return _restore_vec_env(chain, state, mid_episode)
    except Exception as error:
        return [f"the state of the environments is damaged: {_describe(error)}"]


def ignore_signals(env: VecEnv, signals: Iterable[int]) -> None:
    """
    Let the worker processes of a ``SubprocVecEnv`` survive signals that a scheduler sends to all processes of a job, as
    long as the main process lives: it cannot save without them. No effect on other environments.

    :param env: with all its wrappers
    :param signals: for instance ``(signal.SIGTERM, signal.SIGUSR1)``
    """
    base = _chain(env)[-1]
    if isinstance(base, SubprocVecEnv):
        _call(base, "survive_signals", [int(number) for number in signals])
        if base not in _GUARDED:
            # At its exit Python would send SIGTERM to the workers, and wait for them for ever
            _GUARDED.add(base)
            atexit.register(_end_workers, weakref.ref(base))


# --- the VecEnv -------------------------------------------------------------------------------------------------------


def _chain(env: Any) -> list[Any]:
    """All objects from the outermost wrapper to the VecEnv or environment itself."""
    chain = [env]
    while isinstance(chain[-1], gym.Wrapper | VecEnvWrapper):
        chain.append(chain[-1].env if isinstance(chain[-1], gym.Wrapper) else chain[-1].venv)
    return chain


def _restore_vec_env(chain: list[Any], state: dict[str, Any], mid_episode: bool) -> list[str]:
    base, layers, envs = chain[-1], state["wrappers"], state["envs"]
    reasons: list[str] = []
    if mid_episode:
        try:
            _restore_exactly(chain, layers)
        except Exception as error:
            reasons.append(_describe(error))
    if not mid_episode or reasons:
        lost = _restore_lasting(chain, layers)
        reasons = reasons or lost
    if "own" in layers[-1]:
        return reasons
    seeds, options = decode(state["seeds"]), decode(state["options"])
    if not len(envs) == len(seeds) == len(options) == base.num_envs:
        raise ValueError(f"{len(envs)} environments, {len(seeds)} seeds and {len(options)} options")
    for i, tree in enumerate(envs):
        found, is_random_state_back = _call(base, "restore", tree, mid_episode, indices=[i])[0]
        reasons += [f"environment {i}: {reason}" for reason in found]
        # SB3's load() has put the seed there again, and the next reset would repeat the very first episodes
        if is_random_state_back and isinstance(seeds[i], int | None):
            base._seeds[i] = seeds[i]
        if isinstance(options[i], dict):
            base._options[i] = options[i]
    return reasons


def _restore_statistics(chain: list[Any], state: dict[str, Any]) -> None:
    for obj, layer in _pairs(chain, state["wrappers"]):
        if isinstance(obj, VecNormalize):
            statistics = {name: tree for name, tree in layer["lasting"].items() if name != "returns"}
            _restore_attributes(obj, statistics, chain)
            obj.returns = np.zeros(obj.num_envs)


def _call(base: Any, operation: str, *args: Any, indices: Sequence[int] | None = None) -> list[Any]:
    """Results of one of ``OPERATIONS`` on these environments (None: all), wherever they are."""
    run, when_failed = OPERATIONS[operation]
    indices = range(base.num_envs) if indices is None else indices
    if isinstance(base, DummyVecEnv):
        return [run(base.envs[i], *args) for i in indices]
    try:
        if not isinstance(base, SubprocVecEnv):
            raise ValueError(f"{_name(base)} is a VecEnv that cannot be looked into; {OFFER}")
        # All must live: the answers of the others would wait, and be taken for those of the next command
        if base.closed or not all(map(_is_alive, base.processes, base.remotes)):
            raise ValueError("the SubprocVecEnv is closed, or one of its worker processes has ended")
        # SB3's workers know no command that runs a function on the environment. But set_attr puts a function, pickled
        # by its name, on the outermost wrapper, where env_method calls it (as no method, so without the environment).
        base.set_attr(CALL, _in_worker)
        return base.env_method(CALL, operation, *args, indices=indices)
    except Exception as error:
        return [when_failed(_describe(error)) for _ in indices]


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
        # The environment is a local variable of SB3's worker function, which is among our callers
        frame: types.FrameType | None = sys._getframe()
        while frame is not None and frame.f_code is not _worker.__code__:
            frame = frame.f_back
        if frame is None:
            raise RuntimeError("stable_baselines3's worker function is not among the callers")
        result = run(frame.f_locals["env"], *args)
        # The main process has its own, which are the caller's business
        if operation == "capture":
            result["process"] = encode(_global_random_states())
        elif operation == "restore" and "process" in args[0]:
            _set_global_random_states(decode(args[0]["process"]))
        return result
    except Exception as error:  # it would end the worker
        return when_failed(_describe(error))


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
        chain = _chain(env)
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
        return {"missing": _describe(error)}


def _restore_env(env: gym.Env, tree: dict[str, Any], mid_episode: bool) -> tuple[list[str], bool]:
    """
    :return: reasons why it is not exact; whether the environment has its random state back
    """
    reasons: list[str] = []
    try:
        chain, layers = _chain(env), tree.get("layers", [])
        try:
            if "missing" in tree and (mid_episode or not layers):
                raise ValueError(str(tree["missing"]))
            if mid_episode:
                _restore_exactly(chain, layers, tree.get("replay"))
                return [], True
        except Exception as error:
            reasons.append(_describe(error))
        lost = _restore_lasting(chain, layers)
        return reasons or lost, bool(layers) and layers[-1]["class"] == _name(chain[-1]) and not lost
    except Exception as error:
        return [*reasons, f"its state is damaged: {_describe(error)}"], False


def _capture_chain(chain: list[Any]) -> list[dict[str, Any]]:
    seen: dict[int, tuple[Any, ...]] = {}
    return [_capture_object(chain, i, seen) for i in range(len(chain))]


def _restore_exactly(chain: list[Any], layers: list[dict[str, Any]], replay: dict[str, Any] | None = None) -> None:
    """
    :raises Exception: of any kind, if the result would not be exact
    """
    saved, here = [layer["class"] for layer in layers], [_name(obj) for obj in chain]
    if saved != here:
        raise ValueError(f"saved with {' > '.join(saved)}, here is {' > '.join(here)}")
    for obj, layer in zip(chain, layers, strict=True):
        is_replayed = replay is not None and obj is chain[-1]
        for reason in () if is_replayed else layer["unreadable"].values():
            raise ValueError(f"{reason}; {OFFER}")
        now = _arguments(obj)
        names = layer["made"].keys() | now.keys()
        if others := sorted(name for name in names if not _same(layer["made"].get(name), now.get(name))):
            raise ValueError(f"{_short(obj)} was made with other arguments than here: {', '.join(others)}")
    if replay is not None:
        _replay(chain, replay)
    for obj, layer in zip(chain, layers, strict=True):
        attributes = {**layer["lasting"], **layer["episode"]}
        if replay is None or obj is not chain[-1]:
            extra = vars(obj).keys() - attributes.keys() - set(layer["constant"])
            extra = {name for name in extra if not _is_constant(name, vars(obj)[name], chain)}
            if extra and "own" not in layer and STATE.get(type(obj), ALL)[1] is None:
                raise ValueError(f"{_short(obj)} has attributes that the state lacks: {', '.join(sorted(extra))}")
            _restore_attributes(obj, attributes, chain)
        _restore_own(obj, layer)
        _restore_spaces(obj, layer)
    _link(chain, layers, ("lasting", "episode"))


def _restore_lasting(chain: list[Any], layers: list[dict[str, Any]]) -> list[str]:
    """
    :return: reasons why not all of it is back
    """
    reasons = []
    pairs = _pairs(chain, layers)
    for obj, layer in pairs:
        try:
            _restore_attributes(obj, layer["lasting"], chain)
            _restore_own(obj, layer)
            _restore_spaces(obj, layer)
        except Exception as error:
            reasons.append(_describe(error))
    if len(pairs) == len(chain) == len(layers) and not reasons:
        _link(chain, layers, ("lasting",))
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
        i = next((i for i, layer in enumerate(rest) if layer["class"] == _name(obj)), None)
        if i is not None:
            pairs.append((obj, rest.pop(i)))
    return pairs


# --- replay -----------------------------------------------------------------------------------------------------------


class _Recorder:
    """
    Stands in for ``reset`` and ``step`` of an environment that cannot be read, and remembers how it came where it is.

    :param env: without wrappers
    """

    def __init__(self, env: Any):
        self.env = env
        self.shadowed = {name: value for name, value in vars(env).items() if name in ("reset", "step")}
        self.real_reset, self.real_step = env.reset, env.step
        self.is_busy = False  # environments step in their reset, and the other way round
        self.is_needed = False
        self.is_fresh = vars(env).get("_np_random") is None
        self.reason: str | None = "the recording began in mid-episode; it can be captured after the next reset"
        self.began: dict[str, Any] = {}
        self.actions: list[Any] = []
        self.result: Any = None
        vars(env).update({"reset": self.reset, "step": self.step, RECORDER: self})

    def remove(self) -> None:
        for name in ("reset", "step", RECORDER):
            vars(self.env).pop(name, None)
        vars(self.env).update(self.shadowed)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_busy:
            return self.real_reset(*args, **kwargs)
        # Only after an episode is it known which attributes there are
        if self.reason is None and not self.is_needed:
            self.is_needed = not _is_readable(self.env)
            if not self.is_needed:
                self.remove()
                return self.real_reset(*args, **kwargs)
        worlds = [] if self.is_fresh else _worlds(self.env)
        self._begin(args, kwargs)
        result = self._run(self.real_reset, args, kwargs, n_results=1)
        if any(world is used for world in _worlds(self.env) for used in worlds):
            self.reason = "its Box2D world has seen earlier episodes, and their traces stay; make a new one in reset()"
        self.is_fresh = False
        return result

    def step(self, action: Any) -> Any:
        if self.is_busy or self.reason is not None:
            return self.real_step(action)
        try:
            self.actions.append(copy.deepcopy(action))  # before the environment clips it in place
        except Exception as error:
            self.reason = f"an action cannot be copied: {_describe(error)}"
        if len(self.actions) > MAX_REPLAY:
            self.actions, self.reason = [], f"the episode is longer than {MAX_REPLAY} steps"
        return self._run(self.real_step, (action,), {}, n_results=4)

    def tree(self) -> dict[str, Any]:
        """
        :return: what :func:`_replay` needs
        :raises NotEncodable: with the reason why there is none
        """
        if self.reason is not None:
            raise NotEncodable(self.reason)
        actions: Any = self.actions
        if actions and all(type(a) is np.ndarray and a.dtype == actions[0].dtype for a in actions):
            if len({a.shape for a in actions}) == 1:
                actions = np.stack(actions)
        tree = {**self.began, "actions": encode(actions, "actions"), "result": encode(self.result, "observation")}
        return {**tree, "traces": _traces(self.env)}

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.actions, self.reason = [], None
        try:
            _renew_world(self.env)
            if kwargs.get("seed") is None and hasattr(type(self.env), "np_random"):
                _ = self.env.np_random  # else reset() would draw its seed unseen
            start = {
                name: _encode(self.env, name, value, name)
                for name, value in vars(self.env).items()
                if isinstance(value, (bool, int, float, np.number, *RANDOM_TYPES))
            }
            self.began = {"start": start, "args": encode(args, "reset's arguments"), "kwargs": encode(kwargs, "reset")}
        except Exception as error:
            self.reason = _describe(error)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], n_results: int) -> Any:
        self.is_busy = True
        try:
            result = function(*args, **kwargs)
        except BaseException:
            self.reason = "reset or step raised an error"
            raise
        finally:
            self.is_busy = False
        try:
            self.result = copy.deepcopy(result[:n_results])
        except Exception as error:
            self.reason = f"the observation cannot be copied: {_describe(error)}"
        return result


def _prepare_env(env: gym.Env) -> None:
    with contextlib.suppress(Exception):  # capture() will say what the matter is
        inner = _chain(env)[-1]
        if RECORDER in vars(inner) or _offers_state(inner):
            return
        # Others may get unreadable attributes in their first reset or step; the recorder leaves if they do not
        if not (_module(inner).startswith("gymnasium.envs.") and _is_readable(inner)):
            _Recorder(inner)


def _is_readable(env: Any) -> bool:
    return not _capture_object([env], 0, {})["unreadable"]


def _replay(chain: list[Any], replay: dict[str, Any]) -> None:
    """
    :raises Exception: of any kind, if the environment has not come to where it was
    """
    env = chain[-1]
    if isinstance(old := vars(env).get(RECORDER), _Recorder):
        old.remove()
    recorder = _Recorder(env)
    actions, args, kwargs = (decode(replay[name]) for name in ("actions", "args", "kwargs"))
    if len(actions) > MAX_REPLAY:
        raise ValueError(f"a replay of {len(actions)} actions")
    global_states = _global_random_states()
    try:
        _restore_attributes(env, replay["start"], chain)
        env.reset(*args, **kwargs)
        for action in actions:
            env.step(action.copy() if isinstance(actions, np.ndarray) else action)
    finally:
        _set_global_random_states(global_states)
    now = recorder.tree()
    names = [f"its {name}" for name, trace in now["traces"].items() if trace != replay["traces"].get(name)]
    if not _same(now["result"], replay["result"]):
        names.insert(0, "the observation or reward")
    if names:
        raise ValueError(
            f"{_short(env)} cannot be read, and repeating the {len(actions)} actions of the episode led elsewhere "
            f"({', '.join(names[:3])} differ): it uses random numbers or a clock that are not its own; {OFFER}"
        )


def _worlds(env: Any) -> list[Any]:
    return [value for value in vars(env).values() if type(value).__name__ == "b2World"]


def _renew_world(env: Any) -> None:
    """
    Box2D computes other last bits in a world that has had bodies before, even if they are gone (Gymnasium issue 728).
    LunarLander makes a new world for each episode therefore; BipedalWalker and CarRacing get one here.
    """
    if _worlds(env) and any(cls.__module__.startswith("gymnasium.envs.box2d.") for cls in type(env).__mro__):
        env._destroy()
        env.world = type(env.world)(gravity=env.world.gravity)


def _traces(env: Any) -> dict[str, str]:
    """Digest of each attribute as deep as it can be followed, also of those that cannot be written."""
    traces = {}
    for name, value in vars(env).items():
        if not _is_constant(name, value, [env]):
            digest = hashlib.sha256()
            _trace(value, digest, {id(env)})
            traces[name] = digest.hexdigest()[:16]
    return traces


def _trace(value: Any, digest: Any, seen: set[int]) -> None:
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        return
    if isinstance(value, RANDOM_TYPES):
        value = json.dumps(_encode_random(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        digest.update(repr(value).encode())
        return
    digest.update(_name(value).encode())
    if id(value) in seen or isinstance(value, (*CONSTANT_TYPES, *FUNCTION_TYPES)):
        return
    if len(seen) > MAX_REPLAY:
        raise NotEncodable("it consists of too many objects to compare")
    seen.add(id(value))
    slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__") or ()]
    members = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__")}
    for key, part in {
        **members,
        **getattr(value, "__dict__", {}),
        **(value if isinstance(value, dict) else {}),
    }.items():
        digest.update((key if isinstance(key, str) else repr(key)).encode())
        _trace(part, digest, seen)
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    for part in items if isinstance(items, list | tuple | deque) else ():
        _trace(part, digest, seen)


# --- one object -------------------------------------------------------------------------------------------------------


def _capture_object(chain: list[Any], index: int, seen: dict[int, tuple[Any, ...]]) -> dict[str, Any]:
    """
    :param chain: all objects from the outermost wrapper to the environment
    :param index: of the object
    :param seen: id of each mutable value met so far, and where; kept by the caller for the whole chain
    :return: ``class``; ``made``: constructor arguments; ``lasting``, ``episode``: attributes; ``spaces``: their random
        states; ``constant``: names left out; ``unreadable``: reasons by name; ``own``: of ``get_state``, if it has that
    """
    obj = chain[index]
    lasting: dict[str, Any] = {}
    episode: dict[str, Any] = {}
    unreadable: dict[str, str] = {}
    layer: dict[str, Any] = {"class": _name(obj), "made": _arguments(obj), "lasting": lasting, "episode": episode}
    layer |= {"spaces": {}, "constant": [], "unreadable": unreadable}
    has_own = _offers_state(obj)
    if has_own:
        try:
            layer["own"] = encode(obj.get_state(), f"{_short(obj)}.get_state()")
        except Exception as error:
            unreadable["get_state"] = _describe(error)
    elif any(set(vars(c).get("__slots__") or ()) - {"__dict__", "__weakref__"} for c in type(obj).__mro__):
        unreadable["__slots__"] = f"{_short(obj)} has __slots__, which are not looked into"
    lasting_names, episode_names = STATE.get(type(obj), ALL)
    is_env = isinstance(obj, gym.Env) and index == len(chain) - 1
    for name, space in _spaces(obj).items():
        rngs = [part._np_random for part in _subspaces(space)]
        try:
            layer["spaces"][name] = [None if rng is None else _encode_random(rng) for rng in rngs]
        except NotEncodable as error:
            unreadable[name] = _describe(error)
    for name, value in vars(obj).items():
        where = f"{_short(obj)}.{name}"
        try:
            if _is_constant(name, value, chain):
                layer["constant"].append(name)
            elif isinstance(value, RANDOM_TYPES) or (
                not has_own and (episode_names is None or name in lasting_names + episode_names)
            ):
                if type(obj) is PassiveEnvChecker:
                    value = CHECKS_DONE.get(name, value)
                lives_on = name in (*lasting_names, "_np_random_seed") or isinstance(value, RANDOM_TYPES + NESTED)
                part = lasting if lives_on or _is_nested_dict(value) else episode
                same = seen.get(id(value), ())
                if len(same) == 2 and getattr(value, "base", None) is None:
                    part[name] = {"same": list(same)}
                else:
                    _note(value, (index, name), where, seen, is_deep=is_env)
                    part[name] = _encode(obj, name, value, where)
        except Exception as error:
            unreadable[name] = _describe(error)
    return layer


def _restore_attributes(obj: Any, attributes: dict[str, Any], chain: list[Any]) -> None:
    for name, tree in attributes.items():
        values = vars(obj)
        where = f"{_short(obj)}.{name}"
        cls: Any = type(obj)
        is_code = name.startswith("__") or name in CONSTANT_NAMES or _is_code(inspect.getattr_static(cls, name, None))
        if is_code or not (name in values or name in _names_in(cls)):
            raise ValueError(f"{_short(obj)} has no attribute {name!r} to restore")
        current = values.get(name)
        if name in values and _is_constant(name, current, chain):
            if not _same(tree, {"value": None}):  # a window that is not open yet
                raise ValueError(f"{where} was plain data and is a {type(current).__name__} here")
        elif "elapsed" in tree:
            values[name] = CLOCKS[name][0]() - float(tree["elapsed"])
        elif "same" not in tree:
            values[name] = _decode(tree, current, where)


def _link(chain: list[Any], layers: list[dict[str, Any]], parts: Sequence[str]) -> None:
    """Attributes that were one and the same object become so again."""
    for obj, layer in zip(chain, layers, strict=True):
        for name, tree in ((name, tree) for part in parts for name, tree in layer[part].items() if "same" in tree):
            i, other = tree["same"]
            vars(obj)[name] = vars(chain[i])[other]


def _restore_own(obj: Any, layer: dict[str, Any]) -> None:
    if "own" in layer:
        if not _offers_state(obj):
            raise ValueError(f"{_short(obj)} has no set_state(state) for what its get_state() returned")
        obj.set_state(decode(layer["own"]))


def _restore_spaces(obj: Any, layer: dict[str, Any]) -> None:
    for name, states in layer["spaces"].items():
        space = _spaces(obj).get(name)
        parts = [] if space is None else _subspaces(space)
        if len(parts) != len(states):
            raise ValueError(f"{_short(obj)}.{name} is another space")
        for part, state in zip(parts, states, strict=True):
            part._np_random = None if state is None else _decode(state, part._np_random, name)  # type: ignore[assignment]


def _spaces(obj: Any) -> dict[str, gym.Space[Any]]:
    """Its spaces by attribute, those of its class too."""
    of_class = {name: inspect.getattr_static(type(obj), name, None) for name in ("action_space", "observation_space")}
    return {name: value for name, value in {**of_class, **vars(obj)}.items() if isinstance(value, gym.Space)}


def _subspaces(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    found = [space]
    for value in vars(space).values():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for item in items:
            if isinstance(item, gym.Space):
                found += _subspaces(item)
    return found


def _arguments(obj: Any) -> dict[str, Any]:
    """What the object was made with, as far as it says so: a state goes on only in an object made alike."""
    values = vars(obj)
    arguments = {**(values.get("_saved_kwargs") or {}), **(values.get("_ezpickle_kwargs") or {})}
    arguments |= {f"argument {i}": value for i, value in enumerate(values.get("_ezpickle_args") or ())}
    spec = values.get("spec")
    if isinstance(spec, EnvSpec):
        arguments |= {"id": spec.id, **spec.kwargs}
    found = {}
    for name, value in arguments.items():
        is_file = isinstance(value, str) and value.endswith(".xml")  # it may lie elsewhere; the model is compared
        if not (name in RENDER_ARGUMENTS or is_file or isinstance(value, gym.Space)):
            with contextlib.suppress(TypeError):
                found[str(name)] = encode(value)
    return found


# --- one value --------------------------------------------------------------------------------------------------------


def _encode(obj: Any, name: str, value: Any, where: str) -> dict[str, Any]:
    """
    :param obj: what has the attribute ``name``
    :return: ``{kind: tree}``
    :raises NotEncodable: naming the part that is not plain data
    """
    clock = CLOCKS.get(name)
    if clock is not None and isinstance(obj, clock[1]):
        return {"elapsed": clock[0]() - value}
    if type(value) in NESTED:
        parts = {k: v for k, v in vars(value).items() if not isinstance(v, gym.Space)}
        return {"object": {k: _encode(value, k, v, f"{where}.{k}") for k, v in parts.items()}}
    if _is_nested_dict(value):
        return {"objects": {k: _encode(value, k, v, f"{where}[{k!r}]") for k, v in value.items()}}
    if isinstance(value, RANDOM_TYPES):
        return _encode_random(value, where)
    if _is_mujoco_data(value):
        return {"mujoco": _encode_mujoco(value)}
    return {"value": encode(value, where)}


def _decode(tree: dict[str, Any], current: Any, where: str) -> Any:
    """
    :param tree: of :func:`_encode`
    :param current: what is there now; written in place if it is an object of the same kind, so that aliases stay
    :return: the new value
    """
    ((kind, content),) = tree.items()
    if kind == "object" and type(current) in NESTED:
        for name, part in content.items():
            old = vars(current)[name]
            new = _decode(part, old, f"{where}.{name}")
            kinds = [(np.shape(x), np.asarray(x).dtype.kind) for x in (new, old)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"{where}.{name} has shape {kinds[0][0]} in the state, and {kinds[1][0]} here")
            vars(current)[name] = new
        return current
    if kind == "objects" and _is_nested_dict(current) and content.keys() == current.keys():
        return {name: _decode(part, current[name], f"{where}[{name!r}]") for name, part in content.items()}
    if kind == "mujoco" and _is_mujoco_data(current):
        _restore_mujoco(current, content)
        return current
    if kind == "python_random":
        version, words, gauss = decode(content)
        target = current if type(current) is random.Random else random.Random(0)
        target.setstate((version, tuple(words.tolist()), gauss))
        return target
    if kind == "random":
        new = decode(content)
        if type(new) not in RANDOM_TYPES:
            raise ValueError(f"{where} is not a random generator in the state")
        if type(new) is type(current) is np.random.RandomState:
            current.set_state(new.get_state())
            return current
        if type(new) is type(current) and type(new.bit_generator) is type(current.bit_generator):
            current.bit_generator.state = new.bit_generator.state
            return current
        return new
    if kind != "value":
        raise ValueError(f"{where} is {kind!r} in the state, and a {type(current).__name__} here")
    return decode(content)


def _encode_random(rng: Any, where: str = "a space's random generator") -> dict[str, Any]:
    if type(rng) is random.Random:
        return {"python_random": encode(_python_state(rng.getstate()), where)}
    return {"random": encode(rng, where)}


def _encode_mujoco(data: Any) -> dict[str, Any]:
    import mujoco  # type: ignore[import-untyped]

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    # Other sizes than in new data are those of the contacts, which the next step computes anew
    new = mujoco.MjData(data.model)
    arrays = {name: getattr(data, name) for name in dir(data) if isinstance(getattr(data, name), np.ndarray)}
    fixed = {name: a for name, a in arrays.items() if a.size > 0 and a.shape == getattr(new, name).shape}
    return {"model": _model_digest(data.model), "state": encode(state), "arrays": encode(fixed)}


def _restore_mujoco(data: Any, tree: dict[str, Any]) -> None:
    import mujoco

    model, state, arrays = data.model, decode(tree["state"]), decode(tree["arrays"])
    if tree["model"] != _model_digest(model):
        raise ValueError("the MuJoCo model is another one than the state's, or of another MuJoCo version")
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, state, kind)
    mujoco.mj_forward(model, data)
    mujoco.mj_setState(model, data, state, kind)  # before 3.3.6 mj_forward changed the warm start
    # What mj_forward computes belongs to the new position. The simulator leaves some of it a step behind, and tasks
    # read that before they step: Ant and Humanoid would get a wrong first reward.
    for name, array in arrays.items():
        target = None if name.startswith("_") else getattr(data, name, None)
        if not isinstance(target, np.ndarray) or (target.shape, target.dtype) != (array.shape, array.dtype):
            raise ValueError(f"MuJoCo's {name} has another size than in the state")
        target[...] = array


def _model_digest(model: Any) -> str:
    import mujoco

    model = copy.copy(model)
    model.vis.global_.offwidth = model.vis.global_.offheight = 0  # of the window, for the user to choose
    buffer = np.zeros(mujoco.mj_sizeModel(model), dtype=np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return hashlib.sha256(buffer.data).hexdigest()


def _note(value: Any, path: tuple[Any, ...], where: str, seen: dict[int, tuple[Any, ...]], is_deep: bool) -> None:
    """
    Memory that two attributes share would be two after a restore. Whole attributes that are one object are linked
    again; anything finer is refused, inside of the environment to any depth, since that can be replayed instead.

    :raises NotEncodable: if ``value``, or a part of it, is a part of something that has been seen
    """
    root = value
    if isinstance(value, np.ndarray):
        while isinstance(root.base, np.ndarray):
            root = root.base
        if not (root.base is None or isinstance(root.base, bytes | bytearray)):
            raise NotEncodable(f"{where} is a view of memory that is not numpy's")
        if is_deep and not value.flags.c_contiguous:
            raise NotEncodable(f"{where} is not contiguous")
    if isinstance(root, (np.ndarray, list, dict, deque, set, *RANDOM_TYPES, *NESTED)) or _is_mujoco_data(root):
        # A view of an array that is no attribute itself must not pass for the whole
        owner = seen.setdefault(id(root), path if root is value else (*path, "its base"))
        if owner != path and owner != (*path, "its base"):
            raise NotEncodable(f"{where} shares memory with {'.'.join(map(str, owner[1:]))}")
    if is_deep and isinstance(value, set) and len(value) > 1:
        raise NotEncodable(f"{where} is a set, whose order cannot be kept")
    if is_deep and isinstance(value, dict | list | tuple | deque):
        for i, item in enumerate(value.values() if isinstance(value, dict) else value):
            _note(item, (*path, i), f"{where}[{i}]", seen, is_deep)


def _is_constant(name: str, value: Any, chain: list[Any]) -> bool:
    if name in CONSTANT_NAMES or isinstance(value, (*CONSTANT_TYPES, _Recorder)) or any(value is obj for obj in chain):
        return True
    if isinstance(value, functools.partial):
        return _is_constant("", value.func, chain)
    if isinstance(value, FUNCTION_TYPES):
        # A bound method has the state of its object
        owner = getattr(value, "__self__", None)
        return owner is None or _is_constant("", owner, chain)
    package, kind = _module(value).partition(".")[0], type(value).__name__
    return any(package == known and kind.startswith(start) for known, start in RENDERERS)


def _is_code(value: Any) -> bool:
    return callable(value) or (hasattr(type(value), "__get__") and not isinstance(value, functools.cached_property))


@functools.lru_cache
def _names_in(cls: Any) -> frozenset[str]:
    """Names that the methods of a class use: the attributes that it may come to have."""
    names: set[str] = set()
    for base in cls.__mro__:
        names.update(vars(base).get("__annotations__", {}))
        for value in vars(base).values():
            function = inspect.unwrap(getattr(value, "fget", None) or value)
            if isinstance(function, types.FunctionType):
                names.update(function.__code__.co_names)
    return frozenset(names)


def _offers_state(obj: Any) -> bool:
    """MujocoEnv has a set_state(qpos, qvel), and no get_state()."""
    cls = type(obj)
    if not (callable(getattr(cls, "get_state", None)) and callable(getattr(cls, "set_state", None))):
        return False
    try:
        inspect.signature(obj.get_state).bind()
        inspect.signature(obj.set_state).bind(None)
        return True
    except (TypeError, ValueError):
        return False


def _is_nested_dict(value: Any) -> bool:
    return type(value) is dict and bool(value) and all(type(item) in NESTED for item in value.values())


def _is_mujoco_data(value: Any) -> bool:
    return type(value).__name__ == "MjData" and _module(value).partition(".")[0] == "mujoco"


def _python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, np.array(words, dtype=np.uint32), gauss


def _global_random_states() -> dict[str, Any]:
    return {
        "python": _python_state(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "torch": th.get_rng_state(),
    }


def _set_global_random_states(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])


def _same(a: Any, b: Any) -> bool:
    """Of two trees; NaN equals itself."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _name(obj: Any) -> str:
    module, name = _module(obj), type(obj).__qualname__
    # The script that a run was started with has another name in its worker processes
    name = name if module in ("__main__", "__mp_main__") else f"{module}.{name}"
    return SAME_CLASSES.get(name, name)


def _module(obj: Any) -> str:
    return str(getattr(type(obj), "__module__", ""))  # some extension types have none


def _short(obj: Any) -> str:
    return type(obj).__name__


def _describe(error: BaseException) -> str:
    return str(error) if type(error) in (ValueError, NotEncodable) else f"{type(error).__name__}: {error}"


# What can be done with an environment, and the result where it cannot be reached, made of the reason
OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[str], Any]]] = {
    "prepare": (_prepare_env, lambda reason: None),
    "capture": (_capture_env, lambda reason: {"missing": reason}),
    "restore": (_restore_env, lambda reason: ([reason], False)),
    "survive_signals": (_survive_signals, lambda reason: None),
}
