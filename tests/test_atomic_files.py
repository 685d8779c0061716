"""Atomic files, and model files on disks that fail: an error, and what was there before is still there."""

import errno
import io
import itertools
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from crash_tools import (
    OPERATIONS,
    Killer,
    Materialized,
    RecordedDisk,
    Shim,
    Tree,
    add_rows,
    contents,
    in_child,
    without_sync,
)
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softsac import SoftSAC
from sb3_softsac.persistence import atomic_files
from sb3_softsac.persistence.archive import CheckpointError

STEP = 13


@pytest.fixture(scope="module")
def env() -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make("Pendulum-v1")])


def make_model(env: DummyVecEnv) -> SoftSAC:
    return SoftSAC("MlpPolicy", env, policy_kwargs={"net_arch": [4]}, buffer_size=30, seed=0, device="cpu")


def advance(model: SoftSAC, last: int) -> None:
    """Let everything in the model say the same number of steps."""
    add_rows(model.replay_buffer, model.num_timesteps, last)
    model.num_timesteps = last
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.fill_(last)
        model.log_ent_coef.fill_(last)


def step_of(path: pathlib.Path, env: DummyVecEnv) -> int:
    """Load a model, and make sure that it is one that :func:`advance` has made."""
    model = SoftSAC.load(path, env, device="cpu")
    step = model.num_timesteps
    numbers = [*model.policy.parameters(), model.log_ent_coef]
    assert all(bool((number == step).all()) for number in numbers), "parts of several models"
    fresh = make_model(env)
    advance(fresh, step)
    assert contents(model.replay_buffer) == contents(fresh.replay_buffer)
    return step


