"""
A folder of incremental checkpoints of one run: each writes only what is new since the previous one.

::

    ckpt-000003.json               manifest: name, size and SHA-256 of each file of checkpoint 3
    step-30000-000003.zip          model file without the rows of the replay buffer
    replay/00000-08192-<hash>.npz  rows of the replay buffer, shared by all checkpoints in which they are the same

A file never changes once it exists. The manifest is written last: without it, a checkpoint does not exist. Only then
are files removed that no kept manifest names.

A folder on object storage is the same. Its manifests are written only if there is none of that name, so the second of
two runs is refused there, too, though only when it saves.
"""

import hashlib
import io
import json
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock
import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer

from sb3_softsac.persistence import atomic_files, buffer_state
from sb3_softsac.persistence.archive import FORMAT, ArchiveReader, CheckpointError, check_format, naming, sha256_of
from sb3_softsac.persistence.folder_lock import lock_folder

MANIFEST = re.compile(r"ckpt-(0[0-9]{5}|[1-9][0-9]{5,8})\.json")  # only names that save() gives
STATE = re.compile(r"step-([0-9]+)-(0[0-9]{5}|[1-9][0-9]{5,8})\.zip")
SEGMENT = re.compile(r"replay/([0-9]{5,12})-([0-9]{5,12})-[0-9a-f]{16}\.npz")
Manifest = dict[str, Any]


