"""Updates compiled by torch: one function for each combination of what is due, on the CPU and on GPUs."""

import copy
import itertools
import types
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch as th

from sb3_softsac import upstream
from sb3_softsac.execution.eager import Held, Inputs, Run, make_update, prepare, with_gathering
from sb3_softsac.execution.learner import Learner
from sb3_softsac.execution.report import Report, reason_of
from sb3_softsac.execution.watch import Attributes, Watch, hooks_of_gradient
from sb3_softsac.execution.way import Declined, Done, Updates
from sb3_softsac.gradient_step import EAGER, PURE, Due, UpdateOptions, actor_gradients, critic_gradients
from sb3_softsac.heads import head_of
from sb3_softsac.optimizers import has_pure_step, moved_names, use_of

BACKEND = "inductor"
MAX_VARIANTS = 16  # compiled forms of one update: each has its own options and parts that are due
MAX_COMPILATIONS = 3  # of each form
NUMBERS = ("eps", "momentum", "p")  # of norms and dropout

Function = TypeVar("Function", bound=Callable[..., Any])


class Variant(NamedTuple):
    """A form of an update that is compiled by itself."""

    what: Due
    options: UpdateOptions
    batch_size: int
    n_threads: int  # compiled code divides its work among them
    with_steps: bool  # the optimisers' steps are compiled, too
    precision: str  # of matrix products


class Structure:
    """
    What compiled code is made of, besides tensors and an update's options: modules, hooks, numbers, what is trained and
    how. torch's compiler does not look at all of it before it runs the code, and a CUDA graph looks at nothing.

    :param learner: what is updated
    """

    def __init__(self, learner: Learner):
        self._learner = learner
        networks = [learner.policy, *learner.policy.children()]
        self._watch = Watch(networks)
        modules = dict.fromkeys(module for network in networks for module in network.modules())
        self._numbers = [Attributes(each, NUMBERS) for each in modules if not vars(each).keys().isdisjoint(NUMBERS)]
        self._parts = self._present_parts()

    def has_changed(self) -> bool:
        """Whether code that was compiled then is out of date."""
        return self._watch.is_over() or self._present_parts() != self._parts

    def _present_parts(self) -> list[Any]:
        policy = self._learner.policy
        head, actor = vars(head_of(policy.critic)), vars(policy.actor)
        return [
            self._watch.hooks(),
            *(policy.unit_norm, actor.get("log_std_bounds"), actor.get("log_std_bounding")),
            *(head.get("v_min"), head.get("v_max")),
            list(map(list, self._numbers)),
            *map(use_of, self._learner.involved()),
        ]


