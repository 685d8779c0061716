"""Checks of what a user passes to ``SoftSAC``: errors that name the argument, its value and the fix."""

import functools
import math
import warnings
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecTransposeImage, unwrap_vec_normalize

from sb3_softsac import networks, offline, schedules
from sb3_softsac.buffers import map_obs
from sb3_softsac.heads import CategoricalHead, ScalarHead, head_of

MIN_IMAGE_SIZE = 36  # of NatureCNN's three layers: ((36 - 8) / 4 + 1 - 4) / 2 + 1 = 3, the last one's kernel

MEANINGLESS_BOUND = 100.0
"""Isaac Lab's placeholder bounds, for actions of magnitude about 1. Some torques, in N m, are really as large."""


def check_env(env: Any) -> None:
    """
    :param env: what the user passes as one
    :raises ValueError: if it is not an environment of Gymnasium or SB3, nor an id
    """
    if isinstance(env, str | gym.Env | VecEnv):
        return
    fix = "pass an environment, its id, or a VecEnv of SB3"
    if isinstance(env, gym.vector.VectorEnv):
        fix = (
            "SB3 has vectorised environments of its own: stable_baselines3.common.env_util.make_vec_env(id, n_envs=...)"
        )
    elif callable(env):
        fix = "call it, and pass the environment that it makes"
    elif isinstance(env, list | tuple):
        fix = "pass a VecEnv of SB3: DummyVecEnv([functions that make an environment])"
    raise ValueError(f"env={env!r} is not an environment: {fix}.")


def check_observation_space(space: spaces.Space[Any]) -> None:
    """
    :param space: of the environment
    :raises ValueError: if SB3 cannot store or encode its observations
    """
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    for part in parts:
        is_known = isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete)
        if not is_known or (isinstance(part, spaces.MultiDiscrete) and len(part.shape) > 1):
            raise ValueError(
                f"Observations of {part} are not supported: use Box, Discrete, MultiBinary, a vector MultiDiscrete, or "
                "a Dict of these, for instance with gymnasium.wrappers.FlattenObservation(env)."
            )
        if isinstance(part, spaces.Box) and (not part.shape or 0 in part.shape):
            raise ValueError(
                f"Observations of {part} are not arrays with elements: give them one, for instance with "
                "gymnasium.wrappers.ReshapeObservation(env, (1,))."
            )
    if not parts:
        raise ValueError("The observation space is a Dict without entries: give the environment observations.")


def check_action_space(action_space: spaces.Space[Any]) -> None:
    """
    :param action_space: of the environment
    :raises ValueError: unless it is a ``Box`` whose bounds are finite and apart, and their difference is one of its
        dtype; the message has the fix
    """
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"SoftSAC needs a Box action space, the environment has {action_space}: use an algorithm for discrete "
            "actions (DQN, PPO), or give the environment continuous actions."
        )
    low, high = action_space.low.ravel(), action_space.high.ravel()
    if not low.size:
        raise ValueError(f"The action space {action_space} has no dimension: there is nothing to learn.")
    with np.errstate(over="ignore", invalid="ignore"):
        width = high - low
    wraps = (low < high) & (width <= 0)  # of integers. SB3 would compute wrong actions with it
    if wraps.any():
        i = int(np.flatnonzero(wraps)[0])
        raise ValueError(
            f"Action dimension {i} has the bounds [{low[i]}, {high[i]}], too far apart for {low.dtype}: "
            "give the environment a Box of float32, for instance with gymnasium.wrappers.TransformAction(env, lambda "
            f"action: action.round().astype('{low.dtype}'), Box(low, high, dtype='float32'))."
        )
    if (low == high).any():
        i = int(np.flatnonzero(low == high)[0])
        raise ValueError(
            f"Action dimension {i} can only be {low[i]}: there is nothing to learn. Leave it out, for instance with "
            "gymnasium.wrappers.TransformAction(env, lambda action: numpy.insert(action, "
            f"{i}, {low[i]}), Box(low, high)), where low and high have no dimension {i}."
        )
    bad = ~(np.isfinite(width) & (low < high))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"Action dimension {i} has the bounds [{low[i]}, {high[i]}]; both must be finite, low below high. Wrap the "
            "environment, for instance in gymnasium.wrappers.TransformAction with a bounded Box, or use "
            "gymnasium.wrappers.RescaleAction(env, -1, 1) once the bounds are finite."
        )
    if (low <= -MEANINGLESS_BOUND).all() and (high >= MEANINGLESS_BOUND).all():
        warnings.warn(
            f"All actions have bounds of {low.max():g} and {high.min():g} or wider. SoftSAC explores the whole range "
            "from the first step, and learns next to nothing if useful actions are a small part of it. If the bounds "
            "are meaningful, as for torques, all is well. If they stand for 'no bounds', as Isaac Lab's +-100 did, "
            "narrow them: SB3 users first took 3% of them, and later the 2.5th and 97.5th percentiles of a trained PPO "
            "agent's actions (https://araffin.github.io/post/tune-sac-isaac-sim/).",
            UserWarning,
            stacklevel=3,
        )


