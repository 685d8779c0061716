"""SoftSAC's own options, schedules, errors and log."""

import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.wrappers import TransformAction
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.sac import policies as sac_policies
from torch import nn

import sb3_softsac.softsac
from sb3_softsac import ReplayBuffer, SoftSAC, SoftSACPolicy
from sb3_softsac.distributions import log_action_scale
from sb3_softsac.gradient_step import actor_gradients, update
from sb3_softsac.policies import Actor

SMALL = {"policy_kwargs": {"net_arch": [16]}, "buffer_size": 500, "device": "cpu", "seed": 0}


class Records(KVWriter):
    """A logger's output, kept."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


def logged(model: SoftSAC) -> Records:
    records = Records()
    model.set_logger(Logger(folder=None, output_formats=[records]))
    return records


def pendulum(**kwargs: Any) -> SoftSAC:
    """A small model with 64 random steps in its buffer, ready for ``train``."""
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=1000, **{**SMALL, **kwargs})
    logged(model)
    model.learn(64)
    return model


def snapshot(model: SoftSAC) -> dict[str, th.Tensor]:
    state = {name: value.clone() for name, value in model.policy.state_dict().items()}
    if model.log_ent_coef is not None:
        state["log_ent_coef"] = model.log_ent_coef.detach().clone()
    return state


def changes(model: SoftSAC, n_updates: int, chunk: int = 1) -> dict[str, list[int]]:
    """In which of the updates (from 1) each network changed. ``chunk`` updates go into each ``train()``."""
    seen: dict[str, list[int]] = {}
    for first in range(0, n_updates, chunk):
        updates = iter(range(first + 1, first + chunk + 1))
        before = snapshot(model)

        def spy(
            *args: Any, before: dict[str, th.Tensor] = before, updates: Any = updates, step: Callable = update
        ) -> Any:
            outcome = step(*args)
            number, after = next(updates), snapshot(model)
            for name in after:
                if not th.equal(before[name], after[name]):
                    part = name.split(".")[0]
                    if number not in seen.setdefault(part, []):
                        seen[part].append(number)
            before.update(after)
            return outcome

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sb3_softsac.execution.eager, "update", spy)
            model.train(gradient_steps=chunk, batch_size=16)
    return seen


def test_signature_starts_with_sb3s() -> None:
    import inspect

    ours = list(inspect.signature(SoftSAC.__init__).parameters.values())
    sb3s = list(inspect.signature(SAC.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(sb3s)]] == [(p.name, p.default, p.kind) for p in sb3s]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(sb3s) :])
    for name in ("learn", "save", "load", "set_env"):
        ours_, sb3s_ = (inspect.signature(getattr(a, name)).parameters.keys() for a in (SoftSAC, SAC))
        assert [each for each in ours_ if each != "allow_pickle"] == list(sb3s_)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_delays_and_intervals_count_updates(chunk: int) -> None:
    model = pendulum(policy_delay=2, target_update_interval=3, use_actor_target=True)
    seen = changes(model, 6, chunk)
    assert seen == {
        "critic": [1, 2, 3, 4, 5, 6],
        "actor": [2, 4, 6],
        "log_ent_coef": [2, 4, 6],
        "critic_target": [1, 4],
        "actor_target": [4],  # at update 1 the actor had not moved yet
    }
    assert model._n_updates == 6


def test_policy_delay_compensation_does_the_updates_left_out() -> None:
    steps = {}
    for compensation in (False, True):
        model = pendulum(policy_delay=3, policy_delay_compensation=compensation)
        model.train(gradient_steps=6, batch_size=16)
        steps[compensation] = {
            name: next(iter(optimizer.state.values()))["step"].item()
            for name, optimizer in (
                ("actor", model.actor.optimizer),
                ("critic", model.critic.optimizer),
                ("ent_coef", model.ent_coef_optimizer),
            )
        }
    assert steps == {
        False: {"actor": 2, "critic": 6, "ent_coef": 2},
        True: {"actor": 6, "critic": 6, "ent_coef": 6},
    }


@pytest.mark.parametrize(("random_steps", "learning_starts"), [(30, 10), (10, 30), (None, 20), (0, 15), (25, 0)])
def test_random_steps_and_learning_starts_are_independent(random_steps: int | None, learning_starts: int) -> None:
    model = SoftSAC(
        "MlpPolicy", "Pendulum-v1", learning_starts=learning_starts, random_steps=random_steps, batch_size=4, **SMALL
    )
    predicted: list[int] = []
    trained: list[int] = []
    predict, train = model.predict, model.train

    def spy_predict(*args: Any, **kwargs: Any) -> Any:
        predicted.append(model.num_timesteps)
        return predict(*args, **kwargs)

    def spy_train(*args: Any, **kwargs: Any) -> None:
        trained.append(model.num_timesteps)
        train(*args, **kwargs)

    model.predict, model.train = spy_predict, spy_train  # type: ignore[method-assign]
    model.learn(40)
    assert predicted == list(range(learning_starts if random_steps is None else random_steps, 40))
    assert trained == list(range(learning_starts + 1, 41))


def test_actor_target_gives_the_next_actions() -> None:
    model = pendulum(use_actor_target=True, tau=0.0)
    sampled: list[str] = []
    for name in ("actor", "actor_target"):
        actor = getattr(model, name)

        def spy(obs: Any, noise: Any = None, name: str = name, sample: Any = actor.sample) -> Any:
            sampled.append(name)
            return sample(obs, noise)

        actor.sample = spy
    model.train(gradient_steps=1, batch_size=8)
    assert sampled == ["actor_target", "actor"]
    assert not model.actor_target.training


def test_actor_target_follows_by_tau() -> None:
    model = pendulum(use_actor_target=True, tau=0.25)
    old = snapshot(model)
    model.train(gradient_steps=1, batch_size=8)
    new = snapshot(model)
    for name in old:
        if name.startswith("actor."):
            target = name.replace("actor.", "actor_target.")
            th.testing.assert_close(new[target], 0.75 * old[target] + 0.25 * new[name])


def test_separate_learning_rates_and_schedules() -> None:
    model = pendulum(
        learning_rate=lambda progress: 1e-3 * progress,
        qf_learning_rate=lambda progress: 2e-3 * progress,
        ent_coef_learning_rate=5e-3,
    )
    model._current_progress_remaining = 0.5
    model.train(gradient_steps=1, batch_size=8)
    rates = [o.param_groups[0]["lr"] for o in (model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer)]
    assert rates == pytest.approx([5e-4, 1e-3, 5e-3])
    values = model.logger.name_to_value
    assert values["train/learning_rate"] == pytest.approx(5e-4)
    assert values["train/qf_learning_rate"] == pytest.approx(1e-3)
    assert values["train/ent_coef_learning_rate"] == pytest.approx(5e-3)


@pytest.mark.parametrize("learning_rate", [7e-4, np.float32(7e-4), lambda progress: 2 * 7e-4 * progress])
def test_learning_rate_is_everybodys_by_default(learning_rate: Any) -> None:
    model = pendulum(learning_rate=learning_rate)
    model._current_progress_remaining = 0.5
    model.train(gradient_steps=1, batch_size=8)
    for optimizer in (model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(7e-4)
    assert "train/qf_learning_rate" not in model.logger.name_to_value


@pytest.mark.parametrize("kind", ["log", "exp"])
def test_ent_coef_loss_reaches_the_update(kind: str) -> None:
    """Both losses of one update, from the logged means: their ratio is log(ent_coef) to ent_coef."""
    model = pendulum(ent_coef_loss=kind, ent_coef="auto_0.2")
    model.train(gradient_steps=1, batch_size=32)
    log_prob = -model.logger.name_to_value["train/entropy"]
    factor = np.log(0.2) if kind == "log" else 0.2
    assert model.logger.name_to_value["train/ent_coef_loss"] == pytest.approx(-factor * (log_prob - 1.0), rel=1e-4)


@pytest.mark.parametrize("learned", [True, False])
def test_entropy_space_shifts_every_density(learned: bool) -> None:
    """Pendulum's actions are in [-2, 2]: densities are log 2 lower, so targets are ent_coef * log 2 higher."""
    updated = {}
    for space in ("normalized", "env"):
        model = pendulum(entropy_space=space, ent_coef="auto_0.5" if learned else 0.5, target_entropy=-1.0)
        assert isinstance(model.replay_buffer, sb3_softsac.ReplayBuffer)
        model.replay_buffer.seed(0)
        th.manual_seed(0)
        model.train(gradient_steps=1, batch_size=32)
        updated[space] = dict(model.logger.name_to_value)
    shift = log_action_scale(spaces.Box(-2.0, 2.0, (1,)))
    assert shift == pytest.approx(np.log(2.0))
    plain, env = updated["normalized"], updated["env"]
    assert env["train/entropy"] - plain["train/entropy"] == pytest.approx(shift, abs=1e-5)
    assert env["train/target_q_value"] - plain["train/target_q_value"] == pytest.approx(0.99 * 0.5 * shift, abs=1e-4)
    if learned:
        difference = env["train/ent_coef_loss"] - plain["train/ent_coef_loss"]
        assert difference == pytest.approx(np.log(0.5) * shift, abs=1e-5)


