"""Matrix products of a compiled update (``sb3_softsac.execution.cpp.matmul``): equal numbers, and what is replaced."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_softsac.execution.cpp import build, matmul
from sb3_softsac.execution.cpp.matmul import operator_of_products, replace_products
from sb3_softsac.execution.graph_passes import GraphPasses

aten = th.ops.aten

N = 40


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = th.get_num_threads()
    yield
    th.set_num_threads(before)


def ours() -> Any:
    found = operator_of_products()
    assert found is not None
    return found


def rand(*shape: int, dtype: th.dtype = th.float32) -> th.Tensor:
    return th.randn(*shape, dtype=dtype)


def check_meta(module: GraphModule, *inputs: th.Tensor) -> None:
    """What the graph says of its values is what they are."""

    class Interpreter(th.fx.Interpreter):
        def run_node(self, n: th.fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, th.Tensor):
                said = n.meta["val"]
                assert (said.shape, said.dtype) == (value.shape, value.dtype), n
            return value

    Interpreter(module).run(*inputs)


def passed(function: Callable[..., Any], *inputs: th.Tensor, replaces: bool = True) -> tuple[GraphModule, Counter]:
    """Traced as Inductor hands it over, passed, and compared with the original; and how often each operator is left."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    expected = module(*inputs)
    replace_products(module.graph, ours() if replaces else None)
    module.graph.lint()
    module.graph.eliminate_dead_code()
    module.recompile()
    actual = module(*inputs)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, actual)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        th.testing.assert_close(other, one, atol=5e-4, rtol=1e-4)
    check_meta(module, *inputs)
    return module, Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def mm(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a, b)


def mm_of_transposed_left(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a.permute(1, 0), b)


def mm_of_transposed_right(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a, b.permute(1, 0))


def mm_of_transposed(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    return th.mm(a.permute(1, 0), b.permute(1, 0))


# The operator


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 70),
    inner=st.integers(0, 70),
    columns=st.integers(0, 100),
    left=st.booleans(),
    right=st.booleans(),
    bias=st.booleans(),
    relu=st.booleans(),
    gradient=st.booleans(),
    offset=st.integers(0, 3),
    n_threads=st.integers(1, 3),
)
@example(256, 256, 256, True, True, True, True, False, 0, 2)
@example(3, 1100, 300, True, True, True, True, True, 0, 2)
@example(67, 513, 40, False, False, False, False, True, 0, 3)
def test_operator(
    rows: int,
    inner: int,
    columns: int,
    left: bool,
    right: bool,
    bias: bool,
    relu: bool,
    gradient: bool,
    offset: int,
    n_threads: int,
) -> None:
    """Whatever lies transposed or in a larger matrix, and whatever does not fill tiles, panels and threads."""

    def matrix(rows: int, columns: int, transposed: bool) -> th.Tensor:
        wide = rand(columns + 1, rows + offset + 2) if transposed else rand(rows + 1, columns + offset + 2)
        plain = wide[: columns if transposed else rows, offset : offset + (rows if transposed else columns)]
        return plain.t() if transposed else plain

    th.set_num_threads(n_threads)
    a, b, c = matrix(rows, inner, left), matrix(inner, columns, right), rand(columns) if bias else None
    expected = a.double() @ b.double() + (0.0 if c is None else c.double())
    if relu:
        expected = th.relu(expected)
    made = th.relu(rand(rows, columns)) if gradient else None
    if made is not None:
        expected[made == 0] = 0
    actual = ours()(a, b, c, relu, made)
    assert actual.shape == expected.shape and actual.is_contiguous()
    th.testing.assert_close(actual.double(), expected, atol=3e-6 * inner, rtol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_not_finite_is_not_hidden(relu: bool) -> None:
    a, b = rand(20, 30), rand(30, 50)
    a[3, 4], a[5, 6] = th.nan, th.inf
    actual = ours()(a, b, None, relu, None)
    expected = th.relu(a @ b) if relu else a @ b
    th.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert actual[3].isnan().all()


def test_strides_may_be_others_than_the_graph_had() -> None:
    """Inductor is free to choose those of what it computes itself."""
    a, b = rand(40, 90)[::2, ::3], rand(90, 140)[::3, ::2]
    bias, made = rand(70, 2)[:, 1], th.relu(rand(70, 20)).t()
    expected = th.where(made <= 0, 0.0, th.relu(th.addmm(bias, a, b)))
    th.testing.assert_close(ours()(a, b, bias, True, made), expected, atol=1e-4, rtol=1e-4)


def test_matrices_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"product of \[3, 4\] and \[5, 6\]"):
        ours()(rand(3, 4), rand(5, 6), None, False, None)


