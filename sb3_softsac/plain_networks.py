"""
The networks of plain SAC, which our C++ computes: what they have to be, and whether they have been changed since they
were looked at.
"""

import itertools
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_softsac import products
from sb3_softsac.policies import Actor, Critic, Preprocessing, SoftSACPolicy

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Who puts another function in the place of one of these gets that one
OWN_METHODS = ("forward", "extract_features", "get_action_dist_params", "sample", "targets")
# Of actors and critics, besides their parts
ATTRIBUTES = ("use_sde", "separate_log_std_net", "log_std_bounding", "preprocessing", "q_networks")

_END = object()
_hooks_of_gradient = attrgetter("_backward_hooks")


class Layers(NamedTuple):
    """The linear layers of plain networks, from inputs to outputs."""

    actor: list[nn.Linear]  # with mu and log_std at the end
    critics: list[list[nn.Linear]]
    targets: list[list[nn.Linear]]


class Attributes:
    """Some attributes of an object, None for those that it does not have; iterating gives the present ones."""

    def __init__(self, owner: Any, names: Iterable[str]):
        self._values = vars(owner)
        self._names = tuple(names)

    def __iter__(self) -> Iterator[Any]:
        return map(self._values.get, self._names)


class Watch:
    """
    Notices when something about modules is no longer what it was, in microseconds: this is asked before updates and
    each action.

    :param modules: networks; what is within them is watched, too
    :param others: further collections whose items count
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
        :return: whether a module, its class, a parameter or one of the other items was exchanged, or an attribute added
            (such as a method that takes the place of the class's)
        """
        return list(map(len, self._attributes)) != self._n_attributes or not all(
            map(is_, self._present_items(), self._items)
        )

    def sees_hooks(self) -> bool:
        """
        :return: whether there are hooks now, on modules or on gradients
        """
        return any(self._hooks) or any(map(_hooks_of_gradient, self._parameters))

    def sees_own_methods(self) -> bool:
        """
        :return: whether a method of a module has been exchanged for another
        """
        return any(not attributes.keys().isdisjoint(OWN_METHODS) for attributes in self._attributes)


def moved_names() -> list[str]:
    """
    :return: private names of torch's that :class:`Watch` reads, and which are no longer there
    """
    names = [f"torch.nn.Module.{name}" for name in ("_modules", "_parameters", *HOOKS) if name not in vars(nn.Module())]
    names += [
        f"torch.nn.modules.module._global{name}" for name in HOOKS if not hasattr(nn.modules.module, f"_global{name}")
    ]
    return names if hasattr(th.empty(0), "_backward_hooks") else [*names, "torch.Tensor._backward_hooks"]


def usual_arithmetic() -> bool:
    """
    :return: whether torch is to compute in float32 at present
    """
    return products.exact_products_are_wanted() and not th.is_autocast_enabled("cpu")


def plain_actor(actor: nn.Module) -> list[nn.Linear] | None:
    """
    :param actor: any actor
    :return: its linear layers, with mu and log_std at the end; None if there is more to it
    """
    if (
        type(actor) is not Actor
        or actor.use_sde
        or actor.separate_log_std_net
        or actor.log_std_bounding != "clamp"
        or not _reads_vectors(actor)
    ):
        return None
    assert isinstance(actor.log_std, nn.Module)
    layers = _linear_layers([*_chain(actor.latent_pi), actor.mu, actor.log_std], n_last=2)
    heads_fit = layers is not None and layers[-2].weight.shape == layers[-1].weight.shape
    return layers if layers is not None and heads_fit and _follow_each_other(layers[:-1]) else None


def plain_layers(policy: SoftSACPolicy) -> Layers | None:
    """
    :param policy: any policy
    :return: its linear layers; None if there is more to it
    """
    actor = plain_actor(policy.actor)
    networks = (policy.critic, policy.critic_target)
    is_plain = (
        policy.actor_target is None
        and type(policy).targets is SoftSACPolicy.targets
        and all(type(network) is Critic and _reads_vectors(network) for network in networks)
    )
    if actor is None or not is_plain:
        return None
    chains = [_linear_layers(_chain(module)) for network in networks for module in network.q_networks]
    found = [chain for chain in chains if chain is not None]
    if len(found) != len(chains):
        return None
    n_critics = len(policy.critic.q_networks)
    layers = Layers(actor, found[:n_critics], found[n_critics:])
    return layers if _fit(layers) and _are_in_order(layers, policy) else None


def parameters_of(layers: Iterable[nn.Linear]) -> list[th.Tensor]:
    """
    :param layers: layers
    :return: weight and bias of each
    """
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _are_in_order(layers: Layers, policy: SoftSACPolicy) -> bool:
    """Targets follow their networks in the order of parameters, which need not be that of SB3's lists of networks."""
    for chains, network in ((layers.critics, policy.critic), (layers.targets, policy.critic_target)):
        ours = [parameter for chain in chains for parameter in parameters_of(chain)]
        if list(map(id, ours)) != list(map(id, network.parameters())):
            return False
    return True


def _fit(layers: Layers) -> bool:
    """Whether sizes are such as C++ takes for granted; they are not after networks have been exchanged for others."""

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


def _reads_vectors(network: Actor | Critic) -> bool:
    """Whether a network's features are the observations as they are."""
    preprocessing, extractor = network.preprocessing, network.features_extractor
    return (
        type(preprocessing) is Preprocessing
        and preprocessing.is_box
        and preprocessing.scale is None
        and type(extractor) is FlattenExtractor
        and type(extractor.flatten) is nn.Flatten
    )


def _chain(module: nn.Module) -> list[nn.Module]:
    """What is done one after the other, and nothing else; empty if that is not known."""
    return list(module) if type(module) is nn.Sequential else []


def _linear_layers(modules: list[nn.Module], n_last: int = 1) -> list[nn.Linear] | None:
    """Linear layers that have relu between them, with ``n_last`` at the end; None if there is anything else."""
    hidden, last = modules[:-n_last], modules[-n_last:]
    kinds = [type(module) for module in hidden]
    if not hidden or kinds != [nn.Linear, nn.ReLU] * (len(hidden) // 2) or any(type(m) is not nn.Linear for m in last):
        return None
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    tensors = parameters_of(layers)
    is_plain = all(t is not None and t.dtype == th.float32 and t.is_contiguous() and t.numel() for t in tensors)
    return layers if is_plain and all(len(layer.bias) == len(layer.weight) for layer in layers) else None
