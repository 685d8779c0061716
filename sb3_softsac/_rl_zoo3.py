"""
Everything the RL Zoo needs to know of SoftSAC. Never imported unless ``rl_zoo3`` is: see ``_sb3_softsac_startup``.

:func:`patch` changes what a module of the zoo has defined, :func:`edited_code` what it is about to run. Other
algorithms are left alone, except where the zoo is broken for all of them.
"""

import ast
import importlib
import inspect
from collections.abc import Callable
from functools import partial, wraps
from importlib.abc import ExecutionLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import sb3_softsac
from sb3_softsac.callbacks import SaveBestTrainingReturnCallback
from sb3_softsac.softsac import SoftSAC

if TYPE_CHECKING:
    from optuna import Trial
    from rl_zoo3.exp_manager import ExperimentManager

ALGO = "softsac"
EXCLUDED = "excluded_options"


def hyperparams_folder() -> Path:
    """
    :return: the folder of ``softsac.yml``: inside the package, or, in an editable install, beside it
    """
    package = Path(sb3_softsac.__file__).parent
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def own_config(config: str | None) -> str:
    """
    :param config: what ``--conf-file`` says, or None
    :return: None: our ``softsac.yml``; a file that exists, or none of ours: as it is; else the file of ours that is
        called so, for instance ``variants/halfcheetah_lab.yml``
    """
    folder = hyperparams_folder()
    if config is None:
        return str(folder / f"{ALGO}.yml")
    ours = [path for path in (folder / config, folder.parent / config) if path.is_file()]
    return str(ours[0]) if ours and not Path(config).is_file() else config


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
}
POLICY_OPTIONS = ("log_std_bounding", "separate_log_std_net", "weight_init")
NOT_WITH_SDE = ("log_std_bounding", "separate_log_std_net")
NOT_WITH_FIXED_ENT_COEF = ("ent_coef_learning_rate", "ent_coef_loss", "entropy_space")
HER_OPTIONS = ("n_sampled_goal", "goal_selection_strategy")


def excluded_options(hyperparams: dict[str, Any]) -> list[str]:
    """
    :param hyperparams: what a trial does not sample
    :return: names of ``OWN_OPTIONS`` that have no meaning beside it
    """
    excluded = list(NOT_WITH_SDE) if hyperparams.get("use_sde") else []
    if not str(hyperparams.get("ent_coef", "auto")).startswith("auto"):
        excluded += NOT_WITH_FIXED_ENT_COEF
    return excluded


