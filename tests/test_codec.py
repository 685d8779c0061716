"""Values as JSON and back: all that a run consists of, bit for bit; and what a tampered text may not do."""

import json
import os
import sys
import warnings
from collections import OrderedDict, deque
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch as th
from crash_tools import needs_little
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.noise import (
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from sb3_softsac.persistence.codec import BIT_GENERATORS, NotEncodable, decode, encode
from sb3_softsac.policies import SoftSACPolicy


def through_text(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value))))


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape and every bit: NaN equals NaN, 0.0 is not -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        if a.dtype == object:
            return a.shape == b.shape and all(map(same, a.ravel(), b.ravel()))
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, th.Tensor):
        return same(a.numpy(), b.numpy())
    if isinstance(a, float):
        return (a != a and b != b) or same(np.float64(a), np.float64(b))  # there is one NaN in JSON
    if isinstance(a, deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))  # in order
    return bool(a == b)


DTYPES = st.one_of(
    st_np.boolean_dtypes(),
    st_np.integer_dtypes(endianness="="),
    st_np.unsigned_integer_dtypes(endianness=">"),
    st_np.floating_dtypes(endianness="<"),
    st_np.floating_dtypes(endianness=">"),
    st_np.complex_number_dtypes(),
    st_np.unicode_string_dtypes(max_len=5),
    st_np.byte_string_dtypes(max_len=5),
)
SHAPES = st_np.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.text(),
    st.binary(),
    st_np.arrays(DTYPES, SHAPES),
    DTYPES.flatmap(lambda dtype: st_np.arrays(dtype, ()).map(lambda array: array[()])),
    DTYPES,
)
KEYS = st.one_of(st.text(), st.integers(), st.just("$"), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(st.floats(), min_size=60, max_size=70),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
        st.builds(deque, st.lists(inner, max_size=3), st.sampled_from([None, 3, 10])),
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(max_examples=300)
def test_round_trip(value: Any) -> None:
    assert same(through_text(value), value)


@given(st.sets(st.one_of(st.integers(), st.text(), st.tuples(st.integers()))))
def test_sets(value: set[Any]) -> None:
    assert same(through_text(value), value)
    assert same(through_text(frozenset(value)), frozenset(value))


@pytest.mark.parametrize("order", ["F", "A", "C"])
def test_layout_of_arrays(order: Any) -> None:
    array = np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2)[::-1, :, ::2]
    for view in (array, np.array(array, order=order), np.broadcast_to(np.float32(2.0), (3, 4)), np.zeros((0, 3)).T):
        back = through_text(view)
        assert same(back, np.ascontiguousarray(view).reshape(view.shape))
        assert back.flags.writeable
        assert back.flags.owndata


