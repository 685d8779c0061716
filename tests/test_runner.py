"""Eager and compiled updates: the same results, state in the same places, and what happens if one cannot be."""

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.torch_layers import BatchRenorm1d
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from twins import (
    CASES,
    SGD,
    SMALL,
    TAME,
    NormExtractor,
    assert_identical,
    assert_same,
    assert_same_metrics,
    flat,
    make,
    poison,
    state,
    train,
    twins,
)

from sb3_softsac import SoftSAC, SoftSACPolicy, softsac
from sb3_softsac.execution import eager, inductor, threads
from sb3_softsac.execution.cpp import matmul
from sb3_softsac.execution.cpp import update as cpp_update
from sb3_softsac.execution.cpp.matmul import replace_products
from sb3_softsac.execution.cpp.support import NotPlain

pytestmark = pytest.mark.compiler


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and differentiates as Inductor's compilation does, but generates no code."""
    monkeypatch.setattr(inductor, "BACKEND", "aot_eager")


@pytest.fixture
def nothing_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves plain updates to Inductor, too."""

    def refuse(policy: SoftSACPolicy) -> None:
        raise NotPlain("a test")

    monkeypatch.setattr(cpp_update, "plain_layers", refuse)


@pytest.fixture
def only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only traces, which is what most can go wrong in; the operations are then done one by one."""
    monkeypatch.setattr(inductor, "BACKEND", "eager")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, only_traced: None) -> list[str]:
    """Names of the functions that are compiled, from now on."""
    names: list[str] = []
    original = inductor.compiled

    def spy(function: Callable[..., Any], device: th.device) -> Callable[..., Any]:
        names.append(function.__name__)
        return original(function, device)

    monkeypatch.setattr(inductor, "compiled", spy)
    return names


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("quick_compiler")
def test_compiled_equals_eager(name: str) -> None:
    eager, compiled = twins(name)
    for n in (1, 6):
        for model in (eager, compiled):
            th.manual_seed(n)
            model._current_progress_remaining = 1.0 / n
            model.train(gradient_steps=n, batch_size=8)
        assert_same(state(eager), state(compiled), atol=3e-5)
        assert_same_metrics(eager, compiled)
    assert compiled._compiles, "it has fallen back to eager updates"


def has_compiled(model: SoftSAC) -> bool:
    return model._runner is not None and model._runner.compiles and bool(model._runner.compiler.compiled)


# Generated code


def assert_generated_code_equals_eager(batch_size: int = 256, n_updates: int = 4, **options: Any) -> None:
    networks = {"optimizer_kwargs": {"eps": 1e-3}, **options.pop("networks", {})}
    eager, compiled = twins("defaults", batch_size=batch_size, policy_kwargs=networks, **options)
    for model in (eager, compiled):
        th.manual_seed(0)
        model.train(gradient_steps=n_updates, batch_size=batch_size)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert has_compiled(compiled)


