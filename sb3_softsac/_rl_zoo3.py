"""
Everything the RL Zoo needs to know of SoftSAC. Never imported unless ``rl_zoo3`` is: see ``_sb3_softsac_startup``.

:func:`patch` changes what a module of the zoo has defined, :func:`edited_code` what it is about to run. Other
algorithms are left alone, except where the zoo is broken for all of them.
"""

import ast
import importlib.util
import inspect
import io
import json
import sys
import zipfile
from collections.abc import Callable
from functools import wraps
from importlib.abc import ExecutionLoader
from importlib.metadata import version
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from sb3_softsac.callbacks import CheckpointCallback, SaveBestTrainingReturnCallback
from sb3_softsac.execution import threads
from sb3_softsac.persistence import model_file
from sb3_softsac.persistence.archive import CheckpointError
from sb3_softsac.presets import hyperparams_folder
from sb3_softsac.softsac import SoftSAC

if TYPE_CHECKING:
    from optuna import Trial
    from stable_baselines3.common.vec_env import VecEnv

ALGO = "softsac"
RAY = "ray"  # of --vec-env
EXCLUDED = "excluded_options"
FRAME_STACK = "stable_baselines3.common.vec_env.VecFrameStack"
CHECKPOINTS = "checkpoints"  # folder within that of a run


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
OWN_RATES = ("qf_learning_rate", "ent_coef_learning_rate")
RATES = ("learning_rate", *OWN_RATES)
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


def patch(module: ModuleType) -> None:
    """
    Add SoftSAC to a module of the zoo, in place: the modules hold references to each other's objects. A second
    call changes nothing.
    """
    if module.__name__ == "rl_zoo3.utils":
        module.ALGOS[ALGO] = SoftSAC
        _replace_method(module.StoreDict, "__call__", _store_dict)
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        module.HYPERPARAMS_SAMPLER[ALGO] = sample_softsac_params
        module.HYPERPARAMS_CONVERTER[ALGO] = convert_softsac_params
    elif module.__name__ == "rl_zoo3.exp_manager":
        for name, method in METHODS.items():
            _replace_method(module.ExperimentManager, name, method)


def _store_dict(
    original: Callable[..., None], self: Any, parser: Any, namespace: Any, values: list[str], *args: Any
) -> None:
    """
    ``-params`` evaluates its values as Python, and most shells take the quotes of ``qf_learning_rate:'lin_1e-3'`` away:
    a rate that is no Python is text.
    """
    original(self, parser, namespace, [_quoted(value) for value in values], *args)


def _quoted(argument: str) -> str:
    name, _, value = argument.partition(":")
    if name not in RATES:
        return argument
    try:
        ast.literal_eval(value)
        return argument
    except (ValueError, SyntaxError):
        is_text = value.startswith(("lin_", "cos_")) or name in OWN_RATES
        return f"{name}:{value!r}" if is_text else argument


def _replace_method(cls: Any, name: str, method: Callable[..., Any]) -> None:
    """:param method: takes what it replaces, then the object and the arguments"""
    original = getattr(cls, name)
    if hasattr(original, "_knows_softsac"):
        return

    @wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(original, self, *args, **kwargs)

    vars(replacement)["_knows_softsac"] = True
    setattr(cls, name, replacement)


def _init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    call = inspect.signature(original).bind(self, *args, **kwargs)
    arguments = call.arguments
    is_ray = arguments.get("vec_env_type") == RAY
    if is_ray:
        arguments["vec_env_type"] = "dummy"
        arguments["log_folder"] = str(Path(arguments["log_folder"]).resolve())  # actors have another working directory
    original(*call.args, **call.kwargs)
    if is_ray:
        from sb3_softsac.ray import RayVecEnv  # only here: Ray is an extra

        self.vec_env_class = RayVecEnv
    if self.algo == ALGO:
        if getattr(self.args, "num_threads", 0) > 0:
            threads.keep()  # train has set it
        self.config = own_config(arguments.get("config"))
        given = arguments.get("hyperparams") or {}
        self._asks_for_n_timesteps = arguments.get("n_timesteps", 0) > 0 or "n_timesteps" in given


