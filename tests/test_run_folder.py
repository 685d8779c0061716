"""
Folders of checkpoints: a disk that fails, a process that is killed, a power failure, damage, and the command line.

The slow tests kill 2,900 processes, try 41,000 states of a disk whose power has failed, flip 110,000 bits and damage
20,000 folders in other ways; the others do a part of it.
"""

import errno
import fnmatch
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from crash_tools import (
    ROWS,
    STEPS,
    Killer,
    Materialized,
    RecordedDisk,
    Shim,
    add_rows,
    contents,
    expected,
    in_child,
    load,
    load_quietly,
    make_buffer,
    mutate,
    needs_little,
    quick,
    save,
    save_on,
    without_sync,
)
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_atomic_files import Faults

from sb3_softsac import SoftSAC, checkpoint
from sb3_softsac.callbacks import CheckpointCallback
from sb3_softsac.persistence import atomic_files, buffer_state
from sb3_softsac.persistence.archive import CheckpointError
from sb3_softsac.persistence.model_file import open_model_file
from sb3_softsac.persistence.run_folder import RunFolder, _manifest_text

N_SAVES = 6  # in the fourth the ring wraps; from the third on there is something to clean up


@pytest.fixture(autouse=True)
def small_segments_and_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_state, "SMALL", 1)
    monkeypatch.setattr(atomic_files, "os", Shim(without_sync))


@pytest.fixture(scope="module", autouse=True)
def expected_in_advance() -> None:
    """Before anything forks."""
    for step in range(STEPS, STEPS * 40, STEPS):
        expected(step)


def saved(path: pathlib.Path, n_saves: int = 3, keep_last: int = 2) -> tuple[RunFolder, Any, int]:
    folder, buffer = RunFolder(path), make_buffer()
    *_, step = save_on(folder, buffer, 0, n_saves, keep_last)
    return folder, buffer, step