class Faults:
    """
    A disk on which one operation fails.

    :param n: the operation, counted from 0
    :param code: of the error
    :param stays: all later ones of the kind fail too, as on a full disk
    """

    def __init__(self, n: int, code: int, stays: bool = False):
        self.n, self.code, self.stays = n, code, stays
        self.count = -1
        self.failed: str | None = None
        self.paths: dict[int, pathlib.Path] = {}
        self.unsynced: set[pathlib.Path] = set()
        self.renamed = False

    def around(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.count += 1
        if name == "fsync":
            assert self.paths[args[0]] not in self.unsynced, "fsync was tried again: it says yes, and the data are lost"
        if self.count == self.n or (self.stays and name == self.failed):
            self.failed = name
            if name == "write":  # a part gets through
                function(args[0], args[1][: len(args[1]) // 2])
            if name == "close":  # the descriptor is gone even then
                function(*args)
            if name == "fsync":
                self.unsynced.add(self.paths[args[0]])
            raise OSError(self.code, os.strerror(self.code))
        result = without_sync(name, function, args)
        self.renamed |= name == "replace"
        if name == "open":
            self.paths[result] = pathlib.Path(args[0])
        return result


def count_operations(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[str]:
    seen: list[str] = []

    def around(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        seen.append(name)
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "os", Shim(around))
        work()
    return seen


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("stays", [False, True])
def test_error_at_each_operation_of_a_save(
    code: int, stays: bool, env: DummyVecEnv, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "model.zip"
    monkeypatch.setattr(atomic_files, "BUFFER", 4000)  # several writes, as in a big file
    model = make_model(env)
    advance(model, STEP)
    first = count_operations(monkeypatch, lambda: model.save(path))
    assert {"mkdir", "open", "write", "fsync", "close", "replace"} == set(first)
    assert first.count("write") > 5
    failed = []
    for n in itertools.count():
        advance(model, model.num_timesteps + 1)
        faults = Faults(n, code, stays)
        open_before = descriptors()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(atomic_files, "os", Shim(faults.around))
                model.save(path)
            assert faults.failed is None, "the error was swallowed"
        except OSError as error:
            assert error.errno == code
        assert descriptors() <= open_before  # fewer, if something of another test has been collected meanwhile
        if faults.failed is None:  # past the last operation
            break
        failed.append(faults.failed)
        # Before the rename nothing has changed. After it the file is the new one, though nobody knows for how long.
        assert step_of(path, env) == model.num_timesteps - (not faults.renamed)
        assert os.listdir(path.parent) == ["model.zip"], "something half-written is left"
        model.save(path)  # the disk works again
        assert step_of(path, env) == model.num_timesteps
    assert failed[-5:] == ["close", "replace", "open", "fsync", "close"]
    assert failed.count("write") > 5


def test_error_at_each_operation_of_the_first_save(
    env: DummyVecEnv, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(env)
    advance(model, STEP)
    operations = count_operations(monkeypatch, lambda: model.save(tmp_path / "counted" / "deep" / "model"))
    for n in range(len(operations)):
        path = tmp_path / str(n) / "deep" / "model"
        with monkeypatch.context() as patch:
            patch.setattr(atomic_files, "os", Shim(Faults(n, errno.ENOSPC).around))
            with pytest.raises(OSError, match="No space"):
                model.save(path)
        left = [file for file in path.parent.rglob("*") if file.is_file()]
        assert left == ([path.with_suffix(".zip")] if n > operations.index("replace") else [])
        model.save(path)
        assert step_of(path, env) == STEP


def test_short_writes(env: DummyVecEnv, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def around(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if name == "write":
            return function(args[0], args[1][: max(1, min(1000, len(args[1]) // 2))])
        return function(*args)

    model = make_model(env)
    advance(model, STEP)
    monkeypatch.setattr(atomic_files, "os", Shim(around))
    model.save(tmp_path / "model")
    assert step_of(tmp_path / "model", env) == STEP


def test_full_disk_for_real(env: DummyVecEnv) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    model = make_model(env)
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        model.save(file)


def test_an_exception_while_writing_changes_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    for exception in (KeyboardInterrupt, ValueError):
        with pytest.raises(exception), atomic_files.atomic_file(path) as file:
            file.write(b"x" * (atomic_files.BUFFER + 1))
            raise exception
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_writes_of_all_sizes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "BUFFER", 100)
    data = np.random.default_rng(0).bytes(5000)
    with atomic_files.atomic_file(tmp_path / "file") as file:
        position = 0
        for size in [0, 1, 99, 100, 101, 1, 300, 0, 100, 5000]:
            assert file.write(memoryview(data)[position : position + size]) == min(size, 5000 - position)
            position = min(position + size, 5000)
    assert (tmp_path / "file").read_bytes() == data


def test_order_of_operations(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = RecordedDisk(tmp_path)
    monkeypatch.setattr(atomic_files, "os", Shim(disk.around))
    with atomic_files.atomic_file(tmp_path / "a" / "b" / "file") as file:
        file.write(b"data")
    names = [operation[0] for operation in disk.operations]
    assert names == ["mkdir", "fsync", "mkdir", "fsync", "create", "write", "fsync", "replace", "fsync"]
    temporary = disk.operations[4][1]
    assert [operation[1] for operation in disk.operations] == ["a", ".", "a/b", "a", *[temporary] * 4, "a/b"]
    assert set(names) | {"open", "close", "unlink"} >= set(OPERATIONS) - {"unlink"}


def test_leftovers(tmp_path: pathlib.Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()  # its number is free now
    here = socket.gethostname()
    gone = [f".model.zip.{here}.{child.pid}.tmp"]
    kept = [
        f".model.zip.{here}.{os.getpid()}.tmp",  # at work
        f".model.zip.elsewhere.{child.pid}.tmp",  # who knows
        f".other.zip.{here}.{child.pid}.tmp",
        f".model.zip.{here}.{child.pid}.tmpx",
        f"model.zip.{here}.{child.pid}.tmp",
        "model.zip",
        ".model.zip.tmp",
    ]
    for name in gone + kept:
        (tmp_path / name).touch()
    atomic_files.remove_leftovers(tmp_path, r"model\.zip")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_save_removes_what_a_killed_one_has_left(env: DummyVecEnv, tmp_path: pathlib.Path) -> None:
    model = make_model(env)
    advance(model, STEP)
    path = tmp_path / "model.zip"

    def work(report: Callable[[str], None]) -> None:
        atomic_files.os = Shim(Killer(0, operation="fsync"))
        model.save(path)

    _, status = in_child(work)
    assert os.waitstatus_to_exitcode(status) == -9
    assert len(os.listdir(tmp_path)) == 1
    assert not path.exists()
    model.save(path)
    assert os.listdir(tmp_path) == ["model.zip"]


# -- Kill --------------------------------------------------------------------------------------------------------------


def save_until_killed(
    model: SoftSAC, path: pathlib.Path, at: int | None, after: bool, n_saves: int
) -> Callable[[Callable[[str], None]], None]:
    """:return: work for a child that dies before or after its operation number ``at``"""

    def work(report: Callable[[str], None]) -> None:
        atomic_files.os = Shim(Killer(at, after))
        report("0")
        for step in range(STEP, STEP + n_saves):
            advance(model, step)
            model.save(path)
            report(str(step))

    return work


def check_after_kill(path: pathlib.Path, env: DummyVecEnv, reports: list[str]) -> None:
    committed = max(map(int, reports), default=0)
    if committed == 0 and not path.exists():
        return
    assert step_of(path, env) in (committed, max(committed + 1, STEP)), "a committed file is lost, or one is invented"


@pytest.mark.damage
def test_kill_at_each_operation(env: DummyVecEnv, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(env)
    monkeypatch.setattr(atomic_files, "BUFFER", 20_000)
    n_operations = len(count_operations(monkeypatch, lambda: [model.save(tmp_path / "x" / "m") for _ in range(2)]))
    n_kills = 0
    for at in range(n_operations):
        for after in (False, True):
            path = tmp_path / f"{at}-{after}" / "model.zip"
            reports, status = in_child(save_until_killed(model, path, at, after, 2))
            assert os.waitstatus_to_exitcode(status) == -9
            check_after_kill(path, env, reports)
            n_kills += 1
    assert n_kills >= 40


@pytest.mark.slow
def test_kill_at_random_times(env: DummyVecEnv, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    model = make_model(env)
    steps = []
    for n in range(400):
        path = tmp_path / f"{n}" / "model.zip"
        work = save_until_killed(model, path, None, False, 1000)
        reports, status = in_child(work, kill_after=rng.uniform(0.0, 0.05))
        assert os.waitstatus_to_exitcode(status) == -9
        check_after_kill(path, env, reports)
        steps.append(max(map(int, reports), default=0))
    assert len(set(steps)) > 3, "all were killed at the same place"


# -- Power loss --------------------------------------------------------------------------------------------------------


def test_power_loss(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the file stands for a complete old or new content, at every cut of three saves."""
    disk = RecordedDisk(tmp_path)
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "os", Shim(disk.around))
        patch.setattr(atomic_files, "BUFFER", 10)
        for step in range(1, 4):
            with atomic_files.atomic_file(tmp_path / "run" / "file") as file:
                for _ in range(4):
                    file.write(b"%d" % step * 8)
            disk.mark(step)
    seen: set[tuple[Any, ...]] = set()
    cuts_seen = 0
    for cut in range(len(disk.operations) + 1):
        committed = max([0, *(op[1] for op in disk.operations[:cut] if op[0] == "saved")])
        for tree in disk.states(cut):
            cuts_seen += 1
            seen.add((committed, *sorted(tree.items(), key=str)))
            data = tree.get("run/file")
            allowed: list[bytes | None] = [b"%d" % step * 32 for step in (committed, committed + 1)]
            assert data in (allowed if committed else [None, allowed[1]])
    assert len(seen) > 60
    assert cuts_seen > 150


def test_the_simulated_disk_notices_a_missing_sync(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were one of the fsyncs left out, the simulation would show a loss: it is no test that cannot fail."""
    for left_out in range(3):  # of the folder above, the file, its folder
        root = tmp_path / str(left_out)
        root.mkdir()
        disk = RecordedDisk(root)
        with monkeypatch.context() as patch:
            patch.setattr(atomic_files, "os", Shim(disk.around))
            with atomic_files.atomic_file(root / "run" / "file") as file:
                file.write(b"data")
        syncs = [i for i, operation in enumerate(disk.operations) if operation[0] == "fsync"]
        assert all(tree.get("run/file") == b"data" for tree in disk.states(len(disk.operations)))
        del disk.operations[syncs[left_out]]
        assert any(tree.get("run/file") != b"data" for tree in disk.states(len(disk.operations)))


def test_materialized(tmp_path: pathlib.Path) -> None:
    there = Materialized(tmp_path)
    trees: list[Tree] = [{"a": None, "a/b": b"1", "c": b"2"}, {"c": b"3"}, {"a": None, "a/d": b"1"}, {}]
    for tree in trees:
        there.become(tree)
        found = {
            path.relative_to(tmp_path).as_posix(): path.read_bytes() if path.is_file() else None
            for path in tmp_path.rglob("*")
        }
        assert found == tree


def test_file_objects(env: DummyVecEnv) -> None:
    model = make_model(env)
    advance(model, STEP)
    file = io.BytesIO()
    model.save(file)
    assert step_of(file, env) == STEP  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="cannot be read"):
        SoftSAC.load(io.BytesIO(file.getvalue()[:-1000]), env)
