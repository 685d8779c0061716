"""The pass over a compiled update's matrix products (``sb3_softsac.products``): equal numbers, and what it replaces."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_softsac import products, side_by_side
from sb3_softsac.products import MIN_LARGE, Products
from sb3_softsac.side_by_side import operator_of_products

aten = th.ops.aten
ONEDNN = th.ops.mkldnn._linear_pointwise.default if th.backends.mkldnn.is_available() else None
needs_onednn = pytest.mark.skipif(ONEDNN is None, reason="this torch has no oneDNN")

N = 160  # 160^3 multiplications are twice MIN_LARGE
assert N**3 > 2 * MIN_LARGE


def rand(*shape: int, dtype: th.dtype = th.float32) -> th.Tensor:
    return th.randn(*shape, dtype=dtype)


def passed(
    function: Callable[..., Any], *inputs: th.Tensor, use_onednn: bool = True, n: int = 1
) -> tuple[GraphModule, Counter]:
    """Traced as Inductor hands it over, passed, and compared with the original; and how often each operator is left."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    expected = module(*inputs)
    Products(use_onednn, n)(module.graph)
    module.graph.lint()
    module.graph.eliminate_dead_code()
    module.recompile()
    actual = module(*inputs)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, actual)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        th.testing.assert_close(other, one, atol=5e-4, rtol=1e-4)
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" in node.meta and isinstance(node.meta["val"], th.Tensor):
            assert node.meta["val"].dtype in (th.float32, th.float64, th.bfloat16), node
    return module, Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def mm(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a, b)


def mm_of_transposed_left(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a.permute(1, 0), b)


def mm_of_transposed_right(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a, b.permute(1, 0))


def mm_of_transposed(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a.permute(1, 0), b.permute(1, 0))


@needs_onednn
@pytest.mark.parametrize("function", [mm, mm_of_transposed_left, mm_of_transposed_right, mm_of_transposed])
def test_large_products_are_replaced(function: Callable[..., Any]) -> None:
    """Weights' gradients have a transposed left side, layers a transposed right one."""
    _, left = passed(function, rand(N, N), rand(N, N))
    assert left[ONEDNN] == 1
    assert not left[aten.mm.default]
    if function is mm_of_transposed_right:
        assert not left[aten.permute.default], "the layer takes its weight as it lies in memory"


@needs_onednn
@pytest.mark.parametrize(("rows", "inner", "columns"), [(256, 23, 400), (4000, 300, 2), (2, 4000, 300), (37, 500, 111)])
def test_oblong_products(rows: int, inner: int, columns: int) -> None:
    assert rows * inner * columns >= MIN_LARGE
    _, left = passed(mm, rand(rows, inner), rand(inner, columns))
    assert left[ONEDNN] == 1
    _, left = passed(mm_of_transposed_left, rand(inner, rows), rand(inner, columns))
    assert left[ONEDNN] == 1


@needs_onednn
def test_strided_operands_are_equal_or_left_alone() -> None:
    wide = rand(N, 3 * N)
    passed(lambda a, b: th.mm(a[:, :N], b), wide, rand(N, N))
    passed(lambda a, b: th.mm(a[:, ::3], b), wide, rand(N, N))
    passed(lambda a, b: th.mm(a[:1].expand(N, 3 * N)[:, :N], b), wide, rand(N, N))
    passed(lambda a, b: th.mm(b, a[:, 2 * N :]), wide, rand(N, N))


@needs_onednn
@pytest.mark.parametrize("bias", ["whole", "one", "expanded", "sliced"])
def test_large_layers_are_replaced(bias: str) -> None:
    """A bias is (C,); what else ``addmm`` allows may be left alone, but not computed wrongly."""
    biases = {"whole": rand(N), "one": rand(1), "expanded": rand(1).expand(N), "sliced": rand(N, 3)[:, 1]}
    _, left = passed(lambda c, a, b: th.addmm(c, a, b.permute(1, 0)), biases[bias], rand(N, N), rand(N, N))
    if bias == "whole":
        assert left[ONEDNN] == 1 and not left[aten.addmm.default]


@needs_onednn
def test_relu_is_part_of_the_layer() -> None:
    def layer(c: th.Tensor, a: th.Tensor, b: th.Tensor) -> th.Tensor:
        return th.relu(th.addmm(c, a, b.permute(1, 0)))

    module, left = passed(layer, rand(N), rand(N, N), rand(N, N))
    assert left[ONEDNN] == 1
    assert not left[aten.relu.default] and not left[aten.addmm.default]
    (node,) = module.graph.find_nodes(op="call_function", target=ONEDNN)
    assert node.args[3] == "relu"


