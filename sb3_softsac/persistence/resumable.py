"""
Runs that can be saved and continued at any step, unlike those of SB3's off-policy algorithms.

:class:`ResumableAlgorithm` collects the state of a run: parameters, replay buffer, random states, environments,
callbacks and the rollout in progress. ``model_file``, ``run_folder`` and ``envs`` define how each part is written.
"""

import difflib
import inspect
import os
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.utils import check_for_correct_spaces, get_latest_run_id, get_system_info
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage, unwrap_vec_wrapper
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softsac.buffers import ReplayBuffer, map_obs
from sb3_softsac.persistence import atomic_files, buffer_state, callback_state, model_file
from sb3_softsac.persistence.archive import ArchiveReader, ArchiveWriter, CheckpointError, naming
from sb3_softsac.persistence.codec import NotEncodable, decode, encode
from sb3_softsac.persistence.envs import env_state
from sb3_softsac.persistence.model_file import ModelFile
from sb3_softsac.persistence.random_states import get_random_states, set_random_states
from sb3_softsac.persistence.run_folder import RunFolder
from sb3_softsac.rollouts import RolloutAlgorithm, with_usual_strides
from sb3_softsac.validation import check_env, check_outer_wrappers, check_wrappers

TENSORBOARD_NAME = "SoftSAC"
LOGGER_STATE = ("name_to_value", "name_to_count", "name_to_excluded")
NOT_SAVED = "not_saved"  # names of logged values that cannot be encoded
BUFFER_SIZE_IF_WATCHED = 1  # what the RL Zoo passes to load() if it only evaluates
ENT_COEF_STATE = {"ent_coef_optimizer", "ent_coef_tensor", "log_ent_coef"}

Self = TypeVar("Self", bound="ResumableAlgorithm")


class Pending(NamedTuple):
    """State loaded from a file, applied at the next ``learn()``: only then are there callbacks and a logger."""

    callbacks: list[Any] | None = None  # see callback_state
    restarts_stops: bool = False  # restart stop callbacks that already fired
    log: dict[str, dict[str, Any]] | None = None  # recorded, but not yet dumped by the logger
    # If the run continues in mid-episode: what the first rollout finds, since predict() and others change it until then
    random_states: dict[str, Any] | None = None
    env: dict[str, Any] | None = None  # see env_state


class Unread(NamedTuple):
    """Parts of a file that ``load()`` did not restore, since it was called without an environment."""

    replay: str | None  # name of the file, if it has a replay buffer
    env: dict[str, Any] | None  # see env_state.without_envs
    n_updates: int  # updates of the policy in the file

    @property
    def statistics(self) -> dict[str, Any] | None:
        """VecNormalize's."""
        return env_state.statistics(self.env)

    def vec_normalize(self, observation_space: spaces.Space[Any]) -> VecNormalize | None:
        """
        :param observation_space: of the model
        :return: a VecNormalize with the statistics; None: the file has none
        """
        return None if self.statistics is None else env_state.vec_normalize(self.statistics, observation_space)

    @property
    def is_transposed(self) -> bool:
        """Whether VecTransposeImage puts the channels of images first."""
        return env_state.is_transposed(self.env)


