"""Policies: options, initialisation, spaces, gSDE, modes and prediction."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.torch_layers import BatchRenorm1d
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.sac import policies as sb3_policies
from torch import nn

from sb3_softsac import CnnPolicy, MlpPolicy, MultiInputPolicy, SoftSAC, SoftSACPolicy, distributions
from sb3_softsac.gradient_step import pure_update_targets, update_targets

OBSERVATION_SPACE = spaces.Box(-1.0, 1.0, (4,))
ACTION_SPACE = spaces.Box(np.array([-2.0, 0.0], dtype=np.float32), np.array([2.0, 3.0], dtype=np.float32))
SMALL: dict[str, Any] = {"buffer_size": 300, "learning_starts": 20, "batch_size": 8, "device": "cpu", "seed": 0}


def make_policy(**kwargs: Any) -> SoftSACPolicy:
    th.manual_seed(0)
    return SoftSACPolicy(OBSERVATION_SPACE, ACTION_SPACE, lambda _: 1e-3, **{"net_arch": [8, 8], **kwargs})


def observations(n: int = 32, scale: float = 1.0) -> th.Tensor:
    return scale * th.randn(n, 4, generator=th.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kwargs", [{}, {"separate_log_std_net": True}, {"log_std_bounding": "tanh"}, {"use_sde": True}]
)
def test_log_prob_of_samples(kwargs: dict[str, Any]) -> None:
    """What ``sample`` says of its own actions is what ``evaluate_actions`` finds without knowing the sample."""
    policy, obs = make_policy(**kwargs), observations()
    actions, log_prob, log_std = policy.actor.sample(obs)
    assert actions.shape == log_std.shape == (32, 2)
    assert log_prob.shape == (32, 1)
    assert actions.abs().max() < 1.0
    th.testing.assert_close(policy.evaluate_actions(obs, actions), log_prob.squeeze(1), rtol=1e-3, atol=2e-3)


def test_action_log_prob_is_sample() -> None:
    policy, obs = make_policy(), observations()
    th.manual_seed(3)
    actions, log_prob = policy.actor.action_log_prob(obs)
    th.manual_seed(3)
    sample = policy.actor.sample(obs)
    assert th.equal(actions, sample.actions) and th.equal(log_prob, sample.log_prob.squeeze(1))
    th.manual_seed(3)
    assert th.equal(policy.actor(obs), actions)
    noise = th.randn(32, 2)
    assert th.equal(policy.actor.sample(obs, noise).actions, policy.actor.sample(obs, noise).actions)


@pytest.mark.parametrize("squashed", [0.99999, 1.0, -1.0])
def test_evaluate_actions_of_saturated_demonstrations(squashed: float) -> None:
    policy = make_policy()
    log_prob = policy.evaluate_actions(observations(), th.full((32, 2), squashed))
    assert th.isfinite(log_prob).all()


@pytest.mark.parametrize("bounding", ["clamp", "tanh"])
def test_log_std_bounds(bounding: str) -> None:
    policy = make_policy(log_std_bounds=(-5, 2), log_std_bounding=bounding)
    assert isinstance(policy.actor.log_std, nn.Module)
    obs = observations(scale=1000.0)
    _, log_std, _ = policy.actor.get_action_dist_params(obs)
    assert log_std.min() >= -5.0 and log_std.max() <= 2.0
    assert (log_std.min() < -4.5) and (log_std.max() > 1.5)
    with th.no_grad():
        for parameter in policy.actor.log_std.parameters():
            parameter.zero_()
    _, log_std, _ = policy.actor.get_action_dist_params(obs)
    # a zero pre-activation is log_std 0 when clamped, the middle of the bounds when rescaled
    th.testing.assert_close(log_std, th.full_like(log_std, 0.0 if bounding == "clamp" else -1.5))


def test_tanh_bounding_has_gradient_beyond_the_bounds() -> None:
    gradients = {}
    for bounding in ("clamp", "tanh"):
        policy = make_policy(log_std_bounds=(-5, 2), log_std_bounding=bounding)
        with th.no_grad():
            policy.actor.log_std.bias.fill_(3.0)
        _, log_std, _ = policy.actor.get_action_dist_params(observations())
        (gradients[bounding],) = th.autograd.grad(log_std.sum(), policy.actor.log_std.bias)
    assert gradients["clamp"].abs().max() == 0.0
    assert gradients["tanh"].abs().min() > 0.0


def test_separate_log_std_net() -> None:
    policy = make_policy(separate_log_std_net=True)
    mean, log_std, _ = policy.actor.get_action_dist_params(observations())
    trunk = list(policy.actor.latent_log_std.parameters())
    assert [tuple(p.shape) for p in trunk] == [tuple(p.shape) for p in policy.actor.latent_pi.parameters()]
    assert th.autograd.grad(mean.sum(), trunk, allow_unused=True, retain_graph=True) == (None,) * len(trunk)
    assert all(g is not None for g in th.autograd.grad(log_std.sum(), trunk))
    optimised = {id(p) for group in policy.actor.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trunk} <= optimised


@pytest.mark.parametrize("weight_init", ["xavier", "orthogonal"])
def test_weight_init(weight_init: str) -> None:
    policy = make_policy(weight_init=weight_init, use_actor_target=True, separate_log_std_net=True)
    for network in (policy.actor, policy.critic):
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                assert layer.bias.abs().max() == 0.0
                if weight_init == "xavier":
                    limit = (6 / (layer.in_features + layer.out_features)) ** 0.5
                    assert 0.5 * limit < layer.weight.abs().max() <= limit
                else:
                    w = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
                    th.testing.assert_close(w @ w.T, 2 * th.eye(len(w)), atol=1e-5, rtol=0)
    for network, target in policy.targets():
        for ours, theirs in zip(network.parameters(), target.parameters(), strict=True):
            assert th.equal(ours, theirs)


class Pretrained(FlattenExtractor):
    """Its first layer is frozen, its second one is not."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.layers = nn.Sequential(nn.Linear(self.features_dim, self.features_dim), nn.Conv1d(1, 1, 1))
        for parameter in self.layers.parameters():
            nn.init.constant_(parameter, 0.5)
        self.layers[0].requires_grad_(False)


