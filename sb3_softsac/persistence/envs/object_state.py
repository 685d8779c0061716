"""
State of one object of an environment: attribute by attribute, with its random generators, as a JSON tree.

An attribute that is neither plain data nor clearly constant is "unreadable", with a reason that names it.
``known_classes`` lists the classes whose attributes are known; of all others, the attributes themselves decide.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import io
import json
import random
import types
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_softsac.persistence.codec import NotEncodable, decode, encode, full_name
from sb3_softsac.persistence.envs.known_classes import (
    ALL,
    CHECKS_DONE,
    CLOCKS,
    CONSTANT_NAMES,
    CONSTANT_TYPES,
    FUNCTION_TYPES,
    NESTED,
    RANDOM_TYPES,
    RENDER_ARGUMENTS,
    RENDERERS,
    SAME_CLASSES,
    SETTINGS,
    STATE,
    Bookkeeping,
)
from sb3_softsac.persistence.random_states import pack_python_state, unpack_python_state

LARGE = 2**23  # bytes of an attribute, from which on only a digest is saved while it does not change
LARGE_DATA = "_sb3_softsac_large_data"
OFFER = "give its class get_state() and set_state(state), see sb3_softsac.persistence.envs.env_state"


class LargeData(Bookkeeping):
    """
    Digests of the large attributes of an object. They stand for those that never change.

    :param obj: newly made object; None: there are no digests
    """

    def __init__(self, obj: Any):
        self.digests: dict[str, str] = {}
        for name, value in () if obj is None else vars(obj).items():
            with contextlib.suppress(NotEncodable, RecursionError):
                if _n_bytes(value) > LARGE:
                    self.digests[name] = _digest(value, name)


def note_large_data(chain: list[Any]) -> None:
    """
    Note the large attributes of new objects, before a restore or an episode changes them: another new object has the
    same.

    :param chain: all objects from the outermost wrapper to the environment
    """
    is_new = vars(chain[-1]).get("_np_random") is None and not any(
        vars(obj).get("_has_reset") or (isinstance(obj, Monitor) and not obj.needs_reset) for obj in chain
    )
    for obj in chain:
        if not (LARGE_DATA in vars(obj) or type(obj) in STATE or offers_state(obj)):
            vars(obj)[LARGE_DATA] = LargeData(obj if is_new else None)


def chain_of(env: Any) -> list[Any]:
    """All objects from the outermost wrapper to the VecEnv or environment itself."""
    chain = [env]
    while isinstance(chain[-1], gym.Wrapper | VecEnvWrapper):
        chain.append(chain[-1].env if isinstance(chain[-1], gym.Wrapper) else chain[-1].venv)
    return chain


def capture_chain(chain: list[Any]) -> list[dict[str, Any]]:
    """
    Capture the objects of a chain.

    :param chain: all objects from the outermost wrapper to the environment
    :return: JSON tree of each: ``class``; ``made``, constructor arguments; ``lasting`` and ``episode``, attributes;
        ``spaces``, random states of the spaces, and ``bounds``, digests of them; ``constant``, names of attributes left
        out, and ``functions``, those of them that are functions; ``unreadable``, reasons by name; ``settings``;
        ``own``, result of ``get_state()`` if the object has it
    """
    seen: dict[int, tuple[Any, ...]] = {}  # path of each mutable value so far, by id
    return [_capture_object(chain, i, seen) for i in range(len(chain))]


def _capture_object(chain: list[Any], index: int, seen: dict[int, tuple[Any, ...]]) -> dict[str, Any]:
    obj = chain[index]
    lasting: dict[str, Any] = {}
    episode: dict[str, Any] = {}
    unreadable: dict[str, str] = {}
    layer: dict[str, Any] = {
        "class": class_name(obj),
        "made": arguments_of(obj),
        "lasting": lasting,
        "episode": episode,
        "spaces": {},
        "bounds": digests_of_spaces(obj),
        "constant": [],
        "functions": [],
        "unreadable": unreadable,
        "settings": settings_of(obj),
    }
    has_own = offers_state(obj)
    if has_own:
        try:
            layer["own"] = encode(obj.get_state(), f"{short_name(obj)}.get_state()")
        except Exception as error:
            unreadable["get_state"] = describe_error(error)
    elif any(set(vars(c).get("__slots__") or ()) - {"__dict__", "__weakref__"} for c in type(obj).__mro__):
        unreadable["__slots__"] = f"{short_name(obj)} has __slots__, which cannot be captured"
    lasting_names, episode_names = STATE.get(type(obj), ALL)
    is_env = isinstance(obj, gym.Env) and index == len(chain) - 1
    layer["spaces"] = _capture_spaces(obj, unreadable)
    for name, value in vars(obj).items():
        where = f"{short_name(obj)}.{name}"
        try:
            if _is_chosen_method(obj, name, value):
                episode[name] = {"method": value.__name__}
            elif is_constant(name, value, chain):
                layer["constant"].append(name)
                if isinstance(value, FUNCTION_TYPES):
                    layer["functions"].append(name)
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
                    part[name] = _unchanged(obj, name, value) or encode_attribute(obj, name, value, where)
        except Exception as error:
            unreadable[name] = describe_error(error)
    return layer


def _capture_spaces(obj: Any, unreadable: dict[str, str]) -> dict[str, Any]:
    states = {}
    for name, space in _spaces(obj).items():
        rngs = [part._np_random for part in _subspaces(space)]
        try:
            states[name] = [None if rng is None else encode_random(rng) for rng in rngs]
        except NotEncodable as error:
            unreadable[name] = describe_error(error)
    return states


def restore_attributes(obj: Any, attributes: dict[str, Any], chain: list[Any]) -> None:
    for name, tree in attributes.items():
        values = vars(obj)
        where = f"{short_name(obj)}.{name}"
        cls: Any = type(obj)
        is_code = name.startswith("__") or name in CONSTANT_NAMES or _is_code(inspect.getattr_static(cls, name, None))
        if is_code or not (name in values or name in _names_in(cls)):
            raise ValueError(f"{short_name(obj)} has no attribute {name!r} to restore")
        current = values.get(name)
        if "method" in tree:
            values[name] = _method_of(obj, tree["method"], where)
        elif name in values and is_constant(name, current, chain):
            if not are_same(tree, {"value": None}):  # None: a window that was not open yet
                raise ValueError(f"{where} was plain data and is a {type(current).__name__} here")
        elif "elapsed" in tree:
            values[name] = CLOCKS[name][0]() - float(tree["elapsed"])
        elif "same" not in tree:
            values[name] = _decode(tree, current, where)


def link_shared(chain: list[Any], layers: list[dict[str, Any]], parts: Sequence[str]) -> None:
    """Let attributes share one object again, if they shared one when they were captured."""
    for obj, layer in zip(chain, layers, strict=True):
        for name, tree in ((name, tree) for part in parts for name, tree in layer[part].items() if "same" in tree):
            i, other = tree["same"]
            vars(obj)[name] = vars(chain[i])[other]


def restore_object(obj: Any, layer: dict[str, Any], attributes: dict[str, Any], chain: list[Any]) -> None:
    """Restore some attributes of an object of a chain, and what else is in its layer, see :func:`capture_chain`."""
    restore_attributes(obj, attributes, chain)
    if "own" in layer:
        if not offers_state(obj):
            raise ValueError(f"{short_name(obj)} has no set_state(state) for the saved result of get_state()")
        obj.set_state(decode(layer["own"]))
    for name, states in layer["spaces"].items():
        space = _spaces(obj).get(name)
        parts = [] if space is None else _subspaces(space)
        if len(parts) != len(states):
            raise ValueError(f"{short_name(obj)}.{name} is a different space than in the state")
        for part, state in zip(parts, states, strict=True):
            part._np_random = None if state is None else _decode(state, part._np_random, name)  # type: ignore[assignment]


def _spaces(obj: Any) -> dict[str, gym.Space[Any]]:
    """Spaces of an object and of its class, by attribute."""
    of_class = {name: inspect.getattr_static(type(obj), name, None) for name in ("action_space", "observation_space")}
    return {name: value for name, value in {**of_class, **vars(obj)}.items() if isinstance(value, gym.Space)}


def digests_of_spaces(obj: Any) -> dict[str, str]:
    """
    :param obj: environment or wrapper
    :return: a digest of each of its spaces without random states, by attribute
    """
    return {name: _digest_of_space(space) for name, space in _spaces(obj).items()}


def _digest_of_space(space: gym.Space[Any]) -> str:
    digest = hashlib.sha256()
    for part in _subspaces(space):
        if isinstance(part, gym.spaces.Box):  # whose repr() leaves numbers out
            digest.update(f"{type(part).__name__} {part.shape} {part.dtype}".encode())
            digest.update(part.low.tobytes() + part.high.tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _subspaces(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    found = [space]
    for value in vars(space).values():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for item in items:
            if isinstance(item, gym.Space):
                found += _subspaces(item)
    return found


def arguments_of(obj: Any) -> dict[str, Any]:
    """Constructor arguments that the object has recorded, as JSON trees. An exact restore needs the same."""
    values = vars(obj)
    arguments = {**(values.get("_saved_kwargs") or {}), **(values.get("_ezpickle_kwargs") or {})}
    arguments |= {f"argument {i}": value for i, value in enumerate(values.get("_ezpickle_args") or ())}
    spec = values.get("spec")
    if isinstance(spec, EnvSpec):
        arguments |= {"id": spec.id, **spec.kwargs}
    found = {}
    for name, value in arguments.items():
        is_file = isinstance(value, str) and value.endswith(".xml")  # its path may differ; the model may not
        if not (name in RENDER_ARGUMENTS or is_file or isinstance(value, gym.Space)):
            with contextlib.suppress(TypeError):
                found[str(name)] = encode(value)
    return found


# --- one value --------------------------------------------------------------------------------------------------------


def encode_attribute(obj: Any, name: str, value: Any, where: str) -> dict[str, Any]:
    """
    :param obj: owner of the attribute ``name``
    :param value: value of the attribute
    :param where: its name in error messages
    :return: ``{kind: tree}``
    :raises NotEncodable: naming the part that is not plain data
    """
    clock = CLOCKS.get(name)
    if clock is not None and isinstance(obj, clock[1]):
        return {"elapsed": clock[0]() - value}
    if type(value) in NESTED:
        parts = {k: v for k, v in vars(value).items() if not isinstance(v, gym.Space)}
        return {"object": {k: encode_attribute(value, k, v, f"{where}.{k}") for k, v in parts.items()}}
    if _is_nested_dict(value):
        return {"objects": {k: encode_attribute(value, k, v, f"{where}[{k!r}]") for k, v in value.items()}}
    if isinstance(value, RANDOM_TYPES):
        return encode_random(value, where)
    if _is_mujoco_data(value):
        return {"mujoco": _encode_mujoco(value)}
    return {"value": encode(value, where)}


def _method_of(obj: Any, name: Any, where: str) -> Any:
    method = getattr(obj, name, None) if isinstance(name, str) and not name.startswith("__") else None
    if not isinstance(method, types.MethodType) or method.__self__ is not obj:
        raise ValueError(f"{where} is the method {name!r} in the state, which {short_name(obj)} does not have")
    return method


def _unchanged(obj: Any, name: str, value: Any) -> dict[str, Any] | None:
    """Tree of a large attribute that has not changed; None for all others."""
    data = vars(obj).get(LARGE_DATA)
    noted = data.digests.get(name) if isinstance(data, LargeData) else None
    return {"digest": noted} if noted is not None and _digest(value, name) == noted else None


def _n_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray | str | bytes):
        return value.nbytes if isinstance(value, np.ndarray) else len(value)
    if type(value) is dict:
        return sum(map(_n_bytes, value.values()))
    if type(value) in (list, tuple):
        return 8 * len(value) + sum(_n_bytes(item) for item in value if not isinstance(item, int | float))
    return 0


def _digest(value: Any, where: str) -> str:
    """Raise :class:`NotEncodable` if ``value`` is not plain data."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if type(part) is np.ndarray and part.dtype.kind in "biufcSU":
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part))  # type: ignore[arg-type]
        elif type(part) is dict or (type(part) in (list, tuple) and any(map(_n_bytes, part))):
            digest.update(f"{type(part).__name__}{len(part)}".encode())
            for key, item in part.items() if type(part) is dict else enumerate(part):
                digest.update(f"{key!r}:".encode())
                add(item)
        else:
            digest.update(json.dumps(encode(part, where)).encode())

    add(value)
    return digest.hexdigest()