class RunFolder:
    """
    A folder of checkpoints.

    :param path: the folder; the first :meth:`save` creates it
    """

    def __init__(self, path: Path):
        self.path = path.absolute() if isinstance(path, Path) else path  # wherever the user's program goes
        self.last: Manifest | None = None  # written or loaded last by this process
        self.newest = -1  # number of the newest checkpoint at that time, valid or not
        # Replay buffer and its n_added at that time; its id would not do, since a later buffer may get the same
        self._rows_then: tuple[weakref.ref[SB3ReplayBuffer], int] | None = None
        self._lock: filelock.BaseFileLock | None = None

    def lock(self) -> None:
        """
        Let no other run write to the folder, until :meth:`unlock` or the end of the process. Anybody may read.

        :raises CheckpointError: if another run holds the lock
        """
        if self._lock is None and isinstance(self.path, Path):  # there are no locks on object storage
            atomic_files.make_folder(self.path)
            self._lock = lock_folder(self.path)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def numbers(self) -> list[int]:
        """Numbers of the checkpoints that have a manifest, ascending."""
        found = map(MANIFEST.fullmatch, atomic_files.names(self.path))
        return sorted(int(match[1]) for match in found if match)

    def manifest(self, number: int) -> Manifest:
        """
        :param number: number of the checkpoint
        :return: its manifest
        :raises CheckpointError: if the manifest is damaged
        """
        path = self.path / f"ckpt-{number:06d}.json"
        with naming(str(path)):
            if not path.is_file():  # a broken link, a pipe
                raise CheckpointError(f"{path} is not a file.")
            text = path.read_bytes()
            whole = json.loads(text)
            manifest: Manifest = whole["manifest"]
            if _manifest_text(manifest) != text:
                raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the one in it.")
            check_format(str(path), manifest)
            entries = [manifest["state"], *manifest["segments"]]
            names = [entry["file"] for entry in entries]
            if not STATE.fullmatch(names[0]) or not all(SEGMENT.fullmatch(name) for name in names[1:]):
                raise CheckpointError(f"{path} names files that are not part of a checkpoint.")
            if not all(isinstance(entry["sha256"], str) for entry in entries):
                raise CheckpointError(f"{path} lacks a hash.")
            numbers = [manifest["number"], manifest["num_timesteps"], *(entry["size"] for entry in entries)]
            if manifest["number"] != number or not all(type(n) is int and n >= 0 for n in numbers):
                raise CheckpointError(f"{path} has impossible numbers: {numbers}.")
        return manifest

    def verify(self, manifest: Manifest) -> None:
        """
        Compare all files of a checkpoint with its manifest.

        :param manifest: manifest of the checkpoint
        :raises CheckpointError: naming the first file that is missing or damaged
        """
        entries = [manifest["state"], *manifest["segments"]]
        for entry in entries:  # sizes first: they cost little, and differ in most damaged files
            path = self.path / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["size"]:
                found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
                raise CheckpointError(f"{path} {found}, expected {entry['size']} bytes.")
        for entry in entries:
            path = self.path / entry["file"]
            with atomic_files.open_file(path) as file:
                if sha256_of(file) != entry["sha256"]:
                    raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest.")

    def newest_valid(self) -> Manifest:
        """
        :return: manifest of the newest valid checkpoint; a warning names the newer ones, which are damaged
        :raises CheckpointError: if no checkpoint is valid
        """
        problems = []
        for number in reversed(self.numbers()):
            try:
                manifest = self.manifest(number)
                self.verify(manifest)
            except (CheckpointError, OSError) as error:
                problems.append(f"checkpoint {number}: {error}")
                continue
            if problems:
                warnings.warn(
                    f"Falling back to checkpoint {number} (step {manifest['num_timesteps']}) of {self.path}, because "
                    + "; ".join(problems),
                    stacklevel=2,
                )
            return manifest
        raise CheckpointError(
            f"{self.path} has no checkpoint that can be loaded"
            + (": " + "; ".join(problems) if problems else " (no ckpt-*.json in it).")
        )

    def model_files(self) -> list[Path]:
        """Model files of all checkpoints with a readable manifest, newest first."""
        paths = []
        for number in reversed(self.numbers()):
            with suppress(CheckpointError, OSError):
                paths.append(self.path / self.manifest(number)["state"]["file"])
        return paths

    def read_segments(self, manifest: Manifest, replay: dict[str, Any]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """
        :param manifest: manifest of a checkpoint
        :param replay: entry of the replay buffer in the index of its model file
        :return: first row and arrays of each segment
        """
        for entry in manifest["segments"]:
            first, last = _rows(entry["file"])
            path = self.path / entry["file"]
            with atomic_files.open_file(path) as file:
                archive = ArchiveReader(file, str(path))
                yield first, buffer_state.read_rows(archive, replay["description"], (first, last))

    def continues(self, manifest: Manifest, buffer: SB3ReplayBuffer | None) -> None:
        """
        Continue from a checkpoint: the next ones share its segments.

        :param manifest: manifest of the checkpoint
        :param buffer: replay buffer whose rows are those of the segments; None: no known buffer
        """
        self.last = manifest
        self.newest = max([manifest["number"], *self.numbers()])
        self._remember(buffer)

    def save(
        self,
        num_timesteps: int,
        write_state: Callable[[BinaryIO], tuple[int, str]],
        buffer: SB3ReplayBuffer | None,
        keep_last: int,
    ) -> None:
        """
        Write a checkpoint.

        :param num_timesteps: environment steps so far
        :param write_state: writes the model file, returns its size and SHA-256
        :param buffer: replay buffer to save; None: none
        :param keep_last: number of checkpoints to keep
        :raises CheckpointError: if another process writes to the same folder
        :raises OSError: if the disk is full, ...; older checkpoints remain valid
        """
        if max([-1, *self.numbers()]) > self.newest:
            raise self._other_writer()
        number = self.newest + 1
        segments = [] if buffer is None else self._save_segments(buffer)
        name = f"step-{num_timesteps}-{number:06d}.zip"
        with atomic_files.atomic_file(self.path / name, sync=False) as file:
            size, sha256 = write_state(file)
        atomic_files.sync_folder(self.path)
        manifest = {
            "format": FORMAT,
            "number": number,
            "num_timesteps": num_timesteps,
            "state": {"file": name, "size": size, "sha256": sha256},
            "segments": segments,
        }
        self.newest = number  # even if this fails: the file may exist afterwards
        try:
            with atomic_files.atomic_file(self.path / f"ckpt-{number:06d}.json", is_new=True) as file:
                file.write(_manifest_text(manifest))
        except FileExistsError:
            raise self._other_writer() from None
        self.last = manifest
        self._remember(buffer)
        self._clean(keep_last)

    def _other_writer(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} has new checkpoints that this run did not write: does a second process save there? "
            "Give each run its own folder."
        )

    def _save_segments(self, buffer: SB3ReplayBuffer) -> list[dict[str, Any]]:
        rows_before = None
        if self._rows_then is not None and self._rows_then[0]() is buffer:
            rows_before = self._rows_then[1]
        folder = self.path / "replay"
        there = {f"replay/{name}" for name in atomic_files.names(folder)}
        last_entries = [] if self.last is None else self.last["segments"]
        # The user may have removed some
        before = {_rows(entry["file"]): entry for entry in last_entries if entry["file"] in there}
        entries = []
        written = False
        for segment in buffer_state.segments(buffer):
            entry = before.get(segment)
            if entry is None or buffer_state.may_have_changed(buffer, segment, rows_before):
                stream = io.BytesIO()
                np.savez(stream, **buffer_state.get_rows(buffer, *segment))  # type: ignore[arg-type]
                data = stream.getbuffer()
                sha256 = hashlib.sha256(data).hexdigest()
                first, last = segment
                name = f"replay/{first:05d}-{last:05d}-{sha256[:16]}.npz"
                if entry is None or entry["sha256"] != sha256:
                    with atomic_files.atomic_file(self.path / name, sync=False) as file:
                        file.write(data)
                    written = True
                    entry = {"file": name, "size": len(data), "sha256": sha256}
            entries.append(entry)
        if written:
            atomic_files.sync_folder(folder)
        return entries

    def _remember(self, buffer: SB3ReplayBuffer | None) -> None:
        self._rows_then = None if buffer is None else (weakref.ref(buffer), getattr(buffer, "n_added", 0))

    def _clean(self, keep_last: int) -> None:
        """Remove older checkpoints, then all files that no kept manifest names."""
        kept: list[Manifest] = []
        for number in reversed(self.numbers()):
            try:
                manifest = self.last if self.last and self.last["number"] == number else self.manifest(number)
            except CheckpointError:
                continue  # it does not count, and is removed once it is older than those kept
            if len(kept) < keep_last:
                kept.append(manifest)
        oldest = kept[-1]["number"]
        for number in self.numbers():
            if number < oldest:
                atomic_files.remove(self.path / f"ckpt-{number:06d}.json")
        atomic_files.sync_folder(self.path)  # a manifest must not outlive its files
        named = {entry["file"] for manifest in kept for entry in [manifest["state"], *manifest["segments"]]}
        for folder, pattern in (("", STATE), ("replay/", SEGMENT)):
            inside = self.path / folder
            if not inside.is_dir() or (folder and inside.is_symlink()):  # never remove files elsewhere
                continue
            for name in atomic_files.names(inside):
                if pattern.fullmatch(folder + name) and folder + name not in named:
                    atomic_files.remove(inside / name)
            atomic_files.remove_leftovers(inside)


