"""The scripts in ``examples/``, with few steps."""

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ARGUMENTS = {
    "dict_observations.py": ["--steps", "120"],
    "hindsight_replay.py": ["--steps", "220"],
    "images.py": ["--steps", "110"],
    "many_environments.py": ["--env", "Pendulum-v1", "--n-envs", "2", "--steps", "1010"],
}
HAVE_THEIR_OWN = {"offline_to_online.py", "onnx_policy.py", "population_based_training.py", "preemptible.py"}  # tests

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*ARGUMENTS, *HAVE_THEIR_OWN}


@pytest.mark.learning
@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.processes
def test_preemptible(tmp_path: Path) -> None:
    """The same command twice: ended by SIGTERM, and once more to the end."""
    command = [sys.executable, EXAMPLES / "preemptible.py", "--env", "InvertedPendulum-v5", "--steps", "600"]

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = ""
        while "total_timesteps" not in output and process.poll() is None:  # it is training
            output += process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        output += process.communicate(timeout=300)[0]
    assert process.returncode == 143, output
    saved = re.search(r"SIGTERM: saved a checkpoint at step (\d+)", output)
    assert "Starting at step 0\n" in output and saved is not None

    output = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=300, check=True).stdout
    assert f"Starting at step {saved[1]}\n" in output and "Finished at step 600\n" in output