def _decode(tree: dict[str, Any], current: Any, where: str) -> Any:
    """
    :param tree: result of :func:`encode_attribute`
    :param current: present value; an object of the same kind is changed in place, so that aliases stay
    :return: new value
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
        target = current if type(current) is random.Random else random.Random(0)
        target.setstate(unpack_python_state(decode(content)))
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
    if kind == "digest":
        if _digest(current, where) != content:
            raise ValueError(f"{where} was too large to save, and is different here")
        return current
    if kind != "value":
        raise ValueError(f"{where} is {kind!r} in the state, and a {type(current).__name__} here")
    return decode(content)


def encode_random(rng: Any, where: str = "a space's random generator") -> dict[str, Any]:
    if type(rng) is random.Random:
        return {"python_random": encode(pack_python_state(rng.getstate()), where)}
    return {"random": encode(rng, where)}


def _encode_mujoco(data: Any) -> dict[str, Any]:
    import mujoco  # type: ignore[import-untyped]

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    # Only arrays of contacts have another size than in new data; the next step computes them again
    new = mujoco.MjData(data.model)
    arrays = {name: getattr(data, name) for name in dir(data) if isinstance(getattr(data, name), np.ndarray)}
    fixed = {name: a for name, a in arrays.items() if a.size > 0 and a.shape == getattr(new, name).shape}
    return {"model": _model_digest(data.model), "state": encode(state), "arrays": encode(fixed)}


def _restore_mujoco(data: Any, tree: dict[str, Any]) -> None:
    import mujoco

    model, state, arrays = data.model, decode(tree["state"]), decode(tree["arrays"])
    if tree["model"] != _model_digest(model):
        raise ValueError("the MuJoCo model or version differs from that of the state")
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, state, kind)
    mujoco.mj_forward(model, data)
    mujoco.mj_setState(model, data, state, kind)  # before 3.3.6 mj_forward changed the warm start
    # mj_forward computes all arrays for the new position. But mj_step leaves some of them one step behind, and tasks
    # read those before they step: without this, the first rewards of Ant and Humanoid would be wrong.
    for name, array in arrays.items():
        target = None if name.startswith("_") else getattr(data, name, None)
        if not isinstance(target, np.ndarray) or (target.shape, target.dtype) != (array.shape, array.dtype):
            raise ValueError(f"MuJoCo's {name} has a different shape or dtype than in the state")
        target[...] = array


def _model_digest(model: Any) -> str:
    import mujoco

    model = copy.copy(model)
    model.vis.global_.offwidth = model.vis.global_.offheight = 0  # size of the window, which the user chooses
    buffer = np.zeros(mujoco.mj_sizeModel(model), dtype=np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return hashlib.sha256(buffer.data).hexdigest()


def _note(value: Any, path: tuple[Any, ...], where: str, seen: dict[int, tuple[Any, ...]], is_deep: bool) -> None:
    """
    Note memory that attributes share, since a restore would copy it. Two attributes that are the same object are
    linked again. All other sharing is refused; within the environment at any depth, since it can be replayed instead.

    :raises NotEncodable: if ``value`` or a part of it shares memory with an attribute that was seen before
    """
    root = value
    if isinstance(value, np.ndarray):
        while isinstance(root.base, np.ndarray):
            root = root.base
        if not (root.base is None or isinstance(root.base, bytes | bytearray)):
            raise NotEncodable(f"{where} is a view of memory that NumPy does not own")
        if is_deep and not value.flags.c_contiguous:
            raise NotEncodable(f"{where} is not contiguous")
    if isinstance(value, th.Tensor):
        memory = value.untyped_storage().data_ptr()
        if memory and seen.setdefault(-memory, path) != path:
            raise NotEncodable(f"{where} shares memory with {'.'.join(map(str, seen[-memory][1:]))}")
        seen.setdefault(id(value), path)
    if isinstance(root, (np.ndarray, list, dict, deque, set, *RANDOM_TYPES, *NESTED)) or _is_mujoco_data(root):
        # A view must not be taken for the array that it views
        owner = seen.setdefault(id(root), path if root is value else (*path, "its base"))
        if owner != path and owner != (*path, "its base"):
            raise NotEncodable(f"{where} shares memory with {'.'.join(map(str, owner[1:]))}")
    if is_deep and isinstance(value, set) and len(value) > 1:
        raise NotEncodable(f"{where} is a set, whose order cannot be saved")
    if is_deep and isinstance(value, dict | list | tuple | deque):
        for i, item in enumerate(value.values() if isinstance(value, dict) else value):
            _note(item, (*path, i), f"{where}[{i}]", seen, is_deep)


def is_constant(name: str, value: Any, chain: list[Any]) -> bool:
    """Whether an attribute is not state: a function, a space, a renderer, another object of the chain, ..."""
    if name in CONSTANT_NAMES or isinstance(value, CONSTANT_TYPES) or any(value is obj for obj in chain):
        return True
    if isinstance(value, io.IOBase):
        return value.closed or not value.readable()  # the position in a file that is read is state
    if isinstance(value, functools.partial):
        return is_constant("", value.func, chain)
    if isinstance(value, FUNCTION_TYPES):
        # A bound method shares the state of its object
        owner = getattr(value, "__self__", None)
        return owner is None or is_constant("", owner, chain)
    kind = type(value).__name__
    return any(_package_of(value) == package and kind.startswith(start) for package, start in RENDERERS)


def _is_chosen_method(obj: Any, name: str, value: Any) -> bool:
    """Whether an attribute is one of its object's own methods, as in a state machine."""
    if not isinstance(value, types.MethodType) or value.__self__ is not obj or hasattr(type(obj), name):
        return False
    return getattr(type(obj), value.__name__, None) is value.__func__