@given(st.lists(st.one_of(PLAIN, st.lists(st.integers(), min_size=2, max_size=2), st.dictionaries(st.text(), PLAIN))))
def test_arrays_of_objects(items: list[Any]) -> None:
    array = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        array[i] = item
    assert same(through_text(array), array)
    assert same(through_text(array.reshape(-1, 1)), array.reshape(-1, 1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8", "bool", "complex64"])
def test_tensors(dtype: str) -> None:
    for shape in ((), (0,), (2, 3)):
        tensor = th.ones(shape).to(getattr(th, dtype))
        assert same(through_text(tensor), tensor)
    assert through_text(getattr(th, dtype)) is getattr(th, dtype)


@pytest.mark.parametrize(
    "tensor", [th.nn.Parameter(th.ones(3)), th.ones(3, requires_grad=True), th.ones(3, dtype=th.bfloat16)], ids=str
)
def test_tensors_that_would_come_back_as_something_else(tensor: th.Tensor) -> None:
    with pytest.raises(NotEncodable):
        encode(tensor)


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_random_states_go_on(name: str) -> None:
    for n_drawn in (0, 1, 2, 3, 700):
        generator = np.random.Generator(getattr(np.random, name)(5))
        generator.integers(10, size=n_drawn, dtype=np.int32)  # an odd number leaves half a word
        again = through_text(generator)
        assert same(generator.normal(size=1000), again.normal(size=1000))
        assert same(generator.integers(100, size=3, dtype=np.int32), again.integers(100, size=3, dtype=np.int32))


def test_legacy_random_state_goes_on() -> None:
    random = np.random.RandomState(3)
    random.normal(size=3)  # an odd number: the next is kept
    again = through_text(random)
    assert same(random.normal(size=1000), again.normal(size=1000))


SPACES = [
    spaces.Box(-1.0, 2.0, (3,)),
    spaces.Box(-np.inf, np.inf, (2, 3), dtype=np.float64),
    spaces.Box(np.array([-1.0, -np.inf]), np.array([2.0, 3.0]), dtype=np.float64),
    spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8),
    spaces.Discrete(5, start=2),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiBinary(4),
    spaces.Text(5),
    spaces.Tuple([spaces.Discrete(2), spaces.Box(0.0, 1.0)]),
    spaces.Dict({"b": spaces.Box(0, 1, (2,)), "a": spaces.Dict({"x": spaces.Discrete(3)})}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces(space: spaces.Space) -> None:
    space.seed(3)
    space.sample()
    text = json.dumps(encode(space))
    assert len(text) < 30_000, "the bounds of an image take as much room as the image"
    again = decode(json.loads(text))
    assert again == space
    assert repr(again) == repr(space)
    for _ in range(3):
        assert json.dumps(encode(again.sample())) == json.dumps(encode(space.sample()))


def test_bounds_of_images_take_no_memory() -> None:
    trees = json.loads(json.dumps([encode(spaces.Box(0, 255, (3, 2000, 2000), dtype=np.uint8))] * 100))

    def work() -> None:
        decoded = decode(trees)
        assert decoded[0].high.max() == 255

    needs_little(work)


def test_bounds_of_actions_are_ordinary_arrays() -> None:
    space = through_text(spaces.Box(-1.0, 1.0, (17,)))
    assert space.low.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        th.as_tensor(space.low)


@pytest.mark.parametrize("schedule", [ConstantSchedule(0.3), FloatSchedule(0.3), LinearSchedule(1.0, 0.1, 0.4)])
def test_schedules(schedule: Any) -> None:
    again = through_text(schedule)
    assert type(again) is type(schedule)
    assert [again(x) for x in (1.0, 0.7, 0.1)] == [schedule(x) for x in (1.0, 0.7, 0.1)]


def test_schedule_of_the_zoo() -> None:
    assert through_text(SimpleLinearSchedule(0.5))(0.25) == 0.125
    assert through_text(FloatSchedule(SimpleLinearSchedule(0.5)))(0.25) == 0.125


def test_noises_go_on() -> None:
    for noise in (
        NormalActionNoise(np.zeros(2), np.ones(2)),
        OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.2 * np.ones(2), initial_noise=np.ones(2)),
        VectorizedActionNoise(OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2)), 3),
    ):
        noise()
        again = through_text(noise)
        np.random.seed(0)
        drawn = [noise() for _ in range(3)]
        np.random.seed(0)
        assert same([again() for _ in range(3)], drawn)


def test_other_parts_of_a_model() -> None:
    statistics = RunningMeanStd(shape=(3,))
    statistics.update(np.random.default_rng(0).normal(size=(5, 3)))
    again = through_text(statistics)
    assert same(vars(again), vars(statistics))
    again.update(np.ones((2, 3)))  # what comes back can be changed
    for value in (
        TrainFreq(3, TrainFrequencyUnit.EPISODE),
        GoalSelectionStrategy.FINAL,
        th.device("cuda:1"),
        np.dtype(">f4"),
        np.float32,
        SoftSACPolicy,
        th.nn.ReLU,
        th.optim.AdamW,
        spaces.Box,
    ):
        back = through_text(value)
        assert type(back) is type(value)
        assert back == value


# -- What cannot be written --------------------------------------------------------------------------------------------


