"""
What our C++ supports: the networks of plain SAC. Checks that say why a network is not supported, and the detection of
later changes.
"""

import itertools
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_softsac.execution.cpp import matmul
from sb3_softsac.heads import ScalarHead
from sb3_softsac.policies import Actor, Critic, Preprocessing, SoftSACPolicy

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# If a user replaces one of these, torch runs the replacement
OWN_METHODS = (
    *("forward", "extract_features", "get_action_dist_params", "sample", "targets"),
    *("outputs", "values", "target", "loss"),  # of critics and their heads
)
# Of actors and critics, besides their modules
ATTRIBUTES = ("use_sde", "separate_log_std_net", "preprocessing", "q_networks")

_END = object()
_hooks_of_gradient = attrgetter("_backward_hooks")


class NotPlain(Exception):
    """A network or optimiser is not supported; the message is the reason."""


def require(condition: bool, otherwise: str) -> None:
    """
    :param condition: true for plain SAC
    :param otherwise: the reason if it is not
    :raises NotPlain: if it is not
    """
    if not condition:
        raise NotPlain(otherwise)


class Layers(NamedTuple):
    """The linear layers of plain networks, from inputs to outputs."""

    actor: list[nn.Linear]  # with mu and log_std at the end
    critics: list[list[nn.Linear]]
    targets: list[list[nn.Linear]]


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
        parts = (attributes[name] for attributes in self._attributes for name in ("_modules", "_parameters"))
        networks = [Attributes(root, ATTRIBUTES) for root in roots]
        preprocessings = [vars(root)["preprocessing"] for root in roots if "preprocessing" in vars(root)]
        inputs = [Attributes(each, ("is_box", "scale")) for each in preprocessings if type(each) is Preprocessing]
        self._collections = [*(some.values() for some in parts if some), *networks, *inputs, *others]
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
        """
        :return: whether there are hooks on modules or gradients
        """
        return any(self._hooks) or any(map(_hooks_of_gradient, self._parameters))

    def sees_own_methods(self) -> bool:
        """
        :return: whether a method of a module has been replaced
        """
        return any(not attributes.keys().isdisjoint(OWN_METHODS) for attributes in self._attributes)


def moved_names() -> list[str]:
    """
    :return: private names of torch that :class:`Watch` reads and that no longer exist
    """
    names = [f"torch.nn.Module.{name}" for name in ("_modules", "_parameters", *HOOKS) if name not in vars(nn.Module())]
    names += [
        f"torch.nn.modules.module._global{name}" for name in HOOKS if not hasattr(nn.modules.module, f"_global{name}")
    ]
    return names if hasattr(th.empty(0), "_backward_hooks") else [*names, "torch.Tensor._backward_hooks"]


def usual_arithmetic() -> bool:
    """
    :return: whether torch computes in full float32 precision at present
    """
    return matmul.exact_products_are_wanted() and not th.is_autocast_enabled("cpu")


def plain_actor(actor: nn.Module) -> list[nn.Linear]:
    """
    :param actor: any actor
    :return: its linear layers, with mu and log_std at the end
    :raises NotPlain: if it is not supported
    """
    require(type(actor) is Actor, f"the actor's class is {type(actor).__name__}")
    assert isinstance(actor, Actor)
    require(not actor.use_sde, "the actor uses gSDE (use_sde)")
    require(not actor.separate_log_std_net, "the actor has a separate network for log_std (separate_log_std_net)")
    _require_vectors(actor, "actor")
    assert isinstance(actor.log_std, nn.Module)
    layers = _linear_layers([*_chain(actor.latent_pi, "actor"), actor.mu, actor.log_std], "actor", n_last=2)
    require(
        layers[-2].weight.shape == layers[-1].weight.shape and _follow_each_other(layers[:-1]),
        "the sizes of the actor's layers do not fit",
    )
    return layers


def plain_layers(policy: SoftSACPolicy) -> Layers:
    """
    :param policy: any policy
    :return: its linear layers
    :raises NotPlain: if it is not supported
    """
    require(policy.unit_norm is None, "weights are scaled to unit norm (unit_norm)")
    require(policy.actor_target is None, "there is a target actor (use_actor_target)")
    require(
        type(policy).targets is SoftSACPolicy.targets, f"the policy's class {type(policy).__name__} overrides targets()"
    )
    layers = Layers(plain_actor(policy.actor), _plain_critics(policy.critic), _plain_critics(policy.critic_target))
    require(_fit(layers), "the sizes of the layers of actor, critics and target critics do not fit")
    require(_are_in_order(layers, policy), "the critics are not in the order of their parameters")
    return layers


