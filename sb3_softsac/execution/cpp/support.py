"""
What our C++ supports: the networks of plain SAC, also with batch norm, residual blocks and categorical critics. The
checks say why a network is not supported.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_softsac.execution.cpp import matmul
from sb3_softsac.heads import CategoricalHead, ScalarHead
from sb3_softsac.networks import BatchNorm, ResidualBlock, statistics
from sb3_softsac.policies import Actor, Critic, Preprocessing, SoftSACPolicy


class NotPlain(Exception):
    """A network or optimiser is not supported; the message is the reason."""


def require(condition: bool, otherwise: str) -> None:
    """Raise :class:`NotPlain` with the reason ``otherwise`` unless the condition is true."""
    if not condition:
        raise NotPlain(otherwise)


Module = nn.Linear | BatchNorm | nn.RMSNorm


class Kind(IntEnum):
    """What is behind a linear layer, and its batch norm if it has one. So ``update.cpp`` names it."""

    LINEAR = 0
    RELU = 1
    ENDS_BLOCK = 2  # relu, and then the residual block's inputs are added


class Stack(NamedTuple):
    """The layers of a network, from inputs to outputs."""

    modules: list[Module]  # linear layers, and norms before the first or behind a hidden one
    kinds: list[Kind]  # of the hidden linear layers

    def linear_layers(self) -> list[nn.Linear]:
        """The linear layers among the modules."""
        return [module for module in self.modules if isinstance(module, nn.Linear)]


class Layers(NamedTuple):
    """The layers of plain networks."""

    actor: Stack  # with mu and log_std at the end
    critics: list[Stack]
    targets: list[Stack]

    def batch_norms(self) -> list[BatchNorm]:
        """Batch norms of all networks."""
        stacks = [self.actor, *self.critics, *self.targets]
        return [module for stack in stacks for module in stack.modules if isinstance(module, BatchNorm)]


def usual_arithmetic() -> bool:
    """Whether torch computes in full float32 precision at present."""
    return matmul.exact_products_are_wanted() and not th.is_autocast_enabled("cpu")


def plain_actor(actor: nn.Module) -> Stack:
    """Layers of an actor, with mu and log_std at the end; :class:`NotPlain` is raised if it is not supported."""
    require(type(actor) is Actor, f"the actor's class is {type(actor).__name__}")
    assert isinstance(actor, Actor)
    require(not actor.use_sde, "the actor uses gSDE (use_sde)")
    require(not actor.separate_log_std_net, "the actor has a separate network for log_std (separate_log_std_net)")
    _require_vectors(actor, "actor")
    assert isinstance(actor.log_std, nn.Module)
    stack = _stack(_chain(actor.latent_pi, "actor"), [actor.mu, actor.log_std], "actor")
    *_, mu, log_std = stack.modules
    trunk = stack._replace(modules=stack.modules[:-1])
    require(
        mu.weight.shape == log_std.weight.shape and _fit_together(trunk), "the sizes of the actor's layers do not fit"
    )
    return stack


def plain_layers(policy: SoftSACPolicy) -> Layers:
    """Layers of a policy; :class:`NotPlain` is raised if it is not supported."""
    require(policy.actor_target is None, "there is a target actor (use_actor_target)")
    for name in ("targets", "project_to_unit_norm"):
        is_own = getattr(type(policy), name) is not getattr(SoftSACPolicy, name)
        require(not is_own, f"the policy's class {type(policy).__name__} overrides {name}()")
    layers = Layers(plain_actor(policy.actor), _plain_critics(policy.critic), _plain_critics(policy.critic_target))
    require(_fit(layers), "the sizes of the layers of actor, critics and target critics do not fit")
    require(_are_in_order(layers, policy), "the critics are not in the order of their parameters")
    identities = [id(statistic) for norm in layers.batch_norms() for statistic in statistics(norm)]
    require(len(set(identities)) == len(identities), "batch norms share their running statistics")
    return layers


def _plain_critics(network: nn.Module) -> list[Stack]:
    require(type(network) is Critic, f"the critic's class is {type(network).__name__}")
    assert isinstance(network, Critic)
    head = type(network.head)
    require(head in (ScalarHead, CategoricalHead), f"the critics have a {head.__name__}")
    require(head is ScalarHead or network.head.n_outputs > 1, "the critics have a single atom")
    _require_vectors(network, "critic")
    chains = [_chain(module, "critic") for module in network.q_networks]
    stacks = [_stack(chain[:-1], chain[-1:], "critic") for chain in chains]
    are_read = all(stack.modules[-1].weight.shape[0] == network.head.n_outputs for stack in stacks)
    require(are_read, "the sizes of the layers of actor, critics and target critics do not fit")
    return stacks


def parameters_of(module: Module) -> list[th.Tensor]:
    """Weight of a linear layer or norm, and its bias if there is one."""
    return [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]


def _are_in_order(layers: Layers, policy: SoftSACPolicy) -> bool:
    """Targets are averaged in the order of parameters, which may differ from that of SB3's list ``q_networks``."""
    for stacks, network in ((layers.critics, policy.critic), (layers.targets, policy.critic_target)):
        ours = [parameter for stack in stacks for module in stack.modules for parameter in parameters_of(module)]
        if list(map(id, ours)) != list(map(id, network.parameters())):
            return False
    return True