class ResumableAlgorithm(RolloutAlgorithm):
    """Base class of ``SoftSAC``: ``learn``, ``save`` and ``load``."""

    actor_target: Any  # SoftSAC's, or None
    ent_coef: Any  # these are SoftSAC's
    offline_data: Any
    _has_offline_data: bool
    # Left out by every save(); ("replay_buffer",) keeps files small
    save_exclude: tuple[str, ...] = ()
    run_folders: dict[Path, RunFolder] | None = None  # folders with checkpoints of this run, by path
    is_learning = False

    _callback: BaseCallback | None = None
    _loaded = False  # from a file
    _may_continue_episode = False  # the next learn() is the first since then
    _pending = Pending()
    _unread: Unread | None = None
    _tensorboard_run: str | None = None  # folder of the run within tensorboard_log
    _buffer_size_in_file: int | None = None  # if load() was asked for less, to save memory
    _made_from: dict[str, Any]  # values of the arguments that something was made from

    # Attributes of this process, in no copy and no file
    OF_PROCESS: tuple[str, ...] = ("_callback", "_late_callbacks", "run_folders", "after_step")
    # Further attributes that are in no file, besides those that SB3 leaves out
    NOT_IN_FILES: tuple[str, ...] = (
        *("lr_schedule", "save_exclude", "is_learning", "_loaded", "_pending", "_unread"),
        *("_is_interrupted", "_made_from", "_buffer_size_in_file", "_may_continue_episode"),
    )

    @abstractmethod
    def _setup_replay_buffer(self) -> None:
        """Create the replay buffer, unless it exists or there is no environment."""

    @abstractmethod
    def _adopt_sb3_classes(self) -> None:
        """Use our counterparts of SB3's classes in a file of its ``SAC``."""

    def _note_deleted_buffer(self) -> None:
        """SB3's users free memory with ``del model.replay_buffer``: from then on, it is None."""
        vars(self).setdefault("replay_buffer", None)

    @abstractmethod
    def _known_threads(self) -> int | None:
        """Threads of torch that the run uses; None: the next ``learn()`` chooses."""

    def _noise_distributions(self) -> list[StateDependentNoiseDistribution]:
        actors = [actor for actor in (self.actor, self.actor_target) if actor is not None]
        distributions = [actor.action_dist for actor in actors]
        return [dist for dist in distributions if isinstance(dist, StateDependentNoiseDistribution)]

    def _exploration_state(self) -> list[list[th.Tensor]]:
        """Exploration matrices of gSDE, of the actor and of its target."""
        return [
            [dist.exploration_mat.detach().cpu(), dist.exploration_matrices.detach().cpu()]
            for dist in self._noise_distributions()
        ]

    def _set_exploration_state(self, state: list[list[th.Tensor]]) -> None:
        """:raises ValueError: if the matrices are not those of this actor"""
        # The file has none for a target actor that is new here, and too many if the target actor is gone
        for dist, (matrix, matrices) in zip(self._noise_distributions(), state, strict=False):
            shape = dist.exploration_mat.shape
            # There is one for each environment of the rollout in progress; a new rollout draws new ones
            if matrix.shape != shape or matrices.shape[1:] != shape:
                found = tuple(matrix.shape), tuple(matrices.shape)
                raise ValueError(f"exploration matrices have the shapes {found}, not {tuple(shape)} each")
            dist.exploration_mat, dist.exploration_matrices = matrix.to(self.device), matrices.to(self.device)

    def learn(
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train the model. The arguments are those of SB3, except for two defaults, which continue a loaded run.

        :param total_timesteps: number of environment steps
        :param callback: callback, or list of callbacks
        :param log_interval: episodes between log entries
        :param tb_log_name: name of the run in TensorBoard; None: that of the run in the file, or ``"SoftSAC"``
        :param reset_num_timesteps: restart the step count, the schedules and the TensorBoard run; None: only if the
            model was not loaded from a file. The first ``learn()`` after ``load()`` may then continue in mid-episode;
            later ones begin with a new episode, as in SB3, since the environment may have been used in between
        :param progress_bar: show a progress bar (needs tqdm and rich)
        :return: the model itself
        """
        self._note_deleted_buffer()
        self._setup_replay_buffer()  # if it was deleted
        if reset_num_timesteps is None and self._loaded and not self._may_continue_episode:
            self._last_obs = None
        self.is_learning, self.after_step = True, deque()
        try:
            super().learn(
                total_timesteps=total_timesteps,
                callback=callback,
                log_interval=log_interval,
                tb_log_name=tb_log_name,  # type: ignore[arg-type]  # for _setup_learn
                reset_num_timesteps=not self._loaded if reset_num_timesteps is None else reset_num_timesteps,
                progress_bar=progress_bar,
            )
            self._run_after_step()  # a signal may have arrived after the last step
            return self
        finally:
            self.is_learning = False
            for folder in (self.run_folders or {}).values():
                folder.unlock()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str | None = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self._is_interrupted:
            self._last_obs, self._is_interrupted = None, False
        self._note_used_env()
        self._may_continue_episode = False
        if self.random_steps != self._warmed_up_with:  # the user wants others
            self._warmed_up, self._warmed_up_with = False, self.random_steps
        resets = reset_num_timesteps or self._last_obs is None
        if resets:
            self._reset_episodes()
        assert self.env is not None, "You must set the environment before calling learn()"
        if self._unread is not None and self._unread.replay is not None:
            warnings.warn(
                f"The replay buffer in {self._unread.replay} was not read, nor the random states, "
                "because load() was called without an environment. To continue the run, pass env=... to load().",
                stacklevel=3,
            )
            self._unread = self._unread._replace(replay=None)
        env_state.prepare(self.env)
        # SB3 resets the noise here, even in the middle of an episode that continues
        noise = self.action_noise
        keep_noise = not resets and (self.env.num_envs == 1 or isinstance(noise, VectorizedActionNoise))
        if keep_noise:
            self.action_noise = None
        own_logger = None if reset_num_timesteps else self._logger_of_own_run(tb_log_name)
        if own_logger is not None:
            self.set_logger(own_logger)
        try:
            total_timesteps, self._callback = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name or TENSORBOARD_NAME, progress_bar
            )
        finally:
            if keep_noise:
                self.action_noise = noise
            if own_logger is not None:
                self._custom_logger = False
        if resets:
            self._take_first_obs()
        if self.tensorboard_log is not None and self.logger.dir is not None:
            within = os.path.relpath(self.logger.dir, self.tensorboard_log)
            self._tensorboard_run = os.path.basename(within) if within.startswith(os.pardir) else within
        for each in callback_state.walk(self._callback):
            if isinstance(each, EvalCallback) and each.callback_on_new_best is not None:
                each.callback_on_new_best.on_training_start(locals(), globals())  # SB3 does not
        if not reset_num_timesteps:
            self._restore_at_learn()
        random_states = None if reset_num_timesteps else self._pending.random_states
        self._pending = Pending(random_states=random_states)
        return total_timesteps, self._callback

    def _take_first_obs(self) -> None:
        """The environments have been reset."""
        assert self.env is not None
        self._last_obs = map_obs(with_usual_strides, self._last_obs)
        normalize = self._vec_normalize_env
        if normalize is None:
            return
        self._last_original_obs = self._original_obs()
        if self.env is not normalize and unwrap_vec_wrapper(self.env, VecTransposeImage) is None:
            normalized = normalize.normalize_obs(self._last_original_obs)
            check_outer_wrappers(self.env, observations=(self._last_obs, normalized))

    def _note_used_env(self) -> None:
        """Begin a new episode if the environment is no longer where ``load()`` left it."""
        if self._pending.env is not None and self._last_obs is not None:
            assert self.env is not None
            if not env_state.are_same_but_for_clocks(self._pending.env, env_state.capture(self.env)):
                warnings.warn(
                    "The run continues with a new episode, not in mid-episode, because the environment was used after "
                    "load(): evaluate in another one.",
                    stacklevel=5,
                )
                self._last_obs = None

    def _collect_rollout(self, *args: Any) -> RolloutReturn:
        random_states = self._pending.random_states
        if random_states is not None:
            # Only now: on_training_start() of a callback may draw, and has drawn already when the run began
            self._pending = Pending()
            set_random_states(decode(random_states), self.device)
        return super()._collect_rollout(*args)

    def _reset_episodes(self) -> None:
        """The environments are about to be reset."""
        self._rollout = None
        self._end_stored_episodes()

    def _restore_at_learn(self) -> None:
        """Restore what ``load()`` cannot: callbacks and the logger."""
        lost: list[str] = []
        callbacks, restarts_stops, log, *_ = self._pending
        if callbacks is not None:
            self._late_callbacks, lost = callback_state.restore(self._callback, callbacks, restarts_stops)
        if log is not None:
            for name in LOGGER_STATE:
                getattr(self.logger, name).update(log.get(name, {}))
            lost += [f"{name} was logged, but could not be saved" for name in log.get(NOT_SAVED, ())]
        if lost:
            warnings.warn(f"The continuation may differ: {'; '.join(lost)}.", stacklevel=4)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        for each in callback if isinstance(callback, list) else [callback]:
            for inner in callback_state.walk(each) if isinstance(each, BaseCallback) else ():
                if isinstance(eval_env := getattr(inner, "eval_env", None), VecEnv):
                    # Like the training environment: SB3 compares their wrappers one by one
                    vars(inner)["eval_env"] = self._wrap_env(eval_env, self.verbose)
                    env_state.prepare(eval_env)
        return super()._init_callback(callback, progress_bar)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        check_env(env)
        wrapped = OffPolicyAlgorithm._wrap_env(cast(Any, maybe_make_env(env, verbose)), verbose, monitor_wrapper)
        check_wrappers(wrapped)
        return wrapped

    def _logger_of_own_run(self, name: str | None) -> Logger | None:
        """
        A logger for the TensorBoard folder of a loaded run, or for a new one if that is gone or ``name`` is another.
        SB3 would continue the newest folder, which may be that of another run.
        """
        if not self._loaded or self._custom_logger or self.tensorboard_log is None:
            return None
        own_name, _, _ = (self._tensorboard_run or "").rpartition("_")
        logs = str(self.tensorboard_log)
        folder = os.path.join(logs, self._tensorboard_run or "")
        if self._tensorboard_run is None or name not in (None, own_name) or not os.path.isdir(folder):
            name = name or own_name or TENSORBOARD_NAME
            folder = os.path.join(logs, f"{name}_{get_latest_run_id(logs, name) + 1}")
        return configure(folder, ["stdout", "tensorboard"] if self.verbose >= 1 else ["tensorboard"])

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed Python, NumPy, PyTorch, the environments and the action space.

        :param seed: seed, at least 0; None: change nothing
        """
        if seed is not None:
            self._pending = self._pending._replace(random_states=None, env=None)
        super().set_random_seed(seed)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment, as in SB3. A model that was loaded without one gets an empty replay buffer.

        :param env: environment with the same spaces
        :param force_reset: reset it before training
        :raises ValueError: if its spaces are different
        """
        check_env(env)
        super().set_env(cast(Any, maybe_make_env(env, self.verbose)), force_reset)
        self._note_deleted_buffer()
        if isinstance(self.replay_buffer, HerReplayBuffer):
            self.replay_buffer.env = self.env  # SB3 would go on computing rewards in the old environment
        if force_reset:
            self._rollout = None
        if self._unread is not None and self._unread.statistics is not None:
            self._restore_statistics(self._unread.statistics)
        self._setup_replay_buffer()

    def _restore_statistics(self, statistics: dict[str, Any]) -> None:
        """
        :param statistics: VecNormalize's, of a file that was loaded without an environment
        """
        normalize = self._vec_normalize_env
        if normalize is None:
            _warn_of_missing_vec_normalize("Pass VecNormalize(env): set_env() restores its statistics.")
        elif _is_new(normalize) and self._unread is not None and self._n_updates == self._unread.n_updates:
            env_state.restore(normalize, statistics, mid_episode=False)

    def save(
        self,
        path: str | Path | BinaryIO,  # type: ignore[override]
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the state of the whole run, including the replay buffer, in one file.

        An existing file is replaced only when the new one is complete.

        :param path: name of the file (``.zip`` is added to one without a suffix), or file object
        :param exclude: names to leave out besides ``save_exclude``: ``"replay_buffer"``, or attributes
        :param include: names to save that are excluded otherwise
        :raises TypeError: naming an attribute that cannot be saved
        """
        with model_file.new_file(path) as file:
            self.write(file, {*self.save_exclude, *(exclude or ())}, set(include or ()))

    def write(
        self, file: BinaryIO, exclude: Iterable[str] = (), include: Iterable[str] = (), rows_elsewhere: bool = False
    ) -> tuple[int, str]:
        """
        Write a model file.

        :param file: file object to append to
        :param exclude: see :meth:`save`
        :param include: see :meth:`save`
        :param rows_elsewhere: leave out the rows of the replay buffer, which the caller saves separately, after
            :meth:`savable_replay_buffer`
        :return: size of the file in bytes, and its SHA-256
        """
        self._note_deleted_buffer()
        exclude = set(exclude) - set(include)
        skipped = {*self._excluded_save_params(), *exclude} - set(include)
        skipped.update(name.split(".")[0] for names in self._get_torch_save_params() for name in names)
        # The RL Zoo's ParallelTrainCallback replaces methods by functions
        skipped.update(name for name in vars(self) if callable(getattr(type(self), name, None)))
        skipped.add("replay_buffer")  # it has its own members
        replay = None
        if self.replay_buffer is not None and "replay_buffer" not in exclude:
            if rows_elsewhere or self.savable_replay_buffer() is not None:
                replay = self._replay_index(rows_elsewhere)
        elif self._unread is not None and self._unread.replay is not None and "replay_buffer" not in exclude:
            warnings.warn(
                f"The replay buffer in {self._unread.replay} was not read, and is not in the new file. Pass env=... to "
                "load() to keep it, or exclude=['replay_buffer'] to save().",
                stacklevel=3,
            )
        with ArchiveWriter(file) as archive:
            attributes = {name: value for name, value in vars(self).items() if name not in skipped}
            if self._buffer_size_in_file is not None and self.buffer_size == BUFFER_SIZE_IF_WATCHED:
                attributes["buffer_size"] = self._buffer_size_in_file
            for name in ("ep_info_buffer", "ep_success_buffer"):
                if name in attributes:
                    attributes[name] = model_file.plain_infos(attributes[name], name)
            model_file.write_data(archive, attributes)
            model_file.write_parameters(archive, self)
            if replay is not None and not rows_elsewhere:
                buffer_state.write_rows(archive, self.replay_buffer)  # type: ignore[arg-type]
            return archive.close(
                {
                    "num_timesteps": self.num_timesteps,
                    "n_envs": self.n_envs,
                    "machine": model_file.machine(self.device, self._known_threads()),
                    "random": self._pending.random_states or encode(get_random_states(self.device)),
                    "exploration": encode(self._exploration_state()),
                    "ent_coef": encode(self._made_from["ent_coef"]),
                    "env": self._env_state(),
                    "frozen": model_file.frozen_parameters(self),
                    "mid_step": self._is_interrupted,
                    "callbacks": self._pending.callbacks or callback_state.capture(self._callback),
                    "log": self._log_state(),
                    "replay": replay,
                }
            )

    def _env_state(self) -> dict[str, Any] | None:
        if self.env is not None:
            return env_state.capture(self.env)
        # Statistics are out of date if the policy was trained since then, as by the RL Zoo's ParallelTrainCallback
        if self._unread is None or self.replay_buffer is not None or self._n_updates != self._unread.n_updates:
            return None
        return self._unread.env

    def savable_replay_buffer(self) -> SB3ReplayBuffer | None:
        """The replay buffer; None if there is none, or, with a warning, if it cannot be saved."""
        buffer = self.replay_buffer
        if buffer is not None:
            try:
                self._replay_index(rows_elsewhere=True)
                buffer_state.check_rows(buffer)
            except NotEncodable as error:
                warnings.warn(
                    f"The replay buffer is not saved: {error}. To avoid this warning, pass exclude=['replay_buffer'].",
                    stacklevel=4,
                )
                return None
        return buffer

    def _replay_index(self, rows_elsewhere: bool) -> dict[str, Any]:
        buffer = self.replay_buffer
        assert buffer is not None
        segments = None if rows_elsewhere else buffer_state.segments(buffer)
        state = buffer_state.get_state(buffer)
        return {
            "description": buffer_state.describe(buffer),
            "action_bounds": buffer_state.action_bounds(buffer),
            "state": state,
            "segments": segments,
        }

    @classmethod
    def load(  # type: ignore[override]
        cls: type[Self],
        path: str | Path | BinaryIO,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model that continues where it was saved.

        With an environment, the whole run is restored: replay buffer, optimisers, random states, VecNormalize and, at
        the next ``learn()``, callbacks. That continues the step count, the schedules and the TensorBoard run, without
        random actions. Without an environment, the model can predict, but has no replay buffer.

        :param path: file of :meth:`save` or of SB3's ``SAC`` (``.zip`` may be left out), or folder of
            ``CheckpointCallback``, from which the newest valid checkpoint is loaded
        :param env: environment to train in; the number of environments may be different
        :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        :param custom_objects: values that replace those in the file, by name; ``{"replay_buffer": None}`` leaves the
            replay buffer out
        :param print_system_info: print information about this system and the one that saved the file
        :param force_reset: start a new episode; False: continue in mid-episode, bit for bit. If the state of the
            environment cannot be restored (see ``env_state``), a warning gives the reason, and a new episode starts
        :param allow_pickle: unpickle SB3's files and objects without an importable name, which can run any code
        :param kwargs: attributes to change, e.g. ``learning_rate``; ``seed`` restarts all random states
        :return: the model
        :raises CheckpointError: (a ValueError) if the file is damaged, does not fit, or needs ``allow_pickle=True``
        :raises ValueError: for ``kwargs`` that are no attributes
        """
        with model_file.open_model_file(path) as file:
            if print_system_info:
                _print_system_info(file.archive)
            data = model_file.read_data(file.archive, custom_objects, kwargs, allow_pickle)
            has_policy_kwargs = "policy_kwargs" in data or "policy_kwargs" in kwargs
            _check_data(data, kwargs, file.name)
            # What the state in the file was made from; in older files, that is the attribute
            made_from = decode(file.index["ent_coef"]) if "ent_coef" in file.index else data.get("ent_coef")
            env = None if env is None else cls._wrap_env(env, data.get("verbose", 0))
            goes_on = _fit_to_env(data, env) and not force_reset
            if not goes_on:
                data.update(_last_obs=None, _rollout=None)
            continues_random_states = env is not None and "random" in file.index and "seed" not in kwargs
            model = cls(policy=data["policy_class"], env=env, device=device, _init_setup_model=False)  # type: ignore[arg-type, call-arg]
            parameters = {*inspect.signature(cls).parameters} - {"policy", "_init_setup_model"}
            _check_names(kwargs, {*data, *dir(model), *parameters})
            ent_coef = kwargs.get("ent_coef", data.get("ent_coef", model.ent_coef))
            has_new_ent_coef = ent_coef != made_from
            model._set_up(data, kwargs, is_seeded=not continues_random_states)
            model._restore_policy(file, has_new_ent_coef, has_policy_kwargs)
            model._buffer_size_in_file = data.get("buffer_size")  # the zoo's push_to_hub saves the model again
            is_watched = kwargs.get("buffer_size") == BUFFER_SIZE_IF_WATCHED
            wants_replay = "replay_buffer" not in (custom_objects or {}) and not is_watched
            if env is None:
                replay = file.name if wants_replay and file.replay is not None else None
                model._unread = Unread(replay, env_state.without_envs(file.index.get("env")), model._n_updates)
                return model
            with naming(f"the state of the run in {file.name}"):
                if wants_replay:
                    model._restore_replay(file)
                if file.run is not None:
                    model._continue_folder(file, reads_replay=wants_replay and file.replay is not None)
                model._restore_envs(file, goes_on, force_reset)
                if kwargs.get("seed") is not None:
                    model.set_random_seed(model.seed)
                model._set_exploration_state(decode(file.index.get("exploration", [])))
                model._pending = Pending(file.index.get("callbacks"), force_reset, decode(file.index.get("log")))
                if continues_random_states:
                    set_random_states(decode(file.index["random"]), model.device)
                    if model._last_obs is not None:
                        env_now = env_state.capture(cast(VecEnv, model.env))
                        model._pending = model._pending._replace(random_states=file.index["random"], env=env_now)
            return model

    def _set_up(self, data: dict[str, Any], kwargs: dict[str, Any], is_seeded: bool) -> None:
        """
        Create networks and replay buffer of a new model.

        :param data: attributes from a file
        :param kwargs: attributes to change
        :param is_seeded: set the random states from the seed
        """
        vars(self).update(data)
        random_steps = self.learning_starts if self.random_steps is None else self.random_steps
        self._warmed_up = self._warmed_up or self.num_timesteps >= random_steps
        self._warmed_up_with = self.random_steps
        self._loaded = self._may_continue_episode = True
        if kwargs.get("tensorboard_log", self.tensorboard_log) != self.tensorboard_log:
            self._tensorboard_run = None
        self._adopt_sb3_classes()
        vars(self).update(kwargs)
        if "offline_data" in kwargs and self.offline_data is None:
            self._has_offline_data = True  # the user wants it no more
        self._stats_window_size = vars(self).pop("stats_window_size", self._stats_window_size)
        for name in ("ep_info_buffer", "ep_success_buffer"):
            setattr(self, name, deque(getattr(self, name) or (), maxlen=self._stats_window_size))
        seed = self.seed
        self.seed = seed if is_seeded else None
        self._setup_model()
        self.seed = seed

    def _restore_policy(self, file: ModelFile, has_new_ent_coef: bool, has_policy_kwargs: bool) -> None:
        try:
            model_file.read_parameters(file.archive, self, ENT_COEF_STATE if has_new_ent_coef else set())
        except CheckpointError as error:
            hint = "" if has_policy_kwargs else " The file has no policy_kwargs: pass policy_kwargs=... to load()."
            raise CheckpointError(f"{error}{hint}") from error
        frozen = file.index.get("frozen")
        if frozen is not None and has_new_ent_coef:
            frozen = [name for name in frozen if name != "log_ent_coef"]
        model_file.freeze(self, frozen, file.name)
        if self.use_sde:
            self.policy.reset_noise()  # type: ignore[operator]

    def _restore_replay(self, file: ModelFile) -> None:
        if file.replay is not None:
            file.restore_replay(self.replay_buffer)  # type: ignore[arg-type]
        elif file.index.get("replay") is not None:
            complete = [str(path) for path in RunFolder(atomic_files.as_path(file.name).parent).model_files()]
            raise CheckpointError(
                f"{file.name} is part of a checkpoint that was never completed, or that is in another folder: it lacks "
                f"the rows of its replay buffer. Load {' or '.join(complete) or 'another file'} instead, or continue "
                "without them: custom_objects={'replay_buffer': None}."
            )

    def _continue_folder(self, file: ModelFile, reads_replay: bool) -> None:
        """Let the next checkpoints in the folder of the file share its segments."""
        assert file.run is not None
        folder, manifest = file.run
        buffer = self.replay_buffer if reads_replay else None
        if buffer is not None and file.replay:
            here = buffer_state.describe(buffer), buffer_state.action_bounds(buffer)
            there = file.replay["description"], file.replay.get("action_bounds", here[1])
            if there != here:
                buffer = None  # rearranged rows and converted actions are not those of the segments
        folder.continues(manifest, buffer)
        self.run_folders = {folder.path.resolve(): folder}

    def _restore_envs(self, file: ModelFile, goes_on: bool, force_reset: bool) -> None:
        assert self.env is not None
        state = file.index.get("env")
        if state is None:
            reasons = [f"{file.name} has no state of the environment"]
        else:
            is_whole = not file.index.get("mid_step", False)
            reasons = env_state.restore(self.env, state, mid_episode=goes_on and is_whole)
            if not is_whole:
                reasons.append("it was saved while a step or an update was interrupted")
            elif reasons and not goes_on and self._vec_normalize_env is not None:
                warnings.warn(f"VecNormalize may not be fully restored: {'; '.join(reasons)}.", stacklevel=3)
            elif reasons and not goes_on and (owners := env_state.owners_of_statistics(state)):
                warnings.warn(
                    f"The running statistics of {', '.join(owners)} may not be restored, so that the policy sees other "
                    f"values than before: {'; '.join(reasons)}.",
                    stacklevel=3,
                )
            elif reasons and not goes_on:
                self._say(f"The environment's state is not fully restored: {'; '.join(reasons)}")
            if self._vec_normalize_env is not None and (reasons or not goes_on):
                changed = env_state.changed_settings(state, self._vec_normalize_env)
                if changed:
                    warnings.warn(
                        f"The policy will see other observations than it was trained with: {', '.join(changed)}.",
                        stacklevel=3,
                    )
            if self._vec_normalize_env is None and env_state.statistics(state) is not None:
                _warn_of_missing_vec_normalize("Pass VecNormalize(env): load() restores its statistics.")
        if goes_on:
            there, here = file.index.get("machine", {}), model_file.machine(self.device, self._known_threads())
            differences = [
                f"{name}: {there.get(name)} then, {here[name]} now"
                for name in here
                if None not in (there.get(name), here[name]) and there.get(name) != here[name]
            ]
            if differences:
                warnings.warn(f"The continuation may differ in rounding: {'; '.join(differences)}.", stacklevel=3)
        if not force_reset and (reasons or not goes_on):
            warnings.warn(
                "The run continues with a new episode, not in mid-episode, because "
                + ("; ".join(reasons) or "the file was saved without _last_obs"),
                stacklevel=3,
            )
            self._last_obs, self._rollout = None, None
        if self._last_obs is None and isinstance(self.replay_buffer, HerReplayBuffer):
            self._end_stored_episodes()  # else, learn() does

    def _end_stored_episodes(self) -> None:
        """End the episodes in the replay buffer, so that they get nothing from the next ones."""
        buffer = self.replay_buffer
        if buffer is None or buffer.size() == 0:
            return
        newest = (buffer.pos - 1) % buffer.buffer_size
        if isinstance(buffer, ReplayBuffer):
            buffer.end_episodes()
        elif isinstance(buffer, HerReplayBuffer):  # hindsight goals
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SB3 warns that it truncates
                buffer.truncate_last_trajectory()
        elif getattr(buffer, "optimize_memory_usage", False):  # the next observation of the newest row
            buffer.dones[newest] = True
        elif getattr(buffer, "handle_timeout_termination", False):  # n-step returns
            goes_on = buffer.dones[newest] == 0.0
            buffer.dones[newest, goes_on] = buffer.timeouts[newest, goes_on] = 1.0

    def _log_state(self) -> Any:
        """Values recorded since the last dump of the logger, but only the names of images and figures."""
        logger = getattr(self, "_logger", None)
        if self._pending.log is not None:
            return encode(self._pending.log)
        if logger is None:
            return None
        state: dict[str, Any] = {name: {} for name in LOGGER_STATE} | {NOT_SAVED: []}
        for name in LOGGER_STATE:
            for key, value in getattr(logger, name).items():
                try:
                    state[name][key] = encode(value)
                except NotEncodable:
                    state[NOT_SAVED].append(key)
        return state

    def save_replay_buffer(self, path: str | Path | BinaryIO) -> None:  # type: ignore[override]
        """
        Save the replay buffer in its own file, without pickle.

        :param path: name of the file (``.pkl`` is added to one without a suffix, as in SB3), or file object
        :raises NotEncodable: (a TypeError) if your own buffer class has an attribute that is not plain data
        """
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        index = self._replay_index(rows_elsewhere=False)
        buffer_state.check_rows(self.replay_buffer)
        with model_file.new_file(path, ".pkl") as file, ArchiveWriter(file) as archive:
            buffer_state.write_rows(archive, self.replay_buffer)
            archive.close({"replay": index})

    def load_replay_buffer(  # type: ignore[override]
        self, path: str | Path | BinaryIO, truncate_last_traj: bool = True, allow_pickle: bool = False
    ) -> None:
        """
        Load the replay buffer from a file of :meth:`save_replay_buffer` or :meth:`save`.

        :param path: name of the file, or file object
        :param truncate_last_traj: with HER: treat the last trajectory as finished
        :param allow_pickle: allow the pickles that SB3 writes, which can run any code
        :raises CheckpointError: (a ValueError) if the file is damaged, does not fit, or needs ``allow_pickle=True``
        """
        assert self.env is not None, "You must pass an environment at load time, before its replay buffer"
        if self._unread is not None:
            self._unread = self._unread._replace(replay=None)
        self._note_deleted_buffer()
        self.replay_buffer, before = None, self.replay_buffer
        self._setup_replay_buffer()
        buffer = cast(SB3ReplayBuffer, self.replay_buffer)
        self.replay_buffer = before
        self.replay_buffer = model_file.read_replay_buffer(path, buffer, allow_pickle)
        if isinstance(self.replay_buffer, HerReplayBuffer):
            if self.replay_buffer.env is None:
                self.replay_buffer.set_env(self.env)
            if truncate_last_traj:
                self.replay_buffer.truncate_last_trajectory()
        self.replay_buffer.device = self.device

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self.OF_PROCESS, *self.NOT_IN_FILES]

    def __getstate__(self) -> dict[str, Any]:
        """For ``deepcopy`` and ``pickle``."""
        return {name: value for name, value in vars(self).items() if name not in self.OF_PROCESS}


def _fit_to_env(data: dict[str, Any], env: VecEnv | None) -> bool:
    """
    Adapt the attributes of a model to its environments.

    :param data: attributes, changed in place
    :param env: environments, or None
    :return: whether the run can continue in mid-episode
    :raises ValueError: if the spaces are different
    """
    same_envs = env is not None and env.num_envs == data["n_envs"]
    if env is not None:
        check_for_correct_spaces(env, data["observation_space"], data["action_space"])
        data["n_envs"] = env.num_envs
        # As in a new model, random actions and wrappers that sample the space share one random state
        env.action_space._np_random = data["action_space"]._np_random
        data["action_space"] = env.action_space
    noise = data.get("action_noise")
    if not same_envs and isinstance(noise, VectorizedActionNoise):
        data["action_noise"] = noise.base_noise
    return same_envs and "_last_obs" in data


def _is_new(normalize: VecNormalize) -> bool:
    """Whether it has seen no observation."""
    rms = normalize.obs_rms if normalize.norm_obs else normalize.ret_rms
    parts = rms.values() if isinstance(rms, dict) else [rms]
    return all(part.count < 1.0 for part in parts)


def _warn_of_missing_vec_normalize(fix: str) -> None:
    warnings.warn(
        "The model was trained with VecNormalize, but the environment is not wrapped in it: the policy expects "
        f"normalised observations. {fix}",
        stacklevel=4,
    )


def _check_names(kwargs: dict[str, Any], known: set[str]) -> None:
    for name in kwargs.keys() - known:
        alike = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {alike[0]}?" if alike else " Set attributes of your own after load()."
        raise ValueError(f"load() got {name}={kwargs[name]!r}, but the model has no such argument or attribute.{hint}")


def _check_data(data: dict[str, Any], kwargs: dict[str, Any], name: str) -> None:
    """
    Check and complete the attributes of a model.

    :param data: attributes from a file, changed in place; those left out by ``save(exclude=...)`` may be in ``kwargs``
    :param kwargs: attributes to change, without ``policy_kwargs`` afterwards, since these cannot be changed
    :param name: name of the file
    :raises CheckpointError: if a required attribute is missing
    :raises ValueError: if ``policy_kwargs`` differ from those in the file
    """
    required = ("policy_class", "observation_space", "action_space", "n_envs")
    missing = [each for each in required if each not in data and each not in kwargs]
    if missing:
        arguments = ", ".join(f"{each}=..." for each in missing)
        raise CheckpointError(
            f"data in {name} has no {' and no '.join(missing)}: it is not a model file, or save(exclude=...) left that "
            f"out, which has no default. Pass {arguments} to load()."
        )
    data.update({each: kwargs[each] for each in required if each not in data})
    if kwargs.get("use_sde", data.get("use_sde")) != data.get("use_sde", kwargs.get("use_sde")):
        raise ValueError(
            f"use_sde={kwargs['use_sde']} differs from that of the file, whose networks are made for "
            f"use_sde={data['use_sde']}. Leave it out, or make a new model."
        )
    sde = {"use_sde": kwargs.get("use_sde", data.get("use_sde", False))}  # SB3 adds it to what the user passes
    is_given, given = "policy_kwargs" in kwargs, kwargs.pop("policy_kwargs", None) or {}
    data["policy_kwargs"] = {**sde, **data.get("policy_kwargs", given)}
    if is_given and {**sde, **given} != data["policy_kwargs"]:
        raise ValueError(
            f"policy_kwargs={given} differs from that of the file: {data['policy_kwargs']}. Leave it out, or make a "
            "new model and use set_parameters()."
        )


def _print_system_info(archive: ArchiveReader) -> None:
    print("== CURRENT SYSTEM INFO ==")
    get_system_info()
    if "system_info.txt" in archive:
        print("== SAVED MODEL SYSTEM INFO ==")
        with archive.open("system_info.txt") as stream:
            print(stream.read().decode(errors="replace"))