def _plain_critics(network: nn.Module) -> list[list[nn.Linear]]:
    require(type(network) is Critic, f"the critic's class is {type(network).__name__}")
    assert isinstance(network, Critic)
    require(type(network.head) is ScalarHead, f"the critics have a {type(network.head).__name__} (n_atoms)")
    _require_vectors(network, "critic")
    return [_linear_layers(_chain(module, "critic"), "critic") for module in network.q_networks]


def parameters_of(layers: Iterable[nn.Linear]) -> list[th.Tensor]:
    """
    :param layers: layers
    :return: weight and bias of each
    """
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _are_in_order(layers: Layers, policy: SoftSACPolicy) -> bool:
    """Targets are averaged in the order of parameters, which may differ from that of SB3's list ``q_networks``."""
    for chains, network in ((layers.critics, policy.critic), (layers.targets, policy.critic_target)):
        ours = [parameter for chain in chains for parameter in parameters_of(chain)]
        if list(map(id, ours)) != list(map(id, network.parameters())):
            return False
    return True


def _fit(layers: Layers) -> bool:
    """Whether sizes are those that C++ relies on: a user may have replaced a network by one of another size."""

    def sizes(chain: list[nn.Linear]) -> list[tuple[int, ...]]:
        return [tuple(layer.weight.shape) for layer in chain]

    n_actions, n_observations = layers.actor[-1].weight.shape[0], layers.actor[0].weight.shape[1]
    first, *others = [*layers.critics, *layers.targets]
    return (
        len(layers.critics) == len(layers.targets)
        and all(sizes(other) == sizes(first) for other in others)
        and _follow_each_other(first)
        and first[0].weight.shape[1] == n_observations + n_actions
        and first[-1].weight.shape[0] == 1
    )


def _follow_each_other(layers: list[nn.Linear]) -> bool:
    return all(b.weight.shape[1] == a.weight.shape[0] for a, b in itertools.pairwise(layers))


def _require_vectors(network: Actor | Critic, name: str) -> None:
    """Require that features are the unchanged observations."""
    preprocessing, extractor = network.preprocessing, network.features_extractor
    require(type(preprocessing) is Preprocessing, f"the {name} has its own preprocessing of observations")
    require(preprocessing.is_box, f"the observation space is {type(preprocessing.space).__name__}, not Box")
    require(preprocessing.scale is None, "observations are images")
    _require_type(extractor, FlattenExtractor, name)
    _require_type(extractor.flatten, nn.Flatten, name)


def _require_type(module: Any, expected: type[nn.Module], name: str) -> None:
    found = type(module)
    require(found is expected, f"the {name} has {found.__name__} where C++ knows {expected.__name__} only")


def _chain(module: nn.Module, name: str) -> list[nn.Module]:
    """Modules of a plain ``nn.Sequential``."""
    _require_type(module, nn.Sequential, name)
    assert isinstance(module, nn.Sequential)
    return list(module)


def _linear_layers(modules: list[nn.Module], name: str, n_last: int = 1) -> list[nn.Linear]:
    """Linear layers with ReLU between them, of which the ``n_last`` last ones have none."""
    hidden, last = modules[:-n_last], modules[-n_last:]
    require(len(hidden) > 0, f"the {name} has no hidden layers")
    for module, expected in [*zip(hidden, itertools.cycle((nn.Linear, nn.ReLU))), *((m, nn.Linear) for m in last)]:
        _require_type(module, expected, name)
    require(len(hidden) % 2 == 0, f"the {name} has a hidden layer without ReLU")
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    require(all(layer.bias is not None for layer in layers), f"the {name} has a layer without bias")
    are_plain = all(t.dtype == th.float32 and t.is_contiguous() and t.numel() for t in parameters_of(layers))
    require(are_plain, f"parameters of the {name} are not contiguous float32")
    require(all(len(layer.bias) == len(layer.weight) for layer in layers), f"the {name}'s biases do not fit")
    return layers
