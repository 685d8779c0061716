"""
Replay of an episode, for environments whose simulator cannot be read (Box2D): from the random state before the last
reset and the actions since then. The last observation and reward must be the same.
"""

import contextlib
import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_softsac.persistence.codec import NotEncodable, decode, encode, full_name
from sb3_softsac.persistence.envs.known_classes import CONSTANT_TYPES, FUNCTION_TYPES, RANDOM_TYPES, Bookkeeping
from sb3_softsac.persistence.envs.object_state import (
    OFFER,
    are_same,
    capture_chain,
    chain_of,
    class_name,
    describe_error,
    encode_attribute,
    encode_random,
    is_constant,
    note_large_data,
    offers_state,
    restore_attributes,
    short_name,
)
from sb3_softsac.persistence.random_states import get_random_states, set_random_states

RECORDER = "_sb3_softsac_recorder"
MAX_REPLAY = 100_000  # steps of one episode


class Recorder(Bookkeeping):
    """
    Records the reset and actions of the episode, for an environment whose state cannot be read.

    :param env: environment without wrappers
    """

    def __init__(self, env: Any):
        self.env = env
        self.shadowed = {name: value for name, value in vars(env).items() if name in ("reset", "step")}
        self.real_reset, self.real_step = env.reset, env.step
        self.is_busy = False  # an environment may call step() in its reset(), or vice versa
        self.is_needed = False
        self.is_fresh = vars(env).get("_np_random") is None
        self.reason: str | None = "its recording began in mid-episode; it can be captured after the next reset"
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
        # All attributes are known only after an episode
        if self.reason is None and not self.is_needed:
            self.is_needed = not _is_readable(self.env)
            if not self.is_needed:
                self.remove()
                return self.real_reset(*args, **kwargs)
        worlds = [] if self.is_fresh else _worlds(self.env)
        self._begin(args, kwargs)
        result = self._run(self.real_reset, args, kwargs, n_results=1)
        if any(world is used for world in _worlds(self.env) for used in worlds):
            self.reason = "its Box2D world keeps traces of earlier episodes; make a new world in each reset()"
        self.is_fresh = False
        return result

    def step(self, action: Any) -> Any:
        if self.is_busy or self.reason is not None:
            return self.real_step(action)
        try:
            self.actions.append(copy.deepcopy(action))  # before the environment clips it in place
        except Exception as error:
            self.reason = f"an action cannot be copied: {describe_error(error)}"
        if len(self.actions) > MAX_REPLAY:
            self.actions, self.reason = [], f"the episode is longer than {MAX_REPLAY} steps"
        return self._run(self.real_step, (action,), {}, n_results=4)

    def tree(self) -> dict[str, Any]:
        """
        :return: JSON tree for :func:`replay_episode`
        :raises NotEncodable: with the reason, if the episode cannot be replayed
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
                _ = self.env.np_random  # seed it now; reset() would draw a seed that is not recorded
            start = {
                name: encode_attribute(self.env, name, value, name)
                for name, value in vars(self.env).items()
                if isinstance(value, (bool, int, float, np.number, *RANDOM_TYPES))
            }
            self.began = {"start": start, "args": encode(args, "reset's arguments"), "kwargs": encode(kwargs, "reset")}
        except Exception as error:
            self.reason = describe_error(error)

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
            self.reason = f"the observation cannot be copied: {describe_error(error)}"
        return result


def prepare_env(env: gym.Env) -> None:
    """
    Record the episodes of an environment, unless its state can be read.

    :param env: environment with its wrappers
    """
    with contextlib.suppress(Exception):  # capture() gives the reason
        chain = chain_of(env)
        note_large_data(chain)
        inner = chain[-1]
        if RECORDER in vars(inner) or offers_state(inner):
            return
        # Other environments may get unreadable attributes in the first episode; if not, the recorder removes itself
        if not (full_name(type(inner)).startswith("gymnasium.envs.") and _is_readable(inner)):
            Recorder(inner)


def _is_readable(env: Any) -> bool:
    return not capture_chain([env])[0]["unreadable"]


def replay_episode(chain: list[Any], replay: dict[str, Any]) -> None:
    """
    Bring an environment to its recorded state.

    :param chain: all objects from the outermost wrapper to the environment
    :param replay: result of :meth:`Recorder.tree`
    :raises Exception: of any kind, if the replay leads to another state
    """
    env = chain[-1]
    if isinstance(old := vars(env).get(RECORDER), Recorder):
        old.remove()
    recorder = Recorder(env)
    actions, args, kwargs = (decode(replay[name]) for name in ("actions", "args", "kwargs"))
    if len(actions) > MAX_REPLAY:
        raise ValueError(f"a replay of {len(actions)} actions")
    random_states = get_random_states()
    try:
        restore_attributes(env, replay["start"], chain)
        env.reset(*args, **kwargs)
        for action in actions:
            env.step(action.copy() if isinstance(actions, np.ndarray) else action)
    finally:
        set_random_states(random_states)
    now = recorder.tree()
    names = [f"its {name}" for name, trace in now["traces"].items() if trace != replay["traces"].get(name)]
    if not are_same(now["result"], replay["result"]):
        names.insert(0, "the observation or reward")
    if names:
        raise ValueError(
            f"{short_name(env)} cannot be read, and replaying the {len(actions)} actions of the episode led to another "
            f"state ({', '.join(names[:3])} differ): it uses a clock or random numbers other than its own; {OFFER}"
        )


def _worlds(env: Any) -> list[Any]:
    return [value for value in vars(env).values() if type(value).__name__ == "b2World"]


def _renew_world(env: Any) -> None:
    """
    Rounding in a Box2D world depends on earlier bodies, even destroyed ones (Gymnasium issue 728). LunarLander makes a
    new world for each episode therefore; BipedalWalker and CarRacing get one here.
    """
    if _worlds(env) and any(cls.__module__.startswith("gymnasium.envs.box2d.") for cls in type(env).__mro__):
        env._destroy()
        env.world = type(env.world)(gravity=env.world.gravity)


def _traces(env: Any) -> dict[str, str]:
    """Digest of each attribute, at any depth, also of those that cannot be encoded."""
    traces = {}
    for name, value in vars(env).items():
        if not is_constant(name, value, [env]):
            digest = hashlib.sha256()
            _trace(value, digest, {id(env)})
            traces[name] = digest.hexdigest()[:16]
    return traces


def _trace(value: Any, digest: Any, seen: set[int]) -> None:
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        return
    if isinstance(value, RANDOM_TYPES):
        value = json.dumps(encode_random(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        digest.update(repr(value).encode())
        return
    digest.update(class_name(value).encode())
    if id(value) in seen or isinstance(value, (*CONSTANT_TYPES, *FUNCTION_TYPES)):
        return
    if len(seen) > MAX_REPLAY:
        raise NotEncodable("it has too many objects to compare")
    seen.add(id(value))
    slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__") or ()]
    members = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__")}
    members |= value if isinstance(value, dict) else getattr(value, "__dict__", {})
    for name, part in members.items():
        digest.update((name if isinstance(name, str) else repr(name)).encode())
        _trace(part, digest, seen)
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    for part in items if isinstance(items, list | tuple | deque) else ():
        _trace(part, digest, seen)
