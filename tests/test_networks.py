"""Layers of the newer networks: statistics, unit norms, dropout, and where they have no meaning."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from twins import SMALL

from sb3_softsac import MlpPolicy, SoftSAC, networks
from sb3_softsac.networks import Architecture, BatchNorm, batch_statistics, make_layers
from sb3_softsac.policies import Actor, Critic

BATCH = Architecture(normalization="batch", normalize_input=True)


def test_batch_norm_is_torchs() -> None:
    ours, torchs = BatchNorm(3, momentum=0.01), nn.BatchNorm1d(3, momentum=0.01)
    for _ in range(3):
        x = 3.0 + 2.0 * th.randn(10, 3)
        with batch_statistics(nn.Sequential(ours)):
            th.testing.assert_close(ours(x), torchs.train()(x))
        th.testing.assert_close(ours(x), torchs.eval()(x))
        for name in ("running_mean", "running_var"):
            th.testing.assert_close(getattr(ours, name), getattr(torchs, name))
    assert ours.running_mean.abs().min() > 0.0


@pytest.mark.parametrize("mode", [True, False])
def test_batch_norm_does_not_listen_to_the_mode_of_modules(mode: bool) -> None:
    norm = BatchNorm(3).train(mode)
    before = networks.statistics(norm)[0].clone()
    x = 3.0 + th.randn(10, 3)
    assert th.equal(norm(x), norm(x[:1]).expand_as(x)) is False
    th.testing.assert_close(norm(x)[:1], norm(x[:1]))
    assert th.equal(networks.statistics(norm)[0], before)


def test_batch_statistics_end_with_their_context() -> None:
    network = make_layers(3, 1, [4, 4], nn.ReLU, BATCH)
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    with pytest.raises(KeyboardInterrupt), batch_statistics(network):
        assert len(norms) == 3 and all(norm.uses_batch_statistics for norm in norms)
        raise KeyboardInterrupt
    assert not any(norm.uses_batch_statistics for norm in norms)


def test_a_pass_without_gradient_leaves_statistics() -> None:
    network = make_layers(3, 1, [4], nn.ReLU, BATCH)
    before = [tensor.clone() for tensor in networks.statistics(network)]
    x = 2.0 + th.randn(10, 3)
    with th.no_grad(), batch_statistics(network):
        without_gradient = network(x)
    assert all(map(th.equal, before, networks.statistics(network)))
    with batch_statistics(network):
        assert th.equal(network(x), without_gradient)
    assert not any(map(th.equal, before, networks.statistics(network)))


def kinds(network: nn.Module) -> list[str]:
    leaves = [module for module in network.modules() if not list(module.children())]
    return [type(module).__name__ + "b" * (getattr(module, "bias", None) is not None) for module in leaves]


def test_layers() -> None:
    hidden = ["Linear", "BatchNormb", "ReLU"]
    assert kinds(make_layers(3, 2, [8, 4], nn.ReLU, BATCH)) == ["BatchNormb", *hidden, *hidden, "Linearb"]
    layer = Architecture(normalization="layer", dropout_rate=0.1)
    assert kinds(make_layers(3, -1, [8], nn.Tanh, layer)) == ["Linearb", "Dropout", "LayerNormb", "Tanh"]
    assert kinds(make_layers(3, 2, [8], nn.ReLU, Architecture())) == ["Linearb", "ReLU", "Linearb"]
    assert type(make_layers(3, 2, [8], nn.ReLU, Architecture())[0]) is nn.Linear
    residual = make_layers(3, 2, [8, 8], nn.ReLU, BATCH._replace(residual_expansion=4))
    assert kinds(residual) == ["BatchNormb", "Linear", *hidden * 4, "RMSNorm", "Linearb"]
    widths = [module.out_features for module in residual.modules() if isinstance(module, nn.Linear)]
    assert widths == [8, 32, 8, 32, 8, 2]


def test_residual_block_adds_to_its_input() -> None:
    plain = Architecture(residual_expansion=2)
    network = make_layers(3, -1, [4], nn.ReLU, plain)
    first, block, norm = network
    x = th.randn(5, 3)
    hidden = first(x)
    inner = th.relu(block.layers[2](th.relu(block.layers[0](hidden))))
    th.testing.assert_close(network(x), norm(hidden + inner))


@pytest.mark.parametrize("net_arch", [[], [8, 4]])
def test_residual_blocks_have_one_width(net_arch: list[int]) -> None:
    with pytest.raises(ValueError, match=r"net_arch=\[.*\] does not fit residual_expansion=2"):
        make_layers(3, 2, net_arch, nn.ReLU, Architecture(residual_expansion=2))


def make(policy: str = "MlpPolicy", env: Any = "Pendulum-v1", networks: Any = None, **kwargs: Any) -> SoftSAC:
    return SoftSAC(policy, env, policy_kwargs={"net_arch": [16, 16], **(networks or {})}, **{**SMALL, **kwargs})


def test_critics_see_both_halves_and_the_actor_moves_nothing_of_theirs() -> None:
    """Of a whole update: statistics of the joint batch in the critics, and none of the actor's loss."""
    model = make(networks=BATCH._asdict() | {"batch_norm_momentum": 1.0}, joint_batch="critic", policy_delay=2).learn(
        20
    )
    model.policy.optimizer_kwargs = {}
    expected: list[th.Tensor] = []
    original = model._runner

    def keep(_: Any, args: Any) -> None:
        expected.append(args[0].detach().clone())

    assert original is None
    norm = model.critic.q_networks[0][0]
    hook = norm.register_forward_pre_hook(keep)
    model.train(2, 8)  # the second with the actor's
    hook.remove()
    with_gradient = [x for x in expected if len(x) == 16]
    assert [len(x) for x in expected] == [16, 16, 8]
    th.testing.assert_close(norm.running_mean, with_gradient[-1].mean(dim=0))
    th.testing.assert_close(norm.running_var, with_gradient[-1].var(dim=0))