def has_checkpoints(path: str | Path) -> bool:
    """
    :param path: folder of ``CheckpointCallback``, also on object storage; need not exist
    :return: whether there is a run to continue with ``SoftSAC.load(path, env)``
    """
    return bool(RunFolder(atomic_files.as_path(path)).numbers())


class Checkpoint(NamedTuple):
    """One checkpoint of a run folder."""

    folder: RunFolder
    manifest: Manifest


def checkpoint_of(path: Path) -> Checkpoint | None:
    """
    :param path: model file
    :return: the checkpoint that it is part of; None: it is not part of any
    :raises CheckpointError: if the checkpoint is damaged
    """
    match = STATE.fullmatch(path.name)
    folder = RunFolder(path.parent)
    if match is None or int(match[2]) not in folder.numbers():
        return None
    manifest = folder.manifest(int(match[2]))
    if manifest["state"]["file"] != path.name:
        return None
    folder.verify(manifest)
    return Checkpoint(folder, manifest)


def _rows(name: str) -> tuple[int, int]:
    match = SEGMENT.fullmatch(name)
    assert match is not None  # checked when the manifest was read
    return int(match[1]), int(match[2])


def _manifest_text(manifest: Manifest) -> bytes:
    text = json.dumps(manifest, sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"manifest": {text},\n"sha256": "{sha256}"}}\n'.encode()
