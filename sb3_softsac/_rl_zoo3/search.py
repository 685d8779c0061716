"""The search space of ``-optimize``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

EXCLUDED = "excluded_options"
OWN_RATES = ("qf_learning_rate", "ent_coef_learning_rate")
# Values of the options that SAC does not have
CHOICES: dict[str, list[Any]] = {
    "policy_delay_compensation": [False, True],
    "use_actor_target": [False, True],
    "ent_coef_loss": ["log", "exp"],
    "entropy_space": ["normalized", "env"],
    "max_grad_norm": [None, 1.0, 10.0],
    "random_steps": [None, 0],  # None: as many as learning_starts
    "log_std_bounding": ["clamp", "tanh"],
    "separate_log_std_net": [False, True],
    "weight_init": [None, "xavier", "orthogonal"],
    "normalization": [None, "batch", "layer"],
    "normalize_input": [False, True],
    "joint_batch": [None, "critic", "all"],
    "unit_norm": [None, "weights"],
    "n_atoms": [None, 101],
    "normalize_rewards": [None, "std"],  # categorical critics need "bounded", whatever is drawn here
    "dropout_rate": [0.0, 0.01],
    "max_noise_repeat": [1, 16],
}
OWN_OPTIONS = (*OWN_RATES, "policy_delay", *CHOICES)
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
    from rl_zoo3 import hyperparams_opt  # which imports Optuna

    hyperparams = hyperparams_opt.sample_sac_params(trial, n_actions, n_envs, additional_args)
    excluded = trial.user_attrs.get(EXCLUDED, ())
    own = {name: _suggest(trial, name) for name in OWN_OPTIONS if name not in excluded}
    return _with_own_options(hyperparams, own)


def _suggest(trial: "Trial", name: str) -> Any:
    if name in OWN_RATES:
        return trial.suggest_float(name, 1e-5, 0.002, log=True)
    if name == "policy_delay":
        return trial.suggest_int(name, 1, 4)
    return trial.suggest_categorical(name, CHOICES[name])


def convert_softsac_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Converter for ``--trial-id``: arguments as :func:`sample_softsac_params` returned them."""
    from rl_zoo3 import hyperparams_opt  # which imports Optuna

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