def test_targets_have_statistics_of_their_critics() -> None:
    model = make(networks=BATCH._asdict(), joint_batch="critic").learn(30)
    ours, targets = networks.statistics(model.critic), networks.statistics(model.critic_target)
    assert len(ours) == 12 and all(map(th.equal, ours, targets))


def test_statistics_stay_where_a_number_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(networks=BATCH._asdict(), joint_batch="all").learn(25)
    before = [t.clone() for network in (model.actor, model.critic) for t in networks.statistics(network)]
    assert model.replay_buffer is not None
    model.replay_buffer.observations[:] = np.nan
    with pytest.raises(ValueError, match="critic_loss is nan"):
        model.train(1, 8)
    after = [t for network in (model.actor, model.critic) for t in networks.statistics(network)]
    assert all(map(th.equal, before, after))


def test_prediction_is_a_function_of_the_observation() -> None:
    """Whatever else is in the batch, and as in training mode."""
    model = make(networks=BATCH._asdict() | {"dropout_rate": 0.3}, joint_batch="all").learn(30)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    together = model.predict(observations, deterministic=True)[0]
    one_by_one = [model.predict(observation, deterministic=True)[0] for observation in observations]
    np.testing.assert_allclose(together, one_by_one, atol=1e-6)
    model.policy.set_training_mode(True)
    np.testing.assert_allclose(together, model.predict(observations, deterministic=True)[0], atol=1e-6)
    model.policy.set_training_mode(False)
    obs, actions = th.as_tensor(observations), th.zeros(5, 1)
    assert th.equal(model.critic(obs, actions)[0], model.critic(obs, actions)[0])


def test_layer_norm_sees_the_size_of_observations() -> None:
    network = make_layers(3, 1, [16], nn.ReLU, Architecture(normalization="layer"))
    x = th.randn(5, 3)
    assert (network(x) - network(1000.0 * x)).abs().max() > 1e-3


@pytest.mark.parametrize("use_critic_target", [True, False])
@pytest.mark.parametrize("options", [{}, {"networks": BATCH._asdict(), "joint_batch": "critic"}])
def test_targets_are_used_or_not(use_critic_target: bool, options: dict[str, Any]) -> None:
    losses = []
    for value in (0.0, 100.0):
        model = make(use_critic_target=use_critic_target, **options).learn(25)
        with th.no_grad():
            for critic in model.critic_target.q_networks:
                critic[-1].bias.fill_(value)
        th.manual_seed(0)
        model.train(1, 8)
        losses.append(model.logger.name_to_value["train/critic_loss"])
    assert (losses[0] == losses[1]) != use_critic_target
    # They follow all the same, so that a run can be continued with them
    weights = [network.q_networks[0][-1].weight for network in (model.critic, model.critic_target)]
    th.testing.assert_close(*weights, atol=1e-2, rtol=0)


