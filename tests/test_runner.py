"""Eager and compiled updates: the same results, state in the same places, and when to compile."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from twins import CASES, SMALL, TAME, assert_same, assert_same_metrics, flat, has_compiled, make, state, train, twins

from sb3_softsac import SoftSAC, softsac
from sb3_softsac.execution import eager, inductor

pytestmark = pytest.mark.compiler


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


# What changes between two updates


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