def _read_hyperparameters(original: Callable[..., Any], self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The zoo stacks frames on top of VecNormalize, and no replay buffer can normalise what was stacked after that (SB3
    issue 693, zoo issue 480). As a ``vec_env_wrapper`` they are stacked below; it is saved so, for enjoy and others.
    """
    hyperparams, saved = original(self)
    if self.algo != ALGO:
        return hyperparams, saved
    if "env_kwargs" in hyperparams and self._eval_env_kwargs_args is None:
        self.eval_env_kwargs = hyperparams["env_kwargs"]  # the zoo only does so if the command has some, too
    statistics = Path(self.trained_agent).parent / self.env_name / "vecnormalize.pkl"
    if self.continue_training and statistics.exists() and not hyperparams.get("normalize"):
        print("normalize=True: the continued run has VecNormalize")
        hyperparams["normalize"] = saved["normalize"] = True
    if hyperparams.get("normalize") and hyperparams.get("frame_stack"):
        for each in (hyperparams, saved):
            wrappers = each.get("vec_env_wrapper") or []
            wrappers = wrappers if isinstance(wrappers, list) else [wrappers]
            each["vec_env_wrapper"] = [*wrappers, {FRAME_STACK: {"n_stack": each.pop("frame_stack")}}]
        print("frame_stack: frames are stacked below VecNormalize, as a vec_env_wrapper")
    return hyperparams, saved


def _preprocess_schedules(
    original: Callable[..., dict[str, Any]], self: Any, hyperparams: dict[str, Any]
) -> dict[str, Any]:
    # SoftSAC reads the zoo's "lin_3e-4" and more, and says what is wrong with others
    names = [name for name in RATES if self.algo == ALGO and isinstance(hyperparams.get(name), str)]
    rates = {name: hyperparams.pop(name) for name in names}
    return {**original(hyperparams), **rates}


def _create_log_folder(original: Callable[..., None], self: Any) -> None:
    """Another command may have taken the run's number since it was chosen."""
    while self.algo == ALGO:
        try:
            Path(self.save_path).mkdir(parents=True)
            break
        except FileExistsError:
            utils = importlib.import_module("rl_zoo3.utils")
            number = utils.get_latest_run_id(self.log_path, self.env_name) + 1
            self.save_path = str(Path(self.log_path, f"{self.env_name}_{number}"))
            self.params_path = f"{self.save_path}/{self.env_name}"
    original(self)


def _create_callbacks(original: Callable[..., None], self: Any) -> None:
    asked_save_freq = self.save_freq
    original(self)
    for callback in self.callbacks:
        if isinstance(callback, SaveBestTrainingReturnCallback) and callback.save_path is None:
            callback.save_path = self.save_path
    # Trials of an optimisation create their callbacks themselves, and have no folder to save to
    if self.optimize_hyperparameters:
        if self.specified_callbacks:
            callbacks = self.specified_callbacks
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            self.specified_callbacks = [callback for callback in callbacks if not _is_of_one_run(str(callback))]
    elif self.algo == ALGO:
        # Besides the zoo's rl_model_<n>_steps.zip, which are for watching. Without --save-replay-buffer, only a signal
        # leaves a checkpoint, of everything else.
        save_freq = self.save_freq if asked_save_freq > 0 and self.save_replay_buffer else 0
        folder = Path(self.save_path) / CHECKPOINTS
        self.callbacks.append(
            CheckpointCallback(save_freq, folder, save_replay_buffer=self.save_replay_buffer, verbose=1)
        )


def _is_of_one_run(callback: str) -> bool:
    """:param callback: as in the hyperparameters"""
    names = (SaveBestTrainingReturnCallback.__name__, CheckpointCallback.__name__)
    return "sb3_softsac" in callback and any(name in callback for name in names)


def _setup_experiment(original: Callable[..., Any], self: Any) -> Any:
    experiment = original(self)
    if experiment is not None and isinstance(experiment[0], SoftSAC):
        experiment[0].save_exclude = ("replay_buffer",)  # of the best model, and of other files on the way
    return experiment


def _load_pretrained_agent(original: Callable[..., Any], self: Any, hyperparams: dict[str, Any], env: "VecEnv") -> Any:
    if self.algo != ALGO:
        return original(self, hyperparams, env)
    print("Loading pretrained agent")
    changes = {name: value for name, value in hyperparams.items() if name not in ("policy", "policy_kwargs")}
    noise = changes.pop("action_noise", None)
    with model_file.open_model_file(self.trained_agent) as file:
        saved = model_file.read_data(file.archive, None, changes, allow_pickle=False)
    # Goes on where the file was written, random states included
    model = SoftSAC.load(
        self.trained_agent,
        env=env,
        device=self.device,
        force_reset=False,
        tensorboard_log=self.tensorboard_log,
        verbose=self.verbose,
        **changes,
    )
    for name, value in changes.items():
        if name in saved and _plain(saved[name]) != _plain(value):
            print(f"{name}={_plain(value)} instead of the file's, {_plain(saved[name])}")
    own = {name: value for name, value in model.policy_kwargs.items() if name != "use_sde"}  # which SB3 has added
    if "policy_kwargs" in hyperparams and _plain(hyperparams["policy_kwargs"]) != _plain(own):
        print(f"policy_kwargs={own} is the file's, not {hyperparams['policy_kwargs']}")
        self._policy_kwargs_of_file = own
    if "buffer_size" not in changes and model.replay_buffer is not None and model.buffer_size < model.batch_size:
        # Earlier versions wrote such files after they had been loaded for watching, as by push_to_hub
        default = inspect.signature(SoftSAC).parameters["buffer_size"].default
        print(f"buffer_size={default:,} instead of the file's, {model.buffer_size}")
        model.buffer_size, model.replay_buffer = default, None
        model._setup_replay_buffer()
    if not _asks_for_seed():
        self.args.seed = model.seed  # for args.yml
    elif self.seed != model.seed:
        print(f"Seed {self.seed} instead of the file's, {model.seed}")
        model.seed = self.seed
        model.set_random_seed(self.seed)
    if repr(getattr(model.action_noise, "base_noise", model.action_noise)) != repr(noise):
        model.action_noise = noise
    buffer_path = Path(self.trained_agent).parent / "replay_buffer.pkl"
    if model.replay_buffer is not None and model.replay_buffer.size() == 0 and buffer_path.exists():
        print("Loading replay buffer")
        model.load_replay_buffer(buffer_path, truncate_last_traj=self.truncate_last_trajectory)
    return model


def _plain(value: Any) -> str:
    """:return: text that is equal for equal arguments; the zoo makes schedules of constant rates"""
    value = getattr(value, "val", value) if type(value).__name__ == "ConstantSchedule" else value
    if isinstance(value, dict):
        return str({name: _plain(each) for name, each in sorted(value.items())})
    if isinstance(value, (list, tuple)):
        return str([_plain(each) for each in value])
    return repr(float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value)


def _save_config(original: Callable[..., None], self: Any, saved_hyperparams: dict[str, Any]) -> None:
    if hasattr(self, "_policy_kwargs_of_file"):
        saved_hyperparams["policy_kwargs"] = self._policy_kwargs_of_file
    original(self, saved_hyperparams)


def _asks_for_seed() -> bool:
    """Whether the command has a seed. The zoo itself draws one for each command without."""
    return any(argument.partition("=")[0] == "--seed" for argument in sys.argv)


def _learn(original: Callable[..., None], self: Any, model: Any) -> None:
    if not isinstance(model, SoftSAC):
        original(self, model)
        return
    if self.continue_training:
        left = model._total_timesteps - model.num_timesteps
        if left <= 0:
            model._tensorboard_run = None  # several runs may go on from the end of one: each logs to its own folder
        elif not self._asks_for_n_timesteps:
            self.n_timesteps = left
        print(f"Continuing at step {model.num_timesteps:,}, for {self.n_timesteps:,} steps")
    env: Any = model.env
    try:
        # The zoo saves the model after it has closed the environment: in processes, its state would be gone
        with mock.patch.object(type(env), "close", lambda _: None):
            original(self, model)
    except BaseException:
        env.close()
        raise


def _save_trained_model(original: Callable[..., None], self: Any, model: Any) -> None:
    wanted = self.save_replay_buffer
    if isinstance(model, SoftSAC):  # the replay buffer goes into the model's own file
        self.save_replay_buffer = False
        model.save_exclude = () if wanted else ("replay_buffer",)
    original(self, model)
    self.save_replay_buffer = wanted
    if isinstance(model, SoftSAC) and model.env is not None:
        model.env.close()  # see _learn


def _objective(original: Callable[..., float], self: Any, trial: "Trial") -> float:
    # The zoo does not tell the sampler what the trial's other hyperparameters are
    if self.algo == ALGO:
        trial.set_user_attr(EXCLUDED, excluded_options({**self._hyperparams, "normalize": self.normalize}))
        if self.storage is not None:
            from sb3_softsac import studies  # only here: it imports the zoo

            return studies.objective(_pruned_if_invalid(original), self, trial)
        return _pruned_if_invalid(original)(self, trial)
    return original(self, trial)


def _pruned_if_invalid(objective: Callable[..., float]) -> Callable[..., float]:
    """:return: an objective that prunes what the constructor refuses, as the zoo prunes what fails in ``learn()``"""

    @wraps(objective)
    def pruning(self: Any, trial: "Trial") -> float:
        try:
            return objective(self, trial)
        except CheckpointError:
            raise
        except ValueError as error:
            print(f"Trial {trial.number} is pruned: {error}")
            raise importlib.import_module("optuna").TrialPruned from error

    return pruning


def _hyperparameters_optimization(original: Callable[..., None], self: Any) -> None:
    if self.algo == ALGO and self._hyperparams.get("policy_kwargs"):
        print("Trials sample policy_kwargs of their own, in place of the configuration's")
    if self.algo == ALGO and self.storage is not None:
        from sb3_softsac import studies

        studies.optimize(original, self)
    else:
        original(self)


METHODS: dict[str, Callable[..., Any]] = {
    "__init__": _init,
    "read_hyperparameters": _read_hyperparameters,
    "_preprocess_schedules": _preprocess_schedules,
    "create_log_folder": _create_log_folder,
    "create_callbacks": _create_callbacks,
    "setup_experiment": _setup_experiment,
    "_load_pretrained_agent": _load_pretrained_agent,
    "_save_config": _save_config,
    "learn": _learn,
    "save_trained_model": _save_trained_model,
    "objective": _objective,
    "hyperparameters_optimization": _hyperparameters_optimization,
}


def edited_code(loader: ExecutionLoader, name: str) -> CodeType | None:
    """
    :param loader: loader of a module of the zoo
    :param name: name of the module
    :return: the module's code with SoftSAC in it; as it is, if the source is not there
    """
    source = loader.get_source(name)
    if source is None:
        return loader.get_code(name)
    tree = _Editor().visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), loader.get_filename(name), "exec", dont_inherit=True)


