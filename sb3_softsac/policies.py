"""Actor, critics and policies: SB3's networks and names, with the exact log-probability and SoftSAC's options.

SB3's ``Actor``, ``ContinuousCritic`` and ``SACPolicy`` build the networks, so parameter names are theirs and an SB3
``SAC`` zip loads. What is replaced is everything between the networks' outputs and the losses.
"""

import copy
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.sac import policies as sb3_policies
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sb3_softsac import distributions, networks
from sb3_softsac.heads import Outputs, make_head
from sb3_softsac.networks import PLAIN, Architecture
from sb3_softsac.type_aliases import PolicySample, TorchObs
from sb3_softsac.validation import check_architecture, check_image_sizes, check_starts

LOG_STD_BOUNDS = (-20.0, 2.0)  # SB3's clamp
BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
WEIGHT_INITS = (None, "xavier", "orthogonal")
# Of categorical critics (XQC, FlashSAC): of returns that SoftSAC(normalize_rewards=...) has scaled
SUPPORT = (-5.0, 5.0)


class Preprocessing:
    """
    Like SB3's ``preprocess_obs``, but decides once whether the space is an image, so that it can be compiled.

    :param space: of the observations
    :param normalize_images: divide images by 255
    """

    def __init__(self, space: spaces.Space[Any], normalize_images: bool):
        self.space = space
        self.parts = {key: Preprocessing(part, normalize_images) for key, part in getattr(space, "spaces", {}).items()}
        self.is_box = isinstance(space, spaces.Box)
        self.scale = 255.0 if self.is_box and normalize_images and is_image_space(space) else None

    def __call__(self, obs: TorchObs) -> Any:
        """
        :param obs: batch of observations
        :return: what the features extractor reads
        """
        if isinstance(obs, dict):
            return {key: self.parts[key](part) for key, part in obs.items()}
        if self.scale is not None:
            return obs.float() / self.scale
        return obs.float() if self.is_box else preprocess_obs(obs, self.space)


