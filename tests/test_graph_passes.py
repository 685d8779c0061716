"""``sb3_softsac.execution.graph_passes``: where products are replaced, and what Inductor makes of it."""

import warnings

import pytest
import torch as th
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_softsac.execution.cpp import matmul
from sb3_softsac.execution.graph_passes import GraphPasses

pytestmark = pytest.mark.compiler

aten = th.ops.aten


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
