"""The zoo's methods, as they are for SoftSAC. Each takes the one that it replaces as its first argument."""

import ast
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import ConstantSchedule

from sb3_softsac._rl_zoo3.search import EXCLUDED, OWN_RATES, excluded_options
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
FRAME_STACK = "stable_baselines3.common.vec_env.VecFrameStack"
CHECKPOINTS = "checkpoints"  # folder within that of a run
RATES = ("learning_rate", *OWN_RATES)


def store_dict(
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
    hyperparams, saved = original(self)
    if self.algo != ALGO:
        return hyperparams, saved
    if "env_kwargs" in hyperparams and self._eval_env_kwargs_args is None:
        self.eval_env_kwargs = hyperparams["env_kwargs"]  # the zoo only does so if the command has some, too
    statistics = Path(self.trained_agent).parent / self.env_name / "vecnormalize.pkl"
    if self.continue_training and statistics.exists() and not hyperparams.get("normalize"):
        print("normalize=True: the continued run has VecNormalize")
        hyperparams["normalize"] = saved["normalize"] = True
    # The zoo stacks frames on top of VecNormalize, and no replay buffer can normalise what was stacked after that (SB3
    # issue 693, zoo issue 480). As a vec_env_wrapper they are stacked below; it is saved so, for enjoy and others.
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
            from rl_zoo3.utils import get_latest_run_id  # which imports what only training needs

            number = get_latest_run_id(self.log_path, self.env_name) + 1
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
    for name in sorted(changes.keys() & saved.keys()):
        now, then = _as_given(getattr(model, name)), _as_given(saved[name])
        if now != then:
            print(f"{name}={now} instead of the file's, {then}")
    own = {name: value for name, value in model.policy_kwargs.items() if name != "use_sde"}  # which SB3 has added
    if hyperparams.get("policy_kwargs", own) != own:
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


def _as_given(value: Any) -> Any:
    """:return: what the zoo or SB3 have made the value from"""
    if isinstance(value, ConstantSchedule):
        return value.val
    return (value.frequency, value.unit.value) if isinstance(value, TrainFreq) else value


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
            from sb3_softsac._rl_zoo3 import studies  # only here: it imports the zoo

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
            from optuna import TrialPruned

            print(f"Trial {trial.number} is pruned: {error}")
            raise TrialPruned from error

    return pruning


def _hyperparameters_optimization(original: Callable[..., None], self: Any) -> None:
    if self.algo == ALGO and self._hyperparams.get("policy_kwargs"):
        print("Trials sample policy_kwargs of their own, in place of the configuration's")
    if self.algo == ALGO and self.storage is not None:
        from sb3_softsac._rl_zoo3 import studies

        studies.optimize(original, self)
    else:
        original(self)


OF_MANAGER: dict[str, Callable[..., Any]] = {
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
