"""
Checkpoints on object storage: fsspec's memory store, where each request can fail; and, slow, a server that speaks S3.
"""

import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import pytest
from crash_tools import STEPS, add_rows, load, make_buffer, save, save_on
from fsspec.implementations.memory import MemoryFileSystem
from resume_script import differences, snapshot

from sb3_softsac import CheckpointCallback, CheckpointError, SoftSAC, checkpoint, has_checkpoints
from sb3_softsac.persistence import atomic_files, buffer_state
from sb3_softsac.persistence.run_folder import RunFolder

pytest.importorskip("upath")

ADDRESS = "memory://bucket/run"
TRAINING_STEPS = 120


@pytest.fixture(autouse=True)
def empty_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(buffer_state, "SMALL", 1)  # small segments
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def folder_at(name: str) -> pathlib.Path:
    return atomic_files.as_path(f"memory://bucket/{name}")


def stored(name: str) -> list[str]:
    prefix = f"/bucket/{name}/"
    return sorted(key.removeprefix(prefix) for key in MemoryFileSystem.store if key.startswith(prefix))


def named(folder: RunFolder) -> list[str]:
    """:return: what belongs into a folder"""
    manifests = [folder.manifest(number) for number in folder.numbers()]
    entries = [entry for manifest in manifests for entry in [manifest["state"], *manifest["segments"]]]
    return sorted({f"ckpt-{number:06d}.json" for number in folder.numbers()} | {entry["file"] for entry in entries})


def test_each_save_can_be_loaded_and_costs_what_is_new() -> None:
    folder, buffer = RunFolder(folder_at("run")), make_buffer()
    seen: dict[str, bytes] = {}
    for step in save_on(folder, buffer, 0, 8):
        assert load(folder.path)[2] == step
        assert stored("run") == named(folder), "something is left over, or missing"
        for name in stored("run"):
            data = (folder.path / name).read_bytes()
            assert seen.setdefault(name, data) == data, "a file was changed"


