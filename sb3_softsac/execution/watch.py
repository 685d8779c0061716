"""Sees what has changed in networks since code was compiled for them, or tensors of theirs were handed to C++."""

import itertools
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from typing import Any

import torch as th
from torch import nn

from sb3_softsac.policies import Preprocessing

CONTENTS = ("_modules", "_parameters", "_buffers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# If a user replaces one of these, torch runs the replacement
OWN_METHODS = (
    *("forward", "extract_features", "get_action_dist_params", "sample", "targets"),
    *("outputs", "values", "target", "loss"),  # of critics and their heads
    *("project_to_unit_norm", "own_networks"),
)
# Of actors and critics, besides their modules
ATTRIBUTES = ("use_sde", "separate_log_std_net", "preprocessing", "q_networks")

_END = object()
hooks_of_gradient = attrgetter("_backward_hooks")


class Attributes:
    """Iterates over the present values of some attributes of an object; None for those that it does not have."""

    def __init__(self, owner: Any, names: Iterable[str]):
        self._values = vars(owner)
        self._names = tuple(names)

    def __iter__(self) -> Iterator[Any]:
        return map(self._values.get, self._names)


class Watch:
    """
    Detects changed modules in microseconds, before updates and each action.

    :param modules: networks, watched with all modules inside them
    :param others: further collections to watch
    """

    def __init__(self, modules: Iterable[nn.Module], others: Iterable[Iterable[Any]] = ()):
        roots = list(modules)
        self._modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self._attributes = [vars(module) for module in self._modules]
        self._n_attributes = list(map(len, self._attributes))
        parts = (attributes[name] for attributes in self._attributes for name in CONTENTS)
        networks = [Attributes(root, ATTRIBUTES) for root in roots]
        preprocessings = [vars(root)["preprocessing"] for root in roots if "preprocessing" in vars(root)]
        inputs = [Attributes(each, ("is_box", "scale")) for each in preprocessings if type(each) is Preprocessing]
        norms = [Attributes(module, ("eps",)) for module in self._modules if isinstance(module, nn.RMSNorm)]
        self._collections = [*(some.values() for some in parts if some), *networks, *inputs, *norms, *others]
        self._items = list(self._present_items())
        self._hooks = [attributes[name] for attributes in self._attributes for name in HOOKS]
        self._hooks += [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]
        self._parameters = list(dict.fromkeys(parameter for root in roots for parameter in root.parameters()))

    def _present_items(self) -> Iterator[Any]:
        return itertools.chain(map(type, self._modules), itertools.chain.from_iterable(self._collections), (_END,))

    def is_over(self) -> bool:
        """
        :return: whether a module, its class, a parameter or one of the other items has been replaced, or an attribute
            added (such as a function in place of a method)
        """
        return list(map(len, self._attributes)) != self._n_attributes or not all(
            map(is_, self._present_items(), self._items)
        )

    def sees_hooks(self) -> bool:
        """Whether there are hooks on modules or gradients."""
        return any(self._hooks) or any(map(hooks_of_gradient, self._parameters))

    def hooks(self) -> list[Any]:
        """Hooks on modules and gradients."""
        dicts = itertools.chain(self._hooks, map(hooks_of_gradient, self._parameters))
        return [hook for some in dicts if some for hook in some.values()]

    def sees_own_methods(self) -> bool:
        """Whether a method of a module has been replaced."""
        return any(not attributes.keys().isdisjoint(OWN_METHODS) for attributes in self._attributes)


def moved_names() -> list[str]:
    """Private names of torch that :class:`Watch` reads and that no longer exist."""
    names = [f"torch.nn.Module.{name}" for name in (*CONTENTS, *HOOKS) if name not in vars(nn.Module())]
    names += [
        f"torch.nn.modules.module._global{name}" for name in HOOKS if not hasattr(nn.modules.module, f"_global{name}")
    ]
    return names if hasattr(th.empty(0), "_backward_hooks") else [*names, "torch.Tensor._backward_hooks"]