def test_result_does_not_depend_on_threads() -> None:
    a, b = rand(130, 90), rand(90, 70)
    results = []
    for n_threads in (1, 2, 5):
        th.set_num_threads(n_threads)
        results.append(ours()(a, b, None, False, None))
    assert th.equal(results[0], results[1]) and th.equal(results[0], results[2])


@pytest.mark.skipif(sys.platform != "linux", reason="looks for GNU's OpenMP")
def test_threads_compute_it() -> None:
    """Without OpenMP, torch's parallel loops run one after the other without a word."""
    ours()
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    found = [content for path in libraries if b"sb3_softsac" in (content := Path(path).read_bytes())
             and b"product(Tensor a" in content]  # fmt: skip
    assert len(found) == 1 and b"GOMP_parallel" in found[0]


@pytest.mark.compiler
def test_operator_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products are then torch's."""
    (tmp_path / "matmul.cpp").write_text("not C++")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="Matrix products are torch's"):
        patch.setattr(matmul, "SOURCE", tmp_path / "matmul.cpp")
        assert operator_of_products.__wrapped__() is None
    monkeypatch.setattr(matmul, "operator_of_products", lambda: None)
    monkeypatch.setattr(matmul, "ours_are_faster", lambda: True)
    module = make_fx(mm, tracing_mode="fake")(rand(8, 8), rand(8, 8))
    GraphPasses()(module.graph)
    assert module.graph.find_nodes(op="call_function", target=aten.mm.default)


# The pass


@pytest.mark.parametrize("function", [mm, mm_of_transposed_left, mm_of_transposed_right, mm_of_transposed])
def test_products_are_replaced(function: Callable[..., Any]) -> None:
    """Weights' gradients have a transposed left side, layers a transposed right one."""
    _, left = passed(function, rand(N, N), rand(N, N))
    assert left[ours()] == 1 and not left[aten.mm.default]


def test_strided_operands_are_equal_or_left_alone() -> None:
    wide = rand(N, 3 * N)
    _, left = passed(lambda a, b: th.mm(a[:, :N], b), wide, rand(N, N))
    assert left[ours()] == 1
    _, left = passed(lambda a, b: th.mm(b, a[:, 2 * N :]), wide, rand(N, N))
    assert left[ours()] == 1
    _, left = passed(lambda a, b: th.mm(a[:, ::3], b), wide, rand(N, N))
    assert not left[ours()]
    _, left = passed(lambda a, b: th.mm(a[:1].expand(N, 3 * N)[:, :N], b), wide, rand(N, N))
    assert not left[ours()]


@pytest.mark.parametrize("bias", ["whole", "one", "expanded", "sliced"])
def test_layers_are_replaced(bias: str) -> None:
    """A bias is (C,); what else ``addmm`` allows may be left alone, but not computed wrongly."""
    biases = {"whole": rand(N), "one": rand(1), "expanded": rand(1).expand(N), "sliced": rand(N, 3)[:, 1]}
    _, left = passed(lambda c, a, b: th.addmm(c, a, b.permute(1, 0)), biases[bias], rand(N, N), rand(N, N))
    if bias == "whole":
        assert left[ours()] == 1 and not left[aten.addmm.default]


def test_relu_is_part_of_the_layer() -> None:
    def layer(c: th.Tensor, a: th.Tensor, b: th.Tensor) -> th.Tensor:
        return th.relu(th.addmm(c, a, b.permute(1, 0)))

    module, left = passed(layer, rand(N), rand(N, N), rand(N, N))
    assert left[ours()] == 1
    assert not left[aten.relu.default] and not left[aten.addmm.default]
    (node,) = module.graph.find_nodes(op="call_function", target=ours())
    assert node.args[3] is True


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
        assert left[ours()] == 1
        assert left[aten.relu.default] >= 1, function.__name__


