"""
oneDNN for the matrix products of a compiled update, where it is faster than the BLAS that torch calls.

PyTorch's wheels take float32 products from MKL, which does not use AVX-512 on processors that are not Intel's. oneDNN,
part of the same wheels, does: twice the rate on an AMD EPYC (``benchmarks/speed.py`` measures both).
"""

import platform
from pathlib import Path
from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

MIN_PRODUCTS = 2_000_000  # below that many multiplications, oneDNN's longer call costs more than it saves

aten = th.ops.aten


def is_faster() -> bool:
    """
    :return: whether oneDNN is faster than torch's BLAS here, for float32
    """
    return (
        th.backends.mkldnn.is_available()
        and th.backends.mkl.is_available()
        and th.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _vendor()
    )


def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()[:1000]
    except OSError:
        return platform.processor()


class OneDNNProducts(CustomGraphPass):
    """Replaces large float32 ``mm`` and ``addmm`` (and a ``relu`` behind it) of a graph by oneDNN's linear layer."""

    def __call__(self, graph: th.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten.mm.default:
                (a, b), bias = node.args, None
            elif node.target is aten.addmm.default and not node.kwargs and node.args[0].meta["val"].dim() == 1:
                bias, a, b = node.args
            else:
                continue
            if all(_is_matrix(operand.meta["val"]) for operand in (a, b)) and _is_large(a, b):
                self._replace(graph, node, a, b, bias)

    def _replace(self, graph: th.fx.Graph, node: Any, a: Any, b: Any, bias: Any) -> None:
        users = list(node.users)
        relu = bias is not None and len(users) == 1 and users[0].target is aten.relu.default
        old = users[0] if relu else node
        with graph.inserting_before(node):
            if b.target is aten.permute.default and list(b.args[1]) == [1, 0]:
                weight = b.args[0]
            else:
                weight = graph.call_function(aten.permute.default, (b, [1, 0]))
                weight.meta["val"] = b.meta["val"].t()
            new = graph.call_function(
                th.ops.mkldnn._linear_pointwise.default, (a, weight, bias, "relu" if relu else "none", [], "")
            )
        new.meta.update(old.meta)
        new.meta["should_fallback"] = True  # Inductor's own lowering is for constant weights
        old.replace_all_uses_with(new)
        graph.erase_node(old)
        if relu:
            graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_matrix(value: th.Tensor) -> bool:
    dense = 1 in value.stride() and all(isinstance(size, int) for size in value.shape)
    return value.dtype == th.float32 and value.device.type == "cpu" and dense


def _is_large(a: Any, b: Any) -> bool:
    (rows, inner), columns = a.meta["val"].shape, b.meta["val"].shape[1]
    return bool(rows * inner * columns >= MIN_PRODUCTS and min(rows, inner, columns) > 1)
