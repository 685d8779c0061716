"""
Python values as JSON and back, without pickle.

Values without a JSON type become ``{"$": <kind>, ...}``. Classes are written by name, and only those of a few known
packages. Decoding never calls anything that a file names: it looks classes up, which must be among the kinds that a
model consists of, and restores objects by their attributes, without a constructor.
"""

import base64
import importlib
import inspect
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

KIND = "$"
KNOWN_PACKAGES = ("torch", "numpy", "gymnasium", "stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_softsac")
# Packages whose modules may be imported to find a name. Other modules must be imported already: some have side effects
IMPORTED = ("torch.nn", "torch.optim", "gymnasium.spaces", "stable_baselines3", "sb3_contrib", "sb3_softsac")
# Classes that a file may name: their constructors have no side effects
NAMED_CLASSES: tuple[type, ...] = (
    nn.Module,
    th.optim.Optimizer,
    spaces.Space,
    BaseBuffer,
    ActionNoise,
    Enum,
    np.generic,
)
# Classes whose objects are restored by their attributes, without a constructor
PLAIN_CLASSES: tuple[type, ...] = (
    spaces.Space,
    ActionNoise,
    RunningMeanStd,
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
)
# By name: rl_zoo3 need not be imported, and ours import more than this module may
PLAIN_NAMES = (
    "rl_zoo3.utils.SimpleLinearSchedule",
    "sb3_softsac.held_noise.HeldNoise",
    "sb3_softsac.reward_scale.RewardScale",
)
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
# Bounds of a space of this size are written as one number, if they are all equal
SMALL_BYTES, MAX_BOUND_BYTES = 1 << 12, 1 << 26
LONG = 64  # lists of this many floats are written as arrays


class NotEncodable(TypeError):
    """A part of the value can only be written with pickle; the message says which."""


def encode(value: Any, where: str = "value") -> Any:
    """
    :param value: value to write
    :param where: its name in error messages
    :return: JSON tree, for ``json.dumps``
    :raises NotEncodable: naming the part that cannot be written
    """
    try:
        return _encode(value, where)
    except RecursionError:
        raise NotEncodable(f"{where} contains itself, or is nested too deeply") from None


def decode(tree: Any) -> Any:
    """
    :param tree: result of :func:`encode`, possibly from an untrusted file
    :return: a value equal to the encoded one
    :raises ValueError: if the tree is damaged
    """
    try:
        return _decode(tree)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def _encode(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        if len(value) >= LONG and all(type(item) is float for item in value):
            return {KIND: "floats", "array": _encode_array(np.array(value), where)}
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value) and KIND not in value:
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    for kind in _KINDS:
        if kind.matches(value):
            return {KIND: kind.name, **kind.to_tree(value, where)}
    raise NotEncodable(f"{where} is a {full_name(type(value))}, which cannot be written without pickle")


def _decode(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if KIND not in tree:
        return {key: _decode(item) for key, item in tree.items()}
    kind = tree[KIND]
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(f"unknown kind of value {kind!r}: the file is damaged, or a later version wrote it")
    try:
        return _READERS[kind](tree)
    except RecursionError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError, MemoryError) as error:
        raise ValueError(f"damaged value of kind {kind!r}: {type(error).__name__}: {error}") from error


def name_of(value: Any, where: str = "value", kinds: tuple[type, ...] = NAMED_CLASSES) -> str:
    """
    :param value: a class
    :param where: its name in error messages
    :param kinds: base classes, of which it must be a subclass
    :return: ``package.module.Class``, for :func:`find_class`
    :raises NotEncodable: if it cannot be found by this name in a known package
    """
    name = full_name(value)
    with suppress(ValueError):
        if find_class(name, kinds) is value:
            return name
    raise NotEncodable(f"{where} is a {name}, which is not a class of {', '.join(KNOWN_PACKAGES)}")


def find_class(name: str, kinds: tuple[type, ...] = NAMED_CLASSES) -> type:
    """
    :param name: ``package.module.Class``
    :param kinds: base classes, of which it must be a subclass
    :return: the class
    :raises ValueError: if there is no such class in a known package
    """
    found = _look_up(name)
    if not (inspect.isclass(found) and issubclass(found, kinds)):
        raise ValueError(f"{name!r} is not among the classes that a model can consist of")
    return found


def _look_up(name: str) -> Any:
    if not isinstance(name, str) or name.split(".")[0] not in KNOWN_PACKAGES:
        raise ValueError(f"{name!r} is not in a known package ({', '.join(KNOWN_PACKAGES)})")
    parts = name.split(".")
    if not all(part.isidentifier() and not part.startswith("__") for part in parts):
        raise ValueError(f"{name!r} is not a name")
    # The longest prefix that is a module, then attributes of it
    for n in range(len(parts) - 1, 0, -1):
        found: Any = _module(".".join(parts[:n]))
        if found is None:
            continue
        for part in parts[n:]:
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise ValueError(
        f"there is no {name!r}: install the version of its package that wrote the file, or import its module first"
    )