def test_weight_init_leaves_frozen_layers_alone() -> None:
    policy = make_policy(weight_init="orthogonal", features_extractor_class=Pretrained)
    for network in (policy.actor, policy.critic, policy.critic_target):
        frozen, other = network.features_extractor.layers
        assert frozen.weight.eq(0.5).all() and frozen.bias.eq(0.5).all()
        assert not other.weight.eq(0.5).any() and other.bias.eq(0.0).all()


def test_default_init_is_sb3s() -> None:
    th.manual_seed(5)
    ours = SoftSACPolicy(OBSERVATION_SPACE, ACTION_SPACE, lambda _: 1e-3).state_dict()
    th.manual_seed(5)
    theirs = sb3_policies.SACPolicy(OBSERVATION_SPACE, ACTION_SPACE, lambda _: 1e-3).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(th.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"log_std_bounds": (2, -5)}, "log_std_bounds=.* low < high"),
        ({"log_std_bounding": "sigmoid"}, "log_std_bounding='sigmoid'"),
        ({"weight_init": "zeros"}, "weight_init='zeros'"),
        ({"n_critics": 0}, "n_critics=0"),
        ({"n_critics": 2.5}, "n_critics=2.5"),
        ({"log_std_bounds": (-5, 0, 2)}, "log_std_bounds="),
        ({"log_std_bounds": 5}, "log_std_bounds=5"),
        ({"log_std_bounds": None}, "log_std_bounds=None"),
        ({"log_std_bounds": (-np.inf, 2)}, "log_std_bounds="),
        ({"separate_log_std_net": "no"}, "separate_log_std_net='no'"),
        ({"use_sde": True, "log_std_bounding": "tanh"}, "use_sde=True"),
        ({"use_sde": True, "log_std_bounds": (-5, 2)}, "use_sde=True"),
    ],
)
def test_bad_policy_options(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(**kwargs)


@pytest.mark.parametrize("policy_class", [MlpPolicy, CnnPolicy, MultiInputPolicy])
def test_policy_alone_saves_and_loads(policy_class: type[SoftSACPolicy], tmp_path: Any) -> None:
    """``policy.save`` stores every constructor argument."""
    kwargs: dict[str, Any] = {
        "net_arch": {"pi": [8], "qf": [9]}, "log_std_bounds": (-4, 1), "log_std_bounding": "tanh", "n_critics": 3,
        "separate_log_std_net": True, "weight_init": "orthogonal", "use_actor_target": True,
        "share_features_extractor": True, "activation_fn": nn.Tanh,
    }  # fmt: skip
    space: spaces.Space = OBSERVATION_SPACE
    if policy_class is CnnPolicy:
        space = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
    elif policy_class is MultiInputPolicy:
        space = spaces.Dict({"a": OBSERVATION_SPACE, "b": spaces.Discrete(3)})
    policy = policy_class(space, ACTION_SPACE, lambda _: 1e-3, **kwargs)
    policy.save(str(tmp_path / "policy.pth"))
    loaded = policy_class.load(str(tmp_path / "policy.pth"))
    obs = space.sample()
    expected, actual = (p.predict(obs, deterministic=True)[0] for p in (policy, loaded))
    np.testing.assert_array_equal(actual, expected)
    for name, value in loaded.state_dict().items():
        assert th.equal(value, policy.state_dict()[name]), name


@pytest.mark.parametrize("use_sde", [False, True])
def test_predict_deterministic_is_tanh_of_the_mean(use_sde: bool) -> None:
    policy = make_policy(use_sde=use_sde)
    policy.set_training_mode(False)
    obs = observations(5)
    mean_actions, _, _ = policy.actor.get_action_dist_params(obs)
    actions, _ = policy.predict(obs.numpy(), deterministic=True)
    scaled = th.tanh(mean_actions).detach().numpy()
    np.testing.assert_allclose(
        actions, np.array([-2.0, 0.0]) + (scaled + 1) * np.array([2.0, 1.5]), rtol=1e-5, atol=1e-6
    )
    again, _ = policy.predict(obs.numpy(), deterministic=True)
    np.testing.assert_array_equal(actions, again)
    single, _ = policy.predict(obs.numpy()[0], deterministic=True)
    assert single.shape == (2,)


def test_saturated_actions_are_within_the_bounds() -> None:
    """In float32, -1.2 + (0.7 - -1.2) is more than 0.7. All other actions are SB3's."""
    policy = SoftSACPolicy(OBSERVATION_SPACE, spaces.Box(-1.2, 0.7, (1,)), lambda _: 1e-3, net_arch=[8])
    scaled = np.linspace(-1.0, 1.0, 1001, dtype=np.float32).reshape(-1, 1)
    sb3s, ours = BasePolicy.unscale_action(policy, scaled), policy.unscale_action(scaled)
    assert sb3s[-1] > policy.action_space.high and ours.dtype == np.float32
    np.testing.assert_array_equal(ours[:-1], sb3s[:-1])
    with th.no_grad():
        policy.actor.mu.bias.fill_(100.0)
    action, _ = policy.predict(np.zeros(4, dtype=np.float32), deterministic=True)
    assert policy.action_space.contains(action) and action == policy.action_space.high


def test_stochastic_predictions_have_the_policys_distribution() -> None:
    policy = make_policy()
    obs = observations(1)
    actions, _ = policy.predict(np.repeat(obs.numpy(), 20_000, axis=0))
    mean, log_std, _ = policy.actor.get_action_dist_params(obs)
    u = distributions.unsquash(th.as_tensor(policy.scale_action(actions)))
    th.testing.assert_close(u.mean(dim=0, keepdim=True), mean, atol=0.05, rtol=0)
    th.testing.assert_close(u.std(dim=0, keepdim=True).log(), log_std, atol=0.05, rtol=0)


class SquareExtractor(BaseFeaturesExtractor):
    """A user's own features extractor."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=4)
        self.linear = nn.Linear(observation_space.shape[0], 4)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.linear(obs).square()


@pytest.mark.parametrize("share", [False, True])
def test_shared_features_extractor(share: bool) -> None:
    """As in SB3: a shared extractor is the actor's, learned by the policy loss only; targets have their own."""
    policy = make_policy(
        features_extractor_class=SquareExtractor, share_features_extractor=share, use_actor_target=True
    )
    assert (policy.actor.features_extractor is policy.critic.features_extractor) is share
    extractor = {id(p) for p in policy.critic.features_extractor.parameters()}
    optimised = {id(p) for group in policy.critic.optimizer.param_groups for p in group["params"]}
    assert (extractor <= optimised) is not share
    for target in (policy.critic_target, policy.actor_target):
        assert target is not None
        assert target.features_extractor is not policy.actor.features_extractor


def test_custom_extractor_and_optimizer_train() -> None:
    policy_kwargs = {
        "features_extractor_class": SquareExtractor,
        "optimizer_class": th.optim.AdamW,
        "optimizer_kwargs": {"weight_decay": 0.01},
        "activation_fn": nn.Tanh,
        "net_arch": [8],
    }
    model = SoftSAC("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, **SMALL)
    model.learn(40)
    assert isinstance(model.critic.optimizer, th.optim.AdamW)


class BatchNormExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.norm(obs)


def test_train_and_eval_mode() -> None:
    """Batch norm's statistics move in training only; targets copy them; predictions do not depend on the batch."""
    model = SoftSAC(
        "MlpPolicy", "Pendulum-v1", tau=0.1, use_actor_target=True,
        policy_kwargs={"net_arch": [8], "features_extractor_class": BatchNormExtractor}, **SMALL
    )  # fmt: skip
    model.learn(30)
    policy = model.policy
    for network, target in policy.targets():
        norm, target_norm = network.features_extractor.norm, target.features_extractor.norm
        assert norm.running_mean.abs().max() > 0.0
        assert th.equal(norm.running_mean, target_norm.running_mean)
        assert not target.training
    before = model.actor.features_extractor.norm.running_mean.clone()
    obs = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    together = model.predict(obs, deterministic=True)[0]
    alone = np.stack([model.predict(o, deterministic=True)[0] for o in obs])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert th.equal(before, model.actor.features_extractor.norm.running_mean)
    model.train(gradient_steps=1, batch_size=8)
    assert not th.equal(before, model.actor.features_extractor.norm.running_mean)


class OwnNorm(nn.Module):
    """No batch norm of torch's, and its statistics are called as SB3 expects them."""

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("running_scale", th.ones(n))
        self.register_buffer("constant", th.ones(n))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * self.running_scale


class NormedExtractor(FlattenExtractor):
    def __init__(self, observation_space: spaces.Box, norm: type[nn.Module]):
        super().__init__(observation_space)
        self.norm = norm(3)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(obs))


UPDATES_OF_TARGETS = {
    "eager": update_targets,
    "pure": pure_update_targets,
    "compiled": th.compile(pure_update_targets, fullgraph=True, backend="eager"),
}


@pytest.mark.parametrize("how", ["eager", "pure", pytest.param("compiled", marks=pytest.mark.compiler)])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchRenorm1d, OwnNorm])
def test_targets_copy_statistics(norm: type[nn.Module], how: str) -> None:
    """Also BatchRenorm's, which have names of their own, and the counter that ends its warm-up."""
    kwargs = {"features_extractor_class": NormedExtractor, "features_extractor_kwargs": {"norm": norm}}
    policy = SoftSAC("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, use_actor_target=True, **SMALL).policy
    for finite in (False, True):
        for network, _ in policy.targets():
            for i, buffer in enumerate(network.features_extractor.norm.buffers()):
                buffer.fill_(i + 2)
        UPDATES_OF_TARGETS[how](policy, 0.1, th.tensor(finite))
        for network, target in policy.targets():
            copies = dict(target.features_extractor.norm.named_buffers())
            for name, buffer in network.features_extractor.norm.named_buffers():
                assert th.equal(copies[name], buffer) == (finite and name != "constant"), name
                assert copies[name].dtype == buffer.dtype


def test_batch_renorm_in_targets_does_what_it_does_in_predictions() -> None:
    kwargs = {"features_extractor_class": NormedExtractor, "features_extractor_kwargs": {"norm": BatchRenorm1d}}
    model = SoftSAC("MlpPolicy", "Pendulum-v1", tau=1.0, policy_kwargs=kwargs, **SMALL).learn(30)
    norm, target = model.critic.features_extractor.norm, model.critic_target.features_extractor.norm
    assert norm.steps > 0
    x = th.randn(5, 3)
    assert th.equal(target(x), norm.train(False)(x))


@pytest.mark.parametrize("share", [False, True])
def test_cnn(share: bool) -> None:
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    model = SoftSAC(
        "CnnPolicy", env, policy_kwargs={
            "net_arch": [16], "features_extractor_kwargs": {"features_dim": 32}, "share_features_extractor": share
        }, **SMALL
    )  # fmt: skip
    before = [p.clone() for p in model.actor.features_extractor.parameters()]
    model.learn(60)
    assert model.replay_buffer.observations.dtype == np.uint8
    assert model.replay_buffer.observations.shape[2:] == (1, 40, 40)  # channels first
    assert not any(th.equal(a, b) for a, b in zip(before, model.actor.features_extractor.parameters(), strict=True))
    action, _ = model.predict(env.observation_space.sample(), deterministic=True)
    assert env.action_space.contains(action)


@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 3}, {"use_actor_target": True, "policy_delay": 2}])
@pytest.mark.parametrize("channel_last", [True, False])
def test_dict_observations(kwargs: dict[str, Any], channel_last: bool) -> None:
    env = SimpleMultiObsEnv(discrete_actions=False, channel_last=channel_last)
    extractor = {"features_extractor_kwargs": {"cnn_output_dim": 16}, "net_arch": [16]}
    model = SoftSAC("MultiInputPolicy", env, policy_kwargs=extractor, **SMALL, **kwargs)
    model.learn(60)
    assert model.replay_buffer.observations["img"].dtype == np.uint8
    assert model.replay_buffer.observations["vec"].dtype == np.float32
    obs, _ = env.reset()
    action, _ = model.predict(obs, deterministic=True)
    assert env.action_space.contains(action)