def test_max_grad_norm_clips_each_network() -> None:
    model = pendulum(
        learning_rate=1.0, max_grad_norm=1e-3, policy_kwargs={"net_arch": [16], "optimizer_class": th.optim.SGD}
    )
    before = snapshot(model)
    model.train(gradient_steps=1, batch_size=32)
    after = snapshot(model)
    for network in ("actor.", "critic."):
        step = [(after[name] - before[name]).flatten() for name in before if name.startswith(network)]
        assert th.cat(step).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert model.logger.name_to_value["train/critic_grad_norm"] > 1e-3  # logged as it was before clipping


def test_actor_step_leaves_no_gradient_in_the_critics() -> None:
    model = pendulum(policy_delay=2)
    model.train(gradient_steps=1, batch_size=8)
    gradients = [parameter.grad.clone() for parameter in model.critic.parameters()]
    model.train(gradient_steps=1, batch_size=8)  # with the actor's update, after the critics'
    assert not any(th.equal(g, p.grad) for g, p in zip(gradients, model.critic.parameters(), strict=True))
    model.critic.optimizer.zero_grad()
    batch = model.replay_buffer.sample(8)
    optimizers = model._runner.learner.optimizers()
    noise, coefficient = th.randn(8, 1), th.tensor(0.1)
    actor_gradients(model.policy, model._ent_coef, optimizers, batch, noise, coefficient, model._update_options())
    assert all(parameter.grad is None for parameter in model.critic.parameters())


def test_frozen_parameters_stay() -> None:
    model = pendulum()
    frozen = model.actor.latent_pi[0].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    model.train(gradient_steps=2, batch_size=8)
    assert th.equal(before, frozen)


