"""
``examples/slurm/array.sh``: runs that Slurm interrupts and starts again equal those that it leaves alone.

The slow test does it with Slurm's own daemons, which need `apt-get install slurm-wlm munge` or the like. The quick one
has stand-ins for the two commands that the script calls.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from resume_script import differences, snapshot

from sb3_softsac import SoftSAC

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DAEMONS = ("munged", "slurmctld", "slurmd")
STEPS = 1000
LEARNING = 120  # steps after which a process learns for sure
ENV = "test_slurm:Interruptible-v0"  # gymnasium imports this module
SECONDS = 600  # that anything may take

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


class Interruptible(gym.Wrapper):  # type: ignore[type-arg]
    """Says when the process learns, and is slow from then on, so that it is interrupted three times before its end."""

    n_steps = 0  # of this process: no state of the environment

    def step(self, action: Any) -> Any:
        Interruptible.n_steps += 1
        restart = int(os.environ.get("SLURM_RESTART_COUNT", 0 if "SLURM_JOB_ID" in os.environ else 3))
        if Interruptible.n_steps == LEARNING:
            print(f"learning, restart {restart}", flush=True)
        if Interruptible.n_steps > LEARNING and restart < 3:
            time.sleep(0.2)
        return super().step(action)


gym.register(
    "Interruptible-v0", lambda: Interruptible(gym.make("Pendulum-v1", max_episode_steps=100)), disable_env_checker=True
)


def arguments(n_steps: int) -> list[str]:
    return ["--env", ENV, "--steps", str(n_steps)]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """For processes that find Python, our modules and the commands in a folder."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), **changes}


def run_alone(folder: Path, seed: int, n_steps: int) -> None:
    command = [sys.executable, str(EXAMPLES / "preemptible.py"), "--seed", str(seed), "--folder", str(folder)]
    subprocess.run(command + arguments(n_steps), env=environment(folder), check=True, timeout=SECONDS)


def assert_same_run(one: Path, other: Path, n_steps: int) -> None:
    states = []
    for folder in (one, other):
        model = SoftSAC.load(folder, gym.make(ENV), device="cpu", force_reset=False)
        assert model.num_timesteps == n_steps and model._n_updates > LEARNING // 2
        states.append(snapshot(model))
    assert differences(*states) == []


def wait_for(what: Callable[[], Any], message: Callable[[], str]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, message()
        time.sleep(0.2)


@pytest.mark.processes
def test_with_stand_ins(tmp_path: Path) -> None:
    commands = {"srun": 'echo $$ > pid; exec "$@"', "scontrol": 'echo "$@" > scontrol'}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    script = ["bash", str(EXAMPLES / "slurm" / "array.sh"), *arguments(200)]
    for restart, expected in enumerate((143, 0)):
        env = environment(
            tmp_path, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT=str(3 * restart)
        )
        with subprocess.Popen(script, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            output = ""
            while restart == 0 and "learning" not in output and process.poll() is None:
                output += process.stdout.readline()
            if restart == 0:
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
            output += process.communicate(timeout=SECONDS)[0]
        assert process.returncode == expected, output
        assert ("SIGUSR1: saved a checkpoint" in output) == (restart == 0)
        assert (tmp_path / "scontrol").exists() == (restart == 0)
        if restart == 0:
            assert (tmp_path / "scontrol").read_text() == "requeue 7_3\n"
            (tmp_path / "scontrol").unlink()
    assert "Starting at step 0\n" not in output and "Finished at step 200\n" in output
    run_alone(tmp_path / "alone", 3, 200)
    assert_same_run(tmp_path / "runs" / "3", tmp_path / "alone", 200)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Slurm:
    """
    A cluster of this machine alone.

    :param folder: for all of its files
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = environment(folder, SLURM_CONF=str(folder / "slurm.conf"))
        host, user = socket.gethostname(), getpass.getuser()
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": user,
            "SlurmdUser": user,
            "SlurmctldPort": free_port(),
            "SlurmdPort": free_port(),
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder / 'munge'},cred_expire=5",  # how long a requeued job waits
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",  # a job on each thread of a core
            "MpiDefault": "none",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines.append(f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2")
        lines.append("PartitionName=all Nodes=ALL Default=YES")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)

    def daemons(self) -> list[list[str]]:
        munged = ["munged", "--foreground", "--force"]
        files = {"key": "key", "seed": "seed", "pid": "munged.pid", "log": "munged.log"}
        munged += [f"--{option}-file={self.folder / name}" for option, name in files.items()]
        return [[*munged, f"--socket={self.folder / 'munge'}"], ["slurmctld", "-D"], ["slurmd", "-D"]]

    def __call__(self, *command: Any) -> str:
        """:return: what a command of Slurm prints"""
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def is_idle(self) -> bool:
        return "idle" in subprocess.run(["sinfo", "-h"], env=self.environment, capture_output=True, text=True).stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    cluster = Slurm(tmp_path)
    with ExitStack() as stack, (tmp_path / "daemons.log").open("wb") as log:
        for command in cluster.daemons():
            process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
            stack.callback(process.wait, timeout=60)
            stack.callback(process.terminate)
            time.sleep(1)
        wait_for(cluster.is_idle, (tmp_path / "daemons.log").read_text)
        yield cluster
        cluster("scancel", "--full", "--user", getpass.getuser())


@pytest.mark.slow
def test_requeued_three_times(slurm: Slurm) -> None:
    """At the time limit, as by a job of higher priority, and because the node is down."""
    folder = slurm.folder
    (folder / "examples").symlink_to(EXAMPLES)
    (folder / "logs").mkdir()
    script = EXAMPLES / "slurm" / "array.sh"
    job = slurm("sbatch", "--parsable", "--array=1-2", script, *arguments(STEPS))
    log = folder / "logs" / "softsac-2.txt"

    def wait_until(text: str) -> None:
        wait_for(lambda: log.exists() and text in log.read_text(), lambda: log.read_text() if log.exists() else "none")

    wait_until("learning, restart 0")
    minutes = int(slurm("squeue", "-h", "-o", "%M", "-j", f"{job}_2").split(":")[0])
    slurm("scontrol", "update", f"JobId={job}_2", f"TimeLimit={minutes + 2}")
    wait_until("SIGUSR1: saved a checkpoint")
    slurm("scontrol", "update", f"JobId={job}_2", "TimeLimit=240")
    wait_until("learning, restart 1")
    slurm("scontrol", "requeue", f"{job}_2")
    wait_until("SIGTERM: saved a checkpoint")
    wait_until("learning, restart 2")
    node = f"NodeName={socket.gethostname()}"
    slurm("scontrol", "update", node, "State=DOWN", "Reason=test")
    slurm("scontrol", "update", node, "State=RESUME")
    wait_until("learning, restart 3")
    wait_until(f"Finished at step {STEPS}")
    assert log.read_text().count("Starting at step") == 4
    other = (folder / "logs" / "softsac-1.txt").read_text()
    assert 1 <= other.count("Starting at step") <= 2, "the node's failure is the only one that concerns the other task"
    run_alone(folder / "alone", 2, STEPS)
    assert_same_run(folder / "runs" / "2", folder / "alone", STEPS)