class Actor(sb3_policies.Actor):
    """
    Squashed-Gaussian actor. Arguments are those of SB3's ``Actor``, and:

    :param log_std_bounds: lower and upper bound of log_std (natural logarithm of the standard deviation before tanh)
    :param log_std_bounding: ``"clamp"`` (SB3; no gradient outside) or ``"tanh"`` (smooth rescaling, as in CleanRL);
        with tanh, a policy starts in the middle of the bounds, so use it with bounds such as (-5, 2)
    :param separate_log_std_net: give log_std its own trunk instead of sharing the mean's
    :param architecture: how the hidden layers are made
    :raises ValueError: for other values, or for options that gSDE (``use_sde``) does not use
    """

    def __init__(
        self,
        *args: Any,
        log_std_bounds: tuple[float, float] = LOG_STD_BOUNDS,
        log_std_bounding: str = "clamp",
        separate_log_std_net: bool = False,
        architecture: Architecture = PLAIN,
        **kwargs: Any,
    ):
        try:
            low, high = (float(bound) for bound in log_std_bounds)
        except (TypeError, ValueError):
            low, high = float("nan"), float("nan")
        if not float("-inf") < low < high < float("inf"):
            raise ValueError(
                f"log_std_bounds={log_std_bounds} must be finite numbers (low, high) with low < high, e.g. (-20, 2)."
            )
        if not isinstance(separate_log_std_net, bool):
            raise ValueError(f"separate_log_std_net={separate_log_std_net!r} must be True or False.")
        if log_std_bounding not in ("clamp", "tanh"):
            raise ValueError(f"log_std_bounding={log_std_bounding!r} is unknown: use 'clamp' or 'tanh'.")
        super().__init__(*args, **kwargs)
        defaults = ((low, high), log_std_bounding, separate_log_std_net) == (LOG_STD_BOUNDS, "clamp", False)
        if self.use_sde and not defaults:
            raise ValueError(
                "use_sde=True learns one log_std per latent feature and action dimension: log_std_bounds, "
                "log_std_bounding and separate_log_std_net have no effect on it. Leave them out, or set use_sde=False."
            )
        self.log_std_bounds = (low, high)
        self.log_std_bounding = log_std_bounding
        self.separate_log_std_net = separate_log_std_net
        self.preprocessing = Preprocessing(self.observation_space, self.normalize_images)
        self.architecture = architecture
        if architecture != PLAIN:
            self.latent_pi = self._make_trunk()
        if separate_log_std_net:
            self.latent_log_std = self._make_trunk()

    def _make_trunk(self) -> nn.Sequential:
        return networks.make_layers(self.features_dim, -1, self.net_arch, self.activation_fn, self.architecture)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "log_std_bounds": self.log_std_bounds,
            "log_std_bounding": self.log_std_bounding,
            "separate_log_std_net": self.separate_log_std_net,
            "architecture": self.architecture,
        }

    def own_networks(self) -> list[nn.Module]:
        """Networks after the features extractor."""
        names = ("latent_pi", "latent_log_std", "mu", "log_std")
        return [module for name, module in self.named_children() if name in names]

    def extract_features(self, obs: TorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """See SB3."""
        return features_extractor(self.preprocessing(obs))

    def __getstate__(self) -> dict[str, Any]:
        """For ``deepcopy``, which refuses tensors with a graph: gSDE's matrices, and what they were drawn from."""
        state = dict(vars(self))
        if self.use_sde:
            state["action_dist"] = dist = copy.copy(self.action_dist)
            kept = {name: value for name, value in vars(dist).items() if not isinstance(value, th.distributions.Normal)}
            vars(dist).clear()
            vars(dist).update({k: v.detach() if isinstance(v, th.Tensor) else v for k, v in kept.items()})
        return state

    def get_action_dist_params(self, obs: TorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        Parameters of the Gaussian before tanh.

        :param obs: batch of observations
        :return: mean (B, A); log_std (B, A), or the parameter (latent dim, A) with gSDE; and, with gSDE, the latent
            features (B, latent dim) that multiply the exploration matrix
        """
        features = self.extract_features(obs, self.features_extractor)
        latent_pi = self.latent_pi(features)
        mean_actions = self.mu(latent_pi)
        if self.use_sde:
            assert isinstance(self.log_std, nn.Parameter)
            return mean_actions, self.log_std, {"latent_sde": latent_pi}
        assert isinstance(self.log_std, nn.Module)
        log_std = self.log_std(self.latent_log_std(features) if self.separate_log_std_net else latent_pi)
        low, high = self.log_std_bounds
        if self.log_std_bounding == "tanh":
            log_std = low + 0.5 * (high - low) * (th.tanh(log_std) + 1.0)
        else:
            log_std = th.clamp(log_std, low, high)
        return mean_actions, log_std, {}

    def sample(self, obs: TorchObs, noise: th.Tensor | None = None, n_rows: int | None = None) -> PolicySample:
        """
        Draw reparametrised actions.

        :param obs: batch of observations
        :param noise: standard normal noise (B, A), or with gSDE (latent dim, A) for an exploration matrix; None: drawn
            here, or with gSDE the matrix of the last ``reset_noise()``
        :param n_rows: B, if there are more observations: the others only count in the statistics of batch norms
        :return: scaled actions, their log-density and log_std
        """
        mean_actions, log_std, extra = self.get_action_dist_params(obs)
        if n_rows is not None:
            mean_actions = mean_actions[:n_rows]
            log_std = log_std if self.use_sde else log_std[:n_rows]
            extra = {name: values[:n_rows] for name, values in extra.items()}
        if self.use_sde:
            gaussian_actions = mean_actions + self._sde_noise(extra["latent_sde"], noise)
            log_std = self._sde_log_std(log_std, extra["latent_sde"])
            log_prob = distributions.log_prob(gaussian_actions, mean_actions, log_std)
        else:
            noise = th.randn_like(mean_actions) if noise is None else noise
            gaussian_actions, log_prob = distributions.sample(mean_actions, log_std, noise)
        return PolicySample(distributions.squash(gaussian_actions), log_prob.unsqueeze(1), log_std)

    def forward(self, obs: TorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: batch of observations
        :param deterministic: ``tanh(mean)`` instead of a sample
        :return: scaled actions, (B, A)
        """
        mean_actions, log_std, extra = self.get_action_dist_params(obs)
        if deterministic:
            return distributions.squash(mean_actions)
        if self.use_sde:
            return distributions.squash(mean_actions + self._sde_noise(extra["latent_sde"]))
        return distributions.squash(mean_actions + th.exp(log_std) * th.randn_like(mean_actions))

    def action_log_prob(self, obs: TorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        SB3's name for ``sample``.

        :param obs: batch of observations
        :return: scaled actions (B, A) and their log-density (B,)
        """
        actions, log_prob, _ = self.sample(obs)
        return actions, log_prob.squeeze(1)

    def evaluate_actions(self, obs: TorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of given actions, such as demonstrations. The Gaussian sample behind a saturated action is unknown:
        see ``distributions.unsquash`` for the clamp. Where the sample is known, use ``sample``.

        :param obs: batch of observations
        :param actions: scaled actions in [-1, 1], as a replay buffer holds them, (B, A)
        :return: (B,)
        """
        mean_actions, log_std, extra = self.get_action_dist_params(obs)
        if self.use_sde:
            log_std = self._sde_log_std(log_std, extra["latent_sde"])
        return distributions.log_prob(distributions.unsquash(actions), mean_actions, log_std)

    def _sde_noise(self, latent_sde: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """Features times the exploration matrix made from the noise, or else that of the last ``reset_noise()``."""
        assert isinstance(self.action_dist, StateDependentNoiseDistribution)
        if noise is None:
            return self.action_dist.get_noise(latent_sde)
        assert isinstance(self.log_std, nn.Parameter)
        features = latent_sde if self.action_dist.learn_features else latent_sde.detach()
        return th.mm(features, noise * self.action_dist.get_std(self.log_std))

    def _sde_log_std(self, log_std: th.Tensor, latent_sde: th.Tensor) -> th.Tensor:
        """Standard deviation that the exploration matrix gives each action (gSDE, https://arxiv.org/abs/2005.05719)."""
        assert isinstance(self.action_dist, StateDependentNoiseDistribution)
        std = self.action_dist.get_std(log_std)
        variance = th.mm(latent_sde.square(), std.square())
        return 0.5 * th.log(variance + self.action_dist.epsilon)


class Critic(ContinuousCritic):
    """
    SB3's critics, but compilable for images, too. Arguments are those of SB3's ``ContinuousCritic``, and:

    :param architecture: how the hidden layers are made
    :param n_atoms: number of atoms of the distributions of values; None: critics give values
    :param v_min: first atom
    :param v_max: last atom
    :raises ValueError: for other values
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        *,
        architecture: Architecture = PLAIN,
        n_atoms: int | None = None,
        v_min: float = SUPPORT[0],
        v_max: float = SUPPORT[1],
    ):
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            normalize_images,
            n_critics,
            share_features_extractor,
        )
        self.preprocessing = Preprocessing(self.observation_space, self.normalize_images)
        self.head = make_head(n_atoms, v_min, v_max)
        if architecture != PLAIN or n_atoms is not None:
            n_inputs = features_dim + get_action_dim(action_space)
            for idx in range(n_critics):
                layers = networks.make_layers(n_inputs, self.head.n_outputs, net_arch, activation_fn, architecture)
                self.add_module(f"qf{idx}", layers)
                self.q_networks[idx] = layers

    def outputs(self, obs: TorchObs, actions: th.Tensor) -> Outputs:
        """
        :param obs: batch of observations
        :param actions: scaled actions, (B, A)
        :return: what ``head`` reads: values N times (B, 1), or logits N times (B, atoms)
        """
        return super().forward(obs, actions)  # type: ignore[arg-type]  # SB3 annotates arrays only

    def forward(self, obs: TorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param obs: batch of observations
        :param actions: scaled actions, (B, A)
        :return: values, N times (B, 1)
        """
        return self.head.values(self.outputs(obs, actions))

    def q1_forward(self, obs: TorchObs, actions: th.Tensor) -> th.Tensor:
        """Values of the first critic, (B, 1)."""
        return self.head.values((super().q1_forward(obs, actions),))[0]  # type: ignore[arg-type]

    def extract_features(self, obs: TorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """See SB3."""
        return features_extractor(self.preprocessing(obs))


class SoftSACPolicy(sb3_policies.SACPolicy):
    """
    Policy (actor, critics, target critics) of SoftSAC. Arguments are those of SB3's ``SACPolicy``, and:

    :param log_std_bounds: see ``Actor``
    :param log_std_bounding: see ``Actor``
    :param separate_log_std_net: see ``Actor``
    :param weight_init: None (PyTorch's default), ``"xavier"`` (uniform, zero biases) or ``"orthogonal"`` (gain sqrt(2)
        as in jaxrl, zero biases), for all linear and convolutional layers
    :param features_extractor_class: None: ``FlattenExtractor``, ``NatureCNN`` or ``CombinedExtractor``, by policy
    :param use_actor_target: also hold a Polyak-averaged copy of the actor; set by ``SoftSAC(use_actor_target=True)``
    :param normalization: of all hidden layers, before the activation: None, ``"batch"`` or ``"layer"``
    :param normalize_input: batch-normalise the networks' inputs (features and, for critics, actions), instead of
        normalising observations
    :param residual_expansion: None: plain hidden layers; else each number in ``net_arch`` is the width of a residual
        block (the same for all blocks of a network), which is this many times as wide inside (FlashSAC: 4)
    :param unit_norm: scale weights to norm 1 after each step: None, ``"weights"`` (of each output of a linear layer) or
        ``"all"`` (the scales and biases of normalisation layers, too). Features extractors are left alone
    :param dropout_rate: of the critics' hidden layers (DroQ)
    :param n_atoms: None: critics give values; else distributions over this many values (atoms), learned by
        cross-entropy (C51)
    :param v_min: first atom
    :param v_max: last atom. Larger returns cannot be represented (``train/clipped_target_mass``): see
        ``SoftSAC(normalize_rewards=...)``
    :param batch_norm_momentum: weight of a batch in running statistics (sb3-contrib's name)
    :param batch_norm_eps: added to variances (sb3-contrib's name)
    :raises ValueError: for other values
    """

    default_features_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor
    action_space: spaces.Box
    actor: Actor
    actor_target: Actor | None
    critic: Critic
    critic_target: Critic

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        log_std_init: float = -3,
        use_expln: bool = False,
        clip_mean: float = 2.0,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        *,
        log_std_bounds: tuple[float, float] = LOG_STD_BOUNDS,
        log_std_bounding: str = "clamp",
        separate_log_std_net: bool = False,
        weight_init: str | None = None,
        use_actor_target: bool = False,
        normalization: str | None = None,
        normalize_input: bool = False,
        residual_expansion: int | None = None,
        unit_norm: str | None = None,
        dropout_rate: float = 0.0,
        n_atoms: int | None = None,
        v_min: float = SUPPORT[0],
        v_max: float = SUPPORT[1],
        batch_norm_momentum: float = PLAIN.batch_norm_momentum,
        batch_norm_eps: float = PLAIN.batch_norm_eps,
    ):
        if weight_init not in WEIGHT_INITS:
            raise ValueError(f"weight_init={weight_init!r} is unknown: use one of {WEIGHT_INITS}.")
        if not isinstance(n_critics, int | np.integer) or n_critics < 1:
            raise ValueError(f"n_critics={n_critics!r} is not valid: it must be an integer >= 1.")
        for name, value in (("activation_fn", activation_fn), ("optimizer_class", optimizer_class)):
            if not callable(value):
                example = "torch.nn.ReLU" if name == "activation_fn" else "torch.optim.Adam"
                raise ValueError(f"{name}={value!r} is not valid: it must be a class, such as {example}.")
        extractor = features_extractor_class or self.default_features_extractor
        if extractor is CombinedExtractor and not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                f"MultiInputPolicy is for Dict observations, not {observation_space}: use 'MlpPolicy', or 'CnnPolicy' "
                "for images."
            )
        check_starts(observation_space)
        check_image_sizes(observation_space, extractor, normalize_images)
        # SACPolicy.__init__ builds the networks, so what they are built from is set before it
        self.log_std_kwargs: dict[str, Any] = {
            "log_std_bounds": log_std_bounds,
            "log_std_bounding": log_std_bounding,
            "separate_log_std_net": separate_log_std_net,
        }
        self.weight_init = weight_init
        self.use_actor_target = use_actor_target
        self.architecture = Architecture(
            normalization, normalize_input, residual_expansion, dropout_rate, batch_norm_momentum, batch_norm_eps
        )
        check_architecture(self.architecture)
        self.unit_norm = _checked_unit_norm(unit_norm, self.architecture)
        if n_atoms is None and (v_min, v_max) != SUPPORT:
            raise ValueError(f"v_min={v_min} and v_max={v_max} have no effect without n_atoms: set it, e.g. to 101.")
        self.support_kwargs: dict[str, Any] = {"n_atoms": n_atoms, "v_min": v_min, "v_max": v_max}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            use_sde,
            log_std_init,
            use_expln,
            clip_mean,
            extractor,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
            share_features_extractor,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.weight_init is not None:
            init_weights(self.actor, self.weight_init)
            init_weights(self.critic, self.weight_init)
        self.project_to_unit_norm(self.actor)
        self.project_to_unit_norm(self.critic)
        if self.weight_init is not None or self.unit_norm is not None:
            self.critic_target.load_state_dict(self.critic.state_dict())
        self.actor_target = None
        if self.use_actor_target:
            self.make_actor_target()

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """As in SB3, but rounding takes no action beyond its upper bound (the lower one is exact)."""
        return np.minimum(super().unscale_action(scaled_action), self.action_space.high)

    def project_to_unit_norm(self, network: Actor | Critic, finite: th.Tensor | None = None) -> None:
        """
        See ``networks.project_to_unit_norm``.

        :param network: actor or critic; its features extractor is left as it is
        :param finite: boolean scalar; if it is false, nothing is done
        """
        if self.unit_norm is not None:
            own = network.own_networks() if isinstance(network, Actor) else network.q_networks
            networks.project_to_unit_norm(own, self.unit_norm, finite)

    def make_actor_target(self) -> None:
        """Add the Polyak-averaged copy of the actor. It lives in the policy, as SB3's target critics do."""
        self.actor_target = self.make_actor()
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.actor_target.set_training_mode(False)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        architecture = self.architecture._replace(dropout_rate=0.0)
        return Actor(**actor_kwargs, **self.log_std_kwargs, architecture=architecture).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return Critic(**critic_kwargs, architecture=self.architecture, **self.support_kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return (
            super()._get_constructor_parameters()
            | self.log_std_kwargs
            | self.architecture._asdict()
            | self.support_kwargs
            | {
                "unit_norm": self.unit_norm,
                "share_features_extractor": self.share_features_extractor,  # SB3 forgets it
                "weight_init": self.weight_init,
                "use_actor_target": self.actor_target is not None,
            }
        )

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As in torch, but the target actor may be new (it then starts from the actor) or no longer wanted."""
        prefix = "actor_target."
        has_target = any(name.startswith(prefix) for name in state_dict)
        if has_target and self.actor_target is None:
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(prefix)}
        elif not has_target and self.actor_target is not None:
            actor = {name: value for name, value in state_dict.items() if name.startswith("actor.")}
            state_dict = {**state_dict, **{prefix + name.removeprefix("actor."): actor[name] for name in actor}}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def set_training_mode(self, mode: bool) -> None:
        """As in SB3, but faster than its 0.1 ms: this is done three times in each training step."""
        own: tuple[BaseModel, ...] = self.actor, self.critic
        for network in own:
            if type(network).set_training_mode is BaseModel.set_training_mode:
                _set_training_mode(network, mode)
            else:
                network.set_training_mode(mode)
        if self.architecture.dropout_rate > 0.0:
            for module in self.critic_target.modules():
                if isinstance(module, nn.Dropout):
                    module.training = mode  # DroQ: targets drop out, too
        self.training = mode

    def targets(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a network and its Polyak-averaged copy."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.critic, self.critic_target)]
        if self.actor_target is not None:
            pairs.append((self.actor, self.actor_target))
        return pairs

    def evaluate_actions(self, obs: TorchObs, actions: th.Tensor) -> th.Tensor:
        """See ``Actor.evaluate_actions``."""
        return self.actor.evaluate_actions(obs, actions)


def _checked_unit_norm(unit_norm: str | None, architecture: Architecture) -> str | None:
    if unit_norm not in networks.UNIT_NORMS:
        raise ValueError(f"unit_norm={unit_norm!r} is unknown: use one of {networks.UNIT_NORMS}.")
    has_norms = architecture.has_batch_norm or architecture.normalization or architecture.residual_expansion
    if unit_norm == "all" and not has_norms:
        raise ValueError(
            "unit_norm='all' is meant for networks with normalisation layers: use 'weights', or set normalization."
        )
    return unit_norm


def _set_training_mode(module: nn.Module, mode: bool) -> None:
    """``module.train(mode)`` without torch's check of each assignment."""
    children = vars(module).get("_modules")  # torch's own name, which may move
    is_usual = type(module).train is nn.Module.train and "train" not in vars(module)
    if not is_usual or children is None or isinstance(module, th.jit.ScriptModule):
        module.train(mode)
        return
    vars(module)["training"] = mode
    for child in children.values():
        if child is not None:
            _set_training_mode(child, mode)


MlpPolicy = SoftSACPolicy


class CnnPolicy(SoftSACPolicy):
    """``SoftSACPolicy`` for images."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(SoftSACPolicy):
    """``SoftSACPolicy`` for Dict observations."""

    default_features_extractor = CombinedExtractor


COUNTERPARTS: dict[type[BasePolicy], type[SoftSACPolicy]] = {
    sb3_policies.SACPolicy: SoftSACPolicy,
    sb3_policies.CnnPolicy: CnnPolicy,
    sb3_policies.MultiInputPolicy: MultiInputPolicy,
}
"""SB3's policy classes, as an SB3 zip names them, and ours."""


def init_weights(network: nn.Module, weight_init: str) -> None:
    """
    Initialise all linear and convolutional layers in place, biases to zero. Those of a features extractor, too, but for
    layers that are frozen (``requires_grad=False``), as pretrained ones often are.

    :param network: actor or critic
    :param weight_init: ``"xavier"`` (uniform) or ``"orthogonal"`` (gain sqrt(2))
    """
    for layer in network.modules():
        if not isinstance(layer, nn.Linear | _ConvNd) or not layer.weight.requires_grad:
            continue
        if weight_init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.orthogonal_(layer.weight, gain=2**0.5)
        if layer.bias is not None and layer.bias.requires_grad:
            nn.init.zeros_(layer.bias)


def running_statistics(network: nn.Module) -> list[th.Tensor]:
    """
    :param network: actor or critic
    :return: the buffers of its batch norms, including their counters, which targets copy instead of averaging (SB3
        issue 996); of other modules, as in SB3, those called ``running_...``
    """
    return [
        buffer
        for prefix, module in network.named_modules()
        for name, buffer in module.named_buffers(prefix, recurse=False)
        if "running_" in name or _is_batch_norm(module)
    ]


def _is_batch_norm(module: nn.Module) -> bool:
    # sb3-contrib's BatchRenorm, wherever it is: importing it would import all of sb3-contrib's algorithms
    return isinstance(module, BATCH_NORMS) or any(cls.__name__ == "BatchRenorm" for cls in type(module).__mro__)
