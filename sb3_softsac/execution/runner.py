"""
How updates are run: eagerly, in C++, compiled, or as a CUDA graph, with the same result up to rounding; and actions of
exploration, where there is C++ for them.

State stays where it always is, in modules and optimisers: a compiled update reads and writes their tensors in place, so
that saving, loading and going from one way to another need no conversion.
"""

import functools
import itertools
import math
import time
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch as th
from torch.optim import Optimizer

from sb3_softsac import upstream
from sb3_softsac.buffers import rows_of
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.execution.cpp import support
from sb3_softsac.execution.cpp.update import MISFIT, NativeActor, NativeUpdate, classes, error_of_build
from sb3_softsac.execution.cuda_graph import CudaGraph, capture_on, leaves
from sb3_softsac.execution.device_replay import Storage, StoredBatch, gathered
from sb3_softsac.gradient_step import (
    ADAM_OPTIONS,
    CHECKED,
    EAGER,
    PURE,
    Due,
    LearningRates,
    Noise,
    Optimizers,
    Outcome,
    Parts,
    UpdateOptions,
    actor_gradients,
    critic_gradients,
    draw_noise,
    due,
    has_pure_step,
    is_plain_adam,
    moved_names,
    trained,
    update,
)
from sb3_softsac.policies import SoftSACPolicy
from sb3_softsac.type_aliases import ReplayBatch, TorchObs

BACKEND = "inductor"
MAX_VARIANTS = 16  # compiled forms of one update: each has its own options and parts that are due
MAX_COMPILATIONS = 3  # of each form

Variant = tuple[Due, UpdateOptions, int, bool]
"""What is due, how, with how many threads (compiled code divides its work among them), and whether the optimisers'
steps are compiled, too."""
Function = TypeVar("Function", bound=Callable[..., Any])


class Minibatches(NamedTuple):
    """Minibatches of equal size B, one behind the other."""

    samples: ReplayBatch | StoredBatch  # (n B, ...)
    n: int

    @property
    def size(self) -> int:
        return len(self.samples.numbers if isinstance(self.samples, StoredBatch) else self.samples.rewards) // self.n

    def part(self, first: int, last: int) -> ReplayBatch | StoredBatch:
        """
        :param first: first minibatch
        :param last: one past the last
        :return: samples of these, which share memory
        """
        if (first, last) == (0, self.n):
            return self.samples
        return rows_of(self.samples, slice(first * self.size, last * self.size))


Result = tuple[th.Tensor, tuple[str, ...], th.Tensor]
"""Whether all was finite; names and values of the metrics."""
Update = Callable[[Optimizers, ReplayBatch, Noise, th.Tensor], Result]
"""Does an update; takes whether all was finite before."""


class Held(NamedTuple):
    """What an update reads or changes where it is."""

    optimizers: Optimizers
    storage: Storage | None  # what minibatches are gathered from


class Inputs(NamedTuple):
    """What an update is given anew each time."""

    batch: ReplayBatch | StoredBatch
    noise: Noise
    finite: th.Tensor


Run = Callable[[Held, Inputs], Result]
"""An :data:`Update` that gathers its minibatch."""


