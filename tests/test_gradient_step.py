"""One SoftSAC update against one of SB3's SAC: equal networks, batch and noise, several options."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_softsac import SoftSAC


class Env(gym.Env):
    """Random observations; bounds differ by dimension."""

    observation_space = spaces.Box(-1.0, 1.0, (5,))
    action_space = spaces.Box(np.array([-1.0, -0.5, 0.0]), np.array([1.0, 3.0, 2.0]), dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.observation_space.sample(), 1.0, False, False, {}


class FixedBatchesMixin:
    """Hands out the same sequence of batches whoever asks."""

    with_discounts = False

    def sample(self: Any, batch_size: int, env: Any = None) -> Any:
        generator = np.random.default_rng(self.pos)
        self.pos += 1

        def obs(space: spaces.Space) -> Any:
            if isinstance(space, spaces.Dict):
                return {key: obs(part) for key, part in space.spaces.items()}
            space.seed(int(generator.integers(2**31)))
            return th.as_tensor(np.stack([space.sample() for _ in range(batch_size)]))

        def column(scale: float) -> th.Tensor:
            return th.as_tensor(generator.uniform(0.0, scale, (batch_size, 1)).astype(np.float32))

        return ReplayBufferSamples(
            observations=obs(self.observation_space),
            actions=th.as_tensor(generator.uniform(-1, 1, (batch_size, self.action_dim)).astype(np.float32)),
            next_observations=obs(self.observation_space),
            dones=(column(1.0) < 0.3).float(),
            rewards=column(5.0),
            discounts=column(1.0) if self.with_discounts else None,
        )


class FixedBatches(FixedBatchesMixin, SB3ReplayBuffer):
    pass


class FixedDictBatches(FixedBatchesMixin, DictReplayBuffer):
    pass


def twins(policy: str, env: gym.Env, **kwargs: Any) -> tuple[SAC, SoftSAC]:
    """SB3's SAC and SoftSAC with equal parameters and batches; loggers that print nothing."""
    # Adam divides a gradient by its own size, so that the rounding of one that is almost zero becomes a whole step;
    # a larger eps leaves that out
    policy_kwargs = kwargs.setdefault("policy_kwargs", {})
    if "optimizer_class" not in policy_kwargs:
        policy_kwargs["optimizer_kwargs"] = {"eps": 1e-3}
    is_dict = isinstance(env.observation_space, spaces.Dict)
    kwargs["replay_buffer_class"] = FixedDictBatches if is_dict else FixedBatches
    models = []
    for algorithm in (SAC, SoftSAC):
        model = algorithm(policy, env, seed=1, buffer_size=10, device="cpu", **kwargs)
        model.set_logger(Logger(folder=None, output_formats=[]))
        models.append(model)
    sb3_model, model = models
    model.set_parameters(sb3_model.get_parameters())
    return sb3_model, model


def parameters(model: SAC | SoftSAC) -> dict[str, th.Tensor]:
    flat = dict(model.policy.state_dict())
    if model.log_ent_coef is not None:
        flat["log_ent_coef"] = model.log_ent_coef
    return {name: value.detach().clone() for name, value in flat.items()}


BOX_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed_ent_coef": {"ent_coef": 0.2},
    "auto_start": {"ent_coef": "auto_0.1", "target_entropy": -1.5},
    "target_update_interval": {"target_update_interval": 3},
    "three_critics": {"policy_kwargs": {"n_critics": 3, "net_arch": {"pi": [16], "qf": [32, 8]}}},
    "schedule": {"learning_rate": lambda progress: 1e-3 * progress},
    "shared_extractor": {"policy_kwargs": {"share_features_extractor": True}},
    "sgd": {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}},
    "tau_gamma": {"tau": 0.3, "gamma": 0.5},
}


@pytest.mark.parametrize("name", BOX_CASES)
@pytest.mark.parametrize("gradient_steps", [1, 6])
def test_equals_sb3(name: str, gradient_steps: int) -> None:
    """Where SB3's epsilon plays no part (actions far from the bounds), new networks agree to float32 rounding."""
    assert_same_update(*twins("MlpPolicy", Env(), **BOX_CASES[name]), gradient_steps)


def test_equals_sb3_with_n_step_discounts() -> None:
    models = twins("MlpPolicy", Env())
    for model in models:
        model.replay_buffer.with_discounts = True
    assert_same_update(*models, 3)


def test_equals_sb3_with_gsde() -> None:
    # SB3 inverts the tanh for gSDE's log-probability and so adds rounding of its own: a wider tolerance
    models = twins("MlpPolicy", Env(), use_sde=True, policy_kwargs={"log_std_init": -2.0})
    assert_same_update(*models, 3, atol=2e-5)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MultiInputPolicy"])
def test_equals_sb3_on_images_and_dicts(policy: str) -> None:
    env: gym.Env
    if policy == "CnnPolicy":
        env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, channel_first=True, discrete=False)
    else:
        env = SimpleMultiObsEnv(discrete_actions=False, channel_last=False)
    # Plain gradient descent, since not even a larger eps tames Adam here
    policy_kwargs = {"net_arch": [16], "optimizer_class": th.optim.SGD}
    assert_same_update(*twins(policy, env, learning_rate=1e-2, policy_kwargs=policy_kwargs), 2)


def assert_same_update(sb3_model: SAC, model: SoftSAC, gradient_steps: int, atol: float = 3e-6) -> None:
    before = parameters(model)
    for each in (sb3_model, model):
        th.manual_seed(7)
        each.train(gradient_steps=gradient_steps, batch_size=32)
    expected, actual = parameters(sb3_model), parameters(model)
    assert expected.keys() == actual.keys()
    for name in expected:
        th.testing.assert_close(
            actual[name], expected[name], rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    moved = [name for name in before if not th.equal(before[name], actual[name])]
    assert any(name.startswith("actor") for name in moved)
    assert any(name.startswith("critic_target") for name in moved)
