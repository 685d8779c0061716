"""
Matrix products of a compiled update on the CPU.

PyTorch's wheels take float32 products from MKL. It does not use AVX-512 on processors of other makers than Intel, and
is slow for matrices with few columns, of which an update has many. On AMD's processors, products of our own
(``matmul.cpp``) replace them. On all processors, products with a single row, column or term, such as a critic's last
layer, become part of the loops around them. And the actor's update computes only the columns that it needs of the
gradient of a critic's input: those of the actions.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch as th
from torch.fx import Graph, Node

from sb3_softsac.execution.cpp import build

HEADER, SOURCE = Path(__file__).with_name("matmul.h"), Path(__file__).with_name("matmul.cpp")

aten = th.ops.aten


def ours_are_faster() -> bool:
    """Whether our own products are known to be faster than torch's on this processor."""
    return build.suits_processor() and "AuthenticAMD" in build.processor()


@functools.cache
def operator_of_products() -> Any:
    """
    Build the operator ``sb3_softsac::product`` of float32 matrices on the CPU. It takes

    - two matrices, (R, K) and (K, C),
    - a layer's bias (C,), or None, and whether a ReLU follows,
    - the output (R, C) of a ReLU, if the product is its gradient, or None.

    :return: the operator, whose result is (R, C); None where it cannot be built
    """

    def fake(a: th.Tensor, b: th.Tensor, bias: th.Tensor | None, relu: bool, relu_of: th.Tensor | None) -> th.Tensor:
        return a.new_empty(a.shape[0], b.shape[1])

    try:
        build.load(HEADER, SOURCE)
        th.library.register_fake("sb3_softsac::product", fake)
    except build.NoCompiler:  # Inductor cannot compile the graph either, and has a warning
        return None
    except Exception as error:  # compilers and linkers have many ways to fail
        warnings.warn(f"Matrix products are torch's, which are slower here: {error}", stacklevel=2)
        return None
    return th.ops.sb3_softsac.product.default


def exact_products_are_wanted() -> bool:
    """Whether float32 products use full precision; lower precisions are left to torch."""
    products: Any = getattr(th.backends.mkldnn, "matmul", None)
    if not hasattr(products, "fp32_precision"):  # before torch 2.9. Where it is there, the older getter may raise
        return th.get_float32_matmul_precision() == "highest"
    return products.fp32_precision in ("none", "ieee")


def replace_products(graph: Graph, operator: Any) -> None:
    """
    :param graph: graph of ATen operators
    :param operator: see :func:`operator_of_products`; None: only thin products are replaced
    """
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        _separate_sum(graph, node)
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        _drop_unused_columns(graph, node)
    for node in _products(graph):
        *bias, a, b = node.args
        with graph.inserting_before(node):
            if 1 in (*a.meta["val"].shape, *b.meta["val"].shape):
                _replace(node, _thin_product(graph, a, b, bias[0] if bias else None))
            elif operator is not None:
                _use(operator, graph, node, a, b, bias[0] if bias else None)


def _products(graph: Graph) -> list[Any]:
    """Nodes ``mm(a, b)`` and ``addmm(bias, a, b)`` of plain matrices and a whole bias (one element for each column)."""
    found = []
    for node in graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        values = [arg.meta["val"] for arg in node.args]
        if not all(map(_is_plain, values)):
            continue
        if len(values) == 2 or (values[0].shape == values[2].shape[1:] and values[0].stride() == (1,)):
            found.append(node)
    return found


def _is_plain(value: th.Tensor) -> bool:
    is_static = all(isinstance(size, int) for size in value.shape)
    is_dense = 1 in value.stride() and 0 not in value.stride()
    return value.dtype == th.float32 and value.device.type == "cpu" and is_static and is_dense


def call(graph: Graph, target: Any, *args: Any) -> Node:
    """A call of an ATen operator with nodes and constants, at the place where the graph inserts."""
    new = graph.call_function(target, args)
    new.meta["val"] = target(*map(_value, args))
    return new