def test_relu_that_is_used_twice_is_part_of_the_layer() -> None:
    """Its output is kept for the backward pass."""

    def layer(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        out = th.relu(th.mm(a, b))
        return out, (out <= 0.0).float()

    _, left = passed(layer, rand(N, N), rand(N, N))
    assert not left[aten.relu.default]


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_relu_is_part_of_the_product(transposed: bool) -> None:
    """As Inductor hands it over, with ``where``. What was made by a layer lies row by row."""
    made = th.relu(rand(N, 30))

    def function(a: th.Tensor, b: th.Tensor, made: th.Tensor) -> th.Tensor:
        made = made.permute(1, 0) if transposed else made
        return th.where(made <= 0, th.full([], 0.0), th.mm(a, b))

    _, left = passed(function, rand(N, N), rand(N, 30), made.t().contiguous() if transposed else made)
    assert left[ours()] == 1 and left[aten.where.self] == int(transposed)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, made: th.where(made <= 0, th.full([], 1.0), th.mm(a, b)),
        lambda a, b, made: th.where(made <= 1, th.full([], 0.0), th.mm(a, b)),
        lambda a, b, made: th.where(made < 0, th.full([], 0.0), th.mm(a, b)),
        lambda a, b, made: th.where(made <= 0, th.mm(a, b), th.full([], 0.0)),
        lambda a, b, made: th.where(made[:1] <= 0, th.full([], 0.0), th.mm(a, b)),
        lambda a, b, made: th.where(made <= 0, th.full([N, N], 0.0, dtype=th.float64), th.mm(a, b)),
        lambda a, b, made: th.where(made <= 0, th.full([3, N, N], 0.0), th.mm(a, b)),
        lambda a, b, made: th.where(made.double() <= 0, th.full([], 0.0), th.mm(a, b)),
        lambda a, b, made: th.where(th.mm(a, b) <= 0, th.full([], 0.0), made),
        lambda a, b, made: (lambda out: (th.where(made <= 0, th.full([], 0.0), out), out))(th.mm(a, b)),
        lambda a, b, made: (lambda out: th.where(out <= 0, th.full([], 0.0), out))(th.mm(a, b)),
    ],
)
def test_what_is_not_the_gradient_of_relu(function: Callable[..., Any]) -> None:
    _, left = passed(function, rand(N, N), rand(N, N), rand(N, N))
    assert left[aten.where.self] == 1


def test_without_the_operator_products_stay() -> None:
    _, left = passed(mm, rand(N, N), rand(N, N), replaces=False)
    assert left == Counter({aten.mm.default: 1})
    _, left = passed(lambda c, a, b: th.relu(th.addmm(c, a, b)), rand(N), rand(N, N), rand(N, N), replaces=False)
    assert left == Counter({aten.addmm.default: 1, aten.relu.default: 1})


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
    for bias in (rand(N), rand(N, N)):
        _, left = passed(lambda c, a, b: th.addmm(c, a, b, **factors), bias, rand(N, inner), rand(inner, N))
        assert left == Counter({aten.addmm.default: 1})


