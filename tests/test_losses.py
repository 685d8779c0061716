"""Losses against sums written out by hand, and the entropy coefficient's two forms."""

import math

import numpy as np
import pytest
import torch as th

from sb3_softsac import losses
from sb3_softsac.ent_coef import FixedEntCoef, LearnedEntCoef, make_ent_coef

CPU = th.device("cpu")


def test_target_q_values() -> None:
    rewards, dones = th.tensor([[1.0], [2.0]]), th.tensor([[0.0], [1.0]])
    next_q = (th.tensor([[10.0], [20.0]]), th.tensor([[8.0], [30.0]]), th.tensor([[9.0], [25.0]]))
    target = losses.target_q_values(rewards, dones, 0.5, next_q, th.tensor([[-2.0], [7.0]]), th.tensor(0.25))
    th.testing.assert_close(target, th.tensor([[1.0 + 0.5 * (8.0 + 0.5)], [2.0]]))
    discounts = th.tensor([[0.1], [0.9]])
    target = losses.target_q_values(rewards, 0 * dones, discounts, next_q, th.zeros(2, 1), th.tensor(0.25))
    th.testing.assert_close(target, th.tensor([[1.8], [20.0]]))


def test_critic_loss() -> None:
    loss = losses.critic_loss((th.tensor([[1.0], [3.0]]), th.tensor([[0.0], [0.0]])), th.tensor([[2.0], [3.0]]))
    assert loss.item() == pytest.approx(0.5 * (1.0 / 2 + (4.0 + 9.0) / 2))


def test_actor_loss() -> None:
    q_values = (th.tensor([[1.0], [5.0]]), th.tensor([[2.0], [4.0]]))
    loss = losses.actor_loss(q_values, th.tensor([[-1.0], [3.0]]), th.tensor([0.5]))
    assert loss.item() == pytest.approx(((-0.5 - 1.0) + (1.5 - 4.0)) / 2)


@pytest.mark.parametrize("kind", ["log", "exp"])
def test_ent_coef_loss_and_its_gradient(kind: str) -> None:
    log_ent_coef = th.tensor([math.log(0.2)], requires_grad=True)
    log_prob = th.tensor([[1.0], [-3.0]], requires_grad=True)
    loss = losses.ent_coef_loss(log_ent_coef, log_prob, -2.0, kind)
    coefficient = math.log(0.2) if kind == "log" else 0.2
    assert loss.item() == pytest.approx(-coefficient * (-1.0 - 2.0))
    (gradient,) = th.autograd.grad(loss, log_ent_coef)
    # Entropy of 1 is above the target of -2: the coefficient must fall, so its gradient is positive
    assert gradient.item() == pytest.approx(3.0 if kind == "log" else 0.2 * 3.0)
    assert log_prob.grad is None


def test_ent_coef_forms() -> None:
    assert isinstance(make_ent_coef(0.3, 1e-3, CPU), FixedEntCoef)
    assert make_ent_coef(0, 1e-3, CPU).value().item() == 0.0
    assert make_ent_coef(np.float32(0.5), 1e-3, CPU).value().item() == pytest.approx(0.5)
    assert make_ent_coef("0.3", 1e-3, CPU).value().item() == pytest.approx(0.3)
    learned = make_ent_coef("auto_0.1", 1e-3, CPU)
    assert isinstance(learned, LearnedEntCoef)
    assert learned.value().item() == pytest.approx(0.1)
    assert make_ent_coef("auto", 1e-3, CPU).value().item() == 1.0


@pytest.mark.parametrize(
    "value", ["auto_", "auto_0", "auto_-1", "auto0.1", "autox", "yes", -0.1, float("nan"), "auto_inf"]
)
def test_bad_ent_coef(value: str | float) -> None:
    with pytest.raises(ValueError, match="ent_coef="):
        make_ent_coef(value, 1e-3, CPU)