def command_line(*args: Any) -> int:
    """``python -m sb3_softsac.checkpoint``"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["checkpoint", *map(str, args)])
        return checkpoint.main()


def names(path: pathlib.Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


# -- What is in the folder ---------------------------------------------------------------------------------------------


def test_each_save_can_be_loaded_and_costs_what_is_new(tmp_path: pathlib.Path) -> None:
    folder, buffer = RunFolder(tmp_path / "run"), make_buffer()
    before: set[str] = set()
    for number, step in enumerate(save_on(folder, buffer, 0, 8)):
        assert load(tmp_path / "run")[2] == step
        now = set(names(tmp_path / "run"))
        new = sorted(now - before)
        # 11 rows, and the newest one of before, touch two segments of 16 rows at the most; of three in all
        assert [name for name in new if not name.startswith("replay/")] == [
            f"ckpt-{number:06d}.json",
            f"step-{step}-{number:06d}.zip",
        ]
        assert 1 <= len(new) - 2 <= 2 or step % ROWS < STEPS + 1
        kept = range(max(0, number - 1), number + 1)
        assert [n for n in now if n.startswith("ckpt")] == [] or folder.numbers() == list(kept)
        named = {entry["file"] for n in kept for entry in folder.manifest(n)["segments"]}
        assert {name for name in now if name.startswith("replay/")} == named, "something is left over, or missing"
        before = now


def test_each_kept_one_can_be_loaded(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, 7, keep_last=3)
    states = sorted(tmp_path.glob("step-*.zip"))
    assert len(states) == 3
    for state in states:
        assert load(state)[2] == int(state.name.split("-")[1])


def test_going_on_from_an_older_one_replaces_nothing(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, 3, keep_last=3)
    oldest = min(tmp_path.glob("step-*.zip"))
    before = names(tmp_path)
    folder, buffer, step = load(oldest)
    assert (step, folder.numbers()) == (STEPS, [0, 1, 2])
    next(save_on(folder, buffer, step, 1, keep_last=4))
    assert folder.numbers() == [0, 1, 2, 3]
    assert set(before) < set(names(tmp_path))
    assert load(tmp_path)[2] == 2 * STEPS  # the newest is the one written last


def test_files_are_never_changed(tmp_path: pathlib.Path) -> None:
    folder, buffer = RunFolder(tmp_path), make_buffer()
    seen: dict[str, bytes] = {}
    for _ in save_on(folder, buffer, 0, 8):
        for name in names(tmp_path):
            data = (tmp_path / name).read_bytes()
            assert seen.setdefault(name, data) == data


def test_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    folder, buffer, step = saved(tmp_path, 1)
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match="second process"):
        save(RunFolder(tmp_path), make_buffer(), 5)
    assert names(tmp_path) == before
    other = load(tmp_path)[0]
    save(folder, buffer, step)
    with pytest.raises(CheckpointError, match="second process"):
        save(other, buffer, step)


def test_files_of_others_stay(tmp_path: pathlib.Path) -> None:
    folder, buffer, step = saved(tmp_path / "run", 1)
    others = [
        "model.zip",
        "step-1-2.zip",
        "ckpt-1.json",
        "replay/x.npz",
        "replay/1-2-abc.npz",
        "progress.csv",
        ".x.tmp",
    ]
    for name in others:
        (tmp_path / "run" / name).write_text("mine")
    for _ in save_on(folder, buffer, step, 4, keep_last=1):
        pass
    assert all((tmp_path / "run" / name).read_text() == "mine" for name in others)


def test_a_buffer_that_was_changed_in_place(tmp_path: pathlib.Path) -> None:
    folder, buffer, step = saved(tmp_path, 5)
    buffer.rewards[3] = 77.0
    buffer.mark_changed()
    save(folder, buffer, step)
    again = make_buffer()
    with open_model_file(tmp_path) as file:
        file.restore_replay(again)
    assert contents(again) == contents(buffer)


def test_files_that_somebody_has_removed_are_written_again(tmp_path: pathlib.Path) -> None:
    for what in ("replay", "all", "manifests"):
        folder, buffer, step = saved(tmp_path / what, 5)
        if what == "replay":
            shutil.rmtree(tmp_path / what / "replay")
        elif what == "all":
            shutil.rmtree(tmp_path / what)
        else:
            for manifest in (tmp_path / what).glob("ckpt-*"):
                manifest.unlink()
        *_, step = save_on(folder, buffer, step, 1)
        assert load(tmp_path / what)[2] == step


# -- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.damage
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("n_before", [0, 5])  # the first save; one with a wrapped ring and something to clean up
def test_error_at_each_operation(
    n_before: int, code: int, stays: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []
    for n in itertools.count():
        path = tmp_path / str(n)
        folder, buffer = RunFolder(path), make_buffer()
        *_, step = 0, *save_on(folder, buffer, 0, n_before)
        add_rows(buffer, step, step + STEPS)
        faults = Faults(n, code, stays)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(atomic_files, "os", Shim(faults.around))
                save(folder, buffer, step + STEPS)
            assert faults.failed is None, "the error was swallowed"
        except OSError as error:
            assert error.errno == code
        if faults.failed is None:
            break
        failed.append(faults.failed)
        assert not list(path.rglob("*.tmp")) or faults.failed == "unlink"
        # After the last rename the new one is there, though nobody knows for how long
        is_new = any(name == f"ckpt-{n_before:06d}.json" for name in names(path))
        if step or is_new:
            assert load(path)[2] == (step + STEPS if is_new else step)
        else:
            with pytest.raises((CheckpointError, FileNotFoundError)):
                load(path)
        # The disk works again: this process goes on, and so could another
        for other in (False, True):
            if other:
                folder, buffer, step = load(path)
            else:
                step += STEPS
            *_, step = save_on(folder, buffer, step, 2)
            assert load(path)[2] == step
        named = {entry["file"] for number in folder.numbers() for entry in folder.manifest(number)["segments"]}
        assert {name for name in names(path) if name.startswith("replay/")} == named
    assert {"open", "write", "fsync", "close", "replace"} <= set(failed)
    assert ("mkdir" if n_before == 0 else "unlink") in failed
    assert len(failed) > 20


def test_short_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def around(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return function(args[0], args[1][:7]) if name == "write" else without_sync(name, function, args)

    monkeypatch.setattr(atomic_files, "os", Shim(around))
    assert load(saved(tmp_path, 5)[0].path)[2] == 5 * STEPS


def test_state_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    folder, buffer, step = saved(tmp_path)
    before = names(tmp_path)

    def write_state(file: Any) -> tuple[int, str]:
        file.write(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        folder.save(step, write_state, buffer, 2)
    assert names(tmp_path) == before
    assert load(tmp_path)[2] == step


# -- Kill --------------------------------------------------------------------------------------------------------------


def save_until_killed(
    path: pathlib.Path, at: int | None, after: bool, n_saves: int, keep_last: int
) -> Callable[[Callable[[str], None]], None]:
    """:return: work for a child that goes on with what is in the folder, and dies at its operation number ``at``"""

    def work(report: Callable[[str], None]) -> None:
        folder, buffer, step = RunFolder(path), make_buffer(), 0
        if folder.numbers():
            folder, buffer, step = load(path)
        killer = Killer(at, after)
        atomic_files.os = Shim(killer)
        report(str(step))
        for saved_step in save_on(folder, buffer, step, n_saves, keep_last):
            report(str(saved_step))
        report(f"operations {killer.count}")

    return work


def check_after_kill(path: pathlib.Path, reports: list[str]) -> int:
    """:return: step of the newest checkpoint"""
    committed = max((int(report) for report in reports if report.isdigit()), default=0)
    if committed == 0 and not RunFolder(path).numbers():
        return 0
    # A killed process leaves no damage: a fall-back's warning would be an error here
    _, _, step = load(path)
    assert committed <= step <= committed + STEPS, "a committed checkpoint is lost, or one is invented"
    return step


def kill_at_each(path: pathlib.Path, n_saves: int, keep_last: int, every: int = 1) -> int:
    """:return: number of kills"""
    path.mkdir(exist_ok=True)
    reports, status = in_child(save_until_killed(path / "whole", None, False, n_saves, keep_last))
    assert status == 0
    n_operations = int(reports[-1].split()[1])
    cuts = list(itertools.product(range(n_operations), (False, True)))[::every]
    for at, after in cuts:
        run = path / f"{at}-{after}"
        reports, status = in_child(save_until_killed(run, at, after, n_saves, keep_last))
        assert os.waitstatus_to_exitcode(status) == -9, (at, after, n_operations, reports)
        step = check_after_kill(run, reports)
        # Another process goes on there
        folder, buffer, again = load(run) if step else (RunFolder(run), make_buffer(), 0)
        assert again == step
        *_, step = save_on(folder, buffer, step, 1, keep_last)
        assert check_after_kill(run, [str(step)]) == step
        named = {entry["file"] for number in folder.numbers() for entry in folder.manifest(number)["segments"]}
        assert {name for name in names(run) if name.startswith("replay/")} == named, "what was left is still there"
        assert len(list(run.glob("step-*"))) == len(folder.numbers()) <= keep_last
        shutil.rmtree(run)
    return len(cuts)


def kill_at_random(path: pathlib.Path, n_kills: int, n_saves: int = 12) -> int:
    """Child after child goes on in one folder; each is killed at a random time or operation."""
    rng = np.random.default_rng(0)
    run, step, last, folders = path / "0", 0, [], 1
    for n in range(n_kills):
        keep_last = int(rng.integers(1, 4))
        at = None if n % 2 else int(rng.integers(n_saves * 15))
        work = save_until_killed(run, at, bool(rng.integers(2)), n_saves, keep_last)
        reports, status = in_child(work, None if at is not None else rng.uniform(0.0, 0.025))
        assert not reports or reports[0] == str(step)
        assert os.waitstatus_to_exitcode(status) in (0, -9)
        step = check_after_kill(run, reports)
        last.append(step)
        if step > STEPS * 26:  # to be quick, and to see first saves too
            run, step, folders = path / str(folders), 0, folders + 1
    assert len(set(last)) > 10
    return n_kills


@pytest.mark.damage
def test_kill(tmp_path: pathlib.Path) -> None:
    n_kills = kill_at_each(tmp_path, N_SAVES, keep_last=2, every=3)
    n_kills += kill_at_random(tmp_path / "random", 60)
    print("kills", n_kills)
    assert n_kills >= 150


@pytest.mark.slow
def test_kill_more_often(tmp_path: pathlib.Path) -> None:
    n_kills = 0
    for keep_last in (1, 2, 3):
        n_kills += kill_at_each(tmp_path / f"{keep_last}", N_SAVES, keep_last)
    n_kills += kill_at_random(tmp_path / "random", 1400)
    print("kills", n_kills)
    assert n_kills >= 2000


class Reporting(CheckpointCallback):
    """Says when a checkpoint is there."""

    def __init__(self, path: pathlib.Path, report: Callable[[str], None]):
        super().__init__(save_freq=4, save_path=path, on_signal=False)
        self.report = report

    def save(self) -> None:
        super().save()
        self.report(str(self.num_timesteps))


def make_env() -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=30)])


def digest(model: SoftSAC) -> str:
    parameters = pickle.dumps({name: tensor.tolist() for name, tensor in model.policy.state_dict().items()})
    whole = parameters, contents(model.replay_buffer), model.num_timesteps, model._n_updates, model._episode_num
    return hashlib.sha256(pickle.dumps(whole)).hexdigest()


def train_until_killed(path: pathlib.Path, at: int | None) -> Callable[[Callable[[str], None]], None]:
    def work(report: Callable[[str], None]) -> None:
        atomic_files.os = Shim(Killer(at))
        report("0")
        if RunFolder(path).numbers():
            model = SoftSAC.load(path, make_env(), device="cpu", force_reset=False)
        else:
            model = SoftSAC(
                "MlpPolicy", make_env(), policy_kwargs={"net_arch": [4]}, buffer_size=50, learning_starts=8,
                batch_size=4, seed=0, device="cpu",
            )  # fmt: skip
        model.learn(TRAINING_STEPS - model.num_timesteps, callback=Reporting(path, report))

    return work


TRAINING_STEPS = 400


def train_with_kills(path: pathlib.Path, n_kills: int) -> None:
    """A run that is killed again and again goes the way of the one that is not."""
    known: dict[int, str] = {}

    def train(report: Callable[[str], None]) -> None:
        class Recording(Reporting):
            def save(self) -> None:
                self.report(f"{self.num_timesteps} {digest(self.model)}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "Reporting", Recording)
            train_until_killed(path / "whole", None)(report)

    reports, status = in_child(train)
    assert status == 0
    known = {int(step): text for step, text in (report.split() for report in reports if " " in report)}
    assert len(known) == TRAINING_STEPS // 4
    rng = np.random.default_rng(0)
    run, runs, steps = path / "0", 1, []
    for n in range(n_kills):
        at = None if n % 2 else int(rng.integers(80))
        reports, status = in_child(train_until_killed(run, at), None if n % 2 == 0 else rng.uniform(0.0, 0.2))
        assert os.waitstatus_to_exitcode(status) in (0, -9)
        committed = max(map(int, reports), default=0)
        if committed == 0 and not RunFolder(run).numbers():
            continue
        model = SoftSAC.load(run, make_env(), device="cpu", force_reset=False)
        assert model.num_timesteps in range(committed, TRAINING_STEPS + 1)
        assert digest(model) == known[model.num_timesteps]
        steps.append(model.num_timesteps)
        if model.num_timesteps > TRAINING_STEPS * 0.7:
            run, runs = path / str(runs), runs + 1
    assert len(set(steps)) > min(5, n_kills // 3)


@pytest.mark.processes
def test_kill_a_training_run(tmp_path: pathlib.Path) -> None:
    train_with_kills(tmp_path, 15)


@pytest.mark.slow
def test_kill_a_training_run_more_often(tmp_path: pathlib.Path) -> None:
    train_with_kills(tmp_path, 300)


# -- Power loss --------------------------------------------------------------------------------------------------------


def lose_power(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    n_saves: int,
    keep_last: int = 2,
    steps: int = STEPS,
    every: int = 1,
    go_on: int = 20,
) -> int:
    """
    Record some saves; then load all that a power failure may leave.

    :param steps: rows between two saves
    :param every: try each state that is a multiple of it
    :param go_on: after so many states, save once more
    :return: number of different states
    """
    (tmp_path / "recorded").mkdir(parents=True)
    disk = RecordedDisk(tmp_path / "recorded")
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "os", Shim(disk.around))
        patch.setattr(atomic_files, "BUFFER", 200)  # files that are written in parts
        folder = RunFolder(tmp_path / "recorded" / "run")
        for step in save_on(folder, make_buffer(), 0, n_saves, keep_last, steps):
            disk.mark(step)
    (tmp_path / "disk").mkdir()
    there = Materialized(tmp_path / "disk")
    run = tmp_path / "disk" / "run"
    seen: set[Any] = set()
    n_states = 0
    for cut in range(len(disk.operations) + 1):
        committed = max([0, *(operation[1] for operation in disk.operations[:cut] if operation[0] == "saved")])
        for tree in disk.states(cut):
            n_states += 1
            key = committed, hash(frozenset(tree.items()))
            if n_states % every or key in seen:
                continue
            seen.add(key)
            there.become(tree)
            step = newest(run)
            assert step in (committed, committed + steps), f"lost or invented, after {disk.operations[cut - 1][:2]}"
            for number in RunFolder(run).numbers() if step else ():  # the older ones are whole too
                manifest = RunFolder(run).manifest(number)
                RunFolder(run).verify(manifest)
            if len(seen) % go_on == 0:
                copy = tmp_path / "copy"
                if run.exists():
                    shutil.copytree(run, copy)
                folder, buffer, step = load_quietly(copy) if step else (RunFolder(copy), make_buffer(), 0)
                *_, step = save_on(folder, buffer, step, 1, keep_last, steps)
                assert load(copy)[2] == step
                shutil.rmtree(copy)
    return len(seen)


def newest(run: pathlib.Path) -> int:
    """:return: step of the newest checkpoint that can be loaded; 0: none"""
    try:
        return load_quietly(run)[2]
    except (CheckpointError, FileNotFoundError):
        return 0


@pytest.mark.damage
def test_power_loss(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_states = lose_power(tmp_path, monkeypatch, N_SAVES, every=2)
    print("states", n_states)
    assert n_states >= 1500


@pytest.mark.slow
def test_power_loss_in_all_states(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_states = 0
    for keep_last, steps in ((1, 3), (2, STEPS), (3, 25), (2, ROWS + 1)):
        n_states += lose_power(tmp_path / f"{keep_last}-{steps}", monkeypatch, 9, keep_last, steps)
        print("states", n_states)
    assert n_states >= 40_000


@pytest.mark.damage
@pytest.mark.parametrize("left_out", ["segment", "replay", "state", "run", "manifest"])
def test_power_loss_would_be_noticed(left_out: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync is there for nothing: without it, the simulation shows a loss."""
    real = RecordedDisk._replay
    patterns = {
        "segment": "*/replay/.*",
        "replay": "*/replay",
        "state": "*/.step*",
        "run": "run",
        "manifest": "*/.ckpt*",
    }

    def forgetful(disk: RecordedDisk, cut: int) -> Any:
        operations = disk.operations
        disk.operations = [
            ("nothing", operation[1])
            if operation[0] == "fsync" and fnmatch.fnmatch(operation[1], patterns[left_out])
            else operation
            for operation in operations
        ]
        try:
            return real(disk, cut)
        finally:
            disk.operations = operations

    monkeypatch.setattr(RecordedDisk, "_replay", forgetful)
    with pytest.raises(AssertionError, match="lost or invented"):
        lose_power(tmp_path, monkeypatch, 4, go_on=10**9)


