"""Updates that torch compiles: generated code, what makes them compile again, and what cannot be compiled."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib.common.torch_layers import BatchRenorm1d
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from twins import (
    CASES,
    SGD,
    SMALL,
    TAME,
    NormExtractor,
    assert_identical,
    assert_same,
    cheetah,
    has_compiled,
    make,
    state,
    train,
    twins,
)

from sb3_softsac import SoftSAC
from sb3_softsac.execution import inductor, threads
from sb3_softsac.execution.cpp import matmul
from sb3_softsac.execution.cpp.matmul import replace_products

pytestmark = pytest.mark.compiler


def assert_generated_code_equals_eager(batch_size: int = 256, n_updates: int = 4, **options: Any) -> None:
    networks = {"optimizer_kwargs": {"eps": 1e-3}, **options.pop("networks", {})}
    eager, compiled = twins("defaults", batch_size=batch_size, policy_kwargs=networks, **options)
    for model in (eager, compiled):
        th.manual_seed(0)
        model.train(gradient_steps=n_updates, batch_size=batch_size)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert has_compiled(compiled)


@pytest.mark.usefixtures("nothing_is_plain")
def test_generated_code_equals_eager() -> None:
    assert_generated_code_equals_eager()


class ReluDropout(nn.Sequential):
    """An activation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.Dropout(0.2))


def test_generated_code_for_two_threads_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: what is done to the graph must not change the order in which layers draw."""
    monkeypatch.setattr(threads, "n_cores", lambda: 2)
    assert_generated_code_equals_eager(networks={"activation_fn": ReluDropout}, num_threads=2)


@pytest.mark.usefixtures("quick_compiler")
def test_number_of_threads_may_change_between_updates() -> None:
    model = make("defaults", compile=True)
    model.learn(SMALL["learning_starts"] + 2)
    for k in range(6):
        th.set_num_threads(1 + k % 2)
        train(model, 1)
        assert has_compiled(model)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_plain")
@pytest.mark.parametrize("ours_are_faster", [False, True])
def test_generated_code_equals_eager_whatever_the_processor(
    monkeypatch: pytest.MonkeyPatch, ours_are_faster: bool
) -> None:
    replaced: list[str] = []
    original = matmul._use

    def spy(*args: Any) -> None:
        replaced.append(args[2].name)
        original(*args)

    monkeypatch.setattr(matmul, "ours_are_faster", lambda: ours_are_faster)
    monkeypatch.setattr(matmul, "_use", spy)
    with th._inductor.config.patch(force_disable_caches=True):  # else code is found that was made without the spy
        assert_generated_code_equals_eager()
    assert bool(replaced) == ours_are_faster, replaced


def test_learning_rate_changes_without_compiling_anew(compilations: list[str]) -> None:
    model = make("defaults", compile=True, learning_rate=lambda progress: 1e-2 * progress)
    model.learn(SMALL["learning_starts"] + 2)
    for progress, moves in ((0.5, True), (0.0, False), (1.0, True)):
        model._current_progress_remaining = progress
        before = state(model)
        train(model, 1)
        after = state(model)
        for name in (".0.policy.actor.mu.bias", ".0.policy.critic.qf0.0.bias", ".1"):
            distance = (after[name] - before[name]).abs().max().item()
            # Adam's step is at most the rate and about that, after few updates
            assert (1e-5 < distance < 2e-2 * progress) if moves else distance == 0.0, (name, progress)
    assert compilations == ["run"]
    assert has_compiled(model)


@pytest.mark.usefixtures("quick_compiler")
def test_parameters_that_are_frozen_for_a_while() -> None:
    """A parameter that was frozen from the start has no state of Adam's when it is set free."""
    model = make("defaults", compile=True)
    weight = model.actor.latent_pi[0].weight
    weight.requires_grad_(False)
    frozen = weight.clone()
    model.learn(SMALL["learning_starts"] + 3)
    assert has_compiled(model) and th.equal(weight, frozen)
    weight.requires_grad_(True)
    for _ in range(3):
        before = weight.detach().clone()
        train(model, 1)
        assert not th.equal(weight, before)
    weight.requires_grad_(False)
    before = weight.clone()
    train(model, 2)
    assert th.equal(weight, before)
    assert has_compiled(model) and model.actor.optimizer.state[weight]["step"].item() == 3


def test_changed_option_takes_effect(compilations: list[str]) -> None:
    model = make("defaults", compile=True)
    model.learn(SMALL["learning_starts"] + 2)
    pairs = list(zip(model.critic.parameters(), model.critic_target.parameters(), strict=True))
    assert not all(th.equal(*pair) for pair in pairs)
    model.tau = 1.0
    train(model, 1)
    assert all(th.equal(*pair) for pair in pairs)
    model.tau = 0.005
    train(model, 1)
    assert not all(th.equal(*pair) for pair in pairs)
    assert len(compilations) == 2, "a value that has been there before is compiled already"


