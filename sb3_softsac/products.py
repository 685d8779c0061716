"""
Matrix products of a compiled update, on the CPU.

PyTorch's wheels take float32 products from MKL, which does not use AVX-512 on processors that are not Intel's. oneDNN,
part of the same wheels, does: twice the rate on an AMD EPYC (``benchmarks/speed.py`` measures both). Products with a
single row, column or term, such as a critic's last layer, are faster as part of the loops around them. And of the
gradient of a critic's input, the actor's update needs the actions' columns only.
"""

import platform
from pathlib import Path
from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

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
    """

    def __init__(self, use_onednn: bool):
        self.use_onednn = use_onednn

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is aten.mm.default:
                _drop_unused_columns(graph, node)
        for node in list(graph.nodes):
            if node.target is aten.mm.default:
                (a, b), bias = node.args, None
            elif node.target is aten.addmm.default and not node.kwargs and node.args[0].meta["val"].dim() == 1:
                bias, a, b = node.args
            else:
                continue
            if not all(_is_plain(operand.meta["val"]) for operand in (a, b, *([] if bias is None else [bias]))):
                continue
            (rows, inner), columns = a.meta["val"].shape, b.meta["val"].shape[1]
            with graph.inserting_before(node):
                if min(rows, inner, columns) == 1:
                    _replace(node, _thin_product(graph, a, b, bias))
                elif (
                    self.use_onednn
                    and (bias is None or len(bias.meta["val"]) == columns)
                    and rows * inner * columns >= MIN_LARGE
                ):
                    _use_onednn(graph, node, a, b, bias)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), str(self.use_onednn))


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