def _fit(layers: Layers) -> bool:
    """Whether sizes are those that C++ relies on: a user may have replaced a network by one of another size."""

    def sizes(stack: Stack) -> Any:
        return [parameter.shape for module in stack.modules for parameter in parameters_of(module)], stack.kinds

    actor = layers.actor.linear_layers()
    n_actions, n_observations = actor[-1].weight.shape[0], actor[0].weight.shape[1]
    first, *others = [*layers.critics, *layers.targets]
    return (
        len(layers.critics) == len(layers.targets)
        and all(sizes(other) == sizes(first) for other in others)
        and _fit_together(first)
        and first.linear_layers()[0].weight.shape[1] == n_observations + n_actions
    )


def _fit_together(stack: Stack) -> bool:
    """Whether each layer reads as many numbers as the one before makes, and blocks make as many as they read."""
    inputs = [module.weight.shape[-1] for module in stack.modules]
    outputs = [module.weight.shape[0] for module in stack.modules]
    linear = stack.linear_layers()
    blocks = [i for i, kind in enumerate(stack.kinds) if kind is Kind.ENDS_BLOCK]
    return outputs[:-1] == inputs[1:] and all(
        linear[i].weight.shape[0] == linear[i - 1].weight.shape[1] for i in blocks
    )


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


def _stack(hidden: list[nn.Module], last: list[nn.Module], name: str) -> Stack:
    """Hidden layers with ReLU, or residual blocks of two between a linear layer and an RMS norm; and linear layers."""
    rest, stack = list(hidden), Stack([], [])
    if rest and type(rest[0]) is BatchNorm:
        stack.modules.append(rest.pop(0))  # type: ignore[arg-type]
    require(len(rest) > 0, f"the {name} has no hidden layers")
    if any(type(module) is ResidualBlock for module in rest):
        _require_type(linear := rest.pop(0), nn.Linear, name)
        stack.modules.append(linear)  # type: ignore[arg-type]
        stack.kinds.append(Kind.LINEAR)
        while len(rest) > 1:
            _require_type(block := rest.pop(0), ResidualBlock, name)
            n_before = len(stack.kinds)
            _append_hidden(stack, _chain(block.layers, name), name)  # type: ignore[arg-type]
            require(len(stack.kinds) == n_before + 2, f"the {name} has a residual block that is not of two layers")
            stack.kinds[-1] = Kind.ENDS_BLOCK
        _require_type(norm := rest.pop(0), nn.RMSNorm, name)
        assert isinstance(norm, nn.RMSNorm)
        require(norm.eps == 1e-6 and norm.elementwise_affine, f"the {name}'s RMS norm is not a usual one")
        stack.modules.append(norm)
    _append_hidden(stack, rest, name)
    for linear in last:
        _require_type(linear, nn.Linear, name)
        require(linear.bias is not None, f"the {name} has a layer without bias")
        stack.modules.append(linear)  # type: ignore[arg-type]
    _require_usual_tensors(stack, name)
    return stack


def _append_hidden(stack: Stack, modules: list[nn.Module], name: str) -> None:
    """Linear layers, each with batch norm or a bias, and with ReLU."""
    rest = list(modules)
    while rest:
        _require_type(linear := rest.pop(0), nn.Linear, name)
        norm = rest.pop(0) if rest and type(rest[0]) is BatchNorm else None
        require(bool(rest), f"the {name} has a hidden layer without ReLU")
        _require_type(rest.pop(0), nn.ReLU, name)
        has_bias = linear.bias is not None
        require(has_bias or norm is not None, f"the {name} has a layer without bias")
        require(not has_bias or norm is None, f"the {name} has a layer with bias and batch norm")
        stack.modules.extend([linear] if norm is None else [linear, norm])  # type: ignore[list-item]
        stack.kinds.append(Kind.RELU)


def _require_usual_tensors(stack: Stack, name: str) -> None:
    for module in stack.modules:
        if isinstance(module, BatchNorm):
            is_usual = module.affine and module.running_mean is not None and module.running_var is not None
            require(is_usual, f"the {name} has batch norm without parameters or running statistics")
    tensors = [(t, module) for module in stack.modules for t in (*parameters_of(module), *statistics(module))]
    are_plain = all(t.dtype == th.float32 and t.is_contiguous() and t.numel() for t, _ in tensors)
    require(are_plain, f"parameters of the {name} are not contiguous float32")
    require(all(len(t) == len(module.weight) for t, module in tensors), f"the {name}'s biases do not fit")
