"""
Hyperparameter studies of the RL Zoo (``-optimize --storage``) whose trials outlive their workers.

Optuna's heartbeats tell which trials have lost their worker. These are enqueued again, and whichever worker takes one
continues from its last checkpoint.
"""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from rl_zoo3.utils import ALGOS
from sqlalchemy.exc import IntegrityError, ProgrammingError

from sb3_softsac.callbacks import CheckpointCallback
from sb3_softsac.persistence.archive import CheckpointError
from sb3_softsac.persistence.run_folder import RunFolder
from sb3_softsac.softsac import SoftSAC
from sb3_softsac.upstream import find

HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 120  # a client of NFS may see a heartbeat a minute late
MAX_RETRIES = 5  # of one trial, which may be what kills its workers
N_CHECKPOINTS = 10  # of one trial
FOLDER = "checkpoints"  # user attribute of a trial: name of its folder

# None: journal files have no heartbeats, and their trials end with their workers
Heartbeat: Any = find("optuna.storages._heartbeat:BaseHeartbeat") or object
OnStale = Callable[[Study, FrozenTrial], None]


class JournalStorage(optuna.storages.JournalStorage, Heartbeat):
    """
    A journal file with heartbeats, which Optuna only has for databases. A heartbeat is the modification time of a file,
    which the file server sets, so the workers' clocks do not matter.

    :param path: the journal file
    :param on_stale: called for each trial that has lost its worker
    """

    def __init__(self, path: str, on_stale: OnStale):
        super().__init__(JournalFileBackend(path))
        self._heartbeats = Path(f"{path}.heartbeats")
        self._on_stale = on_stale

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id: int = super().create_new_trial(study_id, template_trial)
        self._heartbeat(trial_id)  # its worker may be killed before the first one
        return trial_id

    def record_heartbeat(self, trial_id: int) -> None:
        self._heartbeat(trial_id)

    def _heartbeat(self, name: object) -> float:
        self._heartbeats.mkdir(exist_ok=True)
        path = self._heartbeats / str(name)
        path.touch()
        return path.stat().st_mtime

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        oldest = self._heartbeat("now") - GRACE_SECONDS
        stale = []
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            with suppress(FileNotFoundError):  # it has ended meanwhile, or is about to begin
                if (self._heartbeats / str(trial._trial_id)).stat().st_mtime < oldest:
                    stale.append(trial._trial_id)
        return stale

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        if state == TrialState.RUNNING:
            self._heartbeat(trial_id)  # it may have waited for long
        is_set: bool = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            (self._heartbeats / str(trial_id)).unlink(missing_ok=True)
        return is_set

    def get_heartbeat_interval(self) -> int:
        return HEARTBEAT_SECONDS

    def get_heartbeat_stale_trial_callback(self) -> OnStale:
        return self._on_stale


class TrialSoftSAC(SoftSAC):
    """What the zoo makes for a trial. ``learn()`` continues from the trial's last checkpoint, if it has one."""

    def learn(self, total_timesteps: int, callback: Any = None, **kwargs: Any) -> "TrialSoftSAC":  # type: ignore[override]
        # The last one is ours: hyperparameters may have brought others
        folder = [each.save_path for each in callback if isinstance(each, CheckpointCallback)][-1]
        if not RunFolder(folder).numbers():
            return super().learn(total_timesteps, callback, **kwargs)
        model = SoftSAC.load(folder, self.env, device=self.device, force_reset=False)
        print(f"{folder.name} continues at step {model.num_timesteps:,}", flush=True)
        model.learn(total_timesteps - model.num_timesteps, callback, **kwargs)
        return self


def optimize(original: Callable[[Any], None], manager: Any) -> None:
    """
    Run the zoo's optimisation, and then the trials left by workers that have died meanwhile. The report of the worker
    that ends last covers all trials.

    :param original: method of the manager
    :param manager: manager of a study with a storage
    """
    with warnings.catch_warnings(), mock.patch.dict(ALGOS, {manager.algo: TrialSoftSAC}):
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats are, since 2021
        manager.is_interrupted = False
        with _heartbeats(manager) as studies:
            original(manager)
            while not manager.is_interrupted and (total := _total_with_orphans(studies[-1])) is not None:
                manager.max_total_trials = total
                original(manager)