def _value(arg: Any) -> Any:
    if isinstance(arg, list):
        return list(map(_value, arg))
    return arg.meta["val"] if isinstance(arg, Node) else arg


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _separate_sum(graph: Graph, node: Node) -> None:
    """``addmm(c, a, b)`` with a whole matrix is ``c + mm(a, b)``."""
    c, a, b = node.args
    if not node.kwargs and c.meta["val"].shape == node.meta["val"].shape:  # type: ignore[union-attr]
        with graph.inserting_before(node):
            _replace(node, call(graph, aten.add.Tensor, c, call(graph, aten.mm.default, a, b)))


def _drop_unused_columns(graph: Graph, node: Node) -> None:
    """``(mm(a, b) + mm(c, d))[:, i:j]`` is ``mm(a, b[:, i:j]) + mm(c, d[:, i:j])``."""
    source, *where = node.args
    if node.kwargs or where[:1] != [1] or not isinstance(source, Node):
        return
    terms = list(source.args) if source.target is aten.add.Tensor and not source.kwargs else [source]
    used_once = all(isinstance(term, Node) and len(term.users) == 1 for term in (source, *terms))
    if not used_once or any(term.target is not aten.mm.default for term in terms):  # type: ignore[union-attr]
        return
    if any(term.meta["val"].shape != source.meta["val"].shape for term in terms):  # type: ignore[union-attr]
        return
    with graph.inserting_before(source):
        products = []
        for term in terms:
            a, b = term.args  # type: ignore[union-attr]
            products.append(call(graph, aten.mm.default, a, call(graph, aten.slice.Tensor, b, *where)))
        _replace(node, products[0] if len(products) == 1 else call(graph, aten.add.Tensor, *products))
    for unused in dict.fromkeys((source, *terms)):
        graph.erase_node(unused)


def _thin_product(graph: Graph, a: Node, b: Node, bias: Node | None) -> Node:
    def transposed(matrix: Node) -> Node:
        return call(graph, aten.permute.default, matrix, [1, 0])

    if a.meta["val"].shape[1] == 1:
        product = call(graph, aten.mul.Tensor, a, b)
    elif b.meta["val"].shape[1] == 1:
        product = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, a, transposed(b)), [1], True)
    else:
        product = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, transposed(a), b), [0], True)
    return product if bias is None else call(graph, aten.add.Tensor, product, bias)


def _use(operator: Any, graph: Graph, node: Node, a: Node, b: Node, bias: Node | None) -> None:
    users = list(node.users)
    user = users[0] if len(users) == 1 else node
    relu, relu_of = user.target is aten.relu.default, _relu_of(user, node)
    last = user if relu or relu_of is not None else node
    with graph.inserting_before(last):
        _replace(last, call(graph, operator, a, b, bias, relu, relu_of))
    if last is not node:
        graph.erase_node(node)


def _relu_of(user: Node, gradient: Node) -> Node | None:
    """The output of a ReLU, if the user is its gradient: ``where(output <= 0, 0, gradient)``."""
    if user.target is not aten.where.self or user.args[2] is not gradient:
        return None
    condition, zero = user.args[:2]
    if getattr(condition, "target", None) is not aten.le.Scalar or condition.args[1] != 0:  # type: ignore[union-attr]
        return None
    if getattr(zero, "target", None) is not aten.full.default or zero.args[1] != 0.0:  # type: ignore[union-attr]
        return None
    made = condition.args[0]  # type: ignore[union-attr]
    kinds = {(n.meta["val"].dtype, n.meta["val"].shape, n.meta["val"].device) for n in (made, gradient, user)}  # type: ignore[union-attr]
    return made if len(kinds) == 1 and made.meta["val"].is_contiguous() else None  # type: ignore[union-attr,return-value]