def _module(name: str) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    if not f"{name}.".startswith((*(f"{package}." for package in IMPORTED), "rl_zoo3.utils.")):
        return None
    try:
        return importlib.import_module(name)
    except Exception:  # it does not exist, or cannot be imported here
        return None


def full_name(cls: type) -> str:
    """
    :param cls: a class
    :return: ``package.module.Class``
    """
    return f"{getattr(cls, '__module__', '')}.{cls.__qualname__}"  # some extension types have no module


def _encode_array(array: np.ndarray, where: str) -> dict[str, Any]:
    if array.dtype.kind not in "biufcSU":
        raise NotEncodable(f"{where} is an array of {array.dtype}, which cannot be written without pickle")
    data = np.ascontiguousarray(array).tobytes()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": base64.b64encode(data).decode()}


def _decode_array(tree: dict[str, Any]) -> np.ndarray:
    dtype, shape, n_bytes = _array_head(tree)
    data = base64.b64decode(tree["data"], validate=True)
    if len(data) != n_bytes:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} needs {n_bytes} bytes, the file has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _array_head(tree: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...], int]:
    dtype, shape = np.dtype(tree["dtype"]), tuple(tree["shape"])
    if dtype.kind not in "biufcSU" or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of dtype {dtype} and shape {shape} cannot be read")
    return dtype, shape, math.prod(shape) * dtype.itemsize


def _encode_bound(array: np.ndarray, where: str) -> dict[str, Any]:
    """A bound of a space, as one number if all elements are equal: bounds of images are as large as the images."""
    tree = {KIND: "array", **_encode_array(array, where)}
    item = array.ravel()[:1].tobytes()
    if SMALL_BYTES < array.nbytes <= MAX_BOUND_BYTES and array.tobytes() == item * array.size:
        tree.update({KIND: "bound", "data": base64.b64encode(item).decode()})
    return tree


def _decode_bound(tree: dict[str, Any]) -> np.ndarray:
    dtype, shape, n_bytes = _array_head(tree)
    if n_bytes > MAX_BOUND_BYTES:
        raise ValueError(f"a bound of {n_bytes} bytes: the file is damaged")
    item = np.frombuffer(base64.b64decode(tree["data"], validate=True), dtype)
    return np.broadcast_to(item.reshape(()), shape)  # read-only, takes no memory for any shape


def _encode_random_state(state: Any, where: str) -> dict[str, Any]:
    if state["bit_generator"] not in BIT_GENERATORS:
        raise NotEncodable(f"{where} draws from {state['bit_generator']}, which is not one of {BIT_GENERATORS}")
    return {"state": _encode(state, where)}


def check_random_state(state: dict[str, Any]) -> dict[str, Any]:
    """
    :param state: state of one of NumPy's bit generators, possibly from an untrusted file
    :return: ``state``
    :raises ValueError: if the generator would read outside of its memory, which NumPy does not check
    """
    name = state["bit_generator"]
    if name not in BIT_GENERATORS:
        raise ValueError(f"unknown bit generator {name!r}")
    position = state["state"]["pos"] if name == "MT19937" else state["buffer_pos"] if name == "Philox" else 0
    if not 0 <= position <= (624 if name == "MT19937" else 4):
        raise ValueError(f"{name} cannot be at position {position}")
    return state


def _decode_bit_generator(tree: dict[str, Any]) -> np.random.BitGenerator:
    state = check_random_state(_decode(tree["state"]))
    bit_generator: np.random.BitGenerator = getattr(np.random, state["bit_generator"])(0)
    bit_generator.state = state
    return bit_generator


def _decode_random_state(tree: dict[str, Any]) -> np.random.RandomState:
    random_state = np.random.RandomState(0)
    random_state.set_state(check_random_state(_decode(tree["state"])))
    return random_state


def _encode_object(value: Any, where: str) -> dict[str, Any]:
    # Attributes instead of constructor arguments: they include changes since the construction
    state = {
        name: (_encode_bound if _is_bound(value, item) else _encode)(item, f"{where}.{name}")
        for name, item in vars(value).items()
    }
    name = full_name(type(value))
    return {"class": name if name in PLAIN_NAMES else name_of(type(value), where, PLAIN_CLASSES), "state": state}


def _is_bound(space: Any, value: Any) -> bool:
    return isinstance(space, spaces.Space) and type(value) is np.ndarray and value.dtype != object


def _decode_object(tree: dict[str, Any]) -> Any:
    name, state = tree["class"], tree["state"]
    found = _look_up(name) if name in PLAIN_NAMES else find_class(name, PLAIN_CLASSES)
    if any(attribute.startswith("__") for attribute in state):
        raise ValueError(f"attributes of {name} cannot be called {list(state)}")
    value: Any = object.__new__(found)
    value.__dict__.update({attribute: _decode(item) for attribute, item in state.items()})
    return value


def _decode_torch_dtype(name: str) -> th.dtype:
    dtype = getattr(th, name)
    if not isinstance(dtype, th.dtype):
        raise ValueError(f"torch.{name} is not a dtype")
    return dtype


