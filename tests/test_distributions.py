"""Squashed Gaussian against 50-digit arithmetic and torch.distributions."""

import math

import mpmath
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from sb3_softsac import distributions

mpmath.mp.dps = 50

float32s = {"allow_nan": False, "allow_infinity": False, "width": 32}


def exact_log_det_tanh(u: float) -> mpmath.mpf:
    return -2 * mpmath.log(mpmath.cosh(mpmath.mpf(u)))


def exact_log_prob(u: float, mean: float, log_std: float) -> mpmath.mpf:
    u, mean, log_std = mpmath.mpf(u), mpmath.mpf(mean), mpmath.mpf(log_std)
    noise = (u - mean) / mpmath.exp(log_std)
    return -(noise**2) / 2 - log_std - mpmath.log(2 * mpmath.pi) / 2 - exact_log_det_tanh(u)


def assert_accurate(actual: float, exact: mpmath.mpf, scale: mpmath.mpf | None = None) -> None:
    """At most 1e-5 relative, or 1e-6 absolute; relative to ``scale``, if given."""
    tolerance = max(mpmath.mpf("1e-5") * abs(exact if scale is None else scale), mpmath.mpf("1e-6"))
    assert abs(mpmath.mpf(actual) - exact) <= tolerance, f"{actual} is not {exact}"


@given(st.floats(-50, 50, **float32s))
def test_log_det_tanh_is_exact(u: float) -> None:
    assert_accurate(distributions.log_det_tanh(th.tensor(u)).item(), exact_log_det_tanh(u))


@given(u=st.floats(-50, 50, **float32s), noise=st.floats(-4, 4, **float32s), log_std=st.floats(-5, 2, **float32s))
def test_log_prob_is_exact(u: float, noise: float, log_std: float) -> None:
    mean = float(np.float32(u - noise * math.exp(log_std)))
    u_, mean_, log_std_ = (th.tensor([[x]], dtype=th.float32) for x in (u, mean, log_std))
    actual = distributions.log_prob(u_, mean_, log_std_).item()
    exact = exact_log_prob(u, mean_.item(), log_std_.item())
    # Where the Gaussian's part and the correction cancel, what is left cannot be more exact than they are
    assert_accurate(actual, exact, scale=max(abs(exact), abs(exact_log_det_tanh(u))))


@pytest.mark.parametrize("u", [0.0, 0.5, 2.0, 5.0, 7.0, 8.0, 10.0, 15.0, 20.0, 30.0, 50.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_log_prob_of_saturated_samples(u: float, sign: float) -> None:
    """The strict bound, where SB3's form is off by up to 86 nats."""
    gaussian_action = th.tensor([[sign * u]])
    actual = distributions.log_prob(gaussian_action, gaussian_action - 0.5, th.zeros(1, 1)).item()
    assert_accurate(actual, exact_log_prob(sign * u, sign * u - 0.5, 0.0))


@given(st.floats(-1e4, 1e4, **float32s), st.floats(-20, 2, **float32s))
def test_gradients_are_finite(u: float, log_std: float) -> None:
    mean = th.tensor([[u]], requires_grad=True)
    log_std_ = th.tensor([[log_std]], requires_grad=True)
    gaussian_actions, log_prob = distributions.sample(mean, log_std_, th.tensor([[1.5]]))
    gradients = th.autograd.grad(log_prob.sum() + distributions.squash(gaussian_actions).sum(), [mean, log_std_])
    assert all(th.isfinite(gradient).all() for gradient in gradients)
    # A saturated action is pulled back: d log_prob / du = 2 tanh(u), not 0
    u_ = th.tensor([[u]], requires_grad=True)
    (gradient,) = th.autograd.grad(-distributions.log_det_tanh(u_).sum(), u_)
    assert gradient.item() == pytest.approx(2 * math.tanh(u), abs=1e-5)


def test_agrees_with_torch_distributions() -> None:
    generator = th.Generator().manual_seed(0)
    mean = 2 * th.randn(1000, 3, dtype=th.float64, generator=generator)
    log_std = th.randn(1000, 3, dtype=th.float64, generator=generator) - 1
    noise = th.randn(1000, 3, dtype=th.float64, generator=generator)
    reference = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1)), 1)
    gaussian_actions, log_prob = distributions.sample(mean, log_std, noise)
    actions = reference.base_dist.transforms[0](gaussian_actions)  # the cache keeps the sample behind each action
    th.testing.assert_close(log_prob, reference.log_prob(actions), rtol=1e-9, atol=1e-8)
    th.testing.assert_close(distributions.log_prob(gaussian_actions, mean, log_std), log_prob, rtol=1e-9, atol=1e-9)


def test_sample_is_reparametrised() -> None:
    """Gradients of the sample and of its density, by finite differences."""
    mean, log_std, noise = (th.randn(4, 2, dtype=th.float64) for _ in range(3))
    mean.requires_grad_()
    log_std.requires_grad_()
    assert th.autograd.gradcheck(lambda m, s: distributions.sample(m, s, noise), (mean, log_std))


def test_density_integrates_to_one() -> None:
    actions = th.linspace(-1, 1, 200_001, dtype=th.float64)[1:-1].unsqueeze(1)
    mean, log_std = th.tensor([[0.3]], dtype=th.float64), th.tensor([[-0.2]], dtype=th.float64)
    density = distributions.log_prob(distributions.unsquash(actions), mean, log_std).exp()
    assert th.trapezoid(density, actions.squeeze(1)).item() == pytest.approx(1.0, abs=1e-4)
    # ... and in the environment's units over the environment's range
    space = spaces.Box(-3.0, 7.0, (1,), dtype=np.float64)
    env_density = density * math.exp(-distributions.log_action_scale(space))
    assert th.trapezoid(env_density, 2.0 + 5.0 * actions.squeeze(1)).item() == pytest.approx(1.0, abs=1e-4)


@given(st.floats(-1, 1, **float32s))
def test_unsquash_inverts_and_clamps(action: float) -> None:
    u = distributions.unsquash(th.tensor([action]))
    assert th.isfinite(u).all()
    assert abs(u.item()) <= 8.67
    assert distributions.squash(u).item() == pytest.approx(action, abs=2e-7)


def test_unsquash_clamps_to_the_largest_float_below_one() -> None:
    for dtype in (th.float32, th.float64):
        numpy_dtype = np.float32 if dtype == th.float32 else np.float64
        largest = np.nextafter(numpy_dtype(1), numpy_dtype(0))
        expected = th.atanh(th.tensor([-largest, largest], dtype=dtype))
        th.testing.assert_close(distributions.unsquash(th.tensor([-1.0, 1.0], dtype=dtype)), expected, rtol=0, atol=0)


def test_log_action_scale_of_uneven_bounds() -> None:
    space = spaces.Box(np.array([-1.0, 0.0, -2.0]), np.array([1.0, 1.0, 6.0]), dtype=np.float64)
    assert distributions.log_action_scale(space) == pytest.approx(math.log(1.0) + math.log(0.5) + math.log(4.0))