class Inductor:
    """
    Compiles an update when the first of its form is to be done. If that fails, it never tries again.

    :param learner: what is updated
    :param report: is told of compilations
    """

    def __init__(self, learner: Learner, report: Report):
        self.learner = learner
        self.failed = False
        self.compiled: dict[Variant, Run] = {}
        self._report = report
        self._n_compilations: dict[Variant, int] = defaultdict(int)
        self._structure: Structure | None = None  # of what is compiled
        self._has_hooks = False  # on gradients of parameters
        self._n_trainings = 0  # when these were looked at last

    def __call__(self, updates: Updates) -> Done:
        """See :class:`Way`."""
        if self.failed or not self.learner.has_state():
            raise Declined
        if self.learner.n_trainings != self._n_trainings:
            self._n_trainings = self.learner.n_trainings
            trained = self.learner.optimizers()
            self._has_hooks = any(map(hooks_of_gradient, (p for each in trained for p in each.parameters)))
            if self._structure is not None and self._structure.has_changed():
                self.compiled.clear()
        if self._has_hooks:
            raise Declined("torch's compiler leaves out hooks of a parameter's gradient")
        variant = self._variant(updates)
        before = _random_states(self.learner.device)
        held, inputs = prepare(self.learner, updates)
        run = self.compiled.get(variant)
        if run is not None:
            try:
                return run(held, inputs)
            except Exception as error:
                if not _is_of_compiler(error):
                    raise
        try:
            return self._first(variant, held, inputs)
        except Declined:
            _set_random_states(before, self.learner.device)
            raise

    def _first(self, variant: Variant, held: Held, inputs: Inputs) -> Done:
        """Compile, and do an update."""
        before = [(tensor, tensor.detach().clone()) for tensor in self.learner.tensors()]
        optimizers = self.learner.involved()
        states = [{parameter: copy.copy(state) for parameter, state in each.state.items()} for each in optimizers]
        try:
            self._n_compilations[variant] += 1
            if len(self.compiled) >= MAX_VARIANTS:
                raise RuntimeError(f"its options have changed {MAX_VARIANTS} times")
            if self._n_compilations[variant] > MAX_COMPILATIONS:
                raise RuntimeError(
                    "something in the networks changes with the updates, and each change would compile anew"
                )
            with self._report.compilation("the update", "half a minute or so, a few seconds"):
                run = self._compile(variant)
                held = held._replace(optimizers=self.learner.optimizers())  # their steps may have moved
                with tracing(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's, about its own insides
                    done = run(held, inputs)
        except Exception as error:  # whatever a compiler may raise; if it is the user's own, the eager update raises it
            self.failed = True
            self.compiled.clear()
            with th.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.state.clear()  # of what the steps may have added
                optimizer.state.update(state)
            raise Declined(reason_of(error)) from error
        self.compiled[variant] = run
        self._structure = Structure(self.learner)  # only now: some modules remember things from their first call on
        return done

    def _variant(self, updates: Updates) -> Variant:
        what = updates.dues[updates.first]
        with_steps = all(map(has_pure_step, self.learner.involved(what)))
        now = th.get_num_threads(), with_steps, th.get_float32_matmul_precision()
        return Variant(what, updates.options, updates.minibatches.size, *now)

    def _compile(self, variant: Variant) -> Run:
        check_torch()
        what, options, device = variant.what, variant.options, self.learner.device
        if variant.with_steps:
            return self._finish(with_gathering(compiled(make_update(self.learner, PURE, options, what), device)))
        # What the optimiser does is its own: only the gradients are compiled
        for name in itertools.chain.from_iterable(map(moved_names, self.learner.involved(what))):
            upstream.say_moved(name, "the optimisers' steps are not compiled, which is slower.")
        parts = EAGER._replace(critic=compiled(critic_gradients, device), actor=compiled(actor_gradients, device))
        return with_gathering(make_update(self.learner, parts, options, what))

    def _finish(self, run: Run) -> Run:
        """What is done with a whole compiled update."""
        return run


def compiled(function: Function, device: th.device) -> Function:
    """
    :param function: works on tensors and modules
    :param device: where they are
    :return: the same, compiled as one graph when it is first called, within :func:`tracing`
    """
    # torch keeps compiled forms by code object, and only so many of each: the models of one process must not share it
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


def check_torch() -> None:
    """Raise a RuntimeError if this torch cannot compile an update."""
    import torch._dynamo

    # It is off by default where it is there; a later version may do without it
    if not hasattr(torch._dynamo.config, "trace_autograd_ops") and th.__version__ < "2.11":
        raise RuntimeError(f"torch {th.__version__} cannot compile gradients, 2.11 and newer can")


def tracing() -> AbstractContextManager[Any]:
    """Context in which a function that takes gradients can be compiled."""
    config = th._dynamo.config
    return config.patch(trace_autograd_ops=True) if hasattr(config, "trace_autograd_ops") else nullcontext()


def _is_of_compiler(error: Exception) -> bool:
    """Whether torch's compiler raised it, and not what it has compiled."""
    return any(cls.__module__.startswith("torch._dynamo") for cls in type(error).__mro__)


def _random_states(device: th.device) -> list[th.Tensor]:
    return [th.get_rng_state(), *([th.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(states: list[th.Tensor], device: th.device) -> None:
    th.set_rng_state(states[0])
    if len(states) > 1:
        th.cuda.set_rng_state(states[1], device)