def check_wrappers(env: VecEnv) -> None:
    """
    :param env: with all its wrappers
    :raises ValueError: if a wrapper around VecNormalize changes what it has normalised: the replay buffer holds
        observations as they were before VecNormalize, and normalises them when they are sampled (SB3 issue 693)
    """
    normalize = unwrap_vec_normalize(env)
    while normalize is not None and env is not normalize:
        assert isinstance(env, VecEnvWrapper)
        is_other = env.observation_space != env.venv.observation_space
        if is_other and not isinstance(env, VecTransposeImage):
            name = type(env).__name__
            raise ValueError(
                f"{name} is wrapped around VecNormalize and changes its observations, so the replay buffer could not "
                f"normalise them: swap the two, VecNormalize({name}(env, ...))."
            )
        env = env.venv


def check_outer_wrappers(env: VecEnv, **values: tuple[Any, Any]) -> None:
    """
    :param env: with all its wrappers
    :param values: observations or rewards by name: those of ``env``, and those of the VecNormalize in it
    :raises ValueError: if a wrapper around VecNormalize changes them: the replay buffer does not see that
    """
    for name, (outer, inner) in values.items():
        same: list[bool] = []
        map_obs(lambda a, b, same=same: same.append(np.array_equal(a, b, equal_nan=True)), outer, inner)
        if not all(same):
            wrapper = type(env).__name__
            raise ValueError(
                f"{wrapper}, or a wrapper within, is wrapped around VecNormalize and changes its {name}, which has no "
                f"effect on what is learned: swap the two, VecNormalize({wrapper}(env, ...))."
            )


def check_starts(space: spaces.Space[Any]) -> None:
    """
    :param space: observation space
    :raises ValueError: if discrete values do not start at 0; torch would complain about a value, in mid-run
    """
    for name, part in _parts(space):
        if isinstance(part, spaces.Discrete | spaces.MultiDiscrete) and np.any(part.start != 0):
            raise ValueError(
                f"{name}={part} does not start at 0, but SB3 encodes its values from 0 on. Shift them, for instance "
                "with gymnasium.wrappers.TransformObservation(env, lambda obs: obs - start, Discrete(n))."
            )


def _parts(space: spaces.Space[Any]) -> list[tuple[str, spaces.Space[Any]]]:
    """With their names."""
    if isinstance(space, spaces.Dict):
        return [(f"observation_space[{key!r}]", part) for key, part in space.spaces.items()]
    return [("observation_space", space)]


def check_image_sizes(space: spaces.Space[Any], extractor: type[BaseFeaturesExtractor], normalize_images: bool) -> None:
    """
    :param space: observation space, images with channels first
    :param extractor: class of the features extractor
    :param normalize_images: as in the policy
    :raises ValueError: if an image is too small for SB3's ``NatureCNN``; torch would complain about a kernel's size
    """
    if extractor not in (NatureCNN, CombinedExtractor):
        return
    for name, part in _parts(space):
        if not is_image_space(part, normalized_image=not normalize_images):
            continue
        height, width = part.shape[1:]  # type: ignore[index]
        if min(height, width) < MIN_IMAGE_SIZE:
            least = f"{MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE}"
            raise ValueError(
                f"{name} is an image of {height} x {width} pixels, but NatureCNN needs at least {least}. Enlarge it, "
                "for instance with gymnasium.wrappers.ResizeObservation(env, (84, 84)), or pass your own network: "
                "policy_kwargs=dict(features_extractor_class=...)."
            )


