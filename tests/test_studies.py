"""
Studies of the RL Zoo with several workers, one of which is lost: its trial goes on in another, from its checkpoint.

The workers are the zoo's own commands. Only the seconds after which a worker counts as dead are fewer.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from resume_script import in_new_process

pytestmark = [pytest.mark.slow, pytest.mark.processes]

N_TRIALS, N_STEPS = 3, 300
WORKER = """
from sb3_softsac._rl_zoo3 import studies
studies.HEARTBEAT_SECONDS, studies.GRACE_SECONDS = 1, 8
from rl_zoo3.train import train
train()
"""
SMALL = ["n_envs:1", "learning_starts:280", "buffer_size:1000", "compile:False"]
OPTIONS = [
    *("--algo", "softsac", "--env", "Pendulum-v1", "-n", str(N_STEPS), "-optimize", "--study-name", "study"),
    *("--max-total-trials", str(N_TRIALS), "--n-evaluations", "3", "--eval-episodes", "1", "--no-optim-plots"),
    *("--pruner", "none"),
]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """:return: URL of an empty database; its server listens on a socket in a temporary folder"""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'sb3-softsac[postgresql]'")
    commands = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")) or [shutil.which("pg_ctl")]
    if commands[-1] is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pg_ctl = str(commands[-1])
    folder = tempfile.mkdtemp(prefix="pg")  # short: a socket's path has at most 107 characters
    # The server refuses to run as root, whom Debian's package gives another user
    user = "postgres" if os.getuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)

    def run(*args: str) -> None:
        subprocess.run([pg_ctl, "-D", f"{folder}/data", *args], cwd=folder, user=user, check=True, stdout=sys.stderr)

    run("initdb", "-o", "-U postgres -A trust")
    run("start", "-w", "-l", f"{folder}/log", "-o", f"-k {folder} -c listen_addresses='' -c fsync=off")
    try:
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    finally:
        run("stop", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "study.log") if request.param == "journal" else str(request.getfixturevalue("postgresql"))


def trials_in(storage: str) -> list[FrozenTrial]:
    """:return: trials of the study"""
    if storage.endswith(".log"):
        return optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend(storage))).trials
    database = RDBStorage(storage)
    try:
        return optuna.load_study(study_name="study", storage=database).trials
    finally:
        database.remove_session()
        database.engine.dispose()


class Worker:
    """A command of the zoo, in the background."""

    def __init__(self, storage: str, folder: Path):
        self.output = folder / f"worker_{len(list(folder.glob('worker_*')))}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, *OPTIONS, "--storage", storage, "-params", *SMALL],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(12_000):
            if condition():
                return
            assert self.process.poll() is None, f"ended before {what}:\n{self.output.read_text()}"
            time.sleep(0.01)
        pytest.fail(f"no {what} in two minutes")

    def end(self) -> str:
        status = self.process.wait(timeout=600)
        text = self.output.read_text()
        assert status == 0, text
        return text


@pytest.fixture
def start(storage: str, tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    workers: list[Worker] = []

    def start() -> Worker:
        workers.append(Worker(storage, tmp_path))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


@pytest.mark.parametrize(
    ("storage", "number"),
    [
        ("journal", signal.SIGKILL),
        ("postgresql", signal.SIGKILL),
        ("journal", signal.SIGTERM),
        ("journal", signal.SIGSTOP),  # taken for dead, it comes back when all is over
    ],
    indirect=["storage"],
)
def test_lost_worker(start: Callable[[], Worker], storage: str, number: signal.Signals, tmp_path: Path) -> None:
    victim = start()
    trials = tmp_path / "logs/softsac/trials"
    victim.wait_until(lambda: any(trials.glob("trial_0_*")), "a trial")
    others = [start() for _ in range(2)]
    victim.wait_until(lambda: any(trials.glob("trial_0_*/ckpt-*.json")), "a checkpoint")
    victim.process.send_signal(number)
    texts = [worker.end() for worker in others]

    victim.process.send_signal(signal.SIGCONT)
    statuses = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGSTOP: 1}
    assert victim.process.wait(timeout=300) == statuses[number], victim.output.read_text()

    # Every trial has ended, those of the report are those of the study, and nothing is left on the disk
    ended = trials_in(storage)
    states = [trial.state for trial in ended]
    assert (
        states.count(TrialState.COMPLETE) == N_TRIALS and states.count(TrialState.FAIL) == 1 == len(states) - N_TRIALS
    )
    assert ended[0].state == TrialState.FAIL
    reports = sorted(tmp_path.glob("logs/softsac/report_*.csv"), key=lambda path: path.stat().st_mtime_ns)
    rows = list(csv.DictReader(reports[-1].read_text().splitlines()))
    assert [row["state"] for row in rows] == [state.name for state in states]
    assert not list(trials.iterdir())
    if number != signal.SIGSTOP:  # which gives one more sign of life
        assert not [path for path in tmp_path.glob("study.log.heartbeats/*") if path.name != "now"]

    # The lost one went on, with all that its evaluations had found before
    found = re.findall(r"trial_\d_\w+ continues at step ([\d,]+)", "".join(texts))
    assert len(found) == 1 and N_STEPS // 10 <= int(found[0].replace(",", "")) < N_STEPS
    (again,) = [trial for trial in ended if trial.system_attrs.get("failed_trial") == 0]
    assert again.params == ended[0].params and list(again.intermediate_values) == [1, 2, 3]
    assert again.intermediate_values.items() >= ended[0].intermediate_values.items()


def test_workers_begin_at_once(postgresql: str, tmp_path: Path) -> None:
    """In a new database, all of them want to create the tables."""
    import psycopg

    with psycopg.connect(postgresql.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE new")
    url = postgresql.replace("/postgres?", "/new?")
    code = f"from sb3_softsac._rl_zoo3 import studies; studies._storage({url!r}, print)"
    workers = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(4)]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * 4


def lose_again_and_again(folder: Path) -> list[str]:
    """:return: states of the trials of a study after each loss of a worker"""
    from sb3_softsac._rl_zoo3 import studies  # only in a process of its own: the zoo changes Gymnasium

    warnings.simplefilter("ignore", ExperimentalWarning)
    study = optuna.create_study()
    study.ask().set_user_attr(studies.FOLDER, "trial_0")
    states = []
    for _ in range(studies.MAX_RETRIES + 1):
        study.tell(study.trials[-1].number, state=TrialState.FAIL)
        studies._on_stale(folder, study, study.trials[-1])
        assert (folder / "trial_0").exists() == (study.trials[-1].state == TrialState.WAITING)
        states.append(study.trials[-1].state.name)
        study.ask()
    return states


def test_trial_that_ends_its_workers(tmp_path: Path) -> None:
    """It is enqueued again a few times, then it has failed and its files are removed."""
    (tmp_path / "trial_0").mkdir()
    assert in_new_process(lose_again_and_again, tmp_path) == [*["WAITING"] * 5, "FAIL"]


def stale_trials(path: str, enqueued: bool) -> list[list[int]]:
    """Stale ones as soon as there is a trial, and when its worker has been silent for long."""
    from sb3_softsac._rl_zoo3 import studies

    storage = studies.JournalStorage(path, lambda study, trial: None)
    study = optuna.create_study(storage=storage)
    if enqueued:
        study.enqueue_trial({})
        make_old(Path(f"{path}.heartbeats"))
    study.ask()
    found = [storage._get_stale_trial_ids(study._study_id)]
    make_old(Path(f"{path}.heartbeats"))
    return [*found, storage._get_stale_trial_ids(study._study_id)]


def make_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("enqueued", [False, True])
def test_worker_that_was_killed_before_its_first_heartbeat(enqueued: bool, tmp_path: Path) -> None:
    assert in_new_process(stale_trials, str(tmp_path / "journal"), enqueued) == [[], [0]]