class Failing:
    """
    Requests of the memory store that change something fail, from one of them on.

    :param at: the first that fails, counted from 0
    :param is_done: that one is done, but its answer is lost
    """

    def __init__(self, at: int, is_done: bool, patch: pytest.MonkeyPatch):
        self.at, self.is_done, self.count = at, is_done, 0
        for name in ("pipe_file", "rm"):
            patch.setattr(MemoryFileSystem, name, self._failing(getattr(MemoryFileSystem, name)))

    def _failing(self, request: Any) -> Any:
        def fail(filesystem: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count <= self.at or (self.count == self.at + 1 and self.is_done):
                request(filesystem, *args, **kwargs)
            if self.count > self.at:
                raise ConnectionError("unplugged")

        return fail


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("n_before", [0, 5])  # the first save; one with a wrapped ring and something to clean up
def test_failure_of_each_request(n_before: int, is_done: bool) -> None:
    for n in itertools.count():
        name = f"{n}"
        folder, buffer = RunFolder(folder_at(name)), make_buffer()
        *_, step = 0, *save_on(folder, buffer, 0, n_before)
        add_rows(buffer, step, step + STEPS)
        with pytest.MonkeyPatch.context() as patch:
            requests = Failing(n, is_done, patch)
            try:
                save(folder, buffer, step + STEPS)
                assert requests.count <= n, "the error was swallowed"
            except ConnectionError:
                pass
        is_new = f"ckpt-{n_before:06d}.json" in stored(name)
        if step or is_new:
            assert load(folder.path)[2] == (step + STEPS if is_new else step)
        else:
            assert not has_checkpoints(f"memory://bucket/{name}")
        if requests.count <= n:
            break
        # The store is there again: this process goes on, and so could another
        for other in (False, True):
            if other:
                folder, buffer, step = load(folder.path)
            else:
                step += STEPS
            *_, step = save_on(folder, buffer, step, 1)
            assert load(folder.path)[2] == step
            assert stored(name) == named(folder)
    assert n == 3 if n_before == 0 else n > 6  # a segment, the model file, the manifest; with clean-up


def test_the_second_of_two_runs_is_refused() -> None:
    """Also if it begins to save when there is nothing to see of the other's checkpoint yet."""
    first, second = RunFolder(folder_at("run")), RunFolder(folder_at("run"))

    def write_state(file: Any) -> tuple[int, str]:
        save(first, make_buffer(), 1)
        return file.write(b"state"), "its hash"

    with pytest.raises(CheckpointError, match="second process"):
        second.save(2, write_state, None, 2)
    assert first.newest_valid()["num_timesteps"] == 1
    with pytest.raises(CheckpointError, match="second process"):
        save(RunFolder(folder_at("run")), make_buffer(), 3)


def test_repeated_requests_are_not_taken_for_a_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_file = MemoryFileSystem.pipe_file

    def twice(*args: Any, **kwargs: Any) -> None:
        pipe_file(*args, **kwargs)
        pipe_file(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", twice)
    folder, buffer = RunFolder(folder_at("run")), make_buffer()
    assert [load(folder.path)[2] for _ in save_on(folder, buffer, 0, 3)] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_damage() -> None:
    folder = RunFolder(folder_at("run"))
    *_, step = save_on(folder, make_buffer(), 0, 3)
    newest = folder.path / folder.manifest(2)["state"]["file"]
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="Falling back to checkpoint 1"):
        assert load(folder.path)[2] == step - STEPS


def make_model() -> SoftSAC:
    env = gym.make("Pendulum-v1", max_episode_steps=30)
    return SoftSAC(
        "MlpPolicy", env, policy_kwargs={"net_arch": [8]}, buffer_size=70, learning_starts=20, batch_size=8, seed=0,
        device="cpu", compile=False,
    )  # fmt: skip


def load_model(path: Any) -> SoftSAC:
    return SoftSAC.load(path, gym.make("Pendulum-v1", max_episode_steps=30), device="cpu", force_reset=False)


def train(address: str) -> None:
    """What a script does that is started again and again."""
    model = load_model(address) if has_checkpoints(address) else make_model()
    callback = CheckpointCallback(5, address, on_signal=False, verbose=1)
    model.learn(TRAINING_STEPS - model.num_timesteps, callback)
    callback.save()


def test_training_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert not has_checkpoints(ADDRESS)
    make_model().learn(52, CheckpointCallback(25, ADDRESS, on_signal=False))
    assert load_model(ADDRESS).num_timesteps == 50
    assert (SoftSAC.load(ADDRESS, device="cpu").replay_buffer, has_checkpoints(ADDRESS)) == (None, True)
    for command in (["ls"], ["verify"], ["export", "-o", "memory://bucket/policy"]):
        monkeypatch.setattr(sys, "argv", ["checkpoint", command[0], ADDRESS, *command[1:]])
        assert checkpoint.main() == 0
    assert "checkpoint 1 (step 50): whole" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has checkpoints of another run: continue it with"):
        make_model().learn(1, CheckpointCallback(25, ADDRESS))
    train(ADDRESS)
    train(str(tmp_path / "whole"))
    model = load_model(ADDRESS)
    model.save("memory://bucket/model")
    expected = snapshot(load_model(tmp_path / "whole"))
    for found in (model, load_model("memory://bucket/model.zip"), load_model("memory://bucket/model")):
        assert differences(expected, snapshot(found)) == []


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^s3:/bucket/run was an address.*: pass a string"):
        CheckpointCallback(5, pathlib.Path("s3://bucket/run"))
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ImportError, match=r"^s3://bucket/run needs universal-pathlib: pip install 'sb3-softsac\[s3\]'"):
        CheckpointCallback(5, "s3://bucket/run")


@pytest.mark.slow
def test_killed_with_checkpoints_on_s3(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes are killed at any moment, also between and within the requests of a checkpoint."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        address = "s3://bucket/run"
        atomic_files.as_path("s3://bucket").mkdir()
        command = [sys.executable, "-c", f"from test_object_storage import train; train({address!r})"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for n_kills in range(3):
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                lines = [process.stdout.readline() for _ in range(3)]
                time.sleep(0.1 * n_kills)  # the next one is on its way
                process.kill()
            assert all("Saved a checkpoint" in line for line in lines)
        found = load_model(address)
        assert 45 <= found.num_timesteps < TRAINING_STEPS, "each has made some progress"
        subprocess.run(command, env=env, check=True)
        train(str(tmp_path / "whole"))
        assert differences(snapshot(load_model(tmp_path / "whole")), snapshot(load_model(address))) == []
    finally:
        server.stop()