def test_addmm_onto_a_matrix_is_a_sum() -> None:
    _, left = passed(lambda c, a, b: th.addmm(c, a, b), rand(N, N), rand(N, N), rand(N, N))
    assert left == Counter({aten.add.Tensor: 1, ours(): 1})
    _, left = passed(lambda c, a, b: th.addmm(c, a, b), rand(N, 1), rand(N, N), rand(N, N))
    assert left == Counter({aten.addmm.default: 1})


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 20, 30), (20, 1, 30), (20, 30, 1), (1, 1, 9), (1, 9, 1), (9, 1, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("replaces", [False, True])
def test_thin_products_become_loops(rows: int, inner: int, columns: int, replaces: bool) -> None:
    """A critic's last layer has one output: its gradients are products with one row, column or term."""
    a, b, bias = rand(rows, inner), rand(inner, columns), rand(columns)
    cases: list[tuple[Callable[..., Any], tuple[th.Tensor, ...]]] = [
        (mm, (a, b)),
        (mm_of_transposed_left, (a.t().contiguous(), b)),
        (mm_of_transposed_right, (a, b.t().contiguous())),
        (lambda c, x, y: th.addmm(c, x, y), (bias, a, b)),
        (lambda c, x, y: th.addmm(c, x, y.permute(1, 0)), (bias, a, b.t().contiguous())),
    ]
    passed(lambda c, x, y: th.addmm(c, x, y), rand(1), a, b, replaces=replaces)
    for function, inputs in cases:
        _, left = passed(function, *inputs, replaces=replaces)
        assert not left[aten.mm.default] and not left[aten.addmm.default] and not left[ours()]


def test_thin_products_of_large_sizes_are_exact_enough() -> None:
    passed(mm, rand(1, 4096), rand(4096, 300))
    passed(mm, rand(300, 4096), rand(4096, 1))


def columns_computed(module: GraphModule) -> list[int]:
    return [node.meta["val"].shape[1] for node in module.graph.find_nodes(op="call_function", target=ours())]


def test_only_the_columns_that_are_used_are_computed() -> None:
    """Of the gradient of a critic's input, those of the actions."""
    module, _ = passed(lambda a, b: th.mm(a, b)[:, 60:77], rand(50, 40), rand(40, 77))
    assert columns_computed(module) == [17]
    passed(lambda a, b: th.mm(a, b)[:, -3:], rand(50, 40), rand(40, 77))
    passed(lambda a, b: th.mm(a, b)[:, 1:70:3], rand(50, 40), rand(40, 77))
    passed(lambda a, b: th.mm(a, b.permute(1, 0))[:, 76:], rand(50, 40), rand(77, 40))  # thin then


def test_only_the_columns_that_are_used_of_a_sum_are_computed() -> None:
    """The gradients of two critics, as Inductor hands them over, and as they are written."""
    inputs = rand(50, 40), rand(40, 77), rand(50, 30), rand(30, 77)
    module, left = passed(lambda a, b, c, d: th.addmm(th.mm(a, b), c, d)[:, 60:], *inputs)
    assert columns_computed(module) == [17, 17] and left[aten.add.Tensor] == 1
    module, left = passed(lambda a, b, c, d: (th.mm(a, b) + th.mm(c, d))[:, 60:], *inputs)
    assert columns_computed(module) == [17, 17] and left[aten.add.Tensor] == 1
    passed(lambda a, b, c, d: (th.mm(a, b) + th.mm(c, d))[:, 60:], *inputs[:3], rand(30, 1))  # one column for all


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: th.mm(a, b)[10:20],
        lambda a, b: (th.mm(a, b)[:, 60:], th.mm(a, b)[:, :60]),
        lambda a, b: (lambda product: (product[:, 60:], product[:, :60]))(th.mm(a, b)),
        lambda a, b: (lambda product: (product[:, 60:], product))(th.mm(a, b)),
        lambda a, b: (lambda product: (product + product)[:, 60:])(th.mm(a, b)),
        lambda a, b: (lambda product: ((product + th.mm(a, b))[:, 60:], product))(th.mm(a, b)),
        lambda a, b: (lambda total: (total[:, 60:], total))(th.mm(a, b) + th.mm(a, b)),
        lambda a, b: (th.mm(a, b) + 1.0)[:, 60:],
        lambda a, b: (th.mm(a, b) + b[:1])[:, 60:],
        lambda a, b: th.add(th.mm(a, b), th.mm(a, b), alpha=2)[:, 60:],
        lambda a, b: th.addmm(th.mm(a, b), a, b)[:, 60:],
        lambda a, b: aten.slice.Tensor(th.mm(a, b)),
        lambda a, b: aten.slice.Tensor(th.mm(a, b), -1, 60, 77),
    ],
)
def test_other_slices(function: Callable[..., Any]) -> None:
    passed(function, rand(50, 40), rand(40, 77))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.sampled_from("martsb")), min_size=2))
def test_every_graph_stays_right(steps: list[tuple[int, int, str]]) -> None:
    """Whatever depends on whatever."""

    def network(*inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        known = list(inputs[:3])
        for i, j, kind in steps:
            one, other = known[i % len(known)], known[j % len(known)]
            if kind == "m":
                known.append(th.mm(one, other) / 3.0)
            elif kind == "a":
                known.append(th.addmm(inputs[3], one, other) / 3.0)
            elif kind == "b":
                known.append(th.addmm(other, one, other) / 3.0)
            elif kind == "r":
                known.append(th.relu(th.mm(one, other)) / 3.0)
            elif kind == "s":
                known.append(th.cat([(th.mm(one, other) + th.mm(other, one))[:, 2:], one[:, :2]], 1) / 3.0)
            else:
                known.append(one.permute(1, 0))
        return tuple(known)

    passed(network, rand(6, 6), rand(6, 6), rand(6, 6), rand(6))


@pytest.mark.parametrize(
    ("capability", "processor", "expected"),
    [
        ("AVX512", "vendor_id : AuthenticAMD\nmodel name : AMD EPYC", True),
        ("AVX2", "vendor_id : AuthenticAMD", True),
        ("AVX512", "vendor_id : GenuineIntel", False),
        ("DEFAULT", "vendor_id : AuthenticAMD", False),
        ("DEFAULT", "", False),
    ],
)
def test_where_ours_are_faster(
    monkeypatch: pytest.MonkeyPatch, capability: str, processor: str, expected: bool
) -> None:
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(build, "processor", lambda: processor)
    assert matmul.ours_are_faster() == expected


def test_unknown_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Any, *args: Any, **kwargs: Any) -> str:
        raise PermissionError

    monkeypatch.setattr(matmul.Path, "read_text", unreadable)
    assert isinstance(matmul.ours_are_faster(), bool)