class _Editor(ast.NodeTransformer):
    """
    Adds SoftSAC to the lists that SAC is in, and replaces two imports.

    - ``off_policy_algos`` in enjoy, record_video, push_to_hub (and a nameless one in benchmark): for an algorithm that
      is not in it, the whole replay buffer is allocated when a model is only watched.
    - the classes that ``callbacks.ParallelTrainCallback`` supports.

    ``train`` gets another choice for ``--vec-env``, of which :func:`_init` makes a ``RayVecEnv``.
    """

    IMPORTS = {  # noqa: RUF012
        # huggingface_hub no longer uses requests: for a model without VecNormalize, load_from_hub waits for the error
        # of a missing file, which never comes
        ("requests.exceptions", "HTTPError"): ("huggingface_hub.errors", "EntryNotFoundError"),
        # sb3-team-hf-integration 3.2 no longer has it: push_to_hub fails for every algorithm
        ("huggingface_sb3.push_to_hub", "generate_metadata"): (__name__, "generate_metadata"),
        # push_to_hub: the last that is done to a model card
        ("huggingface_hub.repocard", "metadata_save"): (__name__, "metadata_save"),
    }

    def visit_List(self, node: ast.List | ast.Tuple) -> ast.List | ast.Tuple:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        elements = node.elts
        names = [ast.unparse(element) for element in elements]
        if names == ["'dummy'", "'subproc'"]:
            elements.append(ast.Constant(RAY))
        elif "'sac'" in names:
            elements.append(ast.Constant(ALGO))
        elif "SAC" in names:
            elements.append(ast.parse(f"__import__({__name__!r}, fromlist=['SoftSAC']).SoftSAC", mode="eval").body)
        return node

    visit_Tuple = visit_List

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        statements = []
        for alias in node.names:
            module, name = self.IMPORTS.get((node.module or "", alias.name), (node.module, alias.name))
            asname = alias.asname or (alias.name if name != alias.name else None)
            statements.append(ast.ImportFrom(module, [ast.alias(name, asname)], node.level))
            ast.copy_location(statements[-1], node)
        return statements


