"""
Updates of plain SAC on the CPU, and the actions between them, by our own C++ (``update.cpp``), with the result of
:func:`gradient_step.update` and of the actor up to rounding. Updates are faster than what Inductor makes of them, and
built in seconds. What is not plain (see ``support``), or has other optimisers than Adam and AdamW, is left to
torch, and it can be told why.
"""

import functools
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch as th
from torch.optim import Adam, AdamW

from sb3_softsac import losses
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.execution.cpp import build, matmul
from sb3_softsac.execution.cpp.support import (
    Attributes,
    NotPlain,
    Watch,
    parameters_of,
    plain_actor,
    plain_layers,
    require,
    usual_arithmetic,
)
from sb3_softsac.gradient_step import Due, LearningRates, Optimizers, Outcome, Trained, UpdateOptions
from sb3_softsac.policies import Actor, SoftSACPolicy
from sb3_softsac.type_aliases import ReplayBatch, TorchObs

SOURCE = Path(__file__).with_name("update.cpp")
MAX_WORK = 1 << 31  # of one call: transitions times weights, for each of which there are ten operations
CRITIC_METRICS = ("critic_loss", "q_value", "target_q_value", "critic_grad_norm", "ent_coef", "finite")
ACTOR_METRICS = ("actor_loss", "entropy", "log_std", "saturated_actions", "actor_grad_norm")
ENT_COEF_METRICS = ("ent_coef_loss",)
MISFIT = (
    "the types or sizes of a minibatch do not fit, or a parameter or an optimizer's state is not float32 on the CPU"
)

# What our C++ does instead. Who puts another function in its place gets that one
OWN_LOSSES = (losses.target_q_values, losses.critic_loss, losses.actor_loss, losses.ent_coef_loss)


def classes() -> Any:
    """
    :return: namespace of the classes that ``update.cpp`` defines, built if need be
    :raises Exception: of many kinds, where it cannot be built
    """
    if (error := error_of_build()) is not None:
        raise error
    return th.classes.sb3_softsac


@functools.cache
def error_of_build() -> Exception | None:
    """
    :return: the error because of which ``update.cpp`` cannot be built, or None when it has been built
    """
    try:
        build.load(matmul.HEADER, SOURCE)
    except Exception as error:  # compilers and linkers have many ways to fail
        return error
    return None


class NativeActor:
    """
    Explores with the actor of one policy, if it is plain: torch takes many times as long for the small operators.

    :param policy: networks
    :param get_classes: gives the classes that ``update.cpp`` defines, or None; called when they are first needed
    """

    def __init__(self, policy: SoftSACPolicy, get_classes: Callable[[], Any]):
        self.policy = policy
        self._get_classes = get_classes
        self._looked_at: th.nn.Module | None = None
        self._watch = Watch([])
        self._actor: Any = None

    def __call__(self, observations: TorchObs) -> th.Tensor | None:
        """
        :param observations: of E environments, as the actor takes them
        :return: a sample of scaled actions (E, A), float32. None if the actor or the observations are not plain:
            nothing has then been drawn
        """
        actor = self.policy.actor
        if actor is not self._looked_at or self._watch.is_over():
            self._look_at(actor)
        is_vector = isinstance(observations, th.Tensor)
        if self._actor is None or not is_vector or self._watch.sees_hooks() or not usual_arithmetic():
            return None
        return self._actor.sample(observations, *_log_std_bounds(actor))

    def _look_at(self, actor: th.nn.Module) -> None:
        self._looked_at, self._watch, self._actor = actor, Watch([actor]), None
        with suppress(NotPlain):
            _require_usual_methods(self._watch)
            layers = plain_actor(actor)
            self._actor = _built(self._get_classes).Actor(parameters_of(layers))


