"""Metrics that are not finite: the update they belong to is named and not done."""

from typing import Any

import pytest
import torch as th
from twins import SMALL, assert_identical, assert_same, has_compiled, make, poison, state, train, twins

pytestmark = pytest.mark.compiler


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