LOG_KEYS = {
    "actor_grad_norm", "actor_loss", "critic_grad_norm", "critic_loss", "ent_coef", "ent_coef_loss", "entropy",
    "learning_rate", "log_std", "n_updates", "q_value", "saturated_actions", "target_q_value",
}  # fmt: skip


def test_log() -> None:
    env = gym.make("Pendulum-v1", max_episode_steps=50)
    model = SoftSAC("MlpPolicy", env, learning_starts=30, batch_size=8, **SMALL)
    records = logged(model)
    model.learn(110, log_interval=1)
    assert len(records.rows) == 2
    row = records.rows[-1]
    assert {key.removeprefix("train/") for key in row if key.startswith("train/")} == LOG_KEYS
    assert all(np.isfinite(value) for value in row.values())
    assert row["train/n_updates"] == 70 - 1
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/total_timesteps"} <= row.keys()


def test_log_means_are_over_the_updates_of_one_train() -> None:
    model = pendulum(policy_delay=2)
    kept: list[dict[str, th.Tensor]] = []

    def spy(*args: Any) -> Any:
        finite, metrics = update(*args)
        kept.append(dict(metrics))
        return finite, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sb3_softsac.execution.eager, "update", spy)
        model.train(gradient_steps=5, batch_size=8)
    for key in ("critic_loss", "actor_loss", "entropy"):
        values = [metrics[key].item() for metrics in kept if key in metrics]
        assert len(values) == (5 if key == "critic_loss" else 2)
        assert model.logger.name_to_value[f"train/{key}"] == pytest.approx(np.mean(values), rel=1e-5)


def test_logged_values_are_what_they_say() -> None:
    """One update of plain gradient descent, recomputed here from the state before it."""
    sgd = {"net_arch": [16], "optimizer_class": th.optim.SGD}
    model = pendulum(policy_kwargs=sgd, ent_coef=0.3, learning_rate=0.1)
    with th.no_grad():
        model.actor.mu.bias.fill_(3.7)  # some actions saturate
    assert isinstance(model.replay_buffer, sb3_softsac.ReplayBuffer)
    model.replay_buffer.seed(0)
    batch = model.replay_buffer.sample(64)
    before = snapshot(model)
    th.manual_seed(0)
    pi = model.actor.sample(batch.observations)
    next_pi = model.actor.sample(batch.next_observations)
    current_q = th.cat(model.critic(batch.observations, batch.actions), dim=1)
    next_q = th.cat(model.critic_target(batch.next_observations, next_pi.actions), dim=1).min(dim=1, keepdim=True)[0]
    target_q = batch.rewards + 0.99 * (next_q - 0.3 * next_pi.log_prob)
    expected = {
        "entropy": -pi.log_prob.mean(),
        "log_std": pi.log_std.mean(),
        "saturated_actions": (pi.actions.abs() > 0.999).float().mean(),
        "q_value": current_q.mean(),
        "target_q_value": target_q.mean(),
        "critic_loss": 0.5 * ((current_q - target_q) ** 2).mean(dim=0).sum(),
        "ent_coef": th.tensor(0.3),
    }
    model.replay_buffer.seed(0)
    th.manual_seed(0)
    model.train(gradient_steps=1, batch_size=64)
    values = {name.removeprefix("train/"): value for name, value in model.logger.name_to_value.items()}
    for name, value in expected.items():
        assert values[name] == pytest.approx(value.item(), rel=1e-4), name
    assert 0.1 < values["saturated_actions"] < 0.9
    after = snapshot(model)
    for network in ("actor", "critic"):
        steps = [(after[name] - before[name]).flatten() for name in before if name.startswith(f"{network}.")]
        assert values[f"{network}_grad_norm"] == pytest.approx(th.cat(steps).norm().item() / 0.1, rel=1e-3)


def test_train_zero_steps() -> None:
    model = pendulum()
    before = snapshot(model)
    model.train(gradient_steps=0, batch_size=8)
    assert all(th.equal(value, before[name]) for name, value in snapshot(model).items())


def test_frozen_actor_trains_the_critics() -> None:
    model = pendulum()
    model.actor.requires_grad_(False)
    seen = changes(model, 2)
    assert "actor" not in seen
    assert seen["critic"] == [1, 2]


def test_ent_coef_can_be_set_by_a_callback() -> None:
    model = pendulum(ent_coef=0.3)
    model.ent_coef_tensor = th.tensor(0.7)
    model.train(gradient_steps=1, batch_size=8)
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.7)


def test_no_torch_distribution_in_the_update_or_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pendulum()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Normal was used")

    monkeypatch.setattr(th.distributions.Normal, "__init__", fail)
    model.train(gradient_steps=2, batch_size=8)
    model.predict(np.zeros(3, dtype=np.float32))


def test_device_auto_is_resolved() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **{**SMALL, "device": "auto"})
    assert model.device == th.device("cuda" if th.cuda.is_available() else "cpu")
    model.learn(10)


