"""Losses against sums written out by hand."""

import math

import pytest
import torch as th

from sb3_softsac import losses


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