def sample_softsac_params(
    trial: "Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler for ``-optimize``: what the zoo samples for SAC, and ``OWN_OPTIONS``.

    :param trial: the trial to draw from
    :param n_actions: dimension of the action space
    :param n_envs: number of environments
    :param additional_args: what the zoo says about hindsight replay
    :return: arguments of ``SoftSAC``
    """
    hyperparams_opt = importlib.import_module("rl_zoo3.hyperparams_opt")
    hyperparams = hyperparams_opt.sample_sac_params(trial, n_actions, n_envs, additional_args)
    excluded = trial.user_attrs.get(EXCLUDED, ())
    own = {name: suggest(trial, name) for name, suggest in OWN_OPTIONS.items() if name not in excluded}
    return _with_own_options(hyperparams, own)


def convert_softsac_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Converter for ``--trial-id``.

    :param sampled_params: parameters of a stored trial of :func:`sample_softsac_params`
    :return: arguments of ``SoftSAC``, as :func:`sample_softsac_params` had returned them
    """
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
    return {**hyperparams, **own, "policy_kwargs": {**hyperparams["policy_kwargs"], **policy_kwargs}}


def patch(module: ModuleType) -> None:
    """
    Add SoftSAC, in place: the zoo's modules hold references to each other's objects. Doing it again changes nothing.

    :param module: a module of the zoo that has been loaded
    """
    if module.__name__ == "rl_zoo3.utils":
        module.ALGOS[ALGO] = SoftSAC
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        module.HYPERPARAMS_SAMPLER[ALGO] = sample_softsac_params
        module.HYPERPARAMS_CONVERTER[ALGO] = convert_softsac_params
    elif module.__name__ == "rl_zoo3.exp_manager" and not hasattr(module.ExperimentManager, "_knows_softsac"):
        _patch_manager(module.ExperimentManager)
        module.ExperimentManager._knows_softsac = True


def _patch_manager(manager: "type[ExperimentManager]") -> None:
    original_init = manager.__init__
    init_signature = inspect.signature(original_init)
    original_schedules = manager._preprocess_schedules
    original_create_callbacks = manager.create_callbacks
    original_learn = manager.learn
    original_objective = manager.objective

    @wraps(original_init)
    def __init__(self: "ExperimentManager", *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        if self.algo == ALGO:
            self.config = own_config(init_signature.bind(self, *args, **kwargs).arguments.get("config"))

    @wraps(original_schedules)
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        for name in ("qf_learning_rate", "ent_coef_learning_rate"):
            if isinstance(hyperparams.get(name), str):
                hyperparams[name] = original_schedules({"learning_rate": hyperparams[name]})["learning_rate"]
        return original_schedules(hyperparams)

    @wraps(original_create_callbacks)
    def create_callbacks(self: "ExperimentManager") -> None:
        original_create_callbacks(self)
        for callback in self.callbacks:
            if isinstance(callback, SaveBestTrainingReturnCallback) and callback.save_path is None:
                callback.save_path = self.save_path
        # Trials of an optimisation create their callbacks themselves, and have no folder to save to
        if self.optimize_hyperparameters and self.specified_callbacks:
            callbacks = self.specified_callbacks
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            name = SaveBestTrainingReturnCallback.__name__
            self.specified_callbacks = [callback for callback in callbacks if name not in str(callback)]

    @wraps(original_learn)
    def learn(self: "ExperimentManager", model: Any) -> None:
        if self.continue_training and isinstance(model, SoftSAC):
            # `-i` continues the count of steps, instead of repeating the warm-up and the schedules from their start
            model = SimpleNamespace(learn=partial(model.learn, reset_num_timesteps=False), env=model.env)
        original_learn(self, model)

    @wraps(original_objective)
    def objective(self: "ExperimentManager", trial: "Trial") -> float:
        # The zoo does not tell the sampler what the trial's other hyperparameters are
        if self.algo == ALGO:
            trial.set_user_attr(EXCLUDED, excluded_options(self._hyperparams))
        return original_objective(self, trial)

    for method in (__init__, create_callbacks, learn, objective):
        setattr(manager, method.__name__, method)
    setattr(manager, original_schedules.__name__, staticmethod(_preprocess_schedules))


def edited_code(loader: ExecutionLoader, name: str) -> CodeType:
    """
    :param loader: loader of a module of the zoo
    :param name: name of the module
    :return: the module's code with SoftSAC in it; as it is, if the source is not there
    :raises ImportError: if there is no code either
    """
    source = loader.get_source(name)
    if source is None:
        code = loader.get_code(name)
        if code is None:
            raise ImportError(f"{name} has no code", name=name)
        return code
    tree = _Editor().visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), loader.get_filename(name), "exec", dont_inherit=True)


class _Editor(ast.NodeTransformer):
    """
    Adds SoftSAC to the lists that SAC is in, and replaces two imports.

    - ``off_policy_algos`` in enjoy, record_video, push_to_hub (and a nameless one in benchmark): for an algorithm that
      is not in it, the whole replay buffer is allocated when a model is only watched.
    - the classes that ``callbacks.ParallelTrainCallback`` supports.
    """

    IMPORTS = {  # noqa: RUF012
        # huggingface_hub no longer uses requests: for a model without VecNormalize, load_from_hub waits for the error
        # of a missing file in vain
        ("requests.exceptions", "HTTPError"): ("huggingface_hub.errors", "EntryNotFoundError"),
        # sb3-team-hf-integration 3.2 no longer has it: push_to_hub fails for every algorithm
        ("huggingface_sb3.push_to_hub", "generate_metadata"): (__name__, "generate_metadata"),
    }

    def visit_List(self, node: ast.List) -> ast.List:
        self._add_softsac(node)
        return node

    def visit_Tuple(self, node: ast.Tuple) -> ast.Tuple:
        self._add_softsac(node)
        return node

    def _add_softsac(self, node: ast.List | ast.Tuple) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return
        elements = node.elts
        names = [ast.unparse(element) for element in elements]
        if "'sac'" in names:
            elements.append(ast.Constant(ALGO))
        elif "SAC" in names:
            elements.append(ast.parse(f"__import__({__name__!r}, fromlist=['SoftSAC']).SoftSAC", mode="eval").body)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        statements = []
        for alias in node.names:
            module, name = self.IMPORTS.get((node.module or "", alias.name), (node.module, alias.name))
            asname = alias.asname or (alias.name if name != alias.name else None)
            statements.append(ast.ImportFrom(module, [ast.alias(name, asname)], node.level))
            ast.copy_location(statements[-1], node)
        return statements


def generate_metadata(model_name: str, env_id: str, mean_reward: float, std_reward: float) -> dict[str, Any]:
    """
    :return: the head of a model card, as the function of this name returned it before sb3-team-hf-integration 3.2
    """
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if hasattr(hub, "generate_metadata"):
        metadata: dict[str, Any] = hub.generate_metadata(model_name, env_id, mean_reward, std_reward)
        return metadata
    card: dict[str, Any] = hub._generate_metadata(model_name, env_id, mean_reward, std_reward).to_dict()
    return card