class ZeroTimesRoot(BaseFeaturesExtractor):
    """Finite values, gradients that are not: d sqrt(x) / dx at 0, times 0."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=3)
        self.layer = nn.Linear(3, 3)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return obs + th.sqrt(0.0 * self.layer(obs).abs())


def test_non_finite_gradient_stops_before_the_optimiser_step() -> None:
    model = pendulum(policy_kwargs={"net_arch": [16], "features_extractor_class": ZeroTimesRoot})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"critic_loss is .* and the norm of its gradient nan"):
        model.train(gradient_steps=1, batch_size=8)
    assert all(th.equal(before[name], value) for name, value in snapshot(model).items())


@pytest.mark.parametrize("broken", ["rewards", "observations", "actor"])
def test_non_finite_loss_stops_before_the_optimiser_step(broken: str) -> None:
    model = pendulum()
    model.train(gradient_steps=3, batch_size=8)
    if broken == "rewards":
        model.replay_buffer.rewards[:] = np.inf
    elif broken == "observations":
        model.replay_buffer.observations[:] = np.nan
    else:
        with th.no_grad():
            model.actor.mu.bias.fill_(np.nan)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"critic_loss is (nan|inf) .* at update 4: this optimiser step was not"):
        model.train(gradient_steps=1, batch_size=8)
    after = snapshot(model)
    assert all(th.equal(before[name], after[name]) or before[name].isnan().any() for name in before)
    assert model._n_updates == 3


def test_non_finite_actor_loss_leaves_the_actor_whole() -> None:
    model = pendulum(ent_coef=0.1)
    before = {name: value.clone() for name, value in model.actor.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_softsac.losses.actor_loss", lambda q, log_prob, ent_coef: log_prob.sum() * float("nan"))
        with pytest.raises(ValueError, match=r"actor_loss is nan .* at update 1"):
            model.train(gradient_steps=1, batch_size=8)
    assert all(th.equal(before[name], value) for name, value in model.actor.state_dict().items())


class BoxActions(gym.Env):
    observation_space = spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, action_space: spaces.Space):
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        return np.zeros(2, dtype=np.float32), float(action.sum()), False, False, {}


@pytest.mark.filterwarnings("ignore:.*:UserWarning:gymnasium")
@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-np.inf, np.inf, (1,)), "dimension 0 has the bounds"),
        (spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64), "dimension 1 has the bounds"),
        (spaces.Box(-3e38, 3e38, (1,)), "dimension 0 has the bounds"),
        (spaces.Box(np.array([-1.0, 2.0]), np.array([1.0, 2.0]), dtype=np.float64), r"dimension 1 can only be 2\.0"),
        (spaces.Box(-1.0, np.inf, (1,)), "low below high"),
        (spaces.Box(-1.0, 1.0, (0,)), "has no dimension"),
        (spaces.Discrete(3), "Box action space"),
        (spaces.Box(-100, 100, (1,), np.int8), r"0 has the bounds \[-100, 100\], too far apart for int8: give"),
        (spaces.Box(np.array([0, -(2**62)]), 2**62, dtype=np.int64), "dimension 1 .* too far apart for int64"),
    ],
)
def test_bad_action_spaces(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftSAC("MlpPolicy", BoxActions(space))


class Observes(BoxActions):
    def __init__(self, observation_space: spaces.Space):
        super().__init__(spaces.Box(-1.0, 1.0, (1,)))
        self.observation_space = observation_space


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Text(3),
        spaces.MultiDiscrete([[2, 2], [2, 2]]),
        spaces.Box(-1.0, 1.0, ()),
        spaces.Dict({"a": spaces.Sequence(spaces.Discrete(2))}),
        spaces.Dict({}),
    ],
    ids=str,
)
def test_bad_observation_spaces(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=r"(?s)(Observations of .* are not|Dict without entries).*: (use|give)"):
        SoftSAC("MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy", Observes(space))


def test_what_is_no_environment() -> None:
    for env, fix in (
        (None, "pass an environment"),
        (PendulumEnv, "call it"),
        ([PendulumEnv()], "DummyVecEnv"),
        (gym.make_vec("Pendulum-v1", 2), "make_vec_env"),
    ):
        with pytest.raises(ValueError, match=f"is not an environment: .*{fix}"):
            SoftSAC("MlpPolicy", env)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "MultiInputPolicy"}, "MultiInputPolicy is for Dict observations"),
        ({"seed": 1.5}, "seed=1.5 is not valid"),
        ({"seed": -1}, "seed=-1 is not valid"),
        ({"action_noise": 0.1}, "action_noise=0.1 is not valid: it must be an ActionNoise"),
        ({"use_sde": "yes"}, "use_sde='yes' is not valid"),
        ({"sde_sample_freq": "x"}, "sde_sample_freq='x' is not valid"),
        ({"policy_kwargs": {"activation_fn": "relu"}}, "activation_fn='relu' is not valid: it must be a class"),
        ({"policy_kwargs": {"optimizer_class": "adam"}}, "optimizer_class='adam' is not valid: it must be a class"),
        ({"policy_kwargs": {"use_actor_target": True}}, "pass it to SoftSAC itself"),
        (
            {"env": make_vec_env("Pendulum-v1", 2), "train_freq": (1, "episode")},
            "there are 2 environments: count steps",
        ),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftSAC(**{"policy": "MlpPolicy", "env": "Pendulum-v1", **SMALL, **options})


def test_seed_of_numpy() -> None:
    weights = [
        SoftSAC("MlpPolicy", "Pendulum-v1", **{**SMALL, "seed": seed}).actor.mu.weight for seed in (3, np.int64(3))
    ]
    assert th.equal(*weights)


def test_device_is_where_the_networks_are() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=5, batch_size=4, **SMALL)
    model.device = "cpu"  # type: ignore[assignment]
    model.learn(8)
    assert model.device == th.device("cpu")
    model.device = "meta"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"device=meta has no effect on networks that are on cpu: .*device='meta'"):
        model.learn(8)


class OwnLogProb(Actor):
    def action_log_prob(self, obs: Any) -> Any:
        return super().action_log_prob(obs)


class OwnPolicy(SoftSACPolicy):
    def make_actor(self, features_extractor: Any = None) -> Actor:
        actor = super().make_actor(features_extractor)
        actor.__class__ = OwnLogProb
        return actor


def test_own_log_prob_is_not_left_out_silently() -> None:
    with pytest.raises(ValueError, match=r"OwnLogProb.action_log_prob\(\) would be left out .* override sample"):
        SoftSAC(OwnPolicy, "Pendulum-v1", **SMALL).learn(5)


def test_nan_action_bounds() -> None:
    space = spaces.Box(-1.0, 1.0, (2,))
    space.high = np.array([1.0, np.nan], dtype=np.float32)
    with pytest.raises(ValueError, match="dimension 1 has the bounds"):
        SoftSAC("MlpPolicy", BoxActions(space))


def test_whole_numbers_as_the_error_says() -> None:
    """The environment's step asserts that each action is in its space."""
    env = BoxActions(spaces.Box(-100, 100, (2,), np.int8))
    space = spaces.Box(env.action_space.low, env.action_space.high, dtype="float32")
    wrapped = TransformAction(env, lambda action: action.round().astype("int8"), space)
    with pytest.warns(UserWarning, match="-100 and 100"):
        SoftSAC("MlpPolicy", wrapped, learning_starts=20, batch_size=8, **SMALL).learn(25)