def generate_metadata(model_name: str, env_id: str, mean_reward: float, std_reward: float) -> dict[str, Any]:
    """The head of a model card, as the function of this name returned it before sb3-team-hf-integration 3.2."""
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if hasattr(hub, "generate_metadata"):
        metadata: dict[str, Any] = hub.generate_metadata(model_name, env_id, mean_reward, std_reward)
        return metadata
    card: dict[str, Any] = hub._generate_metadata(model_name, env_id, mean_reward, std_reward).to_dict()
    return card


def metadata_save(path: Path, metadata: dict[str, Any]) -> None:
    """
    Writes the head of a model card. That of a SoftSAC model also gets its evaluation and its learning curve, and usage
    lines that work.

    :param path: the card, in the folder of what is uploaded
    :param metadata: the head
    """
    card = path.read_text(encoding="utf-8")
    if card.lstrip().startswith(f"# **{SoftSAC.__name__}**"):
        path.write_text(_completed_card(card, path.parent), encoding="utf-8")
    importlib.import_module("huggingface_hub.repocard").metadata_save(path, metadata)


def _completed_card(card: str, folder: Path) -> str:
    # Without the variable, load_from_hub refuses
    card = card.replace("python -m rl_zoo3.load_from_hub", "TRUST_REMOTE_CODE=True python -m rl_zoo3.load_from_hub")
    usage = "\n## Usage"
    result = json.loads((folder / "results.json").read_text())
    actions = "deterministic" if result["is_deterministic"] else "sampled"
    evaluation = (
        f"\n## Evaluation\nReturn of {result['n_eval_episodes']} episodes with {actions} actions: "
        f"{result['mean_reward']:.2f} +/- {result['std_reward']:.2f}\n"
    )
    if _draw_learning_curve(folder / "train_eval_metrics.zip", folder / "learning_curve.png"):
        evaluation += "\n![Return of the evaluations during training](learning_curve.png)\n"
    needed = f"\n`--algo {ALGO}` comes with the package sb3-softsac (here {version('sb3-softsac')}): install it, too.\n"
    return card.replace(usage, evaluation + usage, 1).replace(
        "\nInstall the RL Zoo", f"{needed}\nInstall the RL Zoo", 1
    )


def _draw_learning_curve(metrics: Path, picture: Path) -> bool:
    """:return: whether there are evaluations, and matplotlib"""
    with zipfile.ZipFile(metrics) as archive:
        if "evaluations.npz" not in archive.namelist() or importlib.util.find_spec("matplotlib") is None:
            return False
        evaluations = np.load(io.BytesIO(archive.read("evaluations.npz")))
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="return")
    mean, std = (getattr(evaluations["results"], name)(axis=1) for name in ("mean", "std"))
    axes.plot(evaluations["timesteps"], mean)
    axes.fill_between(evaluations["timesteps"], mean - std, mean + std, alpha=0.3)
    figure.savefig(picture)
    return True