def test_too_many_options_end_compilation(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    monkeypatch.setattr(inductor, "MAX_VARIANTS", 2)
    eager, compiled = twins("defaults")
    for i, gamma in enumerate((0.9, 0.8, 0.7, 0.6)):
        eager.gamma = compiled.gamma = gamma
        train(eager, 1, seed=i)
        if gamma == 0.7:
            with pytest.warns(UserWarning, match="cannot be compiled .*: its options have changed 2 times"):
                train(compiled, 1, seed=i)
        else:
            train(compiled, 1, seed=i)
        assert_same(state(eager), state(compiled), atol=3e-5)
    assert len(compilations) == 2
    assert not compiled._compiles


def test_extractor_that_counts_its_calls_does_not_compile_each_update(compilations: list[str]) -> None:
    """Each count would be a constant of another compiled form."""

    class Counting(FlattenExtractor):
        n_calls = 0

        def forward(self, observations: th.Tensor) -> th.Tensor:
            self.n_calls += 1
            return super().forward(observations)

    model = make("fixed_ent_coef", compile=True, policy_kwargs={**TAME, "features_extractor_class": Counting})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is given up, if it is
        model.learn(SMALL["learning_starts"] + 8)
    assert len(compilations) <= 4


def test_plain_sgd_is_compiled(compilations: list[str]) -> None:
    """Without momentum it has no state, as every optimiser before its first step."""
    model = make("fixed_ent_coef", compile=True, policy_kwargs=dict(SGD))
    model.learn(SMALL["learning_starts"] + 3)
    assert compilations == ["critic_gradients", "actor_gradients"]


def double(module: nn.Module, inputs: Any, outputs: th.Tensor) -> th.Tensor:
    return outputs * 2


@pytest.mark.usefixtures("nothing_is_plain", "only_traced")
def test_hook_that_comes_later_takes_effect() -> None:
    """torch's compiler does not look for new ones."""
    eager, compiled = twins("fixed_ent_coef")
    for model in (eager, compiled):
        train(model, 2)
        handle = model.critic.qf0[0].register_forward_hook(double)
        train(model, 1, seed=1)
        handle.remove()
        train(model, 1, seed=2)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert has_compiled(compiled)


@pytest.mark.usefixtures("only_traced")
def test_change_that_only_the_actors_half_sees() -> None:
    """The critics must not take their step twice."""
    eager, compiled = twins("sgd")
    for model in (eager, compiled):
        train(model, 2)
        model.log_ent_coef.requires_grad_(False)
        train(model, 1, seed=1)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert has_compiled(compiled)


def test_failed_attempt_leaves_no_state_of_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step makes a momentum, which a second attempt would add to."""
    fails_at_the_second(monkeypatch)
    models = []
    for compile_ in (False, True):
        model = make("sgd", compile=compile_, ent_coef=0.1)  # else the first update waits for the state of its Adam
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be compiled
            model.learn(SMALL["learning_starts"] + 1)
        models.append(model)
    assert models[1]._runner.compiler.failed
    assert_same(state(models[0]), state(models[1]), atol=1e-7)


class Printing(NormExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        print("forward")
        return super().forward(observations)


class Asking(NormExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        scale = 0.5 if observations.sum().item() > 0.0 else 1.0
        return scale * super().forward(observations)


class Foreign(NormExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        array = np.frombuffer(observations.detach().numpy().tobytes(), dtype=np.float32)
        return super().forward(th.from_numpy(array.copy()).reshape(observations.shape))


class OnlyEager(NormExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        if th.compiler.is_compiling():
            raise RuntimeError("not while compiling")
        return super().forward(observations)


def no_compiler(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no C++ compiler was found\nand more lines")


def fails_at_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the critics' gradients are compiled alone, their step is done when compiling the actor's fails."""
    calls = itertools.count()

    def backend(module: th.fx.GraphModule, inputs: Any) -> Any:
        return module if next(calls) == 0 else no_compiler()

    monkeypatch.setattr(inductor, "BACKEND", backend)


def assert_falls_back(eager: SoftSAC, compiled: SoftSAC, reason: str) -> None:
    train(eager, 3)
    with pytest.warns(UserWarning) as warned:
        train(compiled, 3)
    assert len(warned) == 1
    message = str(warned[0].message)
    start = "The update cannot be compiled and runs eagerly, which is slower: "
    assert message.startswith(start) and reason in message and message[len(start)].isalpha(), message
    assert "\n" not in message and "compile=False" in message
    assert_identical(state(eager), state(compiled))
    for model in (eager, compiled):  # without another warning
        train(model, 2, seed=1)
    assert_identical(state(eager), state(compiled))
    assert not compiled._compiles


class Renormed(NormExtractor):
    """sb3-contrib's BatchRenorm looks at its counter in each forward."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.norm = BatchRenorm1d(self.features_dim)


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("extractor", [Printing, Asking, Foreign, OnlyEager, Renormed])
def test_extractor_that_cannot_be_compiled(extractor: type[NormExtractor]) -> None:
    """Also the running statistics of its batch norm, and the random numbers of its dropout, are the eager run's."""
    policy_kwargs = {**TAME, "features_extractor_class": extractor}
    assert_falls_back(*twins("defaults", policy_kwargs=policy_kwargs), "")


@pytest.mark.parametrize("name", ["defaults", "batch_norm", "gsde", "sgd"])
def test_machine_without_compiler(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(inductor, "BACKEND", no_compiler)
    assert_falls_back(*twins(name), "no C++ compiler was found")


def test_failure_after_half_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = twins("sgd")
    fails_at_the_second(monkeypatch)
    assert_falls_back(eager, compiled, "no C++ compiler was found")


def test_failure_after_half_an_update_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random numbers of the critics' half are drawn a second time."""
    policy_kwargs = {**CASES["sgd"]["policy_kwargs"], "features_extractor_class": NormExtractor}
    eager, compiled = twins("sgd", policy_kwargs=policy_kwargs)
    fails_at_the_second(monkeypatch)
    assert_falls_back(eager, compiled, "no C++ compiler was found")


@pytest.mark.usefixtures("nothing_is_plain")
def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> None:
        raise RuntimeError("torch 2.6 cannot compile gradients, 2.11 and newer can")

    monkeypatch.setattr(inductor, "check_torch", old)
    assert_falls_back(*twins("fixed_ent_coef"), "torch 2.6 cannot compile gradients")


def test_it_is_said_once_in_a_run_of_several_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "BACKEND", no_compiler)
    model = make("fixed_ent_coef", compile=True)
    with pytest.warns(UserWarning, match="cannot be compiled"):
        model.learn(SMALL["learning_starts"] + 3)
    model.learn(2, reset_num_timesteps=False)


class Mistaken(FlattenExtractor):
    wrong = False

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.wrong:
            raise ZeroDivisionError("mine")
        return super().forward(observations)


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("before", [0, 2])
def test_users_own_error_is_raised_as_it_is(before: int) -> None:
    model = make("defaults", compile=True, policy_kwargs={**TAME, "features_extractor_class": Mistaken})
    model.learn(SMALL["learning_starts"] + 1)
    if before:
        train(model, before)
        assert has_compiled(model)
    for module in model.policy.modules():
        if isinstance(module, Mistaken):
            module.wrong = True
    parameters = [p.clone() for p in model.policy.parameters()]
    with pytest.warns(UserWarning, match="cannot be compiled"), pytest.raises(ZeroDivisionError, match=r"^mine$"):
        train(model, 1)
    assert all(th.equal(p, q) for p, q in zip(parameters, model.policy.parameters(), strict=True))


@pytest.mark.usefixtures("only_traced")
def test_many_models_in_one_process_are_compiled() -> None:
    """Dynamo gives up a function after some forms of it (8 by default, here 1)."""
    with th._dynamo.config.patch(recompile_limit=1):
        for i in range(3):
            model = make("fixed_ent_coef", compile=True, seed=i)
            model.learn(SMALL["learning_starts"] + 2)
            assert has_compiled(model)


def test_compiled_update_is_one_graph_of_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    37 products are left to libraries: 8 of the actor's forward passes, 12 of the critics' (the last layer, with one
    output, is part of a loop) and of the backward passes 4 + 2 in the critics' own update, 4 in the critics in the
    actor's, and 4 + 3 in the actor.
    """
    graphs: list[th.fx.Graph] = []

    def keep(module: th.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    def backend(module: th.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(module, inputs, fw_compiler=keep)

    monkeypatch.setattr(inductor, "BACKEND", backend)
    th._dynamo.utils.counters.clear()
    model = cheetah(SoftSAC, compile=True)
    assert has_compiled(model)
    assert len(graphs) == 1
    counters = th._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

    products_ = (th.ops.aten.mm.default, th.ops.aten.addmm.default)
    assert sum(node.target in products_ for node in graphs[0].nodes) <= 49
    replace_products(graphs[0], None)
    graphs[0].eliminate_dead_code()
    assert sum(node.target in products_ for node in graphs[0].nodes) <= 37
