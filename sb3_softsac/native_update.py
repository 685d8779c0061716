"""
Updates of plain SAC on the CPU by our own C++ (``update.cpp``), with the result of :func:`gradient_step.update` up to
rounding. They are faster than what Inductor makes of the same update, and built in seconds. What is not plain is left
to Inductor: networks other than SB3's MLPs with relu, gSDE, a target actor, optimisers other than Adam and the like.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.optim import Adam

from sb3_softsac import losses, native, products
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.gradient_step import Due, LearningRates, Noise, Optimizers, Trained, UpdateOptions
from sb3_softsac.policies import Actor, Critic, SoftSACPolicy
from sb3_softsac.type_aliases import ReplayBatch

SOURCE = Path(__file__).with_name("update.cpp")
CRITIC_METRICS = ("critic_loss", "q_value", "target_q_value", "critic_grad_norm", "ent_coef", "finite")
ACTOR_METRICS = ("actor_loss", "entropy", "log_std", "saturated_actions", "actor_grad_norm")
ENT_COEF_METRICS = ("ent_coef_loss",)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Layers(NamedTuple):
    """The linear layers of plain networks, from inputs to outputs."""

    actor: list[nn.Linear]  # with mu and log_std at the end
    critics: list[list[nn.Linear]]
    targets: list[list[nn.Linear]]


# What our C++ does instead. Who puts another function in its place gets that one
OWN_LOSSES = (losses.target_q_values, losses.critic_loss, losses.actor_loss, losses.ent_coef_loss)
OWN_METHODS = ("forward", "extract_features", "get_action_dist_params", "sample", "targets")


def class_of_updates() -> Any:
    """
    :return: the class that ``update.cpp`` defines, built if need be
    :raises Exception: of many kinds, where it cannot be built
    """
    if (error := error_of_build()) is not None:
        raise error
    return th.classes.sb3_softsac.Update


@functools.cache
def error_of_build() -> Exception | None:
    """
    :return: the error because of which ``update.cpp`` cannot be built, or None when it has been built
    """
    try:
        native.load(products.HEADER, SOURCE)
    except Exception as error:  # compilers and linkers have many ways to fail
        return error
    return None


class NativeUpdate:
    """
    Does the updates of one model, if they are plain.

    :param policy: networks
    :param ent_coef: entropy coefficient
    :param build: gives the class that ``update.cpp`` defines, or None; called when first a plain update is to be done
    """

    def __init__(self, policy: SoftSACPolicy, ent_coef: EntCoef, build: Callable[[], Any]):
        self.policy = policy
        self.ent_coef = ent_coef
        self._build = functools.cache(build)
        self._update: Any = None
        self._adam: list[list[float]] = []  # beta1, beta2 and eps of each optimiser
        # All that it was made of. Holding it keeps identities from being used again
        self._made_of: list[Any] = []
        self._identities: list[int] = []
        self._attributes: list[dict[str, Any]] = []  # of the networks' modules
        self._n_attributes: list[int] = []
        self._parameters: list[nn.Parameter] = []
        self._children: list[dict[str, Any]] = []  # submodules and parameters of each
        self._hooks: list[Any] = []  # truth values: whether there are any

    def suits(self, optimizers: Optimizers) -> bool:
        """
        :param optimizers: what they train, with states
        :return: whether the next update is plain
        """
        is_known = list(map(id, self._parts(optimizers))) == self._identities
        if not is_known or list(map(len, self._attributes)) != self._n_attributes:
            self._look_at(optimizers)
        return (
            self._update is not None
            and not any(self._hooks)
            and not any(parameter._backward_hooks for parameter in self._parameters)
            and (losses.target_q_values, losses.critic_loss, losses.actor_loss, losses.ent_coef_loss) == OWN_LOSSES
            and is_plain(self.policy)
            and products.exact_products_are_wanted()
            and not th.is_autocast_enabled("cpu")
        )

    def _parts(self, optimizers: Optimizers) -> Iterator[Any]:
        """Everything that may be exchanged between two updates."""
        critics = (self.policy.critic.q_networks, self.policy.critic_target.q_networks)
        coefficients = (self.ent_coef.log_ent_coef, self.ent_coef.tensor)
        return itertools.chain([optimizers], coefficients, *critics, *map(dict.values, self._children))

    def _look_at(self, optimizers: Optimizers) -> None:
        self._update = None
        self._attributes = [vars(module) for module in self.policy.modules()]
        children = (attributes[name] for attributes in self._attributes for name in ("_modules", "_parameters"))
        self._children = [some for some in children if some]
        self._hooks = [attributes[name] for attributes in self._attributes for name in HOOKS]
        self._hooks += [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]
        self._parameters = list(self.policy.parameters())
        self._made_of = list(self._parts(optimizers))
        self._identities = list(map(id, self._made_of))
        self._n_attributes = list(map(len, self._attributes))
        layers = plain_layers(self.policy)
        trained = [part for part in optimizers if part is not None]
        is_overridden = any(not attributes.keys().isdisjoint(OWN_METHODS) for attributes in self._attributes)
        if layers is None or is_overridden or not all(map(_is_plain_adam, trained)):
            return
        actor: Any = _with_states(optimizers.actor, _parameters(layers.actor))
        critics = [_with_states(optimizers.critic, _parameters(critic)) for critic in layers.critics]
        if optimizers.ent_coef is None or self.ent_coef.log_ent_coef is None:
            fixed = self.ent_coef.tensor
            ent_coef: Any = [fixed] if fixed is not None and fixed.dtype == th.float32 else None
        else:
            ent_coef = _with_states(optimizers.ent_coef, [self.ent_coef.log_ent_coef])
        if all([actor, *critics, ent_coef]) and self._build() is not None:
            self._adam = [[0.0] * 3 if part is None else _constants(part) for part in optimizers]
            targets = [_parameters(target) for target in layers.targets]
            self._update = self._build()(actor, critics, targets, ent_coef)

    def __call__(
        self,
        batch: ReplayBatch,
        noise: Noise,
        learning_rates: LearningRates,
        finite: th.Tensor,
        options: UpdateOptions,
        what: Due,
    ) -> tuple[th.Tensor, tuple[str, ...], th.Tensor] | None:
        """
        Do an update that :meth:`suits`, unless the tensors are not those of plain SAC.

        :param batch: minibatch
        :param noise: see :func:`gradient_step.draw_noise`
        :param learning_rates: of the optimisers
        :param finite: whether all numbers of the updates before were finite
        :param options: constants of the update
        :param what: what it consists of
        :return: whether all numbers have been finite; names and values of the metrics. None if types or sizes do not
            fit: nothing has then been changed
        """
        tensors: list[Any] = [batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards]
        if batch.discounts is not None:
            tensors.append(batch.discounts)
        if not all(isinstance(tensor, th.Tensor) for tensor in tensors):
            return None
        limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
        numbers = [options.gamma, options.tau, options.target_entropy, options.log_action_scale, limit]
        numbers += [*self.policy.actor.log_std_bounds, options.ent_coef_loss == "exp"]
        for learning_rate, constants in zip(learning_rates, self._adam, strict=True):
            numbers += [float(learning_rate), *constants]
        noises = [noise.next_actions, *noise.actions[: what.actor_updates]]
        inputs = [_as_float32(tensor) for tensor in tensors]
        try:
            values = self._update.run(inputs, noises, list(map(float, numbers)), what.targets, bool(finite))
        except RuntimeError:  # it looks at all tensors before it begins
            return None
        names: tuple[str, ...] = CRITIC_METRICS
        if what.actor_updates:
            names += ACTOR_METRICS if self.ent_coef.log_ent_coef is None else ACTOR_METRICS + ENT_COEF_METRICS
        return values[CRITIC_METRICS.index("finite")].bool(), names, values[: len(names)]


def is_plain(policy: SoftSACPolicy) -> bool:
    """
    :param policy: any policy
    :return: whether its networks are put together as those of plain SAC, whatever their layers are
    """
    actor, critics = policy.actor, (policy.critic, policy.critic_target)
    return (
        type(actor) is Actor
        and all(type(critic) is Critic for critic in critics)
        and policy.actor_target is None
        and type(policy).targets is SoftSACPolicy.targets
        and not (actor.use_sde or actor.separate_log_std_net)
        and actor.log_std_bounding == "clamp"
        and all(_reads_vectors(network) for network in (actor, *critics))
    )


def plain_layers(policy: SoftSACPolicy) -> Layers | None:
    """
    :param policy: any policy
    :return: its linear layers; None if there is more to it
    """
    if not is_plain(policy):
        return None
    actor = policy.actor
    assert isinstance(actor.log_std, nn.Module)
    chains = [
        _linear_layers([*actor.latent_pi, actor.mu, actor.log_std], n_last=2),
        *(_linear_layers(list(network)) for network in policy.critic.q_networks),
        *(_linear_layers(list(network)) for network in policy.critic_target.q_networks),
    ]
    found = [chain for chain in chains if chain is not None]
    if len(found) != len(chains):
        return None
    n_critics = len(policy.critic.q_networks)
    layers = Layers(found[0], found[1 : n_critics + 1], found[n_critics + 1 :])
    return layers if _fit(layers) and _are_in_order(layers, policy) else None


def _are_in_order(layers: Layers, policy: SoftSACPolicy) -> bool:
    """Targets follow their networks in the order of parameters, which need not be that of SB3's lists of networks."""
    for chains, network in ((layers.critics, policy.critic), (layers.targets, policy.critic_target)):
        ours = [parameter for chain in chains for parameter in _parameters(chain)]
        if list(map(id, ours)) != list(map(id, network.parameters())):
            return False
    return True