def test_dict_observations_need_multi_input_policy() -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        SoftSAC("MlpPolicy", SimpleMultiObsEnv(discrete_actions=False))


class SpaceEnv(gym.Env):
    """Samples of any observation space."""

    action_space = spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, observation_space: spaces.Space):
        self.observation_space = observation_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.5, bool(np.random.random() < 0.1), False, {}


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([2, 3, 4]),
        spaces.MultiBinary(4),
        spaces.Box(-1.0, 1.0, (3, 2), dtype=np.float64),
        spaces.Box(-5, 5, (3,), dtype=np.int32),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_dict", [False, True])
def test_observation_spaces(space: spaces.Space, in_dict: bool) -> None:
    policy = "MlpPolicy"
    if in_dict:
        space, policy = spaces.Dict({"a": space, "b": spaces.Box(-1.0, 1.0, (2,))}), "MultiInputPolicy"
    model = SoftSAC(policy, SpaceEnv(space), policy_kwargs={"net_arch": [8]}, **SMALL)
    model.learn(50)
    batch = model.replay_buffer.sample(4)
    preprocess_obs(batch.observations, space)  # raises unless shapes and dtypes are what the policy reads


@pytest.mark.parametrize("kwargs", [
    {}, {"sde_sample_freq": 4}, {"use_sde_at_warmup": True}, {"policy_kwargs": {"use_expln": True, "net_arch": [8]}},
    {"use_actor_target": True}, {"policy_delay": 2, "policy_delay_compensation": True}, {"n_steps": 3},
    {"policy_kwargs": {"clip_mean": 0.0, "net_arch": [8]}},
])  # fmt: skip
def test_gsde(kwargs: dict[str, Any]) -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", use_sde=True, **SMALL, **kwargs)
    log_std = model.actor.log_std.clone()
    model.learn(50)
    assert not th.equal(log_std, model.actor.log_std)
    assert model._n_updates == 30