# -- Command line ------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SoftSAC, pathlib.Path]:
    """A model, and a folder with two of its checkpoints."""
    model = SoftSAC(
        "MlpPolicy", make_env(), policy_kwargs={"net_arch": [4]}, buffer_size=60, learning_starts=8, batch_size=4,
        seed=0, device="cpu",
    )  # fmt: skip
    model.learn(40, callback=CheckpointCallback(20, tmp_path / "run", on_signal=False))
    model.save(tmp_path / "model")
    return model, tmp_path


def test_ls(real_run: tuple[SoftSAC, pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = real_run
    assert command_line("ls", path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["0", "step", "20"], ["1", "step", "40"]]
    assert "in 3 segments" in lines[1]
    for name in ("model.zip", "model", "run/step-40-000001.zip"):
        assert command_line("ls", path / name) == 0
        out = capsys.readouterr().out
        assert "SoftSAC model file" in out
        assert "num_timesteps: 40" in out
        assert "60 rows x 1 environment(s)" in out
        assert "policy.pth" in out


def test_verify(real_run: tuple[SoftSAC, pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = real_run
    for name in ("run", "model.zip", "run/step-40-000001.zip"):
        assert command_line("verify", path / name) == 0
        assert "whole" in capsys.readouterr().out
    segment = next((path / "run" / "replay").iterdir())
    for damaged in (path / "model.zip", path / "run" / "step-20-000000.zip", segment):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
    assert command_line("verify", path / "model.zip") == 1
    assert "model.zip cannot be read" in capsys.readouterr().out
    assert command_line("verify", path / "run") == 1
    out = capsys.readouterr().out
    assert "step-20-000000.zip is damaged" in out
    (path / "empty").mkdir()
    assert command_line("verify", path / "empty") == 1
    assert "has no checkpoints" in capsys.readouterr().out
    (path / "cut.zip").write_bytes((path / "run" / "step-40-000001.zip").read_bytes()[:-500])
    assert command_line("verify", path / "cut.zip") == 1


def test_export(real_run: tuple[SoftSAC, pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = real_run
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for name in ("run", "model.zip", "run/step-40-000001.zip"):
        expected_actions = SoftSAC.load(path / name, device="cpu").predict(observations, deterministic=True)[0]
        target = path / "new" / "policy.zip"
        assert command_line("export", path / name, "-o", target) == 0
        assert f"{target.stat().st_size:,} bytes" in capsys.readouterr().out
        light = SoftSAC.load(target, device="cpu")
        np.testing.assert_array_equal(light.predict(observations, deterministic=True)[0], expected_actions)
        assert command_line("verify", target) == 0
        trained = SoftSAC.load(target, make_env(), device="cpu")
        assert trained.replay_buffer.size() == 0
        trained.learn(20)
        with zipfile.ZipFile(target) as archive:
            assert not [member for member in archive.namelist() if member.startswith("replay/")]
        shutil.rmtree(path / "new")
    assert RunFolder(path / "run").numbers() == [0, 1]


def test_export_keeps_normalisation(tmp_path: pathlib.Path) -> None:
    """Without it the policy would see other numbers than those it has learned from."""
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2))
    model = SoftSAC("MlpPolicy", env, learning_starts=100, buffer_size=100, device="cpu", seed=0)
    model.learn(60)
    model.save(tmp_path / "model.zip")
    assert command_line("export", tmp_path / "model.zip", "-o", tmp_path / "light.zip") == 0
    SoftSAC.load(tmp_path / "model.zip", device="cpu").save(tmp_path / "again.zip", exclude=["replay_buffer"])
    for name, n_envs in (("light.zip", 1), ("light.zip", 2), ("again.zip", 2)):
        other = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * n_envs), training=False)
        SoftSAC.load(tmp_path / name, other, device="cpu")  # without a warning
        np.testing.assert_array_equal(other.obs_rms.mean, env.obs_rms.mean)
        assert other.ret_rms.count == env.ret_rms.count and not other.training
    with pytest.warns(UserWarning, match="trained with VecNormalize, but the environment is not wrapped"):
        SoftSAC.load(tmp_path / "light.zip", make_env(), device="cpu")


def test_export_falls_back_and_says_so(
    real_run: tuple[SoftSAC, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = real_run
    (path / "run" / "step-40-000001.zip").write_bytes(b"x")
    assert command_line("export", path / "run", "-o", path / "policy.zip") == 0
    assert "warning: Falling back to checkpoint 0" in capsys.readouterr().err
    assert SoftSAC.load(path / "policy.zip", device="cpu").num_timesteps == 20


@pytest.mark.parametrize("command", ["ls", "verify", "export"])
def test_errors_of_the_command_line(
    command: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nothing", "No such file"),
        ("text", "text cannot be read"),
        ("empty", "has no checkpoint"),
    ):
        assert command_line(command, name) == 1
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
        assert "Traceback" not in captured.err
    assert sorted(os.listdir(tmp_path)) == ["empty", "text"]


@pytest.mark.processes
def test_as_a_module(real_run: tuple[SoftSAC, pathlib.Path]) -> None:
    _, path = real_run
    command = [sys.executable, "-m", "sb3_softsac.checkpoint", "verify", str(path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoint 1 (step 40): whole" in done.stdout


# -- Damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """Two runs, of two checkpoints each."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, n_saves in zip(runs, (3, 4), strict=True):
        saved(run, n_saves)
    return runs


def step_of(run: pathlib.Path) -> int | None:
    try:
        return load(run)[2]  # compares with what was saved
    except CheckpointError:
        return None


def attempt(run: pathlib.Path, newest: int) -> str:
    """:return: what came of loading a damaged folder; it is none of them if something else was loaded"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = quick(lambda: step_of(run))
    if step is None:
        return "refused"
    if step == newest:
        return "equal"
    told = any("Falling back to checkpoint" in str(warning.message) for warning in caught)
    assert told or RunFolder(run).manifest(RunFolder(run).numbers()[-1])["num_timesteps"] == step, "nobody was told"
    return "fallen back"


def flip_bits(run: pathlib.Path, every: int) -> dict[str, int]:
    counts = {"refused": 0, "fallen back": 0, "equal": 0}
    newest = load(run)[2]
    n_bits = 0
    for name in names(run):
        data = (run / name).read_bytes()
        with (run / name).open("r+b", buffering=0) as file:
            for bit in range(8 * len(data)):
                n_bits += 1
                if n_bits % every:
                    continue
                byte = bit // 8
                os.pwrite(file.fileno(), bytes([data[byte] ^ 1 << bit % 8]), byte)
                counts[attempt(run, newest)] += 1
                os.pwrite(file.fileno(), data[byte : byte + 1], byte)
    assert attempt(run, newest) == "equal"
    return counts


@pytest.mark.damage
def test_flip_bits(two_runs: list[pathlib.Path]) -> None:
    counts = flip_bits(two_runs[1], every=37)
    assert counts["fallen back"] > 1000
    assert counts["refused"] > 100, "segments of both checkpoints"
    assert counts["equal"] > 1000, "of the older one"


@pytest.mark.slow
def test_flip_every_bit(two_runs: list[pathlib.Path]) -> None:
    counts = flip_bits(two_runs[1], every=1)
    print(counts)
    assert sum(counts.values()) > 100_000


def damage(runs: list[pathlib.Path], n: int) -> dict[str, int]:
    rng = np.random.default_rng(0)
    trees = [{name: (run / name).read_bytes() for name in names(run)} for run in runs]
    counts = {"refused": 0, "fallen back": 0, "equal": 0}
    newest = load(runs[0])[2]
    there = Materialized(runs[0].parent / "damaged")
    there.root.mkdir()
    for _ in range(n):
        tree: dict[str, bytes | None] = {"replay": None, **trees[0]}
        for _ in range(int(rng.integers(1, 3))):
            name, second = rng.choice(list(trees[0]), size=2).tolist()
            other = trees[1][str(rng.choice(list(trees[1])))]
            match int(rng.integers(8)):
                case 0:
                    tree.pop(name, None)
                case 1:
                    tree[name], tree[second] = tree.get(second, b""), tree.get(name, b"")
                case 2:
                    tree[name] = other
                case 3:
                    tree[name] = None if "/" not in name or name not in tree else b""
                case _:
                    tree[name] = mutate(trees[0][name], other, rng)
        there.become(tree)
        counts[attempt(there.root, newest)] += 1
    return counts


@pytest.mark.damage
def test_random_damage(two_runs: list[pathlib.Path]) -> None:
    needs_little(lambda: check_damage(damage(two_runs, 2000), 2000))


def check_damage(counts: dict[str, int], n: int) -> None:
    assert counts["fallen back"] > n // 5
    assert counts["refused"] > n // 5


@pytest.mark.slow
def test_more_random_damage(two_runs: list[pathlib.Path]) -> None:
    needs_little(lambda: check_damage(damage(two_runs, 20_000), 20_000))


VALUES: list[Any] = [None, True, -1, 0, 1, 10**30, 0.5, float("nan"), "", "x", "../../x", "/etc/passwd", [], {}, [[]]]


@pytest.mark.damage
def test_manifests_with_right_hashes(two_runs: list[pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever they say: an error that is named, or the older checkpoint; and nothing is taken that does not match."""
    run = two_runs[0]
    folder = RunFolder(run)
    whole = folder.manifest(folder.numbers()[-1])
    path = run / f"ckpt-{folder.numbers()[-1]:06d}.json"
    assert _manifest_text(whole) == path.read_bytes()
    places: list[tuple[Any, ...]] = [(key,) for key in whole]
    places += [("state", key) for key in whole["state"]]
    places += [("segments", 0), *(("segments", 0, key) for key in whole["segments"][0])]
    newest = whole["num_timesteps"]
    counts = {"refused": 0, "fallen back": 0, "equal": 0}
    for place, value in itertools.product(places, [*VALUES, "absent"]):
        manifest = json.loads(json.dumps(whole))
        part = manifest
        for key in place[:-1]:
            part = part[key]
        if value == "absent":
            del part[place[-1]]
        elif part[place[-1]] == value and type(part[place[-1]]) is type(value):
            continue
        else:
            part[place[-1]] = value
        path.write_bytes(_manifest_text(manifest))
        try:
            outcome = attempt(run, newest)
            counts[outcome] += 1
            assert place != ("number",) or outcome == "fallen back"
        except AssertionError:  # another number of steps than in the model file
            assert place == ("num_timesteps",)
        assert (command_line("ls", run), command_line("verify", run)) in ((0, 0), (0, 1))
    assert counts["fallen back"] > 100
    capsys.readouterr()


def test_manifests_that_are_no_files(two_runs: list[pathlib.Path]) -> None:
    run = two_runs[0]
    step = load(run)[2]
    (run / "ckpt-000777.json").mkdir()
    (run / "ckpt-0000778.json").write_text("seven digits, the first of them 0")
    (run / "ckpt-000779.json").symlink_to("nowhere")
    (run / "step-1-000001.zip").mkdir()
    (run / "replay" / "00000-00001-0123456789abcdef.npz").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(run / "ckpt-000780.json")  # to read it would take for ever
    with pytest.warns(UserWarning, match="Falling back to checkpoint 2"):
        folder, buffer, step = load(run)
    *_, step = save_on(folder, buffer, step, 3)
    assert load(run)[2] == step
    assert folder.numbers()[-1] == 783


def test_commands_for_what_is_no_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any zip, and the file of a replay buffer, which is whole, but no policy."""
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("notes.txt", "of something else")
    assert not checkpoint.verify(tmp_path / "other.zip")
    assert "is a zip, but not a model file: it has no member data" in capsys.readouterr().out
    SoftSAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save_replay_buffer(tmp_path / "buffer.pkl")
    assert checkpoint.verify(tmp_path / "buffer.pkl")
    for name in ("other.zip", "buffer.pkl"):
        with pytest.raises(CheckpointError, match="is not a model file"):
            checkpoint.export(tmp_path / name, tmp_path / "out.zip")
        assert not (tmp_path / "out.zip").exists()
