"""
Updates on the CPU, and the actions between them, by our own C++ (``update.cpp``): faster than what Inductor makes of
them, and built in seconds. ``support`` says for which networks; the rest is left to torch.
"""

import functools
import math
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from torch.optim import Adam, AdamW

from sb3_softsac import distributions, heads, losses, networks
from sb3_softsac.execution.cpp import build, matmul
from sb3_softsac.execution.cpp.support import (
    Kind,
    Module,
    NotPlain,
    Stack,
    parameters_of,
    plain_actor,
    plain_layers,
    require,
    usual_arithmetic,
)
from sb3_softsac.execution.device_replay import gathered
from sb3_softsac.execution.learner import Learner
from sb3_softsac.execution.report import Report, reason_of
from sb3_softsac.execution.watch import Attributes, Watch, hooks_of_gradient
from sb3_softsac.execution.way import Declined, Done, Outcome, Updates
from sb3_softsac.gradient_step import SATURATED
from sb3_softsac.heads import CategoricalHead
from sb3_softsac.networks import BatchNorm
from sb3_softsac.optimizers import Optimizers, Trained
from sb3_softsac.policies import SoftSACPolicy
from sb3_softsac.type_aliases import ReplayBatch, TorchObs

HEADER, SOURCE = Path(__file__).with_name("networks.h"), Path(__file__).with_name("update.cpp")
MAX_WORK = 1 << 31  # of one call: transitions times weights, for each of which there are ten operations
MISFIT = (
    "the types or sizes of a minibatch do not fit, or a parameter or an optimizer's state is not float32 on the CPU"
)

JOINT_BATCHES = (None, "critic", "all")  # by the numbers that they have in update.cpp

# If the user replaces one of these, torch runs the replacement
FUNCTIONS: list[tuple[Any, str]] = [
    *((losses, name) for name in ("target_q_values", "critic_loss", "actor_loss", "ent_coef_loss")),
    *((distributions, name) for name in ("sample", "squash", "log_det_tanh", "_log_prob_of_noise")),
    *((heads, "project"), (networks, "project_to_unit_norm"), (networks, "batch_statistics")),
]
OWN_FUNCTIONS = [getattr(module, name) for module, name in FUNCTIONS]


@functools.cache
def error_of_build() -> Exception | None:
    """The error because of which ``update.cpp`` cannot be built, or None when it has been built."""
    try:
        build.load(matmul.HEADER, HEADER, SOURCE)
    except Exception as error:  # compilers and linkers have many ways to fail
        return error
    return None


class Columns(NamedTuple):
    """Metrics, and where they are in a row of what C++ returns."""

    names: tuple[str, ...]
    where: slice


class Classes:
    """
    The classes that ``update.cpp`` defines, built when they are first needed.

    :param report: is told of the compilation
    """

    def __init__(self, report: Report):
        self.error: str | None = None  # of the build
        self._report = report
        self._found: Any = None

    def get(self) -> Any:
        """Namespace of the classes; :class:`NotPlain` is raised where they cannot be used."""
        require(build.suits_processor(), "the processor has neither AVX2 nor AVX-512")
        if self._found is None and self.error is None:
            try:
                self._found = self._build()
            except Exception as error:
                self.error = reason_of(error)
        require(self._found is not None, "it could not be built")
        return self._found

    def _build(self) -> Any:
        is_first = not error_of_build.cache_info().currsize  # otherwise another model has built them
        announced = self._report.compilation("SoftSAC's C++", "ten to thirty seconds, one")
        with announced if is_first else nullcontext():
            if (error := error_of_build()) is not None:
                raise error
        return th.classes.sb3_softsac


class CppActor:
    """
    Samples the actions of one policy, if it is plain. Torch's overhead for such small operators is many times larger.

    :param policy: networks
    :param classes: that ``update.cpp`` defines
    """

    def __init__(self, policy: SoftSACPolicy, classes: Classes):
        self.policy = policy
        self._classes = classes
        self._looked_at: th.nn.Module | None = None
        self._watch = Watch([])
        self._actor: Any = None
        self._norms: list[BatchNorm] = []

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
        eps = self._norms[0].eps if self._norms else 0.0
        if any(norm.eps != eps for norm in self._norms):
            return None
        # By position, since names take a tenth of its time: low, high, whether it is tanh
        return self._actor.sample(observations, *actor.log_std_bounds, float(actor.log_std_bounding == "tanh"), eps)

    def _look_at(self, actor: th.nn.Module) -> None:
        self._looked_at, self._watch, self._actor = actor, Watch([actor]), None
        with suppress(NotPlain):
            _require_usual_methods(self._watch)
            stack = plain_actor(actor)
            self._norms = [module for module in stack.modules if isinstance(module, BatchNorm)]
            self._actor = self._classes.get().Actor(list(map(_tensors_of, stack.modules)), stack.kinds)


