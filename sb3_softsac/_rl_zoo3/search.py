"""The search space of ``-optimize``."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

EXCLUDED = "excluded_options"
# Search space of the options that SAC does not have
OWN_OPTIONS: "dict[str, Callable[[Trial, str], Any]]" = {
    "qf_learning_rate": lambda trial, name: trial.suggest_float(name, 1e-5, 0.002, log=True),
    "ent_coef_learning_rate": lambda trial, name: trial.suggest_float(name, 1e-5, 0.002, log=True),
    "policy_delay": lambda trial, name: trial.suggest_int(name, 1, 4),
    "policy_delay_compensation": lambda trial, name: trial.suggest_categorical(name, [False, True]),
    "use_actor_target": lambda trial, name: trial.suggest_categorical(name, [False, True]),
    "ent_coef_loss": lambda trial, name: trial.suggest_categorical(name, ["log", "exp"]),
    "entropy_space": lambda trial, name: trial.suggest_categorical(name, ["normalized", "env"]),
    "max_grad_norm": lambda trial, name: trial.suggest_categorical(name, [None, 1.0, 10.0]),
    # None: as many as learning_starts
    "random_steps": lambda trial, name: trial.suggest_categorical(name, [None, 0]),
    "log_std_bounding": lambda trial, name: trial.suggest_categorical(name, ["clamp", "tanh"]),
    "separate_log_std_net": lambda trial, name: trial.suggest_categorical(name, [False, True]),
    "weight_init": lambda trial, name: trial.suggest_categorical(name, [None, "xavier", "orthogonal"]),
    "normalization": lambda trial, name: trial.suggest_categorical(name, [None, "batch", "layer"]),
    "normalize_input": lambda trial, name: trial.suggest_categorical(name, [False, True]),
    "joint_batch": lambda trial, name: trial.suggest_categorical(name, [None, "critic", "all"]),
    "unit_norm": lambda trial, name: trial.suggest_categorical(name, [None, "weights"]),
    "n_atoms": lambda trial, name: trial.suggest_categorical(name, [None, 101]),
    # Categorical critics need "bounded", whatever is drawn here
    "normalize_rewards": lambda trial, name: trial.suggest_categorical(name, [None, "std"]),
    "dropout_rate": lambda trial, name: trial.suggest_categorical(name, [0.0, 0.01]),
    "max_noise_repeat": lambda trial, name: trial.suggest_categorical(name, [1, 16]),
}
POLICY_OPTIONS = (
    *("log_std_bounding", "separate_log_std_net", "weight_init"),
    *("normalization", "normalize_input", "unit_norm", "n_atoms", "dropout_rate"),
)
NOT_WITH_SDE = ("log_std_bounding", "separate_log_std_net", "max_noise_repeat")
NOT_WITH_FIXED_ENT_COEF = ("ent_coef_learning_rate", "ent_coef_loss", "entropy_space")
HER_OPTIONS = ("n_sampled_goal", "goal_selection_strategy")


def excluded_options(hyperparams: dict[str, Any]) -> list[str]:
    """Names of ``OWN_OPTIONS`` that have no meaning beside what a trial does not sample."""
    excluded = list(NOT_WITH_SDE) if hyperparams.get("use_sde") else []
    if not str(hyperparams.get("ent_coef", "auto")).startswith("auto"):
        excluded += NOT_WITH_FIXED_ENT_COEF
    if hyperparams.get("normalize"):
        excluded += ["n_atoms", "normalize_rewards"]  # VecNormalize scales rewards already
    return excluded


def sample_softsac_params(
    trial: "Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Sampler for ``-optimize``, called by the zoo: what it samples for SAC, and ``OWN_OPTIONS``."""
    hyperparams_opt = importlib.import_module("rl_zoo3.hyperparams_opt")
    hyperparams = hyperparams_opt.sample_sac_params(trial, n_actions, n_envs, additional_args)
    excluded = trial.user_attrs.get(EXCLUDED, ())
    own = {name: suggest(trial, name) for name, suggest in OWN_OPTIONS.items() if name not in excluded}
    return _with_own_options(hyperparams, own)


def convert_softsac_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Converter for ``--trial-id``: arguments as :func:`sample_softsac_params` returned them."""
    hyperparams_opt = importlib.import_module("rl_zoo3.hyperparams_opt")
    own = {name: value for name, value in sampled_params.items() if name in OWN_OPTIONS}
    # The zoo's converter hands these to the algorithm instead of its buffer
    her = {name: value for name, value in sampled_params.items() if name in HER_OPTIONS}
    hyperparams = hyperparams_opt.convert_offpolicy_params(
        {name: value for name, value in sampled_params.items() if name not in {**own, **her}}
    )
    if her:
        hyperparams["replay_buffer_kwargs"] = her
    return _with_own_options(hyperparams, own)


def _with_own_options(hyperparams: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    policy_kwargs = {name: own.pop(name) for name in POLICY_OPTIONS if name in own}
    if policy_kwargs.get("log_std_bounding") == "tanh":
        policy_kwargs["log_std_bounds"] = (-5, 2)  # a policy starts in the middle of the bounds: -9 is next to no noise
    if policy_kwargs.get("normalization") != "batch" and not policy_kwargs.get("normalize_input"):
        own["joint_batch"] = None  # not left out: the configuration may have another value
    if policy_kwargs.get("n_atoms"):
        own["normalize_rewards"] = "bounded"
    return {**hyperparams, **own, "policy_kwargs": {**hyperparams["policy_kwargs"], **policy_kwargs}}
