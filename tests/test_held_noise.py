"""Noise that is held for random numbers of steps."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from twins import SMALL

from sb3_softsac import SoftSAC
from sb3_softsac.held_noise import HeldNoise


def test_lengths() -> None:
    """P(n) ~ n^-2 up to the maximum, in each environment by itself."""
    n_steps, n_envs, max_steps = 4000, 3, 4
    held = HeldNoise(max_steps)
    noise = np.stack([held.next(n_envs, 1).numpy().copy()[:, 0] for _ in range(n_steps)])
    lengths: list[int] = []
    for env in range(n_envs):
        changes = np.flatnonzero(np.diff(noise[:, env]) != 0.0)
        lengths += np.diff(changes).tolist()
    counts = np.bincount(lengths, minlength=max_steps + 1)
    weights = 1.0 / np.arange(1, max_steps + 1) ** 2
    assert counts[0] == 0 and len(counts) == max_steps + 1
    np.testing.assert_allclose(counts[1:] / counts.sum(), weights / weights.sum(), atol=0.02)
    assert not (np.diff(noise, axis=0) == 0.0).all(axis=1).all()
    assert noise.std() == pytest.approx(1.0, abs=0.05) and abs(noise.mean()) < 0.05


def test_other_numbers_of_environments_begin_anew() -> None:
    held = HeldNoise(1000)
    assert held.next(2, 3).shape == (2, 3)
    assert held.next(5, 3).shape == (5, 3)


def test_actions_are_the_policys_with_held_noise() -> None:
    model = SoftSAC("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=2), max_noise_repeat=16, **SMALL).learn(60)
    assert model._held_noise is not None
    obs = th.as_tensor(model._last_obs)
    th.manual_seed(0)
    model._held_noise.steps_left[:] = 3
    actions = [model._explore(obs) for _ in range(4)]
    with th.no_grad():
        expected = model.actor.sample(obs, model._held_noise.noise).actions
    assert th.equal(actions[0], actions[1]) and th.equal(actions[1], actions[2])
    assert not th.equal(actions[2], actions[3]) and th.equal(actions[3], expected)


def test_predictions_do_not_use_it() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", max_noise_repeat=16, **SMALL).learn(30)
    obs = np.zeros(3, dtype=np.float32)
    drawn = {float(model.predict(obs)[0][0]) for _ in range(5)}
    assert len(drawn) == 5


def test_a_new_seed_draws_new_noise() -> None:
    """Else what was drawn before would be held for some steps more."""
    model = SoftSAC("MlpPolicy", "Pendulum-v1", max_noise_repeat=16, **SMALL).learn(30)
    obs = th.zeros(1, 3)
    drawn = []
    for left in (10, 0):
        assert model._held_noise is not None
        model._held_noise.steps_left[:] = left
        model.set_random_seed(3)
        drawn.append(model._explore(obs))
    assert th.equal(*drawn)