class Mine(th.nn.Module):
    pass


class MyEnum(Enum):
    A = 1


class MyBox(spaces.Box):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x, "here is a .*function"),
        ({"a": [1, {"b": len}]}, r"here\['a'\]\[1\]\['b'\] is a "),
        ({"a": (1, object())}, r"here\['a'\]\[1\] is a builtins.object"),
        (deque([1, print]), r"here\[1\]"),
        ({3: {"x": {print}}}, r"here\[3\]\['x'\]\[0\]"),
        (Mine, r"here is a .*Mine, which is not a class of torch"),
        ([MyEnum.A], r"here\[0\] is a .*MyEnum"),
        (MyBox(0, 1), "here is a .*MyBox"),
        (os.system, "here is a "),
        (dict, "here is a builtins.dict"),
        (np.zeros(2, dtype="datetime64[s]"), "here is an array of datetime64"),
        (np.zeros(2, dtype=[("a", "f4")]), "here is an array of"),
        (np.array([1, print], dtype=object), "here is a "),
        (RunningMeanStd, "here is a .*RunningMeanStd"),  # the class, not one of its objects
        (SimpleLinearSchedule, "here is a .*SimpleLinearSchedule"),
        (th.nn.Linear(1, 1), "here is a torch.nn.modules.linear.Linear"),
    ],
)
def test_names_the_part(value: Any, message: str) -> None:
    with pytest.raises(NotEncodable, match=message):
        encode(value, "here")


def test_what_contains_itself() -> None:
    value: list[Any] = []
    value.append({"a": value})
    with pytest.raises(NotEncodable, match="here contains itself"):
        encode(value, "here")


def test_random_states_of_others() -> None:
    class Other(np.random.PCG64):
        state = property(lambda self: {"bit_generator": "Other"})

    with pytest.raises(NotEncodable, match="here draws from Other"):
        encode(np.random.Generator(Other(0)), "here")


# -- What is tampered with ---------------------------------------------------------------------------------------------

NAMES = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "torch.os.system",
    "torch.hub.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.load",
    "torch.serialization.pickle.Unpickler",
    "torch.nn.Module.__init__",
    "torch.nn.__builtins__",
    "torch.__builtins__.eval",
    "numpy.os.system",
    "numpy.ctypeslib.ctypes.CDLL",
    "gymnasium.make",
    "stable_baselines3.common.save_util.cloudpickle.loads",
    "stable_baselines3.common.vec_env.base_vec_env.cloudpickle.loads",
    "stable_baselines3.SAC",
    "sb3_softsac.persistence.model_file.ModelFile",
    "torch.nn.Linear.forward",
    "torch.nn",
    "torch",
    "",
    ".",
    "torch.",
    ".torch",
    "torch..nn",
    "torch.nn.Linear\x00",
    "torch.nn. Linear",
    "a" * 100_000,
    "torch." + "a." * 10_000 + "b",
    "torch.classes.a.b",
    "torch.ops.a.b.c",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40])
@pytest.mark.parametrize("kind", ["class", "object", "enum"])
def test_names_that_are_no_class_of_a_model(name: str, kind: str) -> None:
    with pytest.raises(ValueError):
        decode({"$": kind, "name": name, "class": name, "state": {}})


# Modules that do something when they are imported: start processes, register environments, warn, read the command line
@pytest.mark.parametrize(
    "module",
    [
        "torch._inductor.async_compile",
        "torch.testing._internal.common_distributed",
        "torch.utils.benchmark.examples.simple_timeit",
        "numpy.distutils",
        "rl_zoo3.import_envs",
        "rl_zoo3.record_video",
        "gymnasium.envs.mujoco.pusher_v4",
    ],
)
def test_no_module_is_imported_for_a_name(module: str) -> None:
    if module in sys.modules:
        pytest.skip("somebody else has imported it")
    with pytest.raises(ValueError, match="there is no"):
        decode({"$": "class", "name": f"{module}.Thing"})
    assert module not in sys.modules