def _fit(layers: Layers) -> bool:
    """Whether sizes are such as C++ takes for granted; they are not after networks have been exchanged for others."""

    def sizes(chain: list[nn.Linear]) -> list[tuple[int, ...]]:
        return [tuple(layer.weight.shape) for layer in chain]

    n_actions, n_observations = layers.actor[-1].weight.shape[0], layers.actor[0].weight.shape[1]
    first, *others = [*layers.critics, *layers.targets]
    heads_fit = layers.actor[-2].weight.shape == layers.actor[-1].weight.shape
    hidden = [layers.actor[:-1], first]
    return (
        len(layers.critics) == len(layers.targets)
        and all(sizes(other) == sizes(first) for other in others)
        and heads_fit
        and all(b.weight.shape[1] == a.weight.shape[0] for chain in hidden for a, b in itertools.pairwise(chain))
        and first[0].weight.shape[1] == n_observations + n_actions
        and first[-1].weight.shape[0] == 1
        and all(len(layer.bias) == len(layer.weight) for chain in (layers.actor, first, *others) for layer in chain)
    )


def _reads_vectors(network: Actor | Critic) -> bool:
    """Whether a network's features are the observations as they are."""
    preprocessing = network.preprocessing
    return preprocessing.is_box and preprocessing.scale is None and type(network.features_extractor) is FlattenExtractor


