"""What is done to the graph of a compiled update on the CPU, before Inductor generates code."""

from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from sb3_softsac.execution.cpp import matmul


class GraphPasses(CustomGraphPass):
    """For Inductor's option ``post_grad_custom_post_pass``."""

    def __init__(self) -> None:
        # Built here already: code from Inductor's cache calls it, too
        self._operator = matmul.operator_of_products() if matmul.ours_are_faster() else None

    def _operator_if_exact(self) -> Any:
        return self._operator if matmul.exact_products_are_wanted() else None

    def __call__(self, graph: Graph) -> None:
        matmul.replace_products(graph, self._operator_if_exact())

    def uuid(self) -> Any:
        files = (__file__, matmul.__file__, str(matmul.HEADER), str(matmul.SOURCE))
        return get_hash_for_files(files, str(self._operator_if_exact()))