@pytest.mark.parametrize("attribute", ["__class__", "__dict__", "__reduce__", "__init__", "__x"])
def test_attributes_with_a_meaning(attribute: str) -> None:
    tree = encode(spaces.Discrete(3))
    tree["state"][attribute] = 1
    with pytest.raises(ValueError, match="cannot be called"):
        decode(tree)


@pytest.mark.parametrize("position", [-1, 625, 2**31 - 1, -(2**31), "1", None])
def test_positions_outside_of_a_random_state(position: Any) -> None:
    """NumPy takes them, and reads what is in memory there, or crashes."""
    trees = [encode(np.random.Generator(np.random.MT19937(0))), encode(np.random.RandomState(0))]
    for tree in trees:
        tree["state"]["state"]["pos"] = position
    trees.append(encode(np.random.Generator(np.random.Philox(0))))
    trees[-1]["state"]["buffer_pos"] = position
    for tree in trees:
        with pytest.raises(ValueError):
            decode(tree)


def test_huge_values() -> None:
    trees: list[Any] = [
        {"$": "array", "dtype": "<f8", "shape": [10**12], "data": ""},
        {"$": "array", "dtype": "<f8", "shape": [2**62, 4], "data": ""},
        {"$": "array", "dtype": "<U1000000000", "shape": [1], "data": ""},
        {"$": "array", "dtype": "(1000000000,)f8", "shape": [], "data": ""},
        {"$": "bound", "dtype": "<f8", "shape": [10**12], "data": "AAAAAAAAAAA="},
        {"$": "bound", "dtype": "<f8", "shape": [-1], "data": "AAAAAAAAAAA="},
        {"$": "objects", "shape": [10**12], "items": []},
        {"$": "deque", "maxlen": -(10**30), "items": []},
        {"$": "deque", "maxlen": "x", "items": []},
        {"$": "generator", "state": {"bit_generator": "PCG64", "state": {"state": -1, "inc": 10**100}}},
    ]
    nested: Any = 1
    for _ in range(50_000):
        nested = [nested] if len(trees) % 2 else {"a": nested}
    trees.append(nested)
    nested = 1
    for _ in range(50_000):
        nested = {"$": "tuple", "items": [nested]}
    trees.append(nested)

    def work() -> None:
        for tree in trees:
            with pytest.raises(ValueError):
                decode(tree)

    needs_little(work)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from(["", "x", "|O", "<f8", "PCG64", "torch.nn.Linear", "gymnasium.spaces.Box", "AAAA", "á"]),
    st.sampled_from(NAMES[:8]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["$", "items", "a"]), st.sampled_from(["tuple", "class", 1, None]), max_size=2),
)
WHOLE = [
    encode(value)
    for value in (
        {"space": SPACES[0], "dict": SPACES[9], "freq": TrainFreq(1, TrainFrequencyUnit.STEP), "dtype": th.float32},
        [np.random.default_rng(0), np.random.RandomState(0), deque([1.0], 3), np.array([[1], "x"], dtype=object)],
        [VectorizedActionNoise(NormalActionNoise(np.zeros(1), np.ones(1)), 2), th.ones(2), b"bytes", {1: {2, 3}}],
        [th.nn.ReLU, LinearSchedule(1.0, 0.1, 0.4), np.float32(3), th.device("cpu"), [0.5] * 70, (1, OrderedDict(a=1))],
    )
]


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, item in items for place in [(*at, key), *places(item, (*at, key))]]


@pytest.mark.damage
@given(st.data())
@settings(max_examples=1500)
def test_damaged_trees(data: st.DataObject) -> None:
    tree = json.loads(json.dumps(data.draw(st.sampled_from(WHOLE))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(tree)))
        part = tree
        for key in place[:-1]:
            part = part[key]
        if data.draw(st.integers(0, 4)) == 0:
            del part[place[-1]]
        else:
            part[place[-1]] = data.draw(JUNK)
        if not places(tree):
            return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about old names of dtypes
        try:
            decode(tree)
        except ValueError:
            pass