def test_bounds_that_stand_for_none_warn() -> None:
    """Isaac Lab's +-100; and not the torques of a robot, of which one may be as large."""
    with pytest.warns(UserWarning, match=r"-100 and 100 .* percentiles"):
        SoftSAC("MlpPolicy", BoxActions(spaces.Box(-100.0, 100.0, (2,))), **SMALL)
    torques = np.array([20.0, 80.0, 360.0], dtype=np.float32)
    SoftSAC("MlpPolicy", BoxActions(spaces.Box(-torques, torques)), **SMALL)


def test_uneven_action_bounds_are_kept() -> None:
    """The environment's step asserts that each action is in its space."""
    low, high = np.array([-3.0, 0.0, 2.0], dtype=np.float32), np.array([-1.0, 0.5, 9.0], dtype=np.float32)
    model = SoftSAC("MlpPolicy", BoxActions(spaces.Box(low, high)), learning_starts=20, batch_size=8, **SMALL)
    model.learn(100)
    with th.no_grad():
        model.actor.mu.bias += th.tensor([100.0, -100.0, 0.0])
    action, _ = model.predict(np.zeros(2, dtype=np.float32), deterministic=True)
    np.testing.assert_allclose(action[:2], [-1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("policy_delay", 0), ("policy_delay", 1.5), ("target_update_interval", 0), ("random_steps", -1),
        ("ent_coef_loss", "exponential"), ("entropy_space", "real"), ("max_grad_norm", 0.0), ("max_grad_norm", -1.0),
        ("qf_learning_rate", -1e-3), ("ent_coef_learning_rate", "fast"), ("learning_rate", float("nan")), ("tau", 1.5),
        ("gamma", -0.1), ("batch_size", 0), ("n_steps", 0), ("buffer_size", 0), ("gradient_steps", -2),
        ("learning_starts", -5), 
        ("train_freq", 0), ("train_freq", 1.5), ("train_freq", []), ("train_freq", (4,)), ("train_freq", [4, "steps"]),
        ("ent_coef", "automatic"), ("target_entropy", "low"), ("target_entropy", float("inf")),
        ("tau", "0.005"), ("gamma", None), ("max_grad_norm", "1"), ("target_entropy", None), ("use_actor_target", "no"),
    ],
)  # fmt: skip
def test_bad_options(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{option}={value!r}")):
        SoftSAC("MlpPolicy", "Pendulum-v1", **{option: value})


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="has no effect on the fixed ent_coef"):
        SoftSAC("MlpPolicy", "Pendulum-v1", ent_coef=0.1, ent_coef_learning_rate=1e-3)
    with pytest.raises(ValueError, match="ent_coef_loss='exp' has no effect on the fixed ent_coef"):
        SoftSAC("MlpPolicy", "Pendulum-v1", ent_coef=0.1, ent_coef_loss="exp")
    with pytest.raises(ValueError, match="use_sde=True"):
        SoftSAC("MlpPolicy", "Pendulum-v1", use_sde=True, policy_kwargs={"separate_log_std_net": True})


@pytest.mark.parametrize("target_entropy", ["auto", -3, "-0.5", np.float32(-2)])
def test_target_entropy(target_entropy: Any) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", target_entropy=target_entropy, **SMALL)
    assert model.target_entropy == pytest.approx(-1.0 if target_entropy == "auto" else float(target_entropy))


@pytest.mark.parametrize(
    "train_freq", [np.int64(4), [4, "step"], (np.int64(4), "step"), TrainFreq(4, TrainFrequencyUnit.STEP)]
)
def test_train_freq(train_freq: Any) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", train_freq=train_freq, **SMALL)
    assert model.train_freq == TrainFreq(4, TrainFrequencyUnit.STEP) and type(model.train_freq.frequency) is int


def test_gradient_steps_minus_one_with_episodes() -> None:
    model = SoftSAC(
        "MlpPolicy",
        gym.make("Pendulum-v1", max_episode_steps=50),
        train_freq=(1, "episode"),
        gradient_steps=-1,
        learning_starts=30,
        batch_size=4,
        **SMALL,
    )
    model.learn(100)
    assert model._n_updates == 100