class OwnForward(Critic):
    def forward(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        return super().forward(obs, actions)


class OwnActor(Actor):
    def forward(self, obs: Any, deterministic: bool = False) -> th.Tensor:
        return super().forward(obs, deterministic)


class OwnPolicy(MlpPolicy):
    """With batch norm in the critics only."""

    def make_critic(self, features_extractor: Any = None) -> Critic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return OwnForward(**kwargs, architecture=BATCH, **self.support_kwargs)

    def make_actor(self, features_extractor: Any = None) -> Actor:
        return OwnActor(**self._update_features_extractor(self.actor_kwargs, features_extractor))


def test_batch_norm_in_a_critic_of_the_users() -> None:
    model = make(OwnPolicy, joint_batch="critic").learn(30)  # type: ignore[arg-type]
    assert not networks.batch_norms(model.actor)
    assert all(norm.running_mean.abs().max() > 0.0 for norm in networks.batch_norms(model.critic))
    with pytest.raises(ValueError, match=r"OwnForward.forward\(\) would be left out .* with n_atoms: override outputs"):
        make(OwnPolicy, networks={"n_atoms": 11})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_noise_repeat=4 has no effect on a policy that draws actions by"):
        make(OwnPolicy, max_noise_repeat=4)  # type: ignore[arg-type]


def test_options_that_are_set_later_are_checked() -> None:
    model = make()
    model.normalize_rewards = "bound"
    with pytest.raises(ValueError, match="normalize_rewards='bound' is not valid"):
        model.learn(10)


def test_dropout_in_updates_only() -> None:
    """DroQ: also in the targets, in the actor's loss; the actor has none."""
    model = make(networks={"dropout_rate": 0.5, "normalization": "layer"}).learn(25)
    dropouts = [m for m in model.critic_target.modules() if isinstance(m, nn.Dropout)]
    model.policy.eval()
    assert len(dropouts) == 4 and not any(m.training for m in dropouts)
    model.policy.set_training_mode(True)
    obs, actions = th.randn(5, 3), th.zeros(5, 1)
    for network in (model.critic, model.critic_target):
        assert not th.equal(network(obs, actions)[0], network(obs, actions)[0])
    assert not [m for m in model.actor.modules() if isinstance(m, nn.Dropout)]


def image() -> gym.Env:
    return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)


def multi_obs() -> gym.Env:
    return SimpleMultiObsEnv(discrete_actions=False)


ENVS = {"MlpPolicy": "Pendulum-v1", "CnnPolicy": image, "MultiInputPolicy": multi_obs}


@pytest.mark.parametrize("unit_norm", ["weights", "all"])
@pytest.mark.parametrize("policy", ENVS)
@pytest.mark.parametrize("options", [{}, {"use_sde": True}, {"share": True}])
def test_unit_norms_after_each_step(policy: str, unit_norm: str, options: dict[str, Any]) -> None:
    is_shared, env = "share" in options, ENVS[policy]
    kwargs = {"unit_norm": unit_norm, "residual_expansion": 2, "share_features_extractor": is_shared}
    rest = {name: value for name, value in options.items() if name != "share"}
    model = make(policy, env if isinstance(env, str) else env(), {**BATCH._asdict(), **kwargs}, **rest)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    targets = model.critic_target.q_networks
    for ours, theirs in zip(model.critic.q_networks, targets, strict=True):
        assert all(map(th.equal, ours.parameters(), theirs.parameters()))
    for _ in range(2):
        for network in (model.actor, model.critic, model.critic_target):
            trained = network.own_networks() if network is model.actor else network.q_networks
            modules = [module for part in trained for module in part.modules()]
            of_target = network is model.critic_target
            for module in modules:
                if isinstance(module, nn.Linear) and not of_target:
                    th.testing.assert_close(module.weight.norm(dim=1), th.ones(len(module.weight)))
                elif isinstance(module, BatchNorm | nn.RMSNorm) and unit_norm == "all" and not of_target:
                    pair = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
                    norm = th.cat(pair).norm().item()
                    assert norm == pytest.approx(len(module.weight) ** 0.5, rel=1e-5)
        model.learn(30)
    moved = [name for name, p in model.policy.named_parameters() if not th.equal(before[name], p)]
    assert len(moved) > 0.9 * len(before)


