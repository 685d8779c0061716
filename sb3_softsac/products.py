"""
Matrix products of a compiled update, on the CPU.

PyTorch's wheels take float32 products from MKL, which does not use AVX-512 on processors that are not Intel's. oneDNN,
part of the same wheels, does: twice the rate on an AMD EPYC (``benchmarks/speed.py`` measures both). Products with a
single row, column or term, such as a critic's last layer, are faster as part of the loops around them. And of the
gradient of a critic's input, the actor's update needs the actions' columns only. What is independent and of the same
shapes is computed side by side, where there are threads: see ``side_by_side.py``.
"""

import platform
from pathlib import Path
from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from sb3_softsac import side_by_side
from sb3_softsac.side_by_side import operator_of_products, put_side_by_side

MIN_LARGE = 2_000_000  # below that many multiplications, oneDNN's longer call costs more than it saves

aten = th.ops.aten


def onednn_is_faster() -> bool:
    """
    :return: whether oneDNN is faster than torch's BLAS here, for float32
    """
    return (
        th.backends.mkldnn.is_available()
        and th.backends.mkl.is_available()
        and th.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()[:1000]
    except OSError:
        return platform.processor()


class Products(CustomGraphPass):
    """
    A pass of Inductor that replaces float32 ``mm`` and ``addmm`` of a graph.

    :param use_onednn: large ones (and a ``relu`` behind) become oneDNN's linear layer
    :param n_threads: that the compiled code will run with
    """

    def __init__(self, use_onednn: bool, n_threads: int = 1):
        self.use_onednn = use_onednn
        # Asked for here already, since code from Inductor's cache calls it, too
        self.n_threads = n_threads if n_threads > 1 and operator_of_products() is not None else 1

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is aten.mm.default:
                _drop_unused_columns(graph, node)
        for node in _products(graph):
            *bias, a, b = node.args
            if 1 in (*a.meta["val"].shape, *b.meta["val"].shape):
                with graph.inserting_before(node):
                    _replace(node, _thin_product(graph, a, b, bias[0] if bias else None))
        if self.n_threads > 1:
            put_side_by_side(graph, _products(graph), self.n_threads, self._pays)
        for node in _products(graph):
            *bias, a, b = node.args
            (rows, inner), columns = a.meta["val"].shape, b.meta["val"].shape[1]
            if self._pays(rows * inner * columns):
                with graph.inserting_before(node):
                    _use_onednn(graph, node, a, b, bias[0] if bias else None)

    def _pays(self, multiplications: int) -> bool:
        return self.use_onednn and multiplications >= MIN_LARGE

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, side_by_side.__file__), f"{self.use_onednn}, {self.n_threads}")


def _products(graph: Graph) -> list[Any]:
    """Nodes ``mm(a, b)`` and ``addmm(bias, a, b)`` of plain matrices and a whole bias (one element for each column)."""
    found = []
    for node in graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        values = [arg.meta["val"] for arg in node.args]
        if not all(map(_is_plain, values)):
            continue
        if len(values) == 2 or values[0].shape == values[2].shape[1:]:
            found.append(node)
    return found


def _is_plain(value: th.Tensor) -> bool:
    is_static = all(isinstance(size, int) for size in value.shape)
    is_dense = 1 in value.stride() and 0 not in value.stride()
    return value.dtype == th.float32 and value.device.type == "cpu" and is_static and is_dense


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    new = graph.call_function(target, args)
    new.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return new


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _transposed(graph: Graph, matrix: Node) -> Node:
    if matrix.target is aten.permute.default and list(matrix.args[1]) == [1, 0]:  # type: ignore[arg-type]
        return matrix.args[0]  # type: ignore[return-value]
    return _call(graph, aten.permute.default, matrix, [1, 0])


def _drop_unused_columns(graph: Graph, node: Node) -> None:
    """``mm(a, b)[:, i:j]`` is ``mm(a, b[:, i:j])``."""
    a, b = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    slices = list(node.users)
    if len(slices) != 1 or slices[0].target is not aten.slice.Tensor or slices[0].args[1:2] != (1,) or slices[0].kwargs:
        return
    with graph.inserting_before(node):
        product = _call(graph, aten.mm.default, a, _call(graph, aten.slice.Tensor, b, *slices[0].args[1:]))
    _replace(slices[0], product)
    graph.erase_node(node)


def _thin_product(graph: Graph, a: Node, b: Node, bias: Node | None) -> Node:
    if a.meta["val"].shape[1] == 1:
        product = _call(graph, aten.mul.Tensor, a, b)
    elif b.meta["val"].shape[1] == 1:
        terms = _call(graph, aten.mul.Tensor, a, _transposed(graph, b))
        product = _call(graph, aten.sum.dim_IntList, terms, [1], True)
    else:
        terms = _call(graph, aten.mul.Tensor, _transposed(graph, a), b)
        product = _call(graph, aten.sum.dim_IntList, terms, [0], True)
    return product if bias is None else _call(graph, aten.add.Tensor, product, bias)


def _use_onednn(graph: Graph, node: Node, a: Node, b: Node, bias: Node | None) -> None:
    users = list(node.users)
    relu = users[0] if len(users) == 1 and users[0].target is aten.relu.default else None
    args: Any = (a, _transposed(graph, b), bias, "none" if relu is None else "relu", [], "")
    new = graph.call_function(th.ops.mkldnn._linear_pointwise.default, args)
    new.meta.update(node.meta)
    new.meta["should_fallback"] = True  # Inductor's own lowering is for constant weights
    if relu is not None:
        _replace(relu, new)
        graph.erase_node(node)
    else:
        _replace(node, new)
