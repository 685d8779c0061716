"""``benchmarks/learning.py``: runs that are killed and resumed, and the report; and that documents say what it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "learning.py"
RESULTS = ROOT / "benchmarks" / "results"
RUN = [
    *("run", "--algo", "softsac", "--env", "Pendulum-v1", "--steps", "600", "--eval-freq", "150"),
    *("--eval-episodes", "2", "--final-episodes", "3", "--checkpoint-freq", "200", "--seed", "1"),
    *("--option", "policy_kwargs.net_arch=[32, 32]"),
]

pytest.importorskip("rliable")
sys.path.insert(0, str(SCRIPT.parent))

import ablation  # noqa: E402
import hours  # noqa: E402
import learning  # noqa: E402
import learning_report  # noqa: E402
import record  # noqa: E402

pytestmark = pytest.mark.processes


def start(*args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """The script, in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    learning.main()


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def evaluations(folder: Path) -> list[list[str]]:
    """Without the times."""
    lines = [line.split(",") for line in (folder / "evaluations.csv").read_text().splitlines()]
    return [line[:4] + line[6:] for line in lines]


def test_run_that_is_killed_and_resumed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    others = start(*RUN, "--out", str(whole))
    process = start(*RUN, "--out", str(killed))
    deadline = time.monotonic() + 200
    # After the evaluation at step 300, the last checkpoint is that of step 200
    while not (csv := killed / "evaluations.csv").exists() or "\n300," not in csv.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished(others)
    output = finished(start("resume", str(killed)))

    assert "goes on from step 200" in output
    assert evaluations(killed) == evaluations(whole)
    assert len(evaluations(whole)) == 1 + 4
    assert (killed / "final.csv").read_text() == (whole / "final.csv").read_text()
    assert not (killed / "checkpoints").exists()
    (resumed,) = json.loads((killed / "run.json").read_text())["resumed"]
    assert resumed["at_step"] == 200 and [row.split(",")[0] for row in resumed["made_again"]] == ["300"]

    command(monkeypatch, "report", str(tmp_path))
    text = capsys.readouterr().out
    assert "1 of 1" in text, "the evaluation that was made again is the same"
    assert (tmp_path / "report.md").read_text() in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_report_while_runs_are_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One has no evaluation yet, one is writing a line, or was killed when it did."""
    shutil.copytree(RESULTS / "learning_compiled", tmp_path / "runs")
    folders = sorted(path.parent for path in (tmp_path / "runs").rglob("run.json"))
    header, *rows = (folders[0] / "evaluations.csv").read_text().splitlines(keepends=True)
    (folders[0] / "evaluations.csv").write_text("".join([header, *rows[:3], rows[3][:9]]))
    (folders[1] / "evaluations.csv").write_text(header)
    (folders[2] / "evaluations.csv").unlink()
    runs = [run for arms in learning_report.read_runs(tmp_path).values() for arm in arms.values() for run in arm]
    assert len(runs) == len(folders) - 2
    (cut,) = [run for run in runs if run.folder == folders[0]]
    assert len(cut.evaluations["steps"]) == 3 and not np.isnan(cut.evaluations["mean_return"]).any()
    assert capsys.readouterr().out.count("has no evaluation yet") == 2


def test_options_and_parts_of_them() -> None:
    arguments = learning.read_hyperparameters(ROOT / "hyperparams" / "compact.yml", "Pendulum-v1", "softsac")
    learning.set_option(arguments, "policy_kwargs.unit_norm", None)
    learning.set_option(arguments, "tau", 0.1)
    learning.set_option(arguments, "replay_buffer_kwargs.handle_timeout_termination", False)
    assert arguments["policy_kwargs"]["unit_norm"] is None and arguments["policy_kwargs"]["n_atoms"] == 101
    assert arguments["tau"] == 0.1 and arguments["learning_rate"] == "lin_3e-4_3e-5"
    assert arguments["replay_buffer_kwargs"] == {"handle_timeout_termination": False}


@pytest.mark.parametrize("env_id", ["Humanoid-v5", "HalfCheetah-v5", "InvertedPendulum-v5"])
def test_sac_gets_what_it_has(env_id: str) -> None:
    """Of the shipped hyperparameters, with those of its policy."""
    arguments = learning.read_hyperparameters(ROOT / "hyperparams" / "softsac.yml", env_id, "sac")
    model = SAC(env=gym.make("Pendulum-v1"), **arguments)
    assert model.learning_starts == arguments["learning_starts"]


def test_a_finished_or_begun_run_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match="already holds a run"):
        command(monkeypatch, *RUN, "--out", str(tmp_path))
    assert (tmp_path / "run.json").read_text() == "{}"


@pytest.mark.parametrize(("algo", "message"), [("sac", "cannot be resumed"), ("softsac", "has no checkpoint")])
def test_what_cannot_be_resumed(tmp_path: Path, algo: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run": {"algo": algo}}))
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, "resume", str(tmp_path))


@pytest.mark.parametrize(
    ("folder", "n_tables"),
    [
        ("learning", 2),
        ("learning_compiled", 2),
        ("learning_compact", 1),
        ("learning_half_wide", 1),
        ("learning_offline", 1),
    ],
)
def test_documents_show_the_recorded_results(folder: str, n_tables: int) -> None:
    tables = learning_report.report_tables(learning_report.read_runs(RESULTS / folder))
    shown = 0
    for path in record.documents():
        text = path.read_text()
        assert record.filled(text, {f"{folder}: {name}": table for name, table in tables.items()}) == text
        shown += text.count(f"<!-- {folder}: ")
    assert shown >= n_tables


def test_only_runs_of_one_length_are_compared() -> None:
    tasks = learning_report.read_runs(RESULTS / "learning_compiled")
    assert "HalfCheetah-v5" in learning_report.comparison_table(tasks)
    (arms,) = tasks.values()
    arms[learning_report.REFERENCE] = [run._replace(steps=run.steps + 1) for run in arms[learning_report.REFERENCE]]
    assert "HalfCheetah-v5" not in learning_report.comparison_table(tasks)


def test_runs_are_named_after_what_they_were_made_with(tmp_path: Path) -> None:
    """Also if their file was changed since then."""
    config = tmp_path / "mine.yml"
    config.write_text("default: {policy: MlpPolicy, n_timesteps: 10, batch_size: 64, policy_kwargs: {unit_norm: all}}")
    run = {"algo": "softsac", "env": "Pendulum-v1", "config": str(config), "option": [["batch_size", "32"]]}
    made_with = {"policy": "MlpPolicy", "batch_size": "32", "policy_kwargs": "{'n_atoms': 101, 'use_sde': False}"}
    record = {"run": run, "hyperparameters": made_with}
    name = "SoftSAC mine batch_size=32 policy_kwargs.n_atoms=101 policy_kwargs.unit_norm=null"
    assert learning_report.arm_name(record) == name
    config.write_text("default: {policy: MlpPolicy, batch_size: 32, policy_kwargs: {n_atoms: 101}}")
    assert learning_report.arm_name(record) == "SoftSAC mine"


def test_ablation_is_that_of_the_recorded_runs() -> None:
    tasks = ablation.read_tasks()
    variants = ablation.read(tasks)
    table = ablation.table(variants, list(tasks))
    text = (ROOT / "docs" / "guide" / "networks.md").read_text()
    assert "<!-- ablation -->" in text and record.filled(text, {"ablation": table}) == text
    whole, *others = variants
    assert whole.name == ablation.WHOLE and len(others) >= 1
    narrow = next(each for each in others if each.name == "blocks half as wide")
    assert 0.5 < narrow.operations / whole.operations < 0.6
    n_recorded = sum(len(runs) for arms in tasks.values() for runs in arms.values())
    assert sum(len(runs) for each in variants for runs in each.runs.values()) == n_recorded  # none has an unknown name


def test_return_over_time_is_that_of_the_recorded_runs_and_rates() -> None:
    tasks = hours.read(hours.RATES)
    text = (ROOT / "docs" / "guide" / "networks.md").read_text()
    assert "<!-- hours -->" in text and record.filled(text, {"hours": hours.table(tasks)}) == text
    curve = tasks["HalfCheetah-v5"]["SoftSAC"]
    (run, *_), starts = curve.runs, 10_000
    assert curve.minutes(run)[0] == 0.0 and run.learning_starts == starts
    assert curve.minutes(run)[-1] == pytest.approx((300_000 - starts) / curve.rate / 60)
    assert curve.after(curve.end()) == pytest.approx(
        np.median([each.evaluations["mean_return"][-6:].mean() for each in curve.runs]), rel=0.1
    )