def _encode_items(value: dict[Any, Any], where: str) -> dict[str, Any]:
    items = [[_encode(key, f"a key of {where}"), _encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
    return {"items": items}


def _decode_items(tree: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(_decode(key), _decode(item)) for key, item in tree["items"]]


def _encode_sequence(value: Iterable[Any], where: str) -> dict[str, Any]:
    return {"items": [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}


def _decode_sequence(tree: dict[str, Any]) -> list[Any]:
    return [_decode(item) for item in tree["items"]]


def _encode_objects(array: np.ndarray, where: str) -> dict[str, Any]:
    return {"shape": list(array.shape), "items": [_encode(item, where) for item in array.ravel().tolist()]}


def _decode_objects(tree: dict[str, Any]) -> np.ndarray:
    items = _decode_sequence(tree)
    array = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):  # array[:] = items would unpack items that are sequences
        array[i] = item
    return array.reshape(tree["shape"])


class _Kind(NamedTuple):
    name: str
    matches: Callable[[Any], bool]
    to_tree: Callable[[Any, str], dict[str, Any]]
    from_tree: Callable[[dict[str, Any]], Any]


_KINDS = [
    _Kind("tuple", lambda v: type(v) is tuple, _encode_sequence, lambda t: tuple(_decode_sequence(t))),
    _Kind("dict", lambda v: type(v) is dict, _encode_items, lambda t: dict(_decode_items(t))),
    _Kind("ordered", lambda v: type(v) is OrderedDict, _encode_items, lambda t: OrderedDict(_decode_items(t))),
    _Kind(
        "deque",
        lambda v: type(v) is deque,
        lambda v, where: {"maxlen": v.maxlen, "items": _encode(list(v), where)},
        lambda t: deque(_decode(t["items"]), t["maxlen"]),
    ),
    _Kind(
        "set",
        lambda v: type(v) in (set, frozenset),
        lambda v, where: {"frozen": type(v) is frozenset, **_encode_sequence(sorted(v, key=repr), where)},
        lambda t: (frozenset if t["frozen"] else set)(_decode_sequence(t)),
    ),
    _Kind(
        "bytes",
        lambda v: type(v) is bytes,
        lambda v, _: {"data": base64.b64encode(v).decode()},
        lambda t: base64.b64decode(t["data"], validate=True),
    ),
    _Kind("objects", lambda v: type(v) is np.ndarray and v.dtype == object, _encode_objects, _decode_objects),
    _Kind("array", lambda v: type(v) is np.ndarray, _encode_array, _decode_array),
    _Kind(
        "number",
        lambda v: isinstance(v, np.generic),
        lambda v, where: _encode_array(np.asarray(v), where),
        lambda t: _decode_array(t)[()],
    ),
    _Kind("path", lambda v: isinstance(v, Path), lambda v, _: {"path": str(v)}, lambda t: Path(t["path"])),
    _Kind("dtype", lambda v: isinstance(v, np.dtype), lambda v, _: {"name": v.str}, lambda t: np.dtype(t["name"])),
    _Kind(
        "generator",
        lambda v: type(v) is np.random.Generator,
        lambda v, where: _encode_random_state(v.bit_generator.state, where),
        lambda t: np.random.Generator(_decode_bit_generator(t)),
    ),
    _Kind(
        "random_state",
        lambda v: type(v) is np.random.RandomState,
        lambda v, where: _encode_random_state(v.get_state(legacy=False), where),
        _decode_random_state,
    ),
    _Kind(
        "tensor",
        # Only tensors that are restored exactly
        lambda v: type(v) is th.Tensor and not v.requires_grad and v.device.type == "cpu" and v.dtype != th.bfloat16,
        lambda v, where: _encode_array(v.numpy(), where),
        lambda t: th.from_numpy(_decode_array(t)),
    ),
    _Kind(
        "torch_dtype",
        lambda v: isinstance(v, th.dtype),
        lambda v, _: {"name": str(v).removeprefix("torch.")},
        lambda t: _decode_torch_dtype(t["name"]),
    ),
    _Kind("device", lambda v: isinstance(v, th.device), lambda v, _: {"name": str(v)}, lambda t: th.device(t["name"])),
    _Kind(
        "enum",
        lambda v: isinstance(v, Enum),
        lambda v, where: {"class": name_of(type(v), where), "name": v.name},
        lambda t: cast(type[Enum], find_class(t["class"], (Enum,)))[t["name"]],
    ),
    _Kind(
        "train_freq",
        lambda v: type(v) is TrainFreq,
        _encode_sequence,
        lambda t: TrainFreq(*_decode_sequence(t)),
    ),
    _Kind("class", inspect.isclass, lambda v, where: {"name": name_of(v, where)}, lambda t: find_class(t["name"])),
    _Kind(
        "object",
        lambda v: isinstance(v, PLAIN_CLASSES) or full_name(type(v)) in PLAIN_NAMES,
        _encode_object,
        _decode_object,
    ),
]
_READERS = {
    **{kind.name: kind.from_tree for kind in _KINDS},
    # Parts of other kinds: of lists, and of the bounds of a Box
    "floats": lambda tree: _decode_array(tree["array"]).tolist(),
    "bound": _decode_bound,
}