@needs_onednn
def test_relu_is_left_if_the_product_is_used_elsewhere() -> None:
    def used_twice(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        product = th.mm(a, b)
        return th.relu(product), product * 2.0

    def returned(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        product = th.mm(a, b)
        return th.relu(product), product

    def two_relus(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        product = th.mm(a, b)
        return th.relu(product), th.relu(product)

    for function in (used_twice, returned, two_relus):
        _, left = passed(function, rand(N, N), rand(N, N))
        assert left[ONEDNN] == 1
        assert left[aten.relu.default] >= 1, function.__name__


@needs_onednn
def test_relu_that_is_used_twice_is_part_of_the_layer() -> None:
    """Its output is kept for the backward pass."""

    def layer(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        out = th.relu(th.mm(a, b))
        return out, out <= 0.0

    module = make_fx(layer, tracing_mode="fake")(a := rand(N, N), b := rand(N, N))
    expected = module(a, b)
    Products(True)(module.graph)
    module.recompile()
    assert not module.graph.find_nodes(op="call_function", target=aten.relu.default)
    th.testing.assert_close(module(a, b)[0], expected[0], atol=5e-4, rtol=1e-4)


def test_without_onednn_large_products_stay() -> None:
    _, left = passed(mm, rand(N, N), rand(N, N), use_onednn=False)
    assert left == Counter({aten.mm.default: 1})
    _, left = passed(lambda c, a, b: th.relu(th.addmm(c, a, b)), rand(N), rand(N, N), rand(N, N), use_onednn=False)
    assert left == Counter({aten.addmm.default: 1, aten.relu.default: 1})


def test_small_products_stay() -> None:
    assert 100 * 100 * 100 < MIN_LARGE
    _, left = passed(mm, rand(100, 100), rand(100, 100))
    assert left == Counter({aten.mm.default: 1})
    _, left = passed(lambda c, a, b: th.addmm(c, a, b), rand(100), rand(100, 100), rand(100, 100))
    assert left == Counter({aten.addmm.default: 1})


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
@pytest.mark.parametrize("inner", [N, 1])
def test_other_types_stay(dtype: th.dtype, inner: int) -> None:
    _, left = passed(mm, rand(N, inner, dtype=dtype), rand(inner, N, dtype=dtype))
    assert left == Counter({aten.mm.default: 1})
    inputs = rand(N, dtype=dtype), rand(N, inner, dtype=dtype), rand(inner, N, dtype=dtype)
    _, left = passed(lambda c, a, b: th.addmm(c, a, b), *inputs)
    assert left == Counter({aten.addmm.default: 1})


@pytest.mark.parametrize("factors", [{"beta": 2.0}, {"alpha": 0.5}, {"beta": 0.0, "alpha": 3.0}])
@pytest.mark.parametrize("inner", [N, 1])
def test_factors_of_addmm_stay(factors: dict[str, float], inner: int) -> None:
    _, left = passed(lambda c, a, b: th.addmm(c, a, b, **factors), rand(N), rand(N, inner), rand(inner, N))
    assert left == Counter({aten.addmm.default: 1})


def test_addmm_onto_a_matrix_stays() -> None:
    _, left = passed(lambda c, a, b: th.addmm(c, a, b), rand(N, N), rand(N, N), rand(N, N))
    assert left == Counter({aten.addmm.default: 1})


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 20, 30), (20, 1, 30), (20, 30, 1), (1, 1, 9), (1, 9, 1), (9, 1, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("use_onednn", [False, True])
def test_thin_products_become_loops(rows: int, inner: int, columns: int, use_onednn: bool) -> None:
    """A critic's last layer has one output: its gradients are products with one row, column or term."""
    a, b, bias = rand(rows, inner), rand(inner, columns), rand(columns)
    cases: list[tuple[Callable[..., Any], tuple[th.Tensor, ...]]] = [
        (mm, (a, b)),
        (mm_of_transposed_left, (a.t().contiguous(), b)),
        (mm_of_transposed_right, (a, b.t().contiguous())),
        (lambda c, x, y: th.addmm(c, x, y), (bias, a, b)),
        (lambda c, x, y: th.addmm(c, x, y.permute(1, 0)), (bias, a, b.t().contiguous())),
    ]
    passed(lambda c, x, y: th.addmm(c, x, y), rand(1), a, b, use_onednn=use_onednn)
    for function, inputs in cases:
        _, left = passed(function, *inputs, use_onednn=use_onednn)
        assert not left[aten.mm.default] and not left[aten.addmm.default] and not left[ONEDNN]


def test_thin_products_of_large_sizes_are_exact_enough() -> None:
    passed(mm, rand(1, 4096), rand(4096, 300))
    passed(mm, rand(300, 4096), rand(4096, 1))


def test_only_the_columns_that_are_used_are_computed() -> None:
    """Of the gradient of a critic's input, those of the actions."""
    module, left = passed(lambda a, b: th.mm(a, b)[:, 60:77], rand(50, 40), rand(40, 77))
    (node,) = module.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert node.meta["val"].shape == (50, 17)
    assert left[aten.mm.default] == 1
    passed(lambda a, b: th.mm(a, b)[:, -3:], rand(50, 40), rand(40, 77))
    passed(lambda a, b: th.mm(a, b)[:, 1:70:3], rand(50, 40), rand(40, 77))
    passed(lambda a, b: th.mm(a, b.permute(1, 0))[:, 76:], rand(50, 40), rand(77, 40))  # thin then


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: th.mm(a, b)[10:20],
        lambda a, b: (th.mm(a, b)[:, 60:], th.mm(a, b)[:, :60]),
        lambda a, b: (lambda product: (product[:, 60:], product[:, :60]))(th.mm(a, b)),
        lambda a, b: (lambda product: (product[:, 60:], product))(th.mm(a, b)),
        lambda a, b: aten.slice.Tensor(th.mm(a, b)),
        lambda a, b: aten.slice.Tensor(th.mm(a, b), -1, 60, 77),
    ],
)
def test_other_slices(function: Callable[..., Any]) -> None:
    passed(function, rand(50, 40), rand(40, 77))


def test_key_of_the_cache() -> None:
    """Code that was made with oneDNN must not be found without it, nor that for two threads with one."""
    made_for = [(True, 1), (False, 1), (True, 2), (False, 2)]
    keys = [Products(*setting).uuid() for setting in made_for]
    assert len(set(keys)) == len(keys)
    assert [Products(*setting).uuid() for setting in made_for] == keys


# Side by side


def joined(module: GraphModule) -> list[Any]:
    """Calls that compute several products: their arguments."""
    return [node.args for node in module.graph.find_nodes(op="call_function", target=operator_of_products())]


def two_critics(obs: th.Tensor, *weights: th.Tensor) -> tuple[th.Tensor, ...]:
    """Two layers each."""
    hidden = [th.relu(th.addmm(bias, obs, w.permute(1, 0))) for w, bias in (weights[:2], weights[4:6])]
    return tuple(th.addmm(b, h, w.permute(1, 0)) for h, (w, b) in zip(hidden, (weights[2:4], weights[6:]), strict=True))


@pytest.mark.parametrize("size", [24, N])
@pytest.mark.parametrize("use_onednn", [False, pytest.param(True, marks=needs_onednn)])
def test_products_of_two_critics_are_computed_side_by_side(size: int, use_onednn: bool) -> None:
    critic = (rand(size, 20), rand(size), rand(size, size), rand(size))
    module, left = passed(two_critics, rand(size, 20), *critic, *map(th.clone, critic), use_onednn=use_onednn, n=2)
    first, second = joined(module)
    assert [args[3] for args in (first, second)] == [True, False], "relu is computed by the thread that has the product"
    assert [args[4] for args in (first, second)] == [False, use_onednn and size == N]
    assert not left[aten.addmm.default] and not left[aten.relu.default] and not left[ONEDNN]
    names = [[node.name for node in args[2]] for args in (first, second)]
    assert names == [["arg2_1", "arg6_1"], ["arg4_1", "arg8_1"]], "a thread computes the same critic all along"


def test_operator_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are then computed as with one thread."""
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="side by side"):
        patch.setattr(side_by_side, "SOURCE", "not C++")
        assert operator_of_products.__wrapped__() is None
    monkeypatch.setattr(products, "operator_of_products", lambda: None)
    _, left = passed(lambda a, b: (th.mm(a, b), th.mm(b, a)), rand(8, 8), rand(8, 8), n=2)
    assert left[aten.mm.default] == 2
    assert Products(False, 2).uuid() == Products(False, 1).uuid()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for GNU's OpenMP")
def test_threads_compute_them() -> None:
    """Without OpenMP, torch's parallel loops run one after the other without a word."""
    operator_of_products()
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    ours = [path for path in libraries if b"sb3_softsac" in (content := Path(path).read_bytes())
            and b"products(Tensor[] a" in content]  # fmt: skip
    assert len(ours) == 1 and b"GOMP_parallel" in Path(ours[0]).read_bytes()


def test_no_thread_keeps_a_graph_of_gradients() -> None:
    a, b = rand(8, 8).requires_grad_(), rand(8, 8).requires_grad_()
    th.set_num_threads(2)
    with th.no_grad():
        outputs = operator_of_products()([a, b], [b, a], [], True, False)
    assert [out.requires_grad for out in outputs] == [False, False]
    th.testing.assert_close(outputs[1], th.relu(b @ a))


def test_what_was_in_a_group_that_is_not_whole_is_joined_in_another() -> None:
    """Only the second product is independent of the first, and it is of the other two."""

    def network(*inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        a, b, c, d, w = inputs
        first = th.mm(a, w)
        return th.mm(b, w), th.mm(first + c, w), th.mm(first + d, w)

    module, left = passed(network, *(rand(8, 8) for _ in range(5)), n=3)
    assert len(joined(module)) == 1 and left[aten.mm.default] == 1


@pytest.mark.parametrize("n", [2, 3])
def test_what_depends_on_each_other_is_not_joined(n: int) -> None:
    def chain(a: th.Tensor, b: th.Tensor) -> th.Tensor:
        for _ in range(4):
            a = th.tanh(th.mm(a, b))
        return a

    module, left = passed(chain, rand(8, 8), rand(8, 8), n=n)
    assert not joined(module) and left[aten.mm.default] == 4


def test_only_equal_shapes_and_whole_groups_are_joined() -> None:
    def several(a: th.Tensor, b: th.Tensor, c: th.Tensor) -> tuple[th.Tensor, ...]:
        return th.mm(a, b), th.mm(a, c), th.mm(b, c), th.mm(b, b), th.mm(c.permute(1, 0), c)

    inputs = rand(8, 8), rand(8, 8), rand(8, 5)
    module, left = passed(several, *inputs, n=2)
    assert len(joined(module)) == 2 and left[aten.mm.default] == 1
    module, left = passed(several, *inputs, n=3)
    assert not joined(module) and left[aten.mm.default] == 5


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
def test_other_types_are_not_joined(dtype: th.dtype) -> None:
    module, _ = passed(lambda a, b: (th.mm(a, b), th.mm(b, a)), rand(8, 8, dtype=dtype), rand(8, 8, dtype=dtype), n=2)
    assert not joined(module)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.sampled_from("mart")), min_size=2), st.integers(2, 4)
)
def test_joining_keeps_every_graph_right(steps: list[tuple[int, int, str]], n: int) -> None:
    """Whatever depends on whatever."""

    def network(*inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        known = list(inputs[:3])
        for i, j, kind in steps:
            one, other = known[i % len(known)], known[j % len(known)]
            if kind == "m":
                known.append(th.mm(one, other) / 3.0)
            elif kind == "a":
                known.append(th.addmm(inputs[3], one, other) / 3.0)
            elif kind == "r":
                known.append(th.relu(th.mm(one, other)) / 3.0)
            else:
                known.append(one.permute(1, 0))
        return tuple(known)

    passed(network, rand(6, 6), rand(6, 6), rand(6, 6), rand(6), n=n)


@pytest.mark.parametrize(
    ("capability", "processor", "expected"),
    [
        ("AVX512", "vendor_id : AuthenticAMD\nmodel name : AMD EPYC", True),
        ("AVX512", "vendor_id : GenuineIntel", False),
        ("AVX2", "vendor_id : AuthenticAMD", False),
        ("DEFAULT", "", False),
    ],
)
def test_where_onednn_is_faster(
    monkeypatch: pytest.MonkeyPatch, capability: str, processor: str, expected: bool
) -> None:
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(th.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_processor", lambda: processor)
    assert products.onednn_is_faster() == expected
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: False)
    assert not products.onednn_is_faster()


def test_unknown_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Any, *args: Any, **kwargs: Any) -> str:
        raise PermissionError

    monkeypatch.setattr(products.Path, "read_text", unreadable)
    assert isinstance(products.onednn_is_faster(), bool)
