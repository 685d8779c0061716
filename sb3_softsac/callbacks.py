"""Callbacks for training with SoftSAC."""

import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from sb3_softsac.persistence import atomic_files, callback_state
from sb3_softsac.persistence.envs import env_state
from sb3_softsac.persistence.run_folder import RunFolder
from sb3_softsac.softsac import SoftSAC
from sb3_softsac.validation import is_int

EXIT_STATUS = 143  # 128 + SIGTERM: schedulers expect it of a job that they have stopped
UNCATCHABLE = {getattr(signal, name) for name in ("SIGKILL", "SIGSTOP") if hasattr(signal, name)}


class CheckpointCallback(BaseCallback):
    """
    Save checkpoints of the whole run, including the replay buffer, to a folder. ``SoftSAC.load(folder, env)`` continues
    from it. Checkpoints are incremental, and remain valid whenever the process ends.

    :param save_freq: calls of the callback between checkpoints, as in SB3: environment steps divided by the number of
        environments; 0: only on signals
    :param save_path: folder without checkpoints of another run; on object storage, ``"s3://bucket/run"``
    :param keep_last: number of checkpoints to keep, at least 1
    :param on_signal: on these signals, save a checkpoint at the end of the current step and exit with status 143: names
        or numbers such as ``("SIGTERM", "SIGUSR2")``; True: SIGTERM and SIGUSR1; False: none
    :param save_replay_buffer: save the replay buffer, too
    :param verbose: 1: report each checkpoint
    :raises ValueError: for invalid values; at the start of training, if ``save_path`` has checkpoints of another run;
        at the start of training or at the first checkpoint, if another run is writing there
    """

    model: SoftSAC

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path,
        keep_last: int = 2,
        on_signal: bool | Iterable[str | int] = True,
        save_replay_buffer: bool = True,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        if not (is_int(save_freq, 0) and is_int(keep_last, 1)):
            raise ValueError(
                f"save_freq={save_freq!r} must be an integer of at least 0, and keep_last={keep_last!r} of at least 1."
            )
        self.save_freq = save_freq
        self.save_path = atomic_files.as_path(save_path)
        self.keep_last = keep_last
        self.on_signal = _signals(on_signal)
        self.save_replay_buffer = save_replay_buffer
        self._signal: int | None = None

    def _init_callback(self) -> None:
        if not isinstance(self.model, SoftSAC):
            name = type(self.model).__name__
            raise ValueError(f"CheckpointCallback saves SoftSAC, not {name}: use SB3's CheckpointCallback.")
        if self.save_path.exists() and not self.save_path.is_dir():
            raise ValueError(f"save_path={str(self.save_path)!r} is a file: choose a folder.")
        folders = self.model.run_folders = self.model.run_folders or {}
        path = self.save_path.resolve()
        self._folder = folders.get(path, RunFolder(self.save_path))
        if path not in folders and self._folder.numbers():
            raise ValueError(
                f"save_path={str(self.save_path)!r} has checkpoints of another run: continue it with "
                f"SoftSAC.load({str(self.save_path)!r}, env), or choose another folder."
            )
        folders[path] = self._folder

    def _on_training_start(self) -> None:
        if self.save_path.is_dir():  # otherwise the first checkpoint makes and locks it
            self._folder.lock()
        if self._save_and_exit not in (self.model.after_step or ()):
            self._signal = None  # from a run that ended before its checkpoint
        if not self.on_signal:
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("on_signal has no effect: signals can only be handled in the main thread.", stacklevel=2)
            return
        env_state.ignore_signals(self.training_env, self.on_signal)
        for callback in callback_state.walk(self.model._callback):
            if isinstance(eval_env := getattr(callback, "eval_env", None), VecEnv):
                env_state.ignore_signals(eval_env, self.on_signal)
        for number in self.on_signal:
            before = signal.getsignal(number)
            if getattr(before, "__self__", None).__class__ is not _Handler:
                signal.signal(number, _Handler(before).handle)
            signal.getsignal(number).__self__.callback = self  # type: ignore[union-attr]

    def _on_step(self) -> bool:
        if self.save_freq > 0 and self.n_calls % self.save_freq == 0:
            self._save_after_step()
        return True

    def _save_after_step(self) -> None:
        # Not now: callbacks after this one have not seen the step yet
        queue = self.model.after_step
        if queue is not None and self._save_and_exit not in queue:
            queue.append(self._save_and_exit)

    def _save_and_exit(self) -> None:
        try:
            self.save()
        finally:
            number, self._signal = self._signal, None
        if number is not None:
            name, step = signal.Signals(number).name, self.model.num_timesteps
            text = f"{name}: saved a checkpoint at step {step} in {self.save_path}, exiting."
            try:
                print(text, flush=True)
            except OSError:  # the program that reads our output was stopped, too
                sys.stdout = None  # otherwise Python would flush it at exit and change the status
            raise SystemExit(EXIT_STATUS)

    def save(self) -> None:
        """
        Save a checkpoint now.

        :raises CheckpointError: if another run is writing to the folder
        """
        model = self.model
        self._folder.lock()
        try:
            buffer = model.savable_replay_buffer() if self.save_replay_buffer else None
            leaves_out = not self.save_replay_buffer or (buffer is None and model.replay_buffer is not None)
            exclude = ("replay_buffer",) if leaves_out else ()
            self._folder.save(
                model.num_timesteps,
                lambda file: model.write(file, exclude, rows_elsewhere=True),
                buffer,
                self.keep_last,
            )
        finally:
            if not model.is_learning:  # otherwise the end of learn() unlocks it
                self._folder.unlock()
        if self.verbose > 0:
            print(f"Saved a checkpoint at step {model.num_timesteps} in {self.save_path}")