def test_gsde_log_prob_is_exact_where_actions_saturate() -> None:
    """SB3 inverts the tanh: a saturated sample's density is then that of |u| = 8."""
    policy = make_policy(use_sde=True, clip_mean=0.0)
    with th.no_grad():
        policy.actor.mu.bias.fill_(20.0)
    obs = observations()
    _, log_prob, log_std = policy.actor.sample(obs)
    mean, _, extra = policy.actor.get_action_dist_params(obs)
    noise = policy.actor.action_dist.get_noise(extra["latent_sde"])
    expected = distributions.log_prob((mean + noise).double(), mean.double(), log_std.double())
    th.testing.assert_close(log_prob.squeeze(1).double(), expected, rtol=1e-4, atol=1e-4)
    assert log_prob.min() > 40.0  # two dimensions, each with at least 2 (20 - log 2) nats of correction


def test_gsde_noise_is_constant_between_resets() -> None:
    policy = make_policy(use_sde=True)
    obs = observations(1)
    policy.reset_noise()
    first, second = policy.actor(obs), policy.actor(obs)
    policy.reset_noise()
    assert th.equal(first, second)
    assert not th.equal(first, policy.actor(obs))


def test_gsde_target_actor_gets_new_noise_with_each_update() -> None:
    model = SoftSAC("MlpPolicy", "Pendulum-v1", use_sde=True, use_actor_target=True, **SMALL)
    model.learn(25)
    assert model.actor_target is not None
    noises: dict[str, list[th.Tensor]] = {"actor": [], "actor_target": []}
    for name in noises:
        actor = getattr(model, name)

        def spy(obs: Any, noise: th.Tensor, name: str = name, sample: Any = actor.sample) -> Any:
            noises[name].append(noise)
            return sample(obs, noise)

        actor.sample = spy
    model.train(gradient_steps=2, batch_size=8)
    drawn = [*noises["actor"], *noises["actor_target"]]
    assert len(drawn) == 4 and all(noise.shape == model.actor.log_std.shape for noise in drawn)
    assert not any(th.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"log_std_bounding": "tanh", "separate_log_std_net": True}])