def test_gradient_steps_zero_learns_nothing() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", gradient_steps=0, learning_starts=0, **SMALL)
    before = snapshot(model)
    model.learn(20)
    assert all(th.equal(value, before[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_many_environments(vec_env_cls: Any) -> None:
    kwargs = {"start_method": "fork"} if vec_env_cls is SubprocVecEnv else None
    env = make_vec_env("Pendulum-v1", n_envs=3, vec_env_cls=vec_env_cls, vec_env_kwargs=kwargs)
    model = SoftSAC("MlpPolicy", env, train_freq=2, gradient_steps=-1, learning_starts=30, batch_size=8, **SMALL)
    model.learn(120)
    assert model.num_timesteps == 120
    assert model._n_updates == 120 - 30
    assert model.replay_buffer.observations.shape == (500 // 3, 3, 3)
    env.close()


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(n_envs: int, noise_class: Any) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=n_envs, env_kwargs={"max_episode_steps": 20})
    noise = noise_class(np.zeros(1), 0.1 * np.ones(1))
    model = SoftSAC("MlpPolicy", env, action_noise=noise, learning_starts=10, batch_size=8, **SMALL)
    model.learn(100)
    assert np.abs(model.replay_buffer.actions).max() <= 1.0


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar() -> None:
    pytest.importorskip("rich")
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=10, batch_size=8, **SMALL)
    model.learn(20, progress_bar=True)


def test_tensorboard_log_is_named_after_the_algorithm(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    model = SoftSAC(
        "MlpPolicy", "Pendulum-v1", tensorboard_log=str(tmp_path), learning_starts=10, batch_size=8, **SMALL
    )
    model.learn(20)
    assert [path.name for path in tmp_path.iterdir()] == ["SoftSAC_1"]


@pytest.mark.learning
def test_learns_pendulum_a_little() -> None:
    """Not a benchmark: learning visibly works in 4,000 steps (random policy: about -1200)."""
    model = SoftSAC(
        "MlpPolicy", "Pendulum-v1", learning_rate=3e-3, batch_size=64, policy_kwargs={"net_arch": [32, 32]},
        buffer_size=10_000, seed=1, device="cpu", compile=True,
    )  # fmt: skip
    model.learn(4000)
    mean_return, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=0), n_eval_episodes=10)
    assert mean_return > -500.0


# What a review has found


@pytest.mark.parametrize("how", ["policy", "setup"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exchanged_networks_are_trained(how: str, compile: bool) -> None:
    """Networks are reset in a run, to learn from the same buffer again (https://arxiv.org/abs/2205.07802)."""
    model = pendulum(compile=compile)
    model.train(3, 8)
    if how == "policy":
        policy_class: Any = model.policy_class
        model.policy = policy_class(
            model.observation_space, model.action_space, model.lr_schedule, **model.policy_kwargs
        )
        model._create_aliases()
    else:
        model._setup_model()
    before = snapshot(model)
    model.train(3, 8)
    after = snapshot(model)
    changed = {name for name in before if not th.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"actor", "critic", "critic_target", "log_ent_coef"}
    assert model.critic.optimizer.state and model.actor.optimizer.state


def test_changed_schedule_reaches_all_optimizers() -> None:
    """As in SB3, where ``learning_rate`` is only read when the model is made."""
    model = pendulum(qf_learning_rate=0.01)
    model.lr_schedule = lambda progress: 1e-6
    model.learning_rate = 0.5
    model.train(1, 8)
    assert model.ent_coef_optimizer is not None
    optimizers = model.actor.optimizer, model.ent_coef_optimizer, model.critic.optimizer
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1e-6, 1e-6, 0.01]


BATCH_NORM = {"net_arch": [16], "normalization": "batch"}
CHANGES: list[tuple[str, Any, dict[str, Any]]] = [
    ("learning_rate", 1e-2, {}), ("learning_rate", "cos_1e-2", {}), ("qf_learning_rate", 1e-2, {}),
    ("ent_coef_learning_rate", 1e-2, {}), ("batch_size", 16, {}), ("tau", 0.5, {}), ("gamma", 0.5, {}),
    ("gamma", 0.5, {"n_steps": 3}), ("gamma", 0.5, {"replay_buffer_kwargs": {"n_steps": 3}}), ("n_steps", 3, {}),
    ("n_steps", 3, {"gamma": 0.5}), ("n_steps", 1, {"n_steps": 3}), ("train_freq", 4, {}),
    ("train_freq", (2, "step"), {}), ("gradient_steps", 2, {}),
    ("ent_coef", 0.3, {}), ("ent_coef", "auto_0.1", {"ent_coef": 0.3}), ("target_update_interval", 3, {}),
    ("target_entropy", -3, {}), ("target_entropy", "auto_0.5", {}), ("target_entropy", np.float32(-3), {}),
    ("policy_delay", 2, {}), ("policy_delay_compensation", True, {"policy_delay": 2}), ("random_steps", 70, {}),
    ("use_actor_target", True, {}), ("use_actor_target", False, {"use_actor_target": True}),
    ("ent_coef_loss", "exp", {"ent_coef": "auto_0.1"}), ("entropy_space", "env", {}), ("max_grad_norm", 0.01, {}),
    ("joint_batch", "critic", {"policy_kwargs": BATCH_NORM}), ("use_critic_target", False, {}),
    ("normalize_rewards", "std", {}), ("max_noise_repeat", 8, {}), ("sde_sample_freq", 2, {"use_sde": True}),
]  # fmt: skip


class Seed(BaseCallback):
    def _on_training_start(self) -> None:
        self.model.set_random_seed(3)

    def _on_step(self) -> bool:
        return True


def learn_seeded(model: SoftSAC, n_steps: int) -> dict[str, th.Tensor]:
    """Some updates, and the networks after them."""
    model.learning_starts = 0
    model.learn(n_steps, callback=Seed(), reset_num_timesteps=False)
    return snapshot(model)


@pytest.mark.parametrize(("name", "value", "options"), CHANGES)
def test_argument_changed_between_two_calls_of_learn(name: str, value: Any, options: dict[str, Any]) -> None:
    """The model goes on as if it had been made with it."""
    options = {"batch_size": 8, "learning_rate": 1e-3, "compile": False, **options}
    changed, made, unchanged = pendulum(**options), pendulum(**{**options, name: value}), pendulum(**options)
    setattr(changed, name, value)
    found, expected, otherwise = (learn_seeded(model, 8) for model in (changed, made, unchanged))
    th.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    if found.keys() == otherwise.keys():
        assert not all(th.equal(value, otherwise[key]) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "value", "options", "message"),
    [
        ("use_sde", True, {}, "use_sde=True .*: make a new model"),
        ("use_sde", False, {"use_sde": True}, "use_sde=False .*: make a new model"),
        ("n_steps", 3, {"replay_buffer_class": SB3ReplayBuffer}, "n_steps=3 .*class=ReplayBuffer.* set it back to 1"),
        ("n_steps", 5, {"replay_buffer_kwargs": {"n_steps": 3}}, "n_steps=5 .*{'n_steps': 3}.* set it back to 1"),
        ("gamma", 0.5, {"replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.9}}, "gamma=0.5 .*back to 0.99"),
        (
            "gamma",
            0.5,
            {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3}},
            "gamma=0.5 ",
        ),
        ("ent_coef_learning_rate", 1e-3, {"ent_coef": 0.3}, "no effect on the fixed ent_coef=0.3"),
        ("ent_coef_loss", "exp", {"ent_coef": 0.3}, "no effect on the fixed ent_coef=0.3"),
        ("ent_coef", "high", {}, "ent_coef='high' is not valid"),
        ("train_freq", (1, "day"), {}, r"train_freq=\(1, 'day'\) is not valid"),
    ],
)
def test_argument_that_cannot_be_changed(name: str, value: Any, options: dict[str, Any], message: str) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **SMALL, **options)
    before = getattr(model, name)
    setattr(model, name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model.learn(1)
    setattr(model, name, before)
    model.learn(1)


@pytest.mark.parametrize("also", ["nothing", "learning_rate"])
def test_schedule_of_the_user_stays(also: str) -> None:
    model = pendulum()
    model.lr_schedule = schedule = lambda progress: 1e-6
    if also == "learning_rate":
        model.learning_rate = 0.5
    model.learn(1)
    assert model.lr_schedule is schedule
    model.learning_rate = 0.25
    model.learn(1)
    assert model.lr_schedule(1.0) == 0.25


def test_target_entropy_set_before_train() -> None:
    model = pendulum()
    model.target_entropy = -3
    model.train(1, 8)
    assert model._n_updates == 1


@pytest.mark.parametrize("learns_before_saving", [False, True])
def test_offline_data_set_to_none(learns_before_saving: bool, tmp_path: Any) -> None:
    model = pendulum(offline_data=pendulum().replay_buffer, offline_fraction=0.25, batch_size=8)
    model.learn(1)
    assert len(model.offline_data.rewards) == 64
    model.offline_data = None
    if learns_before_saving:
        model.learn(1)
    else:
        model.save(tmp_path / "model")
    assert model.offline_data is None and model._offline_source is None
    model.train(1, 8)
    model.save(tmp_path / "model")
    assert SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu").offline_data is None


@pytest.mark.parametrize(
    ("options", "n_steps"),
    [
        ({"replay_buffer_kwargs": {"n_steps": 3}}, 3),
        ({"replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.5}, "gamma": 0.9}, 3),
        ({"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.5}}, 3),
        ({"replay_buffer_class": SB3ReplayBuffer}, 1),
    ],
)
def test_offline_data_has_the_returns_of_the_replay_buffer(options: dict[str, Any], n_steps: int) -> None:
    model = pendulum(**{"gamma": 0.5, "offline_data": pendulum().replay_buffer, **options})
    assert (model.offline_data.n_steps, model.offline_data.gamma) == (n_steps, 0.5)
    model.train(1, 8)
    assert model._n_updates == 1


@pytest.mark.parametrize("options", [{}, {"use_actor_target": True}])
def test_copy_with_gsde(options: dict[str, Any]) -> None:
    model = pendulum(use_sde=True, **options)
    model.train(1, 8)
    twin = copy.deepcopy(model)
    assert model.actor.action_dist.exploration_mat.requires_grad  # for those who sample with it
    obs = np.ones((1, 3), dtype=np.float32)
    assert np.array_equal(model.predict(obs)[0], twin.predict(obs)[0])  # with the same matrix
    expected, found = learn_seeded(model, 5), learn_seeded(twin, 5)
    assert all(th.equal(value, found[name]) for name, value in expected.items())


class NewestFirst(ReplayBuffer):
    """Draws in a way of its own, at SB3's point of extension."""

    asked: ClassVar[list[int]] = []

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        self.asked.append(len(batch_inds))
        return super()._get_samples(np.full(len(batch_inds), self.pos - 1), env)


def test_own_sampling_is_asked_for_one_minibatch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    NewestFirst.asked.clear()
    pendulum(replay_buffer_class=NewestFirst).train(4, 8)
    assert NewestFirst.asked == [8] * 4
    model = pendulum()
    assert model.replay_buffer is not None
    batch = model.replay_buffer.sample(8)
    monkeypatch.setattr(model.replay_buffer, "sample", lambda batch_size, env=None: batch)
    model.train(4, 8)
    assert model._n_updates == 4


def test_exploration_after_a_callback_has_trained() -> None:
    """Batch norm and dropout belong to the updates, as with SB3's ``predict``."""
    modes = []

    class Train(BaseCallback):
        def _on_step(self) -> bool:
            modes.append(model.actor.training)
            model.train(1, 8)
            return True

    model = pendulum(train_freq=10, random_steps=0)
    model.learn(4, callback=Train())
    assert modes == [False] * 10


class FrozenEncoder(BaseFeaturesExtractor):
    """A pretrained encoder whose batch norm stays in evaluation mode, as users keep it there."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space, 4)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)
        self.encoder.train = lambda mode=True: self.encoder  # type: ignore[method-assign]

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.encoder(observations)


def test_encoder_that_refuses_training_mode() -> None:
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": [8], "features_extractor_class": FrozenEncoder}}
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=8, **kwargs).learn(40)
    norm = model.actor.features_extractor.encoder[1]
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


class ScriptedExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: Any):
        super().__init__(observation_space, 16)
        self.layers = th.jit.script(nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5)))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_dropout_is_off_in_predictions() -> None:
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": [8], "features_extractor_class": ScriptedExtractor}}
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=8, compile=False, **kwargs).learn(30)
    obs = np.ones((1, 3), dtype=np.float32)
    first, second = (model.predict(obs, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


class OwnRates(SoftSAC):
    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.param_groups[0]["lr"] = 1e-5


def test_own_learning_rates() -> None:
    model = OwnRates("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=8, qf_learning_rate=1e-3, **SMALL)
    model.learn(30)
    optimizers = (model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1e-5, 1e-3, 1e-5]


class ActorOfSB3(SoftSACPolicy):
    def make_actor(self, features_extractor: Any = None) -> Any:
        return sac_policies.SACPolicy.make_actor(self, features_extractor)


def test_actor_of_sb3_is_refused() -> None:
    with pytest.raises(ValueError, match=r"make_actor\(\) returns stable_baselines3.sac.policies.Actor: derive"):
        SoftSAC(ActorOfSB3, "Pendulum-v1", **SMALL)


class HalfTheNoise(SquashedDiagGaussianDistribution):
    pass


def test_own_distribution_is_not_left_out_silently() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **SMALL)
    model.actor.action_dist = HalfTheNoise(1)
    with pytest.raises(ValueError, match=r"^action_dist=HalfTheNoise of the actor would be left out: override sample"):
        model.learn(5)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_buffer_of_another_model_gets_the_options_of_this_one(n_steps: int) -> None:
    other = SoftSAC("MlpPolicy", "Pendulum-v1", n_steps=4 - n_steps, gamma=0.99, **SMALL).learn(5)
    model = SoftSAC("MlpPolicy", "Pendulum-v1", n_steps=n_steps, gamma=0.5, **SMALL)
    model.replay_buffer = other.replay_buffer
    model.learn(5)
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (n_steps, 0.5)


class NotToBePickled(gym.Wrapper):
    @property
    def spec(self) -> Any:
        spec = copy.copy(self.env.spec)
        spec.kwargs = {"function": lambda: None}
        return spec


@pytest.mark.processes
def test_episodes_in_a_worker_whose_spec_cannot_be_pickled() -> None:
    env = SubprocVecEnv([lambda: NotToBePickled(gym.make("Pendulum-v1", max_episode_steps=10))])
    model = SoftSAC("MlpPolicy", env, train_freq=(1, "episode"), learning_starts=10, batch_size=8, **SMALL)
    model.learn(30)
    env.close()
    assert model.num_timesteps == 30


def test_integers_at_the_end_of_an_episode_with_vec_normalize() -> None:
    """They come back from their normalised values, which are rounded."""

    class Integers(gym.Env):
        observation_space = spaces.Box(0, 1000, (20,), np.int64)
        action_space = spaces.Box(-1.0, 1.0, (1,))

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.np_random.integers(400, 600, 20), {}

        def step(self, action: Any) -> Any:
            self.last = self.np_random.integers(400, 600, 20)
            return self.last, 1.0, False, True, {"last": self.last}

    ends: list[np.ndarray] = []

    class Notes(BaseCallback):
        def _on_step(self) -> bool:
            ends.append(self.locals["infos"][0]["last"])
            return True

    env = VecNormalize(DummyVecEnv([Integers]))
    model = SoftSAC("MlpPolicy", env, learning_starts=100, **SMALL).learn(30, callback=Notes())
    stored = model.replay_buffer._get_samples(np.arange(30)).next_observations.numpy()
    np.testing.assert_array_equal(stored[5:], np.array(ends)[5:])  # the first are clipped to a few standard deviations


@pytest.mark.parametrize("find", [lambda m: m.log_ent_coef, lambda m: m.critic.qf0[0].weight], ids=["coef", "weight"])
def test_hook_of_a_gradient(find: Callable[[SoftSAC], th.Tensor]) -> None:
    """Holds a parameter where it is. Neither C++ nor torch's compiler calls it."""
    model = SoftSAC("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=8, compile=True, **SMALL)
    parameter = find(model)
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * 0.0)
    with pytest.warns(UserWarning, match="runs eagerly, which is slower: torch's compiler leaves out hooks"):
        model.learn(40)
    assert th.equal(parameter, before)