def _signals(on_signal: bool | Iterable[str | int]) -> list[signal.Signals]:
    if isinstance(on_signal, bool):
        return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if on_signal and hasattr(signal, name)]
    try:
        if isinstance(on_signal, str):
            raise ValueError
        found = [signal.Signals[each] if isinstance(each, str) else signal.Signals(each) for each in on_signal]
        if set(found) & UNCATCHABLE:
            raise ValueError
        return found
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"on_signal={on_signal!r} is not valid: use True, False, or names of signals that a process can catch, "
            "such as ('SIGTERM', 'SIGUSR2')."
        ) from None


class _Handler:
    """
    Signal handler: requests a checkpoint while the model is learning, and calls the previous handler otherwise.

    :param before: previous handler
    """

    def __init__(self, before: Any):
        self.before = before
        self.callback: CheckpointCallback | None = None
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        is_here = os.getpid() == self._process  # and not in a child that was forked while the model was learning
        if is_here and self.callback is not None and self.callback.model.is_learning:
            # A second signal must not end the process before the checkpoint is complete
            self.callback._signal = self.callback._signal or number
            self.callback._save_after_step()
        elif callable(self.before):
            self.before(number, frame)
        elif self.before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class SaveBestTrainingReturnCallback(BaseCallback):
    """
    Save the model with the best mean training return, above a threshold. This needs no evaluation episodes: the return
    is that of the exploring policy, averaged over the last ``stats_window_size`` episodes.

    :param threshold: mean return above which models are saved
    :param save_path: folder for ``<name>.zip`` and, with VecNormalize, ``<name>_vecnormalize.pkl``; None: the folder of
        the run, in the RL Zoo only
    :param name: file name without suffix
    :param min_episodes: finished episodes before the first save, at most ``stats_window_size``
    :param verbose: 1: report each save
    :raises ValueError: at the start of training, if ``save_path`` is None
    """

    def __init__(
        self,
        threshold: float = float("-inf"),
        save_path: str | None = None,
        name: str = "best_training_model",
        min_episodes: int = 10,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        self.threshold = float(threshold)
        self.save_path = save_path
        self.name = name
        self.min_episodes = min_episodes
        self.best_mean_return = self.threshold
        self._episodes_seen = -1

    def _init_callback(self) -> None:
        if self.save_path is None:
            raise ValueError("save_path=None only works in the RL Zoo, where it is the run's folder: pass a folder.")
        # A continued run has the best return of the file that it was loaded from: a new folder gets its own best model
        self._path = atomic_files.as_path(self.save_path) / f"{self.name}.zip"
        self._is_there = self._path.exists()

    def _on_step(self) -> bool:
        # SB3 tells nothing of rollouts to callbacks within EveryNTimesteps and its like
        all_callbacks = getattr(self.model, "_callback", None)
        if self.model._episode_num != self._episodes_seen and callback_state.is_on_event(self, all_callbacks):
            self._on_rollout_end()
        return True

    def _on_rollout_end(self) -> None:
        returns = [info["r"] for info in self.model.ep_info_buffer or ()]
        if not returns and self.model._episode_num > 0 and self._episodes_seen < 0:
            self._episodes_seen = 0
            warnings.warn(
                "SaveBestTrainingReturnCallback gets no returns of finished episodes and will save nothing: wrap the "
                "environments in Monitor, or the vectorised one in VecMonitor.",
                stacklevel=2,
            )
        enough = min(self.min_episodes, self.model._stats_window_size)
        if self.model._episode_num == self._episodes_seen or len(returns) < enough:
            return
        self._episodes_seen = self.model._episode_num
        mean_return = float(safe_mean(returns))
        if mean_return <= max(self.threshold, self.best_mean_return if self._is_there else self.threshold):
            return
        self.best_mean_return, self._is_there = mean_return, True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.model.save(self._path, exclude=["replay_buffer"])
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            with atomic_files.atomic_file(self._path.with_name(f"{self.name}_vecnormalize.pkl")) as file:
                pickle.dump(vec_normalize, file)  # as VecNormalize.save(), which takes local files only
        if self.verbose > 0:
            print(f"Mean training return {mean_return:.1f} at step {self.num_timesteps}: saved {self.name}.zip")