def test_export(deterministic: bool, kwargs: dict[str, Any]) -> None:
    """Plain tensor operations: ``torch.export`` (and so ONNX) takes the policy; SB3's it refuses since torch 2.9."""
    policy, obs = make_policy(**kwargs), observations()
    exported = th.export.export(policy, (obs,), {"deterministic": deterministic}).module()
    th.manual_seed(0)
    expected = policy(obs, deterministic=deterministic)
    th.manual_seed(0)
    th.testing.assert_close(exported(obs, deterministic=deterministic), expected)


@pytest.mark.parametrize("policy", ["MlpPolicy", MlpPolicy, SoftSACPolicy])
def test_ways_to_name_a_policy(policy: Any) -> None:
    assert isinstance(SoftSAC(policy, "Pendulum-v1", **SMALL).policy, SoftSACPolicy)


def test_sb3_policy_classes_are_replaced_or_refused() -> None:
    class Custom(sb3_policies.SACPolicy):
        pass

    assert type(SoftSAC(sb3_policies.CnnPolicy, FakeImageEnv(discrete=False), **SMALL).policy) is CnnPolicy
    for wrong in (Custom, BasePolicy):
        with pytest.raises(ValueError, match=r"derive your class from sb3_softsac.SoftSACPolicy"):
            SoftSAC(wrong, "Pendulum-v1", **SMALL)
