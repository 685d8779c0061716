"""``sb3_softsac.execution.graph_passes``: equal numbers, scalars computed once."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_softsac.execution.cpp import matmul
from sb3_softsac.execution.graph_passes import GraphPasses, compute_scalars_once

pytestmark = pytest.mark.compiler

aten = th.ops.aten


def adam_like(step: th.Tensor, rate: th.Tensor, weight: th.Tensor, gradient: th.Tensor) -> tuple[th.Tensor, ...]:
    step = step + 1.0
    size = rate / (1.0 - 0.9**step)
    return weight - size * gradient / (1.0 - 0.999**step).sqrt(), step


def traced(function: Callable[..., Any], *inputs: th.Tensor) -> GraphModule:
    module = make_fx(function, tracing_mode="fake")(*inputs)
    expected = module(*inputs)
    compute_scalars_once(module.graph)
    module.graph.lint()
    module.recompile()
    for one, other in zip(expected, module(*inputs), strict=True):
        assert one.shape == other.shape
        th.testing.assert_close(other, one, atol=0.0, rtol=0.0)
    return module


def uses(module: GraphModule) -> list[tuple[Any, Any]]:
    """Scalars that are used in something larger: the operators of both."""
    found = []
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            small, large = source.meta["val"].numel() == 1, node.op == "call_function" and node.meta["val"].numel() > 1
            if small and large and source.op != "placeholder":
                found.append((source.target, node.target))
    return found


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_come_from_memory(shape: tuple[int, ...]) -> None:
    inputs = th.full(shape, 4.0), th.tensor(1e-3), th.randn(20, 30), th.randn(20, 30)
    module = traced(adam_like, *inputs)
    (vector,) = module.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert vector.meta["val"].shape == (2,), "the size of the step and the root of the correction"
    wanted = [(source, target) for source, target in uses(module) if target is not aten.cat.default]
    assert {source for source, _ in wanted} == {aten.reshape.default}
    powers = [node for node in module.graph.nodes if node.target is aten.pow.Scalar]
    assert len(powers) == 2 and all(node < vector for node in powers)


def test_what_depends_on_more_than_scalars_stays() -> None:
    def function(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, ...]:
        mean = b.mean()
        return b * (a * mean), b * th.rand(()), b + mean

    module = make_fx(function, tracing_mode="fake")(th.tensor(2.0), th.randn(8, 9))
    before = [node.name for node in module.graph.nodes]
    compute_scalars_once(module.graph)
    assert [node.name for node in module.graph.nodes] == before


def test_scalars_of_other_types_stay() -> None:
    """They would all become the type of the first."""

    def function(a: th.Tensor, i: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, ...]:
        return b * (i + 1), b * (a + 1.0), b.double() * (i.double() + 0.5)

    module = traced(function, th.tensor(2.0), th.tensor(3), th.randn(8, 9))
    (vector,) = module.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert len(set(vector.args[0])) == 1


def one_power(step: th.Tensor, rate: th.Tensor, weight: th.Tensor, gradient: th.Tensor) -> tuple[th.Tensor, ...]:
    return (weight - rate * gradient / (1.0 - 0.9**step),)


@pytest.mark.parametrize("function", [adam_like, one_power])
def test_generated_code_has_no_power_in_a_loop(function: Callable[..., Any]) -> None:
    """With as few scalars as these Inductor could compute a concatenation where it is used."""
    options = {"post_grad_custom_post_pass": GraphPasses()}
    inputs = th.tensor(4.0), th.tensor(1e-3), th.randn(20, 30), th.randn(20, 30)
    with th._inductor.config.patch(fx_graph_cache=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        result, (code,) = run_and_get_code(th.compile(function, options=options, fullgraph=True), *inputs)
    th.testing.assert_close(result[0], function(*inputs)[0])
    kernels = code.split("async_compile.cpp")[1:]
    loops = [kernel for kernel in kernels if "Vectorized<float>::loadu" in kernel]
    assert loops and any("std::pow" in kernel for kernel in kernels)
    for kernel in loops:
        assert "std::pow" not in kernel[kernel.index("for(int64_t") :]


def test_lower_precision_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "ours_are_faster", lambda: True)
    before = th.get_float32_matmul_precision()
    keys = set()
    try:
        for precision, replaced in (("highest", True), ("medium", False), ("high", False)):
            th.set_float32_matmul_precision(precision)
            passes = GraphPasses()
            keys.add(passes.uuid())
            module = make_fx(th.mm, tracing_mode="fake")(th.randn(9, 9), th.randn(9, 9))
            passes(module.graph)
            left = module.graph.find_nodes(op="call_function", target=aten.mm.default)
            assert bool(left) != replaced
    finally:
        th.set_float32_matmul_precision(before)
    assert len(keys) == 2, "code of one must not be found for the other"


def test_key_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that calls our operator must not be found where it is not used."""
    keys = []
    for slow in (True, False, True):
        monkeypatch.setattr(matmul, "ours_are_faster", lambda slow=slow: slow)
        keys.append(GraphPasses().uuid())
    assert keys[0] == keys[2] != keys[1]


def test_products_are_not_built_where_torch_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(matmul, "ours_are_faster", lambda: False)
    monkeypatch.setattr(matmul, "operator_of_products", fail)
    GraphPasses()


class Layers(th.nn.Module):
    """Its hidden matrix is a sum of which Inductor finds most parts column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = th.nn.ParameterList(th.randn(24, 24) for _ in range(4))
        self.bias = th.nn.Parameter(th.randn(24))

    def forward(self, x: th.Tensor) -> th.Tensor:
        first, second, third, last = self.weights
        hidden = th.relu(x @ first + (second @ x.t()).t() + (third @ x.t()).t())
        return th.relu(th.addmm(self.bias, hidden, last)).square().sum()


def test_generated_code_of_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the way of a compiled update: through Inductor's C++, with our products."""
    monkeypatch.setattr(matmul, "ours_are_faster", lambda: True)
    layers, x = Layers(), th.randn(24, 24)
    parameters = list(layers.parameters())
    expected = th.autograd.grad(layers(x), parameters)
    options = {"post_grad_custom_post_pass": GraphPasses(), "cpp_wrapper": True}
    compiled = th.compile(layers, options=options, fullgraph=True)
    with th._inductor.config.patch(fx_graph_cache=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        actual = th.autograd.grad(compiled(x), parameters)
    for one, other in zip(expected, actual, strict=True):
        th.testing.assert_close(other, one, atol=1e-2, rtol=1e-4)


def test_newer_settings_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to answer the older question once one of them has been used."""
    monkeypatch.setattr(matmul, "ours_are_faster", lambda: True)
    before = th.backends.mkldnn.matmul.fp32_precision
    th.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        module = make_fx(th.mm, tracing_mode="fake")(th.randn(9, 9), th.randn(9, 9))
        GraphPasses()(module.graph)
        assert module.graph.find_nodes(op="call_function", target=aten.mm.default)
    finally:
        th.backends.mkldnn.matmul.fp32_precision = before
