"""Pairs of models in the same state, whose updates are run in different ways, and what is compared of them."""

import copy
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_softsac import SoftSAC
from sb3_softsac.execution.runner import Runner
from sb3_softsac.execution.way import Minibatches

SMALL: dict[str, Any] = {"learning_starts": 20, "buffer_size": 300, "batch_size": 8, "device": "cpu", "seed": 0}
# A zero gradient's rounding must not become a whole step of Adam
TAME = {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-3}}


class NormExtractor(FlattenExtractor):
    """With batch norm and dropout: running statistics, and random numbers of the network's own."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.norm(super().forward(observations)))


def image() -> gym.Env:
    return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, channel_first=True, discrete=False)


def multi_obs() -> gym.Env:
    return SimpleMultiObsEnv(discrete_actions=False, channel_last=False)


SGD = {"net_arch": [16], "optimizer_class": th.optim.SGD}
# As many of the newer networks' options as go together
XQC = {**TAME, "normalization": "batch", "normalize_input": True, "unit_norm": "weights", "n_atoms": 21}
FLASHSAC = {**XQC, "residual_expansion": 2, "unit_norm": "all", "log_std_bounding": "tanh", "log_std_bounds": (-5, 2)}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed_ent_coef": {"ent_coef": 0.2},
    "delays": {"policy_delay": 2, "target_update_interval": 3, "tau": 0.5},
    "compensation": {"policy_delay": 2, "policy_delay_compensation": True},
    "actor_target": {"use_actor_target": True},
    "gsde": {"use_sde": True},
    "gsde_target": {"use_sde": True, "use_actor_target": True},
    "n_steps": {"n_steps": 3},
    "schedule": {"learning_rate": lambda progress: 3e-3 * progress, "qf_learning_rate": 1e-3},
    "max_grad_norm": {"max_grad_norm": 0.5, "ent_coef_loss": "exp", "entropy_space": "env"},
    "amsgrad": {"policy_kwargs": {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-3, "amsgrad": True}}},
    "adamw": {"policy_kwargs": {**TAME, "optimizer_class": th.optim.AdamW}},
    "weight_decay": {"policy_kwargs": {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-3, "weight_decay": 0.5}}},
    "sgd": {"policy_kwargs": {**SGD, "optimizer_kwargs": {"momentum": 0.9}}},
    "xqc": {"joint_batch": "critic", "normalize_rewards": "bounded", "policy_delay": 3, "policy_kwargs": XQC},
    "flashsac": {"joint_batch": "all", "normalize_rewards": "bounded", "policy_kwargs": FLASHSAC},
    "crossq": {
        "joint_batch": "critic",
        "use_critic_target": False,
        "use_actor_target": True,
        "policy_kwargs": {**TAME, "normalize_input": True, "normalization": "batch"},
    },
    "no_target": {"use_critic_target": False},
    "droq": {"policy_kwargs": {**TAME, "normalization": "layer", "dropout_rate": 0.1}},
    "rmsprop_delay": {"policy_delay": 2, "policy_kwargs": {**SGD, "optimizer_class": th.optim.RMSprop}},
    "shared_extractor": {"policy_kwargs": {**TAME, "share_features_extractor": True}},
    "batch_norm": {"policy_kwargs": {**TAME, "features_extractor_class": NormExtractor}},
    "tanh": {"policy_kwargs": {**TAME, "log_std_bounding": "tanh", "log_std_bounds": (-5, 2)}},
    "log_std": {"policy_kwargs": {**TAME, "log_std_bounding": "tanh", "separate_log_std_net": True, "n_critics": 3}},
    "image": {"policy": "CnnPolicy", "env": image, "policy_kwargs": {**SGD}, "learning_rate": 1e-2},
    "dict": {"policy": "MultiInputPolicy", "env": multi_obs, "policy_kwargs": {**SGD}, "learning_rate": 1e-2},
}


def make(name: str, **kwargs: Any) -> SoftSAC:
    case = {**CASES[name], **kwargs}
    policy, env = case.pop("policy", "MlpPolicy"), case.pop("env", lambda: gym.make("Pendulum-v1"))()
    model = SoftSAC(policy, env, **{**SMALL, "policy_kwargs": dict(TAME), **case})
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


def twins(name: str, **kwargs: Any) -> tuple[SoftSAC, SoftSAC]:
    """A model that runs eagerly, after its first update, and one in the same state that compiles."""
    eager, compiled = make(name, compile=False, **kwargs), make(name, compile=True, **kwargs)
    eager.learn(SMALL["learning_starts"] + 1)
    compiled.learn(SMALL["learning_starts"] + 1)
    compiled.replay_buffer = copy.deepcopy(eager.replay_buffer)
    compiled.set_parameters(copy.deepcopy(eager.get_parameters()))
    with th.no_grad():
        if compiled.log_ent_coef is not None and eager.log_ent_coef is not None:
            compiled.log_ent_coef.copy_(eager.log_ent_coef)
    return eager, compiled


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{prefix}.{i}").items()}
    return {prefix: value}


def state(model: SoftSAC) -> dict[str, Any]:
    """Networks, targets, optimisers, entropy coefficient and torch's random state."""
    parts = [model.get_parameters(), model.log_ent_coef, th.get_rng_state()]
    return {k: v.detach().clone() if isinstance(v, th.Tensor) else v for k, v in flat(parts).items()}


def assert_same(expected: dict[str, Any], actual: dict[str, Any], atol: float) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if isinstance(value, th.Tensor):
            assert actual[name].dtype == value.dtype and actual[name].device == value.device, name
            th.testing.assert_close(
                actual[name], value, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name} {text}"
            )
        else:
            assert actual[name] == value, name


def assert_same_metrics(expected: SoftSAC, actual: SoftSAC) -> None:
    for key, value in expected.logger.name_to_value.items():
        if key.startswith("train/"):
            assert actual.logger.name_to_value[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def assert_identical(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        same = th.equal(value, actual[name]) if isinstance(value, th.Tensor) else value == actual[name]
        assert same, name


def train(model: SoftSAC, n: int, seed: int = 0) -> None:
    """With the same noise in each model."""
    th.manual_seed(seed)
    model.train(gradient_steps=n, batch_size=8)


def poison(monkeypatch: pytest.MonkeyPatch, at: int, name: str) -> None:
    """From now on, the minibatch of this number, of those drawn at once for a ``train()``, has NaN in this tensor."""
    run = Runner.__call__

    def poisoned(self: Runner, draws: Iterable[Minibatches], *args: Any) -> Any:
        return run(self, map(with_nan, draws), *args)

    def with_nan(minibatches: Minibatches) -> Minibatches:
        samples, size = minibatches.samples, minibatches.size
        tensor = getattr(samples, name).clone()
        tensor[(at - 1) * size : at * size] *= float("nan")
        return minibatches._replace(samples=samples._replace(**{name: tensor}))

    monkeypatch.setattr(Runner, "__call__", poisoned)


def has_compiled(model: SoftSAC) -> bool:
    return model._runner is not None and model._runner.compiles and bool(model._runner.compiler.compiled)


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