def _is_code(value: Any) -> bool:
    return callable(value) or (hasattr(type(value), "__get__") and not isinstance(value, functools.cached_property))


@functools.lru_cache
def _names_in(cls: Any) -> frozenset[str]:
    """Names that the methods of a class use: it may get attributes of these names."""
    names: set[str] = set()
    for base in cls.__mro__:
        names.update(vars(base).get("__annotations__", {}))
        for value in vars(base).values():
            function = inspect.unwrap(getattr(value, "fget", None) or value)
            if isinstance(function, types.FunctionType):
                names.update(function.__code__.co_names)
    return frozenset(names)


def settings_of(obj: Any) -> dict[str, Any]:
    return {name: encode(vars(obj)[name]) for name in SETTINGS.get(type(obj), ()) if name in vars(obj)}


def offers_state(obj: Any) -> bool:
    """Whether the class of an environment, wrapper or callback has ``get_state()`` and ``set_state(state)``."""
    cls = type(obj)
    if not (callable(getattr(cls, "get_state", None)) and callable(getattr(cls, "set_state", None))):
        return False
    try:
        # Not every set_state() is meant: MujocoEnv has set_state(qpos, qvel)
        inspect.signature(obj.get_state).bind()
        inspect.signature(obj.set_state).bind(None)
        return True
    except (TypeError, ValueError):
        return False


def _is_nested_dict(value: Any) -> bool:
    return type(value) is dict and bool(value) and all(type(item) in NESTED for item in value.values())


def _package_of(value: Any) -> str:
    return full_name(type(value)).partition(".")[0]


def _is_mujoco_data(value: Any) -> bool:
    return type(value).__name__ == "MjData" and _package_of(value) == "mujoco"


def are_same(a: Any, b: Any) -> bool:
    """Whether two JSON trees are equal. NaN equals itself."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def class_name(obj: Any) -> str:
    # The main script of a run has another module name in worker processes
    name = full_name(type(obj)).removeprefix("__main__.").removeprefix("__mp_main__.")
    return SAME_CLASSES.get(name, name)


def short_name(obj: Any) -> str:
    return type(obj).__name__


def describe_error(error: BaseException) -> str:
    return str(error) if type(error) in (ValueError, NotEncodable) else f"{type(error).__name__}: {error}"