class NativeUpdate:
    """
    Does the updates of one model, if they are plain.

    :param policy: networks
    :param ent_coef: entropy coefficient
    :param get_classes: see :class:`NativeActor`
    """

    def __init__(self, policy: SoftSACPolicy, ent_coef: EntCoef, get_classes: Callable[[], Any]):
        self.policy = policy
        self.ent_coef = ent_coef
        self._get_classes = get_classes
        self._update: Any = None
        self._reason: str | None = None  # why there is none
        self._n_weights = 1  # that are trained
        self._adam: list[list[float]] = []  # of each optimiser, see _constants
        self._optimizers: Optimizers | None = None
        self._watch = Watch([])

    def reason_against(self, optimizers: Optimizers) -> str | None:
        """
        :param optimizers: what they train, with states
        :return: why the next update is not for C++; None if it is
        """
        if optimizers is not self._optimizers or self._watch.is_over():
            self._look_at(optimizers)
        if self._reason is not None:
            return self._reason
        if self._watch.sees_hooks():
            return "a hook is registered on a network or a parameter"
        if (losses.target_q_values, losses.critic_loss, losses.actor_loss, losses.ent_coef_loss) != OWN_LOSSES:
            return "a function of sb3_softsac.losses has been replaced"
        return None if usual_arithmetic() else "float32 is to be computed less precisely (matmul_precision or autocast)"

    def _look_at(self, optimizers: Optimizers) -> None:
        policy = self.policy
        critics = (policy.critic.q_networks, policy.critic_target.q_networks)
        coefficient = Attributes(self.ent_coef, ("log_ent_coef", "tensor"))
        self._watch = Watch([policy, *policy.children()], [coefficient, *critics])
        self._optimizers, self._update, self._reason = optimizers, None, None
        try:
            self._update = self._make(optimizers)
        except NotPlain as reason:
            self._reason = str(reason)

    def _make(self, optimizers: Optimizers) -> Any:
        _require_usual_methods(self._watch)
        layers = plain_layers(self.policy)
        for name, trained in optimizers._asdict().items():
            if trained is not None:
                _require_adam(name, trained)
        actor = _with_states("actor", optimizers.actor, parameters_of(layers.actor))
        critics = [_with_states("critic", optimizers.critic, parameters_of(critic)) for critic in layers.critics]
        if optimizers.ent_coef is None or self.ent_coef.log_ent_coef is None:
            fixed = self.ent_coef.tensor
            require(fixed is not None and fixed.dtype == th.float32, "the entropy coefficient is not float32")
            ent_coef: list[Any] = [fixed]
        else:
            ent_coef = _with_states("ent_coef", optimizers.ent_coef, [self.ent_coef.log_ent_coef])
        self._adam = [_constants(part) for part in optimizers]
        self._n_weights = sum(p.numel() for part in optimizers if part is not None for p in part.parameters)
        targets = list(map(parameters_of, layers.targets))
        return _built(self._get_classes).Update(actor, critics, targets, ent_coef)

    def n_at_once(self, batch_size: int) -> int:
        """
        :param batch_size: B
        :return: updates to ask for at once, so that a run can be interrupted after a quarter of a second or so
        """
        return max(1, MAX_WORK // (batch_size * self._n_weights))

    def __call__(
        self,
        batch: ReplayBatch,
        dues: list[Due],
        learning_rates: LearningRates,
        finite: th.Tensor,
        options: UpdateOptions,
    ) -> tuple[th.Tensor, list[Outcome]] | None:
        """
        Do updates that there is no :meth:`reason_against`, unless the tensors do not fit. Noise is drawn as
        :func:`gradient_step.draw_noise` does.

        :param batch: one minibatch behind the other
        :param dues: what each update consists of
        :param learning_rates: of the optimisers
        :param finite: whether all numbers of the updates before were finite
        :param options: constants of the updates
        :return: whether all numbers have been finite, and metrics of each update. None if tensors do not fit (see
            ``MISFIT``): nothing has then been drawn or changed
        """
        tensors: list[Any] = [batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards]
        if batch.discounts is not None:
            tensors.append(batch.discounts)
        if not all(isinstance(tensor, th.Tensor) for tensor in tensors):
            return None
        limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
        numbers = [options.gamma, options.tau, options.target_entropy, options.log_action_scale, limit]
        numbers += [options.ent_coef_loss == "exp", *_log_std_bounds(self.policy.actor)]
        for learning_rate, constants in zip(learning_rates, self._adam, strict=True):
            numbers += [float(learning_rate), *constants]
        inputs = [_as_float32(tensor) for tensor in tensors]
        actor_updates, targets = [due.actor_updates for due in dues], [int(due.targets) for due in dues]
        values = self._update.run(inputs, actor_updates, targets, list(map(float, numbers)), bool(finite))
        if values is None:
            return None
        of_actor = ACTOR_METRICS if self.ent_coef.log_ent_coef is None else ACTOR_METRICS + ENT_COEF_METRICS
        names = [CRITIC_METRICS + of_actor if due.actor_updates else CRITIC_METRICS for due in dues]
        outcomes = [Outcome(some, row[: len(some)]) for some, row in zip(names, values.unbind(), strict=True)]
        return outcomes[-1].values[CRITIC_METRICS.index("finite")].bool(), outcomes


def _built(get_classes: Callable[[], Any]) -> Any:
    require(build.suits_processor(), "the processor has neither AVX2 nor AVX-512")
    classes = get_classes()
    require(classes is not None, "it could not be built")
    return classes


def _require_usual_methods(watch: Watch) -> None:
    require(not watch.sees_own_methods(), "a method of a network has been replaced")


def _require_adam(name: str, trained: Trained) -> None:
    optimizer, groups = trained.optimizer, trained.groups
    require(isinstance(optimizer, Adam | AdamW), f"the {name} optimizer is {type(optimizer).__name__}")
    require(bool(groups), f"the {name} optimizer has a step of its own (a subclass, a hook, differentiable)")
    require(len(groups) == 1, f"the {name} optimizer has several groups of parameters")
    for option in ("amsgrad", "maximize"):
        require(not groups[0].options[option], f"the {name} optimizer has the option {option}")


def _constants(trained: Trained | None) -> list[float]:
    """In the order of ``update.cpp``."""
    names = ("beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay")
    return [0.0 if trained is None else float(trained.groups[0].options[name]) for name in names]


def _log_std_bounds(actor: Actor) -> tuple[float, float, float]:
    """In the order of ``update.cpp``."""
    low, high = actor.log_std_bounds
    return low, high, float(actor.log_std_bounding == "tanh")


def _with_states(name: str, trained: Trained, parameters: list[th.Tensor]) -> list[th.Tensor]:
    """Each parameter with Adam's exp_avg, exp_avg_sq and step."""
    group = trained.groups[0]
    rows = zip(group.parameters, group.exp_avgs, group.exp_avg_sqs, group.steps, strict=True)
    states = {id(row[0]): row for row in rows}
    are_trained = all(id(parameter) in states for parameter in parameters)
    require(are_trained, f"the {name} optimizer does not train all parameters: some are frozen, or not its own")
    return [tensor for parameter in parameters for tensor in states[id(parameter)]]


def _as_float32(tensor: th.Tensor) -> th.Tensor:
    return tensor if tensor.dtype == th.float32 and tensor.is_contiguous() else tensor.float().contiguous()
