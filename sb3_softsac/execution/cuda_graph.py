"""Updates on a GPU, compiled and replayed as CUDA graphs: one launch instead of hundreds."""

import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_softsac.execution.eager import Held, Run
from sb3_softsac.execution.inductor import Inductor
from sb3_softsac.execution.learner import Learner
from sb3_softsac.execution.report import Report
from sb3_softsac.optimizers import Optimizers

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Takes a function without arguments; returns a function that replays it, and the outputs that a replay fills."""


def capture_on(device: th.device) -> Capture:
    """
    :param device: of the function: torch captures what happens on the current device, whichever that is
    :return: captures a function without running it; it must not sync with the device, and has to have run before
    """

    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = th.cuda.CUDAGraph()
        with th.cuda.device(device), th.cuda.graph(graph, stream=th.cuda.Stream(device)):
            outputs = function()
        return graph.replay, outputs

    return capture


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """
    :param function: called with each leaf: what is neither a tuple, a list nor a dict
    :param tree: nested tuples, named tuples, lists and dicts
    :return: the same structure with the function's results
    """
    if isinstance(tree, dict):
        return {key: map_leaves(function, part) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [map_leaves(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """Leaves of a tree, in order, see :func:`map_leaves`."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, th.Tensor) else leaf


def _layout(tree: Any) -> Any:
    """What two trees of inputs must have in common for one to be copied into the other."""
    if isinstance(tree, dict):
        return {key: _layout(part) for key, part in tree.items()}, list(tree)
    if isinstance(tree, tuple | list):
        return type(tree), *map(_layout, tree)
    return None if tree is None else (tree.shape, tree.dtype)


class CudaGraph:
    """
    Calls a function, from the second time on as a graph.

    A graph reads and writes the addresses of its capture. So inputs are copied to fixed places, and the function is
    captured again if a tensor of the state has moved (as an optimiser's does when its state is loaded). A function that
    cannot be captured is called without a graph, with a warning.

    :param function: takes its state and inputs (tensors, in tuples and dicts), changes the state in place, and returns
        tensors and plain values
    :param addresses: takes the state; returns the addresses of all tensors that are read or changed, besides inputs
    :param capture: see :data:`Capture`
    """

    def __init__(self, function: Callable[..., Any], addresses: Callable[[Any], tuple[Any, ...]], capture: Capture):
        self.function = function
        self.n_captures = 0
        self._addresses = addresses
        self._capture = capture
        self._warm = self._failed = False
        self._replay: Callable[[], None] | None = None
        self._outputs: Any = None
        self._inputs: list[th.Tensor | None] = []
        self._key: Any = None

    def __call__(self, held: Any, *args: Any) -> Any:
        if not self._warm or self._failed:  # libraries initialise in the first run, which cannot be captured
            self._warm = True
            return self.function(held, *args)
        key = _layout(args), self._addresses(held)
        if key != self._key:
            own_args = map_leaves(_clone, args)
            self._inputs = leaves(own_args)
            try:
                self._replay, self._outputs = self._capture(lambda: self.function(held, *own_args))
            except RuntimeError as error:  # CUDA's, or out of memory. Nothing has run
                self._failed, self._replay, self._outputs, self._inputs = True, None, None, []
                warnings.warn(
                    f"The update cannot be captured in a CUDA graph and runs without one, which is slower: {error}",
                    stacklevel=2,
                )
                return self.function(held, *args)
            self._key = key
            self.n_captures += 1
        else:
            for own, new in zip(self._inputs, leaves(args), strict=True):
                if own is not None:
                    own.copy_(new, non_blocking=True)
        assert self._replay is not None
        self._replay()
        # The next replay overwrites its outputs
        return map_leaves(_clone, self._outputs)


class CudaGraphs(Inductor):
    """
    Compiles updates, and captures them in graphs.

    :param learner: what is updated
    :param report: is told of compilations
    """

    def __init__(self, learner: Learner, report: Report):
        super().__init__(learner, report)
        self._known_optimizers: Optimizers | None = None
        self._known_networks: list[nn.Module] = []
        self._known_tensors: list[th.Tensor] = []  # of the two

    def _finish(self, run: Run) -> Run:
        self.learner.place_steps()
        return CudaGraph(run, self._addresses, capture_on(self.learner.device))

    def _addresses(self, held: Held) -> tuple[Any, ...]:
        """Where a graph finds what it was not given as inputs."""
        networks = list(self.learner.policy.children())
        if held.optimizers is not self._known_optimizers or networks != self._known_networks:
            # Looking for all tensors takes a while: not each time
            self._known_optimizers, self._known_networks = held.optimizers, networks
            self._known_tensors = self.learner.tensors()
        fixed = [*self._known_tensors, *self.learner.ent_coef.tensors()]
        stored = [] if held.storage is None else leaves(held.storage)
        return [tensor.data_ptr() for tensor in fixed], [(tensor.data_ptr(), tensor.shape) for tensor in stored]
