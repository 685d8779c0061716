"""Learning rates by name."""

from pathlib import Path

import pytest
from twins import SMALL

from sb3_softsac import SoftSAC, schedules


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lin_3e-4", (3e-4, 1.5e-4, 0.0)),
        ("lin_3e-4_3e-5", (3e-4, 1.65e-4, 3e-5)),
        ("cos_3e-4_1e-4", (3e-4, 2e-4, 1e-4)),
        ("cos_1", (1.0, 0.5, 0.0)),
    ],
)
def test_parse(text: str, values: tuple[float, ...]) -> None:
    schedule = schedules.parse(text)
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx(list(values))
    assert schedule(-0.3) == schedule(0.0)  # the last rollout may go on behind the end


def test_cosine_is_flat_at_both_ends() -> None:
    schedule = schedules.parse("cos_1_0")
    assert 1.0 - schedule(0.99) < 1e-3 and schedule(0.01) < 1e-3 and schedule(0.75) == pytest.approx(0.853553, abs=1e-6)


@pytest.mark.parametrize(
    "text", ["", "lin", "lin_", "lin_x", "exp_1_2", "lin_1_2_3", "lin_-1", "cos_nan", "lin_1_inf", 3]
)
def test_not_valid(text: str) -> None:
    assert not schedules.is_valid(text)


@pytest.mark.parametrize("name", ["learning_rate", "qf_learning_rate", "ent_coef_learning_rate"])
def test_in_a_run(name: str, tmp_path: Path) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **{name: "lin_1e-3_2e-4"}, **SMALL).learn(40)
    optimizer = {"learning_rate": model.actor, "qf_learning_rate": model.critic}.get(name, model)
    optimizer = optimizer.ent_coef_optimizer if optimizer is model else optimizer.optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)
    model.save(tmp_path / "model")
    assert getattr(SoftSAC.load(tmp_path / "model", model.env), name) == "lin_1e-3_2e-4"
    with pytest.raises(ValueError, match=f"{name}='lin_fast' is not valid: .*'lin_<first>'"):
        SoftSAC("MlpPolicy", "Pendulum-v1", **{name: "lin_fast"})