def test_frozen_weights_keep_their_norm() -> None:
    model = make(networks={"unit_norm": "weights"})
    frozen = model.critic.q_networks[0][0].weight
    with th.no_grad():
        frozen.mul_(3.0)
    frozen.requires_grad_(False)
    before = frozen.clone()
    model.learn(25)
    assert th.equal(frozen, before)


def test_features_extractors_keep_their_weights_as_they_are() -> None:
    plain, normed = (make("CnnPolicy", image(), {"unit_norm": each}) for each in (None, "weights"))
    for ours, theirs in zip(
        plain.actor.features_extractor.parameters(), normed.actor.features_extractor.parameters(), strict=True
    ):
        assert th.equal(ours, theirs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("normalization", "group"), ("normalize_input", 1), ("residual_expansion", 0), ("residual_expansion", 1.5),
        ("unit_norm", True), ("dropout_rate", 1.0), ("dropout_rate", -0.1), ("n_atoms", 1), ("n_atoms", 2.0),
        ("batch_norm_momentum", 2.0), ("batch_norm_eps", -1.0),
    ],
)  # fmt: skip
def test_bad_options_of_networks(option: str, value: Any) -> None:
    networks = {"normalization": "batch"} if option.startswith("batch_norm") else {}
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        make(networks={**networks, option: value})


@pytest.mark.parametrize(
    ("networks", "options", "message"),
    [
        ({}, {"joint_batch": "critic"}, "joint_batch='critic' has no effect on networks without batch norm"),
        ({"normalization": "layer"}, {"joint_batch": "all"}, "joint_batch='all' has no effect"),
        ({"normalization": "batch"}, {"batch_size": 1}, "batch_size=1 is too small for batch norm"),
        ({}, {"normalize_rewards": "bounded"}, "normalize_rewards='bounded' needs categorical critics"),
        ({}, {"max_noise_repeat": 2, "use_sde": True}, "max_noise_repeat=2 has no effect with use_sde=True"),
        ({}, {"max_noise_repeat": 0}, "max_noise_repeat=0 is not valid"),
        ({}, {"joint_batch": "both"}, "joint_batch='both' is not valid"),
        ({}, {"normalize_rewards": True}, "normalize_rewards=True is not valid"),
        ({}, {"use_critic_target": None}, "use_critic_target=None is not valid"),
        ({"v_max": 10.0}, {}, "v_max=10.0 have no effect without n_atoms"),
        ({"n_atoms": 11, "v_min": 5.0}, {}, "v_min=5.0 and v_max=5.0 are not valid"),
        ({"batch_norm_eps": 1e-5}, {}, "batch_norm_eps=1e-05 has no effect without batch normalisation"),
        ({"unit_norm": "all"}, {}, "unit_norm='all' is meant for networks with normalisation layers"),
    ],
)
def test_options_without_meaning(networks: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(networks=networks, **options)


def test_rewards_are_scaled_once() -> None:
    env = VecNormalize(SoftSAC("MlpPolicy", "Pendulum-v1", **SMALL).env)
    with pytest.raises(ValueError, match="normalize_rewards='std' and VecNormalize"):
        make(env=env, normalize_rewards="std")
    model = make(normalize_rewards="std")
    model.set_env(env)
    with pytest.raises(ValueError, match="normalize_rewards='std' and VecNormalize"):
        model.learn(10)
    env.norm_reward = False
    model.learn(10)


def test_policies_can_be_saved_by_themselves(tmp_path: Any) -> None:
    kwargs = {**BATCH._asdict(), "n_atoms": 11, "v_max": 7.0, "unit_norm": "all", "dropout_rate": 0.1}
    model = make(networks=kwargs, joint_batch="all").learn(25)
    model.policy.save(tmp_path / "policy.pth")
    loaded = type(model.policy).load(tmp_path / "policy.pth")
    assert loaded.architecture == model.policy.architecture and loaded.unit_norm == "all"
    obs, actions = th.randn(4, 3), th.zeros(4, 1)
    assert th.equal(loaded.critic.eval()(obs, actions)[0], model.critic.eval()(obs, actions)[0])
