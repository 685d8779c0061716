"""Passes over the graph of a compiled update on the CPU, before Inductor generates code."""

from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from sb3_softsac.execution.cpp import matmul
from sb3_softsac.execution.cpp.matmul import call

aten = th.ops.aten


class GraphPasses(CustomGraphPass):
    """For Inductor's option ``post_grad_custom_post_pass``."""

    def __init__(self) -> None:
        # Built here already: code from Inductor's cache calls it, too
        self._operator = matmul.operator_of_products() if matmul.ours_are_faster() else None

    def _operator_if_exact(self) -> Any:
        return self._operator if matmul.exact_products_are_wanted() else None

    def __call__(self, graph: Graph) -> None:
        matmul.replace_products(graph, self._operator_if_exact())
        compute_scalars_once(graph)

    def uuid(self) -> Any:
        files = (__file__, matmul.__file__, str(matmul.HEADER), str(matmul.SOURCE))
        return get_hash_for_files(files, str(self._operator_if_exact()))


def compute_scalars_once(graph: Graph) -> None:
    """
    Compute scalars that depend on scalar inputs only once, before everything else. Inductor would compute them wherever
    they are used, in the innermost loops; Adam's bias corrections are powers of the number of steps.

    :param graph: graph of ATen operators
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    known = set(filter(_is_scalar, inputs))
    scalars = []
    for node in graph.nodes:
        if _is_scalar(node) and _is_pointwise(node) and known.issuperset(node.all_input_nodes):
            known.add(node)
            scalars.append(node)
    wanted = {node: list(filter(_is_large, node.users)) for node in scalars}
    wanted = {node: users for node, users in wanted.items() if users}
    if not wanted:
        return
    last = inputs[-1]
    for node in scalars:
        last.append(node)
        last = node
    with graph.inserting_before(last.next):
        # A concatenation of more than one tensor is always written to memory, and read from there
        parts = [call(graph, aten.reshape.default, node, [1]) for node in wanted]
        vector = call(graph, aten.cat.default, parts if len(parts) > 1 else parts * 2)
        for i, (node, users) in enumerate(wanted.items()):
            element = call(graph, aten.select.int, vector, 0, i)
            scalar = call(graph, aten.reshape.default, element, list(node.meta["val"].shape))
            for user in users:
                user.replace_input_with(node, scalar)


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, th.Tensor) and value.numel() == 1 and value.dtype == th.float32


def _is_large(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, th.Tensor) and value.numel() > 1


def _is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return th.Tag.pointwise in tags and th.Tag.nondeterministic_seeded not in tags