class Execution:
    """
    Runs the updates of one model.

    :param policy: networks and their optimisers
    :param ent_coef: entropy coefficient and its optimiser
    :param compile: compile updates, and actions where we have C++ for them; on CUDA, also capture updates in graphs
    :param say: called with what a user may want to read
    """

    def __init__(self, policy: SoftSACPolicy, ent_coef: EntCoef, compile: bool, say: Callable[[str], None]):
        self.policy = policy
        self.ent_coef = ent_coef
        self.compiles = compile
        self.compile_seconds = 0.0  # spent until now
        self.failed = False  # it was tried in vain
        self._say = say
        is_native = compile and BACKEND == "inductor" and policy.device.type == "cpu"
        for name in support.moved_names() if is_native else ():
            is_native = False
            upstream.say_moved(name, "neither updates nor actions are computed in C++, which is faster.")
        get_classes = functools.cache(self._build_native)
        self._native = NativeUpdate(policy, ent_coef, get_classes) if is_native else None
        self._native_actor = NativeActor(policy, get_classes) if is_native else None
        self._was_native = False  # the last update
        self._told: set[str] = set()  # to the user
        self._compiled: dict[Variant, Run] = {}
        self._n_compilations: dict[Variant, int] = defaultdict(int)
        self._trained: Optimizers | None = None
        self._trained_key: Any = None
        self._known_optimizers: Optimizers | None = None
        self._known_networks: list[th.nn.Module] = []
        self._known_tensors: list[th.Tensor] = []  # of the two
        self._states: list[Any] = []  # that are looked up, kept so that no other has their identity
        device = policy.device
        self._finite = th.ones((), dtype=th.bool, device=device)
        rates = (critic := th.zeros((), device=device), th.zeros_like(critic), th.zeros_like(critic))
        self._learning_rates = LearningRates(*rates)
        self._values: list[float] = [0.0] * len(rates)

    def __call__(
        self,
        draws: Iterable[Minibatches],
        options: UpdateOptions,
        n_updates: int,
        storage: Storage | None = None,
    ) -> tuple[int, dict[str, float]]:
        """
        Do updates, one for each minibatch.

        :param draws: minibatches on the policy's device; each draw is asked for when the updates before are done
        :param options: constants of the updates
        :param n_updates: updates done before
        :param storage: what the minibatches are gathered from, if they have to be
        :return: updates done, and means of their metrics by log key
        :raises NotFinite: if a loss or gradient is not finite; that optimiser's step and all after it were not done
        """
        self._set_learning_rates()
        if not self._was_native:  # it takes a while, and does nothing to plain networks
            self.policy.set_training_mode(True)
        finite = self._finite
        outcomes: list[Outcome] = []
        for minibatches in draws:
            first = len(outcomes)
            while (n_done := len(outcomes) - first) < minibatches.n:
                n_before = n_updates + len(outcomes)
                result = self._run_native(storage, minibatches, n_done, finite, options, n_before)
                if result is not None:
                    finite, done = result
                    outcomes += done
                    continue
                what = due(options, n_before)
                noise = draw_noise(self.policy, minibatches.size, what.actor_updates, finite.device)
                inputs = Inputs(minibatches.part(n_done, n_done + 1), noise, finite)
                finite, names, values = self._run(storage, inputs, options, what)
                outcomes.append(Outcome(names, values))
        return len(outcomes), means(outcomes, n_updates)

    def act(self, observations: TorchObs) -> th.Tensor | None:
        """
        Sample actions as the actor does, faster.

        :param observations: of E environments, on the policy's device
        :return: scaled actions (E, A); None if the actor has to do it itself
        """
        # Also when updates turned out not to compile: a run that is continued does not know of that before its first
        return None if self._native_actor is None else self._native_actor(observations)

    def _run_native(
        self,
        storage: Storage | None,
        minibatches: Minibatches,
        n_done: int,
        finite: th.Tensor,
        options: UpdateOptions,
        n_before: int,
    ) -> tuple[th.Tensor, list[Outcome]] | None:
        """Do updates with the minibatches that are left, in C++: many of them, or none."""
        result = None
        if self.compiles and self._native is not None:
            reason = self._native.reason_against(self._optimizers())
            if reason is None:
                n = min(minibatches.n - n_done, self._native.n_at_once(minibatches.size))
                batch = gathered(minibatches.part(n_done, n_done + n), storage)
                dues = [due(options, n_before + i) for i in range(n)]
                result = self._native(batch, dues, self._learning_rates, finite, options)
            if result is None:
                self._say_declined(reason or MISFIT)
        if self._was_native and result is None:
            self.policy.set_training_mode(True)
        self._was_native = result is not None
        return result

    def _run(self, storage: Storage | None, inputs: Inputs, options: UpdateOptions, what: Due) -> Result:
        # C++ needs the states of all optimisers, also of one that is not due: nothing is compiled until they are there
        if self.compiles and (self._has_state(what) if self._native is None else self._has_state()):
            run = self._compiled.get(self._variant(options, what))
            if run is not None:
                try:
                    return run(Held(self._optimizers(), storage), inputs)
                except Exception as error:
                    if not _is_of_compiler(error):
                        raise  # else it has to be compiled anew
            result = self._first_run(storage, inputs, options, what)
            if result is not None:
                return result
        run = with_gathering(self._make_update(EAGER, options, what))
        result = run(Held(self._optimizers(), storage), inputs)
        for optimizer in self._involved(what) if result[0] else ():
            for parameter in _trainable(optimizer) if is_plain_adam(optimizer) else ():
                _ = optimizer.state[parameter]  # empty if it has no gradient; tells it from one that was frozen
        return result

    def _build_native(self) -> Any:
        try:
            if error_of_build.cache_info().currsize:  # known from another model
                return classes()
            with self._timed("SoftSAC's C++", "ten to thirty seconds, one"):
                return classes()
        except Exception as error:
            warnings.warn(
                f"SoftSAC's C++ cannot be built, and torch is slower without it: {_reason(error)}", stacklevel=2
            )
            return None

    @contextmanager
    def _timed(self, what: str, duration: str) -> Iterator[None]:
        """Tell the user of a compilation, unless there has been one like it, and count its time if it succeeds."""
        self._say_once(f"Compiling {what}: {duration} if it has been done before ...")
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        self._say(f"Compiled in {seconds:.1f} s")

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def _say_declined(self, reason: str) -> None:
        text = f"Updates are not run by SoftSAC's C++, but compiled by torch: {reason}"
        if text not in self._told and self._has_state():  # else this one is eager, and C++ may do the next
            self._say_once(text)

    def _make_update(self, parts: Parts, options: UpdateOptions, what: Due) -> Update:
        policy, ent_coef, learning_rates = self.policy, self.ent_coef, self._learning_rates

        def run(optimizers: Optimizers, batch: ReplayBatch, noise: Noise, finite: th.Tensor) -> Result:
            finite, metrics = update(
                policy, ent_coef, optimizers, batch, noise, learning_rates, finite, options, what, parts
            )
            metrics["finite"] = finite.float()
            return finite, tuple(metrics), th.stack([value.reshape(()) for value in metrics.values()])

        return run

    def _first_run(self, storage: Storage | None, inputs: Inputs, options: UpdateOptions, what: Due) -> Result | None:
        """Compile, and do an update; None if that cannot be, with all as it was."""
        before = [(tensor, tensor.detach().clone()) for tensor in self.tensors()]
        random_states = _random_states(self.policy.device)
        variant = self._variant(options, what)
        try:
            self._n_compilations[variant] += 1
            if len(self._compiled) >= MAX_VARIANTS:
                raise RuntimeError(f"its options have changed {MAX_VARIANTS} times")
            if self._n_compilations[variant] > MAX_COMPILATIONS:
                raise RuntimeError(
                    "something in the networks changes with the updates, and each change would compile anew"
                )
            with self._timed("the update", "half a minute or so, a few seconds"):
                run = self._compile(options, what)
                with tracing(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, about its own insides
                    result = run(Held(self._optimizers(), storage), inputs)
        except Exception as error:  # whatever a compiler may raise; if it is the user's own, the eager update raises it
            self.compiles, self.failed = False, True
            self._compiled.clear()
            th.set_rng_state(random_states[0])
            if len(random_states) > 1:
                th.cuda.set_rng_state(random_states[1], self.policy.device)
            with th.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            warnings.warn(
                f"The update cannot be compiled and runs eagerly, which is slower: {_reason(error)} "
                "(compile=False says that this is wanted)",
                stacklevel=2,
            )
            return None
        self._compiled[variant] = run
        return result

    def _variant(self, options: UpdateOptions, what: Due) -> Variant:
        return what, options, th.get_num_threads(), all(map(has_pure_step, self._involved(what)))

    def _compile(self, options: UpdateOptions, what: Due) -> Run:
        check_torch()
        device = self.policy.device
        if not all(has_pure_step(optimizer) for optimizer in self._involved(what)):
            # What the optimiser does is its own: only the gradients are compiled
            for name in itertools.chain.from_iterable(map(moved_names, self._involved(what))):
                upstream.say_moved(name, "the optimisers' steps are not compiled, which is slower.")
            parts = EAGER._replace(critic=compiled(critic_gradients, device), actor=compiled(actor_gradients, device))
            return with_gathering(self._make_update(parts, options, what))
        run = with_gathering(compiled(self._make_update(PURE, options, what), device))
        if device.type != "cuda":
            return run
        self._place_steps()
        return CudaGraph(run, self._addresses_of, capture_on(device))

    def _involved(self, what: Due = Due(1, True)) -> list[Optimizer]:  # noqa: B008
        optimizers = [self.policy.critic.optimizer]
        if what.actor_updates:
            optimizers.append(self.policy.actor.optimizer)
            if self.ent_coef.optimizer is not None:
                optimizers.append(self.ent_coef.optimizer)
        return optimizers

    def _optimizers(self) -> Optimizers:
        """What the optimisers train, looked up anew if a state, option or hook is new, or a parameter was frozen."""
        optimizers = self._involved()
        key = [
            (
                id(optimizer.state),
                list(map(id, optimizer.state.values())),
                list(map(id, _trainable(optimizer))),
                [list(map(group.get, ADAM_OPTIONS)) for group in optimizer.param_groups],
                is_plain_adam(optimizer),
            )
            for optimizer in optimizers
        ]
        if self._trained is None or key != self._trained_key:
            ent_coef = self.ent_coef.optimizer
            self._trained = Optimizers(
                trained(self.policy.critic.optimizer),
                None if ent_coef is None else trained(ent_coef),
                trained(self.policy.actor.optimizer),
            )
            self._trained_key = key
            self._states = [[optimizer.state, *optimizer.state.values()] for optimizer in optimizers]
        return self._trained

    def _has_state(self, what: Due = Due(1, True)) -> bool:  # noqa: B008
        """
        Optimisers make their state in a step of their own. What has no entry in it then was frozen in all steps. This
        is read from the optimisers alone, so that a run that is continued compiles the same updates.
        """
        return all(
            not is_plain_adam(optimizer) or all(parameter in optimizer.state for parameter in _trainable(optimizer))
            for optimizer in self._involved(what)
        )

    def _place_steps(self) -> None:
        """Adam counts its steps on the CPU; a graph needs them where the parameters are."""
        for optimizer in self._involved():
            for state in optimizer.state.values():
                if isinstance(state.get("step"), th.Tensor):
                    state["step"] = state["step"].to(self.policy.device)
        self._trained = None

    def tensors(self) -> list[th.Tensor]:
        """
        :return: all that an update changes
        """
        tensors = [*self.policy.parameters(), *self.policy.buffers()]
        if self.ent_coef.log_ent_coef is not None:
            tensors.append(self.ent_coef.log_ent_coef)
        for optimizer in self._involved():
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, th.Tensor)]
        return tensors

    def _addresses_of(self, held: Held) -> tuple[Any, ...]:
        """Where a graph finds what it was not given as inputs."""
        networks = list(self.policy.children())
        if held.optimizers is not self._known_optimizers or networks != self._known_networks:
            # Looking for all tensors takes a while: not each time
            self._known_optimizers, self._known_networks = held.optimizers, networks
            self._known_tensors = self.tensors()
        coefficients = (self.ent_coef.log_ent_coef, self.ent_coef.tensor)
        fixed = [*self._known_tensors, *(tensor for tensor in coefficients if tensor is not None)]
        stored = [] if held.storage is None else leaves(held.storage)
        return [tensor.data_ptr() for tensor in fixed], [(tensor.data_ptr(), tensor.shape) for tensor in stored]

    def _set_learning_rates(self) -> None:
        optimizers = (self.policy.critic.optimizer, self.ent_coef.optimizer, self.policy.actor.optimizer)
        for i, (rate, optimizer) in enumerate(zip(self._learning_rates, optimizers, strict=True)):
            value = 0.0 if optimizer is None else float(optimizer.param_groups[0]["lr"])
            if value != self._values[i]:
                self._values[i] = value
                rate.fill_(value)