@pytest.mark.usefixtures("nothing_is_plain")
@pytest.mark.parametrize("n_threads", [1, 2])
def test_generated_code_equals_eager(monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
    monkeypatch.setattr(threads, "n_cores", lambda: 2)
    assert_generated_code_equals_eager(num_threads=n_threads)


class ReluDropout(nn.Sequential):
    """An activation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.Dropout(0.2))


def test_dropout_draws_the_same_with_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done to the graph must not change the order in which layers draw."""
    monkeypatch.setattr(threads, "n_cores", lambda: 2)
    networks = {"activation_fn": ReluDropout, "net_arch": [32, 32]}
    assert_generated_code_equals_eager(batch_size=32, n_updates=3, networks=networks, num_threads=2)


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


# What changes between two updates


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


@pytest.mark.usefixtures("only_traced")
def test_parameters_that_are_set_take_effect() -> None:
    """``set_parameters`` puts other tensors into the optimisers."""
    eager, compiled = twins("defaults")
    before = copy.deepcopy(eager.get_parameters())
    for model in (eager, compiled):
        train(model, 2)
    assert_same(state(eager), state(compiled), atol=3e-5)
    for model in (eager, compiled):
        model.set_parameters(copy.deepcopy(before))
        assert model.log_ent_coef is not None
        model.log_ent_coef.data = th.full((1,), -1.5)
        train(model, 2, seed=1)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert has_compiled(compiled)
    counts = [s["step"].item() for s in compiled.critic.optimizer.state.values()]
    assert counts == [3.0] * len(counts), "one before they were taken, two after"


@pytest.mark.usefixtures("only_traced")
def test_optimiser_states_are_exchanged_with_sb3() -> None:
    eager, compiled = twins("defaults")
    for model in (eager, compiled):
        train(model, 2)
    assert has_compiled(compiled)
    types_ = [
        {k: type(v) for k, v in flat(model.get_parameters()).items()} | {"lr": type(model.lr_schedule(1.0))}
        for model in (eager, compiled)
    ]
    assert types_[0] == types_[1]
    assert all(type(g["lr"]) is float for g in compiled.critic.optimizer.param_groups)

    sb3 = SAC("MlpPolicy", "Pendulum-v1", **{**SMALL, "seed": 1}, policy_kwargs=TAME)
    sb3.set_logger(Logger(folder=None, output_formats=[]))
    sb3.set_parameters(copy.deepcopy(compiled.get_parameters()))
    sb3.replay_buffer.__dict__.update(SAC("MlpPolicy", "Pendulum-v1", **SMALL).learn(20).replay_buffer.__dict__)
    before = copy.deepcopy(sb3.critic.optimizer.state_dict())
    sb3.train(gradient_steps=1, batch_size=8)
    after = sb3.critic.optimizer.state_dict()
    assert [s["step"] + 1 for s in before["state"].values()] == [s["step"] for s in after["state"].values()]

    for model in (eager, compiled):
        model.set_parameters(copy.deepcopy(sb3.get_parameters()))
        train(model, 1)
    assert_same(state(eager), state(compiled), atol=3e-5)


# Saved and copied


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("compiled_before", [True, False])
def test_saved_run_goes_on_compiled_or_not(tmp_path: Path, compiled_before: bool) -> None:
    model = make("defaults", compile=compiled_before)
    model.learn(SMALL["learning_starts"] + 3)
    assert has_compiled(model) == compiled_before
    model.save(tmp_path / "model")
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    continued = []
    for compiles in (True, False):
        loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", compile=compiles)
        assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
        loaded.learn(4)
        assert has_compiled(loaded) == compiles
        continued.append(state(loaded))
    assert_same(*continued, atol=3e-5)


def test_file_that_is_loaded_with_compile_false_is_not_compiled(tmp_path: Path, compilations: list[str]) -> None:
    """Not even by someone who calls ``train()`` himself."""
    model = make("fixed_ent_coef", compile=True)
    model.learn(SMALL["learning_starts"] + 2)
    model.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", compile=False)
    loaded.set_logger(Logger(folder=None, output_formats=[]))
    train(loaded, 1)
    assert len(compilations) == 1


@pytest.mark.usefixtures("only_traced")
def test_compiled_run_is_continued_bit_for_bit(tmp_path: Path) -> None:
    whole = make("defaults", compile=True)
    whole.learn(SMALL["learning_starts"] + 6)
    model = make("defaults", compile=True)
    model._total_timesteps = SMALL["learning_starts"] + 6
    model.learn(SMALL["learning_starts"] + 3)
    model.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", force_reset=False)
    loaded.learn(3)
    assert has_compiled(loaded)
    for one, other in zip(whole.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert th.equal(one, other)


@pytest.mark.usefixtures("only_traced")
def test_copy_of_a_compiled_model_is_on_its_own(tmp_path: Path) -> None:
    model = make("defaults", compile=True)
    model.learn(SMALL["learning_starts"] + 3)
    twin = copy.deepcopy(model)
    assert has_compiled(model) and twin._compiles
    before = state(model)
    train(twin, 2)
    assert has_compiled(twin)
    changed = state(model)
    assert all(th.equal(before[name], changed[name]) for name in before if name.startswith((".0.policy", ".1")))
    train(model, 2)
    assert_same(state(model), state(twin), atol=1e-6)


# Numbers that are not finite


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("at", [1, 3])
def test_nan_rewards_stop_a_compiled_run(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Updates before that one are kept, nothing of it or after it is done."""
    eager, compiled = twins("defaults")
    for model in (eager, compiled):
        train(model, 1)
    n_before = compiled._n_updates
    before = [state(model) for model in (eager, compiled)]
    with monkeypatch.context() as patch:
        poison(patch, at, "rewards")
        for model in (eager, compiled):
            with pytest.raises(ValueError, match=rf"^critic_loss is nan .* at update {n_before + at}: .* NaN"):
                train(model, 5, seed=1)
            assert model._n_updates == n_before + at - 1
            for optimizer in (model.critic.optimizer, model.actor.optimizer, model.ent_coef_optimizer):
                assert {s["step"].item() for s in optimizer.state.values()} == {n_before + at - 1.0}
    assert_same(state(eager), state(compiled), atol=3e-5)
    if at == 1:
        for old, model in zip(before, (eager, compiled), strict=True):
            assert_identical({**old, ".2": None}, {**state(model), ".2": None})  # but for the random state

    for model in (eager, compiled):  # nothing of it is left
        train(model, 2, seed=2)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert has_compiled(compiled)


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize(("ent_coef", "loss"), [(0.2, "actor_loss"), ("auto", "ent_coef_loss")])
def test_nan_actor_stops_its_own_update(compiles: bool, ent_coef: Any, loss: str) -> None:
    """With a target actor, the critics' update does not see it: that is done, and nothing behind it."""
    model = make("actor_target", compile=compiles, ent_coef=ent_coef)
    model.learn(SMALL["learning_starts"] + 2)
    assert has_compiled(model) == compiles
    with th.no_grad():
        model.actor.mu.bias.fill_(float("nan"))
    before = state(model)
    with pytest.raises(ValueError, match=f"^{loss} is nan.* at update {model._n_updates + 1}"):
        train(model, 3)
    after = state(model)
    changed = {n for n in before if isinstance(before[n], th.Tensor) and not before[n].equal(after[n])}
    changed -= {".0.policy.actor.mu.bias", ".2"}  # NaN is not NaN; random state
    assert changed
    assert all(name.startswith((".0.policy.critic.", ".0.critic.optimizer.")) for name in changed), changed


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("compiles", [True, False])
def test_nan_observations_do_not_reach_the_targets_statistics(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    model = make("batch_norm", compile=compiles, ent_coef=0.2)
    model.learn(SMALL["learning_starts"] + 2)
    assert has_compiled(model) == compiles
    poison(monkeypatch, 1, "observations")
    before = {name: value.clone() for name, value in model.critic_target.state_dict().items()}
    with pytest.raises(ValueError, match="critic_loss is nan"):
        train(model, 1)
    for name, value in model.critic_target.state_dict().items():
        assert th.equal(value, before[name]), name


# What cannot be compiled


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


# Whether to compile


@pytest.fixture
def ten_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten updates are worth compilation; what is compiled is left as it is, which is quicker."""
    monkeypatch.setattr(softsac, "MIN_COMPILED_UPDATES", 10)
    monkeypatch.setattr(inductor, "compiled", lambda function, device: function)


AUTO: dict[str, tuple[dict[str, Any], int, int]] = {
    # options, environments, steps of the first run with ten updates
    "defaults": ({}, 1, 30),
    "train_freq": ({"train_freq": 2}, 1, 40),
    "gradient_steps": ({"train_freq": 4, "gradient_steps": 5}, 1, 28),
    "as_many_as_steps": ({"train_freq": 3, "gradient_steps": -1}, 1, 30),
    "envs": ({}, 2, 40),
    "envs_as_many_as_steps": ({"gradient_steps": -1}, 2, 30),
    "episodes": ({"train_freq": (1, "episode")}, 1, 120),
    "no_updates_before": ({"learning_starts": 0}, 1, 10),
}


@pytest.mark.usefixtures("ten_are_many")
@pytest.mark.parametrize("case", AUTO)
def test_auto_compiles_long_runs(case: str) -> None:
    kwargs, n_envs, n_steps = AUTO[case]

    def env() -> gym.Env:
        return gym.make("Pendulum-v1", max_episode_steps=10)

    between = {"train_freq": 2, "gradient_steps": 4, "envs": 2, "envs_as_many_as_steps": 2, "episodes": 10}
    for steps, expected in ((n_steps, True), (n_steps - between.get(case, 1), False)):
        options = {**SMALL, "ent_coef": 0.2, "policy_kwargs": TAME, **kwargs}
        model = SoftSAC("MlpPolicy", make_vec_env(env, n_envs), **options).learn(steps)
        assert model._compiles == expected, (steps, model._n_updates)
    assert model.compile == "auto"


@pytest.mark.usefixtures("ten_are_many")
def test_auto_stays_with_a_run(tmp_path: Path) -> None:
    """Else the rest of a long run, or its last few steps, would not be computed as the run that goes through."""
    model = make("fixed_ent_coef")
    model.learn(30)
    assert model._compiles
    model.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu")
    loaded.learn(1)
    assert loaded._compiles
    model.learn(1, reset_num_timesteps=False)
    assert model._compiles


@pytest.mark.usefixtures("ten_are_many")
def test_auto_counts_the_updates_of_all_parts_of_a_run(tmp_path: Path) -> None:
    model = make("fixed_ent_coef")
    model.learn(26)
    assert not model._compiles
    model.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu")
    loaded.learn(3)
    assert not loaded._compiles
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded._compiles


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("compile", value) for value in ("yes", None, 2, "max-autotune")],
        *[("matmul_precision", value) for value in ("low", 32, True, "bfloat16")],
        *[("num_threads", value) for value in (0, -1, 1.5, "all", None, True)],
    ],
)
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value!r} is not valid: it must be "):
        make("defaults", **{name: value})


@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("verbose", [0, 1])
def test_compilation_is_told(capsys: pytest.CaptureFixture[str], verbose: int) -> None:
    model = make("fixed_ent_coef", compile=True, verbose=verbose)
    model.learn(SMALL["learning_starts"] + 3)
    assert has_compiled(model)
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "ompil" in line]
    if verbose:
        assert told[0].startswith("Compiling the update: ")
        assert told[1].startswith("Compiled in ") and told[1].endswith(" s")
        assert float(told[1].split()[2]) == pytest.approx(model._runner.report.compile_seconds, abs=0.06)
        assert len(told) == 2
    else:
        assert not lines


@pytest.mark.parametrize(("own", "expected"), [(None, "high"), ("highest", "highest"), ("medium", "medium")])
@pytest.mark.parametrize("fails", [False, True])
def test_precision_of_products_is_the_updates_own(
    monkeypatch: pytest.MonkeyPatch, own: str | None, expected: str, fails: bool
) -> None:
    model = make("fixed_ent_coef", compile=False, matmul_precision=own)
    model.learn(SMALL["learning_starts"])
    seen: list[str] = []
    update = eager.update

    def spy(*args: Any) -> Any:
        seen.append(th.get_float32_matmul_precision())
        if fails:
            raise ZeroDivisionError
        return update(*args)

    monkeypatch.setattr(eager, "update", spy)
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("high")
    try:
        try:
            train(model, 1)
        except ZeroDivisionError:
            assert fails
        assert th.get_float32_matmul_precision() == "high"
    finally:
        th.set_float32_matmul_precision(before)
    assert seen == [expected]


def test_torchs_newer_settings_of_precision_are_left_alone() -> None:
    """torch refuses to answer the older question once one of them has been used."""
    model = make("fixed_ent_coef", compile=False)
    model.learn(SMALL["learning_starts"])
    before = th.backends.mkldnn.matmul.fp32_precision
    th.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        train(model, 1)
        assert th.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        th.backends.mkldnn.matmul.fp32_precision = before


# What an update costs, counted: a busy machine does not change it


class Cheetah(gym.Env):
    """Of HalfCheetah's size."""

    observation_space = spaces.Box(-np.inf, np.inf, (17,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.normal(size=17), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.np_random.normal(size=17), float(action.sum()), False, False, {}


def cheetah(algorithm: Any, **kwargs: Any) -> Any:
    """SB3's or our defaults, after the first update."""
    model = algorithm("MlpPolicy", Cheetah(), buffer_size=500, learning_starts=64, device="cpu", seed=0, **kwargs)
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(66)
    return model


def flops(model: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model.train(gradient_steps=1, batch_size=256)
    return counter.get_total_flops()


def test_arithmetic_of_an_update() -> None:
    """
    Multiply-adds for each row of the batch. The actor (17 inputs, 256, 256, 2 times 6 outputs) has 72,960 weights and
    is run twice; a critic (23 inputs, 256, 256, 1 output) has 71,680, and there are two of them, run three times each:
    as targets, with the batch's actions and with the policy's own.
    """
    actor, critic, batch = 17 * 256 + 256 * 256 + 256 * 12, 23 * 256 + 256 * 256 + 256, 256
    assert (actor, critic) == (72_960, 71_680)
    forward = 2 * actor + 6 * critic
    # One product for the weights, and one for the inputs of each layer but the first
    backward_of_critics = 2 * (critic + critic - 23 * 256)
    # Through the critics to the actions: no weights of theirs
    backward_of_actor = 2 * critic + (actor + actor - 17 * 256)
    expected = 2 * batch * (forward + backward_of_critics + backward_of_actor)
    assert expected == 581_566_464

    counted = flops(cheetah(SoftSAC, compile=False))
    assert counted == expected
    assert counted < flops(cheetah(SAC))


class Operators(TorchDispatchMode):
    """Counts calls of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_eager_update_calls_fewer_operators_than_sb3s() -> None:
    counts = {}
    for algorithm, kwargs in ((SAC, {}), (SoftSAC, {"compile": False})):
        model = cheetah(algorithm, policy_kwargs={"net_arch": [16]}, **kwargs)
        with Operators() as operators:
            model.train(gradient_steps=1, batch_size=256)
        counts[algorithm] = operators.n
    assert counts[SoftSAC] < counts[SAC]


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
