"""
Independent matrix products of the same shapes, side by side: each thread computes one whole.

An update has pairs of them, since it has two critics. If all threads share each product instead, they wait for each
other after every one, and read what the others have just written. Where cores have far caches, that takes as long as
the products themselves: see ``benchmarks/results/speed``.
"""

import functools
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable

import torch as th
from torch._inductor.codecache import CppCodeCache
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

aten = th.ops.aten

# Compiled by Inductor's own builder, and kept in its cache
SOURCE = r"""
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Scalars = c10::List<std::optional<at::Scalar>>;
using Linear = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, std::string_view, Scalars,
                      std::optional<std::string_view>);

Tensor onednn_product(const Tensor& a, const Tensor& b, const MaybeTensor& bias, bool relu) {
  static auto linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
  return linear.call(a, b.t(), bias, relu ? "relu" : "none", Scalars(), "");
}

Tensor product(const Tensor& a, const Tensor& b, const MaybeTensor& bias, bool relu) {
  Tensor out = bias ? at::addmm(*bias, a, b) : at::mm(a, b);
  return relu ? out.relu_() : out;
}

std::vector<Tensor> products(at::TensorList a, at::TensorList b, at::TensorList bias, bool relu, bool onednn) {
  std::vector<Tensor> out(a.size());
  at::parallel_for(0, a.size(), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowAutograd without_autograd;  // other threads begin with it on
    for (int64_t i = begin; i < end; i++) {
      MaybeTensor with = bias.empty() ? MaybeTensor() : MaybeTensor(bias[i]);
      out[i] = (onednn ? onednn_product : product)(a[i], b[i], with, relu);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(sb3_softsac, m) {
  m.def("products(Tensor[] a, Tensor[] b, Tensor[] bias, bool relu, bool onednn) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(sb3_softsac, CPU, m) { m.impl("products", &products); }
"""


@functools.cache
def operator_of_products() -> th._ops.OpOverload | None:
    """
    :return: operator that takes N matrices (R, K), N matrices (K, C), no or N biases (C,), whether relu follows and
        whether oneDNN is to be used, and gives N products (R, C); None where it cannot be built. It is there from the
        first call on
    """

    def shapes(
        a: list[th.Tensor], b: list[th.Tensor], bias: list[th.Tensor], relu: bool, onednn: bool
    ) -> list[th.Tensor]:
        return [left.new_empty(left.shape[0], right.shape[1]) for left, right in zip(a, b, strict=True)]

    try:
        # Code that is built against one version of torch is not for another: the text is the cache's key
        CppCodeCache.load(f"// torch {th.__version__} {th.version.git_version}\n{SOURCE}")
        th.library.register_fake("sb3_softsac::products", shapes)
    except Exception as error:  # compilers and linkers have many ways to fail
        warnings.warn(f"Products are not computed side by side, which is slower: {error}", stacklevel=2)
        return None
    found: th._ops.OpOverload = th.ops.sb3_softsac.products.default
    return found


def put_side_by_side(graph: Graph, products: list[Node], n: int, use_onednn: Callable[[int], bool]) -> None:
    """
    Replace each N products of one kind that do not depend on each other by one call.

    :param graph: graph of ATen operators
    :param products: nodes ``mm(a, b)`` and ``addmm(bias, a, b)``
    :param n: N, number of threads
    :param use_onednn: whether oneDNN is to be used, by the multiplications of one product
    """
    if sum(th.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in graph.nodes) > 1:
        return  # layers such as dropout would draw their random numbers in another order than in an eager update
    kinds = defaultdict(list)
    for node in products:
        operands = [(tuple(arg.meta["val"].shape), arg.meta["val"].stride()) for arg in node.args]  # type: ignore[union-attr]
        kinds[node.target, tuple(operands), _relu_of(node) is not None].append(node)
    for same in kinds.values():
        while len(same) >= n:
            group = _independent(graph, same, n)
            if len(group) == n:
                _join(graph, group, use_onednn)
            done = group if len(group) == n else same[:1]
            same[:] = [node for node in same if node not in done]


def _independent(graph: Graph, nodes: list[Node], n: int) -> list[Node]:
    """The first node and those that are nearest to it in what they are made from, if there are so many."""
    ancestors, inputs = _ancestors(graph)
    sources = {node: ancestors[node] & inputs for node in nodes}
    group: list[Node] = []
    for node in sorted(nodes, key=lambda node: (sources[node] ^ sources[nodes[0]]).bit_count()):
        if len(group) < n and not any(_depends(ancestors[node], ancestors[other]) for other in group):
            group.append(node)
    # A critic's products, forward and backward, are to meet its weights in one core's cache
    return sorted(group, key=lambda node: _bits(sources[node]))


def _ancestors(graph: Graph) -> tuple[dict[Node, int], int]:
    """What each node depends on, itself included, as bits; and those of the graph's inputs."""
    ancestors: dict[Node, int] = {}
    sources = 0
    for i, node in enumerate(graph.nodes):
        ancestors[node] = functools.reduce(operator.or_, (ancestors[before] for before in node.all_input_nodes), 1 << i)
        if node.op == "placeholder":
            sources |= 1 << i
    return ancestors, sources


def _depends(one: int, other: int) -> bool:
    """Whether one of two nodes is an ancestor of the other, by the ancestors of both."""
    return one & other in (one, other)


def _bits(number: int) -> list[int]:
    return [i for i in range(number.bit_length()) if number >> i & 1]


def _relu_of(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is aten.relu.default else None


def _join(graph: Graph, group: list[Node], use_onednn: Callable[[int], bool]) -> None:
    columns = list(zip(*(node.args for node in group), strict=True))
    bias = columns.pop(0) if len(columns) == 3 else ()
    a, b = columns
    relus = [_relu_of(node) for node in group]
    (rows, inner), n_columns = a[0].meta["val"].shape, b[0].meta["val"].shape[1]
    args = (list(a), list(b), list(bias), relus[0] is not None, use_onednn(rows * inner * n_columns))
    target = operator_of_products()
    assert target is not None
    with graph.inserting_before(group[-1]):
        joined = graph.call_function(target, args)
        joined.meta["val"] = [node.meta["val"] for node in group]
        outs = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(group))]
    for node, relu, out in zip(group, relus, outs, strict=True):
        out.meta.update(node.meta)
        (node if relu is None else relu).replace_all_uses_with(out)
        if relu is not None:
            graph.erase_node(relu)
        graph.erase_node(node)
    stable_topological_sort(graph)