def _require(owner: Any, condition: bool, name: str, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={getattr(owner, name)!r} is not valid: it must be {allowed}.")


def is_number(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high


def is_int(value: Any, low: int) -> bool:
    return isinstance(value, int | np.integer) and is_number(value, low)


def check_architecture(architecture: networks.Architecture) -> None:
    """
    :param architecture: how the layers of a network are made
    :raises ValueError: naming an option that is not valid
    """
    require = functools.partial(_require, architecture)
    normalization, normalize_input, expansion, dropout_rate, momentum, eps = architecture
    require(normalization in networks.NORMALIZATIONS, "normalization", f"one of {networks.NORMALIZATIONS}")
    require(isinstance(normalize_input, bool), "normalize_input", "True or False")
    require(expansion is None or is_int(expansion, 1), "residual_expansion", "an integer >= 1, or None")
    require(is_number(dropout_rate, 0.0) and dropout_rate < 1.0, "dropout_rate", "a number in [0, 1)")
    require(is_number(momentum, 0.0, 1.0), "batch_norm_momentum", "a number in [0, 1]")
    require(is_number(eps, 0.0) and 0.0 < eps < math.inf, "batch_norm_eps", "a number > 0")
    for name in ("batch_norm_momentum", "batch_norm_eps"):
        value = getattr(architecture, name)
        if not architecture.has_batch_norm and value != getattr(networks.PLAIN, name):
            raise ValueError(
                f"{name}={value!r} has no effect without batch normalisation: set normalization='batch' or "
                "normalize_input=True, or leave it out."
            )


def check_options(model: Any) -> None:
    """
    :param model: ``SoftSAC`` with all options set
    :raises ValueError: naming the option, its value and what is allowed
    """
    require = functools.partial(_require, model)
    if "use_actor_target" in (model.policy_kwargs or {}):
        value = model.policy_kwargs["use_actor_target"]
        raise ValueError(f"use_actor_target={value} is not for policy_kwargs: pass it to SoftSAC itself.")
    for name in ("buffer_size", "batch_size", "n_steps", "target_update_interval", "policy_delay"):
        require(is_int(getattr(model, name), 1), name, "an integer >= 1")
    parts = model.train_freq if isinstance(model.train_freq, tuple | list) else (model.train_freq, "step")
    valid = len(parts) == 2 and is_int(parts[0], 1) and parts[1] in ("step", "episode", *TrainFrequencyUnit)
    require(valid, "train_freq", "an integer >= 1, or (an integer >= 1, 'step' or 'episode')")
    require(is_int(model.gradient_steps, -1), "gradient_steps", "an integer >= 0, or -1: one for each step collected")
    require(is_number(model.learning_starts, 0), "learning_starts", "a number >= 0")
    require(model.random_steps is None or is_number(model.random_steps, 0), "random_steps", "a number >= 0, or None")
    for name in ("tau", "gamma"):
        require(is_number(getattr(model, name), 0.0, 1.0), name, "a number in [0, 1]")
    for name in ("learning_rate", "qf_learning_rate", "ent_coef_learning_rate"):
        rate = getattr(model, name)
        optional = name != "learning_rate" and rate is None
        number = is_number(rate, 0.0) and float(rate) < float("inf")
        allowed = f"a number >= 0, a function of the remaining progress, or {schedules.SYNTAX}"
        require(optional or number or callable(rate) or schedules.is_valid(rate), name, allowed)
    for name in ("policy_delay_compensation", "use_actor_target", "use_critic_target"):
        require(isinstance(getattr(model, name), bool), name, "True or False")
    for name in ("compile", "buffer_on_device"):
        value = getattr(model, name)
        require(isinstance(value, bool) or value == "auto", name, "True, False or 'auto'")
    precisions = (None, "highest", "high", "medium")
    require(model.matmul_precision in precisions, "matmul_precision", "'highest', 'high', 'medium' or None")
    require(model.num_threads == "auto" or is_int(model.num_threads, 1), "num_threads", "an integer >= 1, or 'auto'")
    require(model.ent_coef_loss in ("log", "exp"), "ent_coef_loss", "'log' or 'exp'")
    require(model.entropy_space in ("normalized", "env"), "entropy_space", "'normalized' or 'env'")
    max_grad_norm = model.max_grad_norm
    require(
        max_grad_norm is None or (is_number(max_grad_norm, 0.0) and max_grad_norm > 0.0),
        "max_grad_norm",
        "a number > 0, or None",
    )
    require(model.joint_batch in (None, "critic", "all"), "joint_batch", "'critic', 'all' or None")
    require(model.normalize_rewards in (None, "std", "bounded"), "normalize_rewards", "'std', 'bounded' or None")
    require(is_int(model.max_noise_repeat, 1), "max_noise_repeat", "an integer >= 1")
    require(isinstance(model.use_sde, bool), "use_sde", "True or False")
    require(is_int(model.sde_sample_freq, -1), "sde_sample_freq", "an integer >= -1")
    is_noise = model.action_noise is None or isinstance(model.action_noise, ActionNoise)
    require(is_noise, "action_noise", "an ActionNoise, such as NormalActionNoise(mean, sigma), or None")
    require(is_number(model.offline_fraction, 0.0, 1.0), "offline_fraction", "a number in [0, 1]")
    parse_target_entropy(model.target_entropy, 1)
    check_combinations(model)


def check_combinations(model: Any) -> None:
    """
    :param model: ``SoftSAC`` with all options set, each of them valid
    :raises ValueError: for options that make no sense beside others
    """
    if model.max_noise_repeat > 1 and model.use_sde:
        raise ValueError(
            f"max_noise_repeat={model.max_noise_repeat} has no effect with use_sde=True, whose noise changes every "
            "sde_sample_freq steps: leave one of them out."
        )
    for name, default in (("ent_coef_learning_rate", None), ("ent_coef_loss", "log")):
        value = getattr(model, name)
        if not str(model.ent_coef).startswith("auto") and value != default:
            raise ValueError(
                f"{name}={value!r} has no effect on the fixed ent_coef={model.ent_coef}: use "
                f"ent_coef='auto_{model.ent_coef}' to learn it, or leave {name} out."
            )
    unit = model.train_freq[1] if isinstance(model.train_freq, tuple | list) else "step"
    if unit in ("episode", TrainFrequencyUnit.EPISODE) and model.n_envs > 1:
        raise ValueError(
            f"train_freq={tuple(model.train_freq)} counts episodes, but there are {model.n_envs} environments: count "
            "steps, or use one environment."
        )
    fraction = model.offline_fraction
    if model.offline_data is None and model._offline_source is None and fraction not in (0.0, offline.DEFAULT_FRACTION):
        raise ValueError(f"offline_fraction={fraction} has no effect without offline_data: pass both, or neither.")
    if model.offline_data is not None and 0.0 < fraction < 1.0:
        n_offline = round(fraction * model.batch_size)
        if n_offline in (0, model.batch_size):
            raise ValueError(
                f"offline_fraction={fraction} of batch_size={model.batch_size} is {n_offline} transitions, rounded: "
                "choose a fraction that leaves some of each kind, or a larger batch_size."
            )


def parse_target_entropy(target_entropy: Any, n_actions: int) -> float:
    """
    :param target_entropy: number, ``"auto"``, ``"auto_<fraction>"`` or ``"std_<standard deviation>"``
    :param n_actions: A
    :return: entropy in nats
    :raises ValueError: if it is none of these
    """
    kind, _, number = str(target_entropy).partition("_")
    try:
        value = float(number or 1.0) if kind in ("auto", "std") else float(target_entropy)
    except (TypeError, ValueError):
        value = float("nan")
    is_named = kind in ("auto", "std")
    if not np.isfinite(value) or (kind == "std" and (not number or value <= 0.0)) or (is_named and value < 0.0):
        raise ValueError(
            f"target_entropy={target_entropy!r} is not valid: it must be a number, 'auto' (minus the action "
            "dimension), 'auto_0.5' (half of that) or 'std_0.15' (of Gaussians with this standard deviation)."
        )
    if kind == "auto":
        return -value * n_actions
    return n_actions * 0.5 * math.log(2.0 * math.pi * math.e * value**2) if kind == "std" else value


def check_networks(model: Any) -> None:
    """
    :param model: ``SoftSAC`` with its networks
    :raises ValueError: for options that make no sense with these networks or this environment
    """
    from sb3_softsac.policies import Critic  # which imports this module

    if model.use_sde != model.actor.use_sde:
        raise ValueError(
            f"use_sde={model.use_sde} has no effect on this actor, which was made with use_sde={model.actor.use_sde}: "
            "make a new model."
        )
    has_batch_norm = bool(networks.batch_norms(model.policy))
    head = head_of(model.critic)
    if model.joint_batch is not None and not has_batch_norm:
        raise ValueError(
            f"joint_batch={model.joint_batch!r} has no effect on networks without batch norm: leave it out, or set "
            "policy_kwargs=dict(normalization='batch') or dict(normalize_input=True)."
        )
    if has_batch_norm and model.batch_size < 2:
        raise ValueError(f"batch_size={model.batch_size} is too small for batch norm, which needs at least 2.")
    if model.normalize_rewards == "bounded" and isinstance(head, ScalarHead):
        raise ValueError(
            "normalize_rewards='bounded' needs categorical critics, whose support it fits returns to: set "
            "policy_kwargs=dict(n_atoms=101), or use 'std'."
        )
    if model.normalize_rewards == "bounded" and isinstance(head, CategoricalHead) and head.bound <= 0.0:
        raise ValueError(
            f"normalize_rewards='bounded' needs a support around 0, not v_min={head.v_min}, v_max={head.v_max}: change "
            "these, or use 'std'."
        )
    if not isinstance(head, ScalarHead) and type(model.critic).forward is not Critic.forward:
        raise ValueError(
            f"{type(model.critic).__name__}.forward() would be left out of the loss of critics with n_atoms: override "
            "outputs() instead, which returns their logits."
        )
    _check_actor(model)
    if model.normalize_rewards is not None and getattr(model._vec_normalize_env, "norm_reward", False):
        raise ValueError(
            f"normalize_rewards={model.normalize_rewards!r} and VecNormalize(norm_reward=True) would both scale the "
            "rewards: leave one of them out."
        )


def _check_actor(model: Any) -> None:
    from sb3_softsac.policies import Actor  # which imports this module

    actor = type(model.actor)
    if not issubclass(actor, Actor):
        raise ValueError(
            f"{type(model.policy).__name__}.make_actor() returns {actor.__module__}.{actor.__name__}: derive your "
            "class from sb3_softsac.policies.Actor."
        )
    distribution = type(model.actor.action_dist)
    is_usual = model.use_sde or distribution is SquashedDiagGaussianDistribution
    if not is_usual and actor.sample is Actor.sample:
        raise ValueError(
            f"action_dist={distribution.__name__} of the actor would be left out: override sample() and forward() of "
            "sb3_softsac.policies.Actor instead."
        )
    if actor.action_log_prob is not Actor.action_log_prob and actor.sample is Actor.sample:
        raise ValueError(
            f"{actor.__name__}.action_log_prob() would be left out of updates: override sample() instead, which also "
            "returns the metrics of the policy."
        )
    overrides = model._predict_is_overridden() or actor.forward is not Actor.forward
    if model.max_noise_repeat > 1 and overrides:
        raise ValueError(
            f"max_noise_repeat={model.max_noise_repeat} has no effect on a policy that draws actions by its own "
            "predict() or forward(): leave it out."
        )
