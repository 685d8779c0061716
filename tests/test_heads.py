"""Categorical critics: projection, target and loss against slow ones."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from twins import SMALL

from sb3_softsac import SoftSAC, losses
from sb3_softsac.heads import CategoricalHead, ScalarHead, project


def project_slowly(probabilities: Any, values: Any, v_min: float, v_max: float) -> np.ndarray:
    """C51's algorithm 1, a bin after the other."""
    result = np.zeros(probabilities.shape)
    n_atoms = probabilities.shape[1]
    for row in range(len(probabilities)):
        for i in range(n_atoms):
            position = (min(max(values[row, i], v_min), v_max) - v_min) / (v_max - v_min) * (n_atoms - 1)
            low, high = math.floor(position), math.ceil(position)
            if low == high:
                result[row, low] += probabilities[row, i]
            else:
                result[row, low] += probabilities[row, i] * (high - position)
                result[row, high] += probabilities[row, i] * (position - low)
    return result


@given(seed=st.integers(0, 10_000), n_atoms=st.integers(2, 60), spread=st.floats(0.0, 3.0), v_max=st.floats(0.1, 50.0))
def test_projection(seed: int, n_atoms: int, spread: float, v_max: float) -> None:
    rng = np.random.default_rng(seed)
    v_min = -v_max * rng.uniform(0.1, 2.0)
    probabilities = rng.dirichlet(np.ones(n_atoms), size=4)
    values = rng.uniform(v_min - spread, v_max + spread, (4, 1)) + np.linspace(0, rng.uniform(0, 1), n_atoms)
    found = project(*map(th.as_tensor, (probabilities, values)), v_min, v_max)
    np.testing.assert_allclose(found, project_slowly(probabilities, values, v_min, v_max), atol=1e-9)
    np.testing.assert_allclose(found.sum(dim=1), 1.0)


def test_projection_by_hand() -> None:
    """Atoms -1, 0, 1: 0.25 lies between the last two, 7 beyond the last, -1 on the first."""
    probabilities = th.tensor([[0.2, 0.5, 0.3]])
    moved = th.tensor([[0.25, 7.0, -1.0]])
    th.testing.assert_close(project(probabilities, moved, -1.0, 1.0), th.tensor([[0.3, 0.15, 0.55]]))


def target_of(head: Any, rewards: list[float], dones: list[float], **kwargs: Any) -> tuple[th.Tensor, dict[str, Any]]:
    arguments = {"discounts": 0.5, "next_log_prob": th.zeros(len(rewards), 1), "ent_coef": th.tensor(0.1), **kwargs}
    return head.target(th.tensor(rewards)[:, None], th.tensor(dones)[:, None], **arguments)


def sharp(*atoms: int) -> th.Tensor:
    """Logits of distributions that are all in one atom of three."""
    return 50.0 * th.eye(3)[list(atoms)]


def test_target_by_hand() -> None:
    head = CategoricalHead(3, -1.0, 1.0)
    # The critic with the lower mean is another one for each transition: 0 and 1 in the first, -1 and 1 in the second
    next_outputs = (sharp(1, 2, 2), sharp(2, 0, 1))
    target, metrics = target_of(head, [0.5, 0.0, 9.0], [0.0, 0.0, 1.0], next_outputs=next_outputs)
    expected = th.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    th.testing.assert_close(target, expected, atol=1e-6, rtol=0)
    assert metrics["target_q_value"].item() == pytest.approx((0.5 - 0.5 + 9.0) / 3)
    assert metrics["clipped_target_mass"].item() == pytest.approx(1 / 3)


def test_target_pays_for_certainty() -> None:
    head = CategoricalHead(3, -1.0, 1.0)
    target, _ = target_of(head, [0.0], [0.0], next_outputs=(sharp(1),), next_log_prob=th.tensor([[2.0]]))
    th.testing.assert_close(target, th.tensor([[0.1, 0.9, 0.0]]), atol=1e-6, rtol=0)


def test_means_follow_the_scalar_target() -> None:
    """Within the support, the mean of the categorical target is the value that a scalar critic would learn."""
    head = CategoricalHead(101, -5.0, 5.0)
    logits = th.randn(6, 101, dtype=th.float64)
    rewards, dones, log_prob = th.randn(6, 1) * 0.1, th.tensor([[0.0], [1.0]] * 3), th.randn(6, 1)
    arguments = rewards, dones, th.full((6, 1), 0.9)
    target, metrics = head.target(*arguments, (logits,), log_prob, th.tensor(0.2))
    (values,) = head.values((logits,))
    expected = losses.target_q_values(*arguments, (values,), log_prob, th.tensor(0.2))
    th.testing.assert_close(((target * head.atoms).sum(dim=1, keepdim=True)), expected.double(), atol=1e-5, rtol=0)
    assert metrics["target_q_value"].item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_loss_is_cross_entropy() -> None:
    head = CategoricalHead(5, -1.0, 1.0)
    outputs = tuple(th.randn(7, 5) for _ in range(3))
    target = th.softmax(th.randn(7, 5), dim=1)
    expected = np.mean([[-(target[i] * th.log_softmax(logits[i], 0)).sum() for i in range(7)] for logits in outputs])
    assert head.loss(outputs, target).item() == pytest.approx(expected, rel=1e-5)


def test_scalar_head_is_sacs() -> None:
    head, values = ScalarHead(), (th.randn(4, 1), th.randn(4, 1))
    target, metrics = target_of(head, [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 0.0], next_outputs=values)
    arguments = th.tensor([[1.0], [2.0], [3.0], [4.0]]), th.tensor([[0.0], [1.0], [0.0], [0.0]]), 0.5
    assert th.equal(target, losses.target_q_values(*arguments, values, th.zeros(4, 1), th.tensor(0.1)))
    assert th.equal(head.loss(values, target), losses.critic_loss(values, target))
    assert head.values(values) is values and metrics.keys() == {"target_q_value"}


def test_critics_give_values() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"n_atoms": 11, "net_arch": [8], "v_max": 3.0}, **SMALL)
    obs, actions = th.randn(4, 3), th.zeros(4, 1)
    outputs = model.critic.outputs(obs, actions)
    assert [tuple(each.shape) for each in outputs] == [(4, 11)] * 2
    for value, logits in zip(model.critic(obs, actions), outputs, strict=True):
        expected = th.softmax(logits, dim=1) @ th.linspace(-5.0, 3.0, 11)
        th.testing.assert_close(value, expected[:, None])
    assert th.equal(model.critic.q1_forward(obs, actions), model.critic(obs, actions)[0])


def test_overflow_of_the_support_is_logged() -> None:
    """Pendulum's returns are far below -5, out of the support, unless rewards are scaled."""
    model = SoftSAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"n_atoms": 21, "net_arch": [8]}, **SMALL).learn(30)
    unscaled = model.logger.name_to_value["train/clipped_target_mass"]
    model = SoftSAC(
        "MlpPolicy", "Pendulum-v1", policy_kwargs={"n_atoms": 21, "net_arch": [8]}, normalize_rewards="bounded", **SMALL
    ).learn(30)
    assert 0.0 <= model.logger.name_to_value["train/clipped_target_mass"] < unscaled
