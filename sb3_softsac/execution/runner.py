"""
Runs the updates of a model, each in the fastest way that can do it; and samples actions in C++, where it can.

State stays where it always is, in modules and optimisers: every way changes their tensors in place, so that saving,
loading and going from one way to another need no conversion.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch as th

from sb3_softsac import upstream
from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.execution import inductor, watch
from sb3_softsac.execution.cpp.update import Classes, CppActor, CppUpdate
from sb3_softsac.execution.cuda_graph import CudaGraphs
from sb3_softsac.execution.device_replay import Storage
from sb3_softsac.execution.eager import Eager
from sb3_softsac.execution.inductor import Inductor
from sb3_softsac.execution.learner import Learner
from sb3_softsac.execution.metrics import means
from sb3_softsac.execution.report import Report
from sb3_softsac.execution.way import Declined, Done, Minibatches, Outcome, Updates, Way
from sb3_softsac.gradient_step import UpdateOptions, due
from sb3_softsac.policies import SoftSACPolicy
from sb3_softsac.type_aliases import TorchObs

NOT_BUILT = "SoftSAC's C++ cannot be built"


class Runner:
    """
    :param policy: networks and their optimisers
    :param ent_coef: entropy coefficient and its optimiser
    :param compile: False: updates are run eagerly, and actions are torch's
    :param say: called with what a user may want to read
    """

    def __init__(self, policy: SoftSACPolicy, ent_coef: EntCoef, compile: bool, say: Callable[[str], None]):
        self.learner = Learner(policy, ent_coef)
        self.report = Report(say)
        self._compiles = compile
        self._eager = Eager(self.learner)
        self.compiler = (CudaGraphs if policy.device.type == "cuda" else Inductor)(self.learner, self.report)
        has_cpp = compile and inductor.BACKEND == "inductor" and policy.device.type == "cpu"
        for name in watch.moved_names() if has_cpp else ():
            has_cpp = False
            upstream.say_moved(name, "neither updates nor actions are computed in C++, which is faster.")
        self._classes = Classes(self.report)
        self.cpp = CppUpdate(self.learner, self._classes) if has_cpp else None
        # Also used if updates turn out not to compile: a run that is continued does not know that before its first
        self.cpp_actor = CppActor(policy, self._classes) if has_cpp else None
        self.last_way: Way | None = None
        self._finite = th.ones((), dtype=th.bool, device=policy.device)

    @property
    def compiles(self) -> bool:
        """Whether updates are compiled, or will be; False: not wanted, or compilation failed."""
        return self._compiles and not self.compiler.failed

    def _ways(self) -> list[Way]:
        """The ways that may do the next update, the fastest first."""
        if not self.compiles:
            return [self._eager]
        return [self.compiler, self._eager] if self.cpp is None else [self.cpp, self.compiler, self._eager]

    def _run(self, updates: Updates) -> Done:
        for way in self._ways():
            try:
                done = way(updates)
            except Declined as declined:
                if str(declined):
                    self._note(way, str(declined))
                continue
            if way is self.compiler and self._classes.error is not None:
                self.report.warn_once(f"{NOT_BUILT}, and torch is slower without it: {self._classes.error}")
            self.last_way = way
            return done
        raise AssertionError("eager updates are always possible")

    def _note(self, way: Way, reason: str) -> None:
        if way is self.cpp:
            self.report.once(f"Updates are not run by SoftSAC's C++, but compiled by torch: {reason}")
            return
        also = "" if self._classes.error is None else f". {NOT_BUILT}: {self._classes.error}"
        self.report.warn_once(
            f"The update cannot be compiled and runs eagerly, which is slower: {reason}{also} (compile=False says that "
            "this is wanted)"
        )

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
        self.learner.begin()
        finite = self._finite
        outcomes: list[Outcome] = []
        for minibatches in draws:
            n_before = len(outcomes)
            dues = [due(options, n_updates + n_before + i) for i in range(minibatches.n)]
            while (first := len(outcomes) - n_before) < minibatches.n:
                finite, done = self._run(Updates(minibatches, first, dues, storage, options, finite))
                outcomes += done
        return len(outcomes), means(outcomes, n_updates)

    def act(self, observations: TorchObs) -> th.Tensor | None:
        """
        Sample actions as the actor does, faster.

        :param observations: of E environments, on the policy's device
        :return: scaled actions (E, A); None if the actor has to do it itself
        """
        return None if self.cpp_actor is None else self.cpp_actor(observations)


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