class CppUpdate:
    """
    Does updates, several in one call.

    :param learner: what is updated
    :param classes: that ``update.cpp`` defines
    """

    def __init__(self, learner: Learner, classes: Classes):
        self.learner = learner
        self._classes = classes
        self._update: Any = None
        self._reason: str | None = None  # why there is none
        self._option_names: list[str] = []
        self._metrics: tuple[Columns, ...] = ()  # of an update without the actor's, and with it
        self._norms: list[BatchNorm] = []
        self._n_weights = 1  # that are trained
        self._adam: dict[str, float] = {}  # options of the optimisers
        self._numbers: list[float] = []
        self._numbers_key: Any = None  # what they were made of
        self._optimizers: Optimizers | None = None
        self._watch = Watch([])

    def __call__(self, updates: Updates) -> Done:
        """See :class:`Way`. Noise is drawn as :func:`gradient_step.draw_noise` does."""
        if (reason := self.reason_against()) is not None:
            # Without states this update is eager, and the next one may be for C++
            raise Declined(reason) if self.learner.has_state() else Declined
        minibatches, first = updates.minibatches, updates.first
        if self._norms and minibatches.size < 2:
            raise Declined("batch norm has no variance of a single transition")
        if updates.options.joint_batch not in JOINT_BATCHES:
            raise Declined(f"joint_batch={updates.options.joint_batch!r} is unknown")
        last = min(minibatches.n, first + self.n_at_once(minibatches.size))
        dues = updates.dues[first:last]
        tensors = _tensors(gathered(minibatches.part(first, last), updates.storage))
        values = None
        if tensors is not None:
            actor_updates, targets = [due.actor_updates for due in dues], [int(due.targets) for due in dues]
            values = self._update.run(tensors, actor_updates, targets, self._options(updates), bool(updates.finite))
        if values is None:
            raise Declined(MISFIT)
        columns = [self._metrics[due.actor_updates > 0] for due in dues]
        outcomes = [Outcome(some.names, row[some.where]) for some, row in zip(columns, values.unbind(), strict=True)]
        return Done(outcomes[-1].values[columns[-1].names.index("finite")].bool(), outcomes)

    def reason_against(self) -> str | None:
        """Why the next update is not for C++; None if it is."""
        optimizers = self.learner.optimizers()
        if optimizers is not self._optimizers or self._watch.is_over():
            self._look_at(optimizers)
        if self._reason is not None:
            return self._reason
        if self._watch.sees_hooks() or any(map(hooks_of_gradient, self.learner.ent_coef.tensors())):
            return "a hook is registered on a network or a parameter"
        for (module, name), own in zip(FUNCTIONS, OWN_FUNCTIONS, strict=True):
            if getattr(module, name) is not own:
                return f"{module.__name__}.{name} has been replaced"
        if len({(norm.eps, norm.momentum) for norm in self._norms}) > 1:
            return "batch norms differ in eps or momentum"
        if self._norms and not self._norms[0].eps > 0.0:
            return "eps of batch norm is not positive"
        return None if usual_arithmetic() else "float32 is to be computed less precisely (matmul_precision or autocast)"

    def n_at_once(self, batch_size: int) -> int:
        """How many updates are done in one call: a run can be interrupted after a quarter of a second or so."""
        return max(1, MAX_WORK // (batch_size * self._n_weights))

    def _look_at(self, optimizers: Optimizers) -> None:
        policy = self.learner.policy
        critics = (policy.critic.q_networks, policy.critic_target.q_networks)
        coefficient = Attributes(self.learner.ent_coef, ("log_ent_coef", "tensor"))
        self._watch = Watch([policy, *policy.children()], [coefficient, *critics])
        self._optimizers, self._update, self._reason = optimizers, None, None
        try:
            self._update = self._make(optimizers)
        except NotPlain as reason:
            self._reason = str(reason)

    def _make(self, optimizers: Optimizers) -> Any:
        _require_usual_methods(self._watch)
        policy = self.learner.policy
        layers = plain_layers(policy)
        for name, trained in optimizers._asdict().items():
            if trained.optimizer is not None:
                _require_adam(name, trained)
        actor = _with_states("actor", optimizers.actor, layers.actor)
        critics = [_with_states("critic", optimizers.critic, critic) for critic in layers.critics]
        ent_coef = self.learner.ent_coef.tensors()
        require(all(tensor.dtype == th.float32 for tensor in ent_coef), "the entropy coefficient is not float32")
        if self.learner.ent_coef.is_learned:
            ent_coef = _states("ent_coef", optimizers.ent_coef, ent_coef)
        targets = [list(map(_tensors_of, stack.modules)) for stack in layers.targets]
        critic_kinds = [*layers.critics[0].kinds, Kind.LINEAR]
        atoms = getattr(policy.critic.head, "atoms", None)
        update = self._classes.get().Update(actor, layers.actor.kinds, critics, targets, critic_kinds, ent_coef, atoms)
        self._norms = layers.batch_norms()
        self._metrics = self._columns(*update.metric_names())
        self._option_names, self._numbers_key = update.option_names(), None
        self._adam = {}
        for name, trained in optimizers._asdict().items():
            self._adam |= _adam(name, trained)
        self._n_weights = sum(p.numel() for part in optimizers for p in part.parameters)
        return update

    def _columns(
        self, of_categorical: list[str], of_critics: list[str], of_actor: list[str], of_ent_coef: list[str]
    ) -> tuple[Columns, Columns]:
        """Where the metrics are that ``gradient_step.update`` returns, too."""
        is_categorical = isinstance(self.learner.policy.critic.head, CategoricalHead)
        first = 0 if is_categorical else len(of_categorical)
        if is_categorical:
            of_critics = of_categorical + of_critics
        if self.learner.ent_coef.is_learned:
            of_actor = of_actor + of_ent_coef

        def columns(names: list[str]) -> Columns:
            return Columns(tuple(names), slice(first, first + len(names)))

        return columns(of_critics), columns(of_critics + of_actor)

    def _options(self, updates: Updates) -> list[float]:
        """What an update is told besides tensors, in the order in which ``update.cpp`` names it."""
        policy, rates, options = self.learner.policy, self.learner.rates, updates.options
        actor, head, norm = policy.actor, policy.critic.head, self._norms[0] if self._norms else None
        support = (head.v_min, head.v_max) if isinstance(head, CategoricalHead) else (0.0, 0.0)
        eps, momentum = (0.0, 0.0) if norm is None else (norm.eps, norm.momentum or 0.0)
        key = (
            *(options, actor.log_std_bounds, actor.log_std_bounding),
            *(policy.unit_norm, support, eps, momentum, *rates),
        )
        if key != self._numbers_key:
            numbers = {
                "gamma": options.gamma,
                "tau": options.tau,
                "target_entropy": options.target_entropy,
                "log_action_scale": options.log_action_scale,
                "max_grad_norm": math.inf if options.max_grad_norm is None else options.max_grad_norm,
                "ent_coef_loss_is_exp": options.ent_coef_loss == "exp",
                "saturated": SATURATED,
                "joint_batch": JOINT_BATCHES.index(options.joint_batch),
                "has_critic_target": options.use_critic_target,
                "log_std_low": actor.log_std_bounds[0],
                "log_std_high": actor.log_std_bounds[1],
                "log_std_is_tanh": actor.log_std_bounding == "tanh",
                "v_min": support[0],
                "v_max": support[1],
                "batch_norm_eps": eps,
                "batch_norm_momentum": momentum,
                "projects_weights": policy.unit_norm is not None,
                "projects_norms": policy.unit_norm == "all",
                **{f"{name}_learning_rate": rate for name, rate in zip(Optimizers._fields, rates, strict=True)},
                **self._adam,
            }
            if len(numbers) != len(self._option_names):
                raise RuntimeError(f"update.cpp knows {self._option_names}, and update.py {list(numbers)}")
            self._numbers = [float(numbers[name]) for name in self._option_names]
            self._numbers_key = key
        return self._numbers


def _require_usual_methods(watch: Watch) -> None:
    require(not watch.sees_own_methods(), "a method of a network has been replaced")


def _require_adam(name: str, trained: Trained) -> None:
    optimizer, groups = trained.optimizer, trained.groups
    require(isinstance(optimizer, Adam | AdamW), f"the {name} optimizer is {type(optimizer).__name__}")
    require(bool(groups), f"the {name} optimizer has a step of its own (a subclass, a hook, differentiable)")
    require(len(groups) == 1, f"the {name} optimizer has several groups of parameters")
    for option in ("amsgrad", "maximize"):
        require(not groups[0].options[option], f"the {name} optimizer has the option {option}")


def _adam(name: str, trained: Trained) -> dict[str, float]:
    options = ("beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay")
    values = trained.groups[0].options if trained.groups else dict.fromkeys(options, 0.0)
    return {f"{name}_{option}": float(values[option]) for option in options}


def _with_states(name: str, trained: Trained, stack: Stack) -> list[list[th.Tensor]]:
    """The tensors of each module: each parameter with Adam's exp_avg, exp_avg_sq and step, and statistics."""
    return [[*_states(name, trained, parameters_of(module)), *networks.statistics(module)] for module in stack.modules]


def _states(name: str, trained: Trained, parameters: list[th.Tensor]) -> list[th.Tensor]:
    group = trained.groups[0]
    rows = zip(group.parameters, group.exp_avgs, group.exp_avg_sqs, group.steps, strict=True)
    states = {id(row[0]): row for row in rows}
    are_trained = all(id(parameter) in states for parameter in parameters)
    require(are_trained, f"the {name} optimizer does not train all parameters: some are frozen, or not its own")
    return [tensor for parameter in parameters for tensor in states[id(parameter)]]


def _tensors_of(module: Module) -> list[th.Tensor]:
    return [*parameters_of(module), *networks.statistics(module)]


def _tensors(batch: ReplayBatch) -> list[th.Tensor] | None:
    """Parts of a minibatch in the order of ``Update::run``, contiguous float32; None if one is not a tensor."""
    parts: list[Any] = [batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards]
    if batch.discounts is not None:
        parts.append(batch.discounts)
    if not all(isinstance(part, th.Tensor) for part in parts):
        return None
    return [p if p.dtype == th.float32 and p.is_contiguous() else p.float().contiguous() for p in parts]