def with_gathering(update: Update) -> Run:
    """
    :param update: takes minibatches
    :return: the same, for what minibatches are gathered from. Gathering is not compiled with the update: a graph takes
        it in as well
    """

    def run(held: Held, inputs: Inputs) -> Result:
        return update(held.optimizers, gathered(inputs.batch, held.storage), inputs.noise, inputs.finite)

    return run


def _trainable(optimizer: Optimizer) -> list[th.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """
    :param precision: of float32 matrix products within the context; None: as it is
    """
    if precision is None:
        yield
        return
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        th.set_float32_matmul_precision(before)


def means(outcomes: list[Outcome], n_updates: int) -> dict[str, float]:
    """
    Means of the metrics over the updates that have them, for one transfer from the device.

    :param outcomes: of K updates
    :param n_updates: updates done before
    :return: means by name
    :raises NotFinite: if a number was not finite
    """
    if not outcomes:
        return {}
    numbers = outcomes[0].values if len(outcomes) == 1 else th.cat([outcome.values for outcome in outcomes])
    names = itertools.chain.from_iterable(outcome.names for outcome in outcomes)
    terms: dict[str, list[float]] = defaultdict(list)
    for name, number in zip(names, numbers.tolist(), strict=True):
        terms[name].append(number)
    result = {name: sum(some) / len(some) for name, some in terms.items()}
    if result.pop("finite") < 1.0:
        raise _not_finite(outcomes, n_updates)
    return result


def _random_states(device: th.device) -> list[th.Tensor]:
    return [th.get_rng_state(), *([th.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _reason(error: Exception) -> str:
    """The first lines of an error, until one that is a sentence."""
    said: list[str] = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        said.append(line)
        if not line.endswith(":"):
            break
    return " ".join(said) or type(error).__name__


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """
    :param state: state dict of a module or an optimiser
    :return: the same, with the step counters of an optimiser that a graph has moved back on the CPU, where it expects
        them
    """
    groups = state.get("param_groups")
    if not groups or any(group.get("capturable") or group.get("fused") for group in groups):
        return state

    def on_cpu(name: str, value: Any) -> Any:
        return value.cpu() if name == "step" and isinstance(value, th.Tensor) else value

    per_parameter = {key: {n: on_cpu(n, v) for n, v in values.items()} for key, values in state["state"].items()}
    return {**state, "state": per_parameter}


class NotFinite(ValueError):
    """
    A loss or gradient was not finite.

    :param message: what happened
    :param n_done: updates that were completed before
    """

    def __init__(self, message: str, n_done: int):
        super().__init__(message)
        self.n_done = n_done


def _not_finite(outcomes: list[Outcome], n_updates: int) -> NotFinite:
    for i, outcome in enumerate(outcomes):
        metrics = dict(zip(outcome.names, outcome.values.tolist(), strict=True))
        if metrics["finite"]:
            continue
        pairs = [
            (loss, norm)
            for loss, norm in CHECKED
            if any(not math.isfinite(metrics.get(name or loss, 0.0)) for name in (loss, norm))
        ]
        loss, norm = (pairs or CHECKED)[0]
        said = f"{loss} is {metrics[loss]}" + (f" and the norm of its gradient {metrics[norm]}" if norm else "")
        return NotFinite(
            f"{said} at update {n_updates + i + 1}: this optimiser step was not taken. Check rewards and observations "
            "for NaN, infinite or huge values; else lower the learning rate or set max_grad_norm.",
            i,
        )
    raise AssertionError("all is finite")


def compiled(function: Function, device: th.device) -> Function:
    """
    :param function: works on tensors and modules
    :param device: where they are
    :return: the same, compiled as one graph when it is first called, within :func:`tracing`
    """
    # Compiled forms belong to a code object, and only so many to each: the models of one process must not share it
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    if BACKEND != "inductor":
        return cast(Function, th.compile(own, fullgraph=True, dynamic=False, backend=BACKEND))
    options: dict[str, Any] = {
        "fallback_random": True,  # the same random numbers as in an eager update, in layers such as dropout
        "size_asserts": False,
        "alignment_asserts": False,
    }
    if device.type == "cpu":
        options["cpp_wrapper"] = True  # calls from Python took 5% of an update
        try:
            from sb3_softsac.execution.graph_passes import GraphPasses

            options["post_grad_custom_post_pass"] = GraphPasses()
        except ImportError:
            name = "torch._inductor.custom_graph_pass:CustomGraphPass"
            upstream.say_moved(name, "the graph of a compiled update is left as it is, which is slower.")
    known = set(th._inductor.list_options())
    options = {name: value for name, value in options.items() if name in known}
    return cast(Function, th.compile(own, fullgraph=True, dynamic=False, options=options))


def _is_of_compiler(error: Exception) -> bool:
    """Whether torch's compiler, not what it has compiled, raised it."""
    return any(cls.__module__.startswith("torch._dynamo") for cls in type(error).__mro__)


def check_torch() -> None:
    """
    :raises RuntimeError: if this torch cannot compile an update
    """
    import torch._dynamo

    # It is off by default where it is there; a later version may do without it
    if not hasattr(torch._dynamo.config, "trace_autograd_ops") and th.__version__ < "2.11":
        raise RuntimeError(f"torch {th.__version__} cannot compile gradients, 2.11 and newer can")


def tracing() -> AbstractContextManager[Any]:
    """
    :return: context in which a function that takes gradients can be compiled
    """
    config = th._dynamo.config
    return config.patch(trace_autograd_ops=True) if hasattr(config, "trace_autograd_ops") else nullcontext()