@contextmanager
def _heartbeats(manager: Any) -> Iterator[list[Study]]:
    """
    Give the zoo's studies a storage with heartbeats.

    :return: the studies that have been created since
    """
    create_study, studies = optuna.create_study, []
    storage = _storage(manager.storage, partial(_on_stale, _folder_of_trials(manager)))

    def create(**kwargs: Any) -> Study:
        studies.append(create_study(**{**kwargs, "storage": storage}))
        fail_stale_trials(studies[-1])  # otherwise the zoo counts them as trials that run
        return studies[-1]

    with mock.patch.object(optuna, "create_study", create):
        yield studies


def _storage(url: str, on_stale: OnStale) -> BaseStorage:
    if url.endswith(".log"):  # as in the zoo
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(url, on_stale)
    connect = partial(
        RDBStorage,
        url,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=on_stale,
    )
    for _ in range(3):
        with suppress(IntegrityError, ProgrammingError):  # another worker creates the tables at the same time
            return connect()
        time.sleep(2.0)
    return connect()


def _folder_of_trials(manager: Any) -> Path:
    return Path(manager.log_path) / "trials"


def _on_stale(folder: Path, study: Study, trial: FrozenTrial) -> None:
    n_before = len(RetryHeartbeatStaleTrialCallback.retry_history(trial))
    if n_before < MAX_RETRIES:
        print(f"Trial {trial.number} has lost its worker: enqueued again", flush=True)
        RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)
    else:
        print(f"Trial {trial.number} has failed: it has lost {n_before + 1} workers", flush=True)
        if FOLDER in trial.user_attrs:
            shutil.rmtree(folder / trial.user_attrs[FOLDER], ignore_errors=True)


def _total_with_orphans(study: Study) -> int | None:
    """
    Wait until the trials that run elsewhere have ended, or have had time to show that their worker is alive.

    :return: number of trials that have not failed, if one of them is waiting for a worker; otherwise None
    """
    end = time.monotonic() + GRACE_SECONDS + HEARTBEAT_SECONDS
    while True:
        fail_stale_trials(study)
        states = [trial.state for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
        if TrialState.WAITING in states:
            return len(states)
        if TrialState.RUNNING not in states or time.monotonic() > end:
            return None
        time.sleep(HEARTBEAT_SECONDS / 10)


def objective(original: Callable[..., float], manager: Any, trial: Trial) -> float:
    """
    Run a trial that saves checkpoints, in a folder that is removed when it ends. A signal leaves the checkpoints for
    the next worker, as a kill does. ``original`` is the zoo's method.
    """
    folder = _folder_of(trial, _folder_of_trials(manager))
    every = manager.save_freq if manager.save_freq > 0 else manager.n_timesteps // N_CHECKPOINTS // manager.n_envs
    checkpoints = {
        "save_freq": max(every, 1),
        "save_path": folder,
        "on_signal": manager.n_jobs == 1,  # otherwise trials run in threads, which get none
    }
    given = manager.specified_callbacks or []
    of_trial = copy(manager)  # several threads may share the manager
    of_trial.specified_callbacks = [
        *(given if isinstance(given, list) else [given]),
        {"sb3_softsac.CheckpointCallback": checkpoints},
    ]
    try:
        value = original(of_trial, trial)
    except (Exception, KeyboardInterrupt) as error:
        manager.is_interrupted |= isinstance(error, KeyboardInterrupt)
        _remove(folder, trial)
        raise
    _remove(folder, trial)
    return value


def _folder_of(trial: Trial, folder_of_trials: Path) -> Path:
    """The trial's folder of checkpoints: a new one, or that of the worker that it has lost."""
    lost = folder_of_trials / trial.user_attrs[FOLDER] if FOLDER in trial.user_attrs else None
    if lost is not None and not _is_locked(lost):
        return lost
    # Other studies may use the same log folder
    trial.set_user_attr(FOLDER, f"trial_{trial.number}_{uuid4().hex[:8]}")
    folder = folder_of_trials / trial.user_attrs[FOLDER]
    if lost is not None:
        shutil.copytree(lost, folder)
    return folder


def _is_locked(folder: Path) -> bool:
    """Whether a worker writes to the folder, perhaps one that is suspended and was taken for dead."""
    run_folder = RunFolder(folder)
    try:
        run_folder.lock()
    except CheckpointError:
        return True
    run_folder.unlock()
    return False


def _remove(folder: Path, trial: Trial) -> None:
    # If this worker was suspended and taken for dead, the folder is another's by now
    trials = [each for each in trial.study.get_trials(deepcopy=False) if each.user_attrs.get(FOLDER) == folder.name]
    if all(each.state.is_finished() or each.number == trial.number for each in trials):
        shutil.rmtree(folder, ignore_errors=True)