def _linear_layers(modules: list[nn.Module], n_last: int = 1) -> list[nn.Linear] | None:
    """Linear layers that have relu between them, with ``n_last`` at the end; None if there is anything else."""
    hidden, last = modules[:-n_last], modules[-n_last:]
    kinds = [type(module) for module in hidden]
    if not hidden or kinds != [nn.Linear, nn.ReLU] * (len(hidden) // 2) or any(type(m) is not nn.Linear for m in last):
        return None
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    is_plain = all(t is not None and t.dtype == th.float32 and t.is_contiguous() and t.numel() for t in tensors)
    return layers if is_plain else None


def _parameters(layers: list[nn.Linear]) -> list[th.Tensor]:
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _is_plain_adam(trained: Trained) -> bool:
    if type(trained.optimizer) is not Adam or len(trained.groups) != 1:
        return False
    options = trained.groups[0].options
    return not any(options[name] for name in ("amsgrad", "weight_decay", "maximize", "decoupled_weight_decay"))


def _constants(trained: Trained) -> list[float]:
    return [float(trained.groups[0].options[name]) for name in ("beta1", "beta2", "eps")]


def _with_states(trained: Trained, parameters: list[th.Tensor]) -> list[th.Tensor] | None:
    """Each parameter with Adam's exp_avg, exp_avg_sq and step; None if it is not trained."""
    group = trained.groups[0]
    rows = zip(group.parameters, group.exp_avgs, group.exp_avg_sqs, group.steps, strict=True)
    states = {id(row[0]): row for row in rows}
    if any(id(parameter) not in states for parameter in parameters):
        return None
    return [tensor for parameter in parameters for tensor in states[id(parameter)]]


def _as_float32(tensor: th.Tensor) -> th.Tensor:
    return tensor if tensor.dtype == th.float32 and tensor.is_contiguous() else tensor.float().contiguous()
