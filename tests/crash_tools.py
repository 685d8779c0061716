"""What the tests of crashes, power loss and damage share: rows that say what they are, and a disk that fails."""

import functools
import itertools
import os
import pathlib
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
from gymnasium import spaces

from sb3_softsac.buffers import ReplayBuffer
from sb3_softsac.persistence import buffer_state
from sb3_softsac.persistence.archive import ArchiveWriter
from sb3_softsac.persistence.model_file import open_model_file
from sb3_softsac.persistence.run_folder import RunFolder

# All operations that change a disk
OPERATIONS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")
ROWS = 40  # of the ring; segments have 16 rows at least
STEPS = 11  # rows between two saves: the ring wraps in the fourth
T = TypeVar("T")
Tree = dict[str, bytes | None]  # files by path, None: a folder


def without_sync(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Does the operation; an fsync would only take time, where no power is lost for real."""
    return None if name == "fsync" else function(*args)


class Shim:
    """
    Stands for the module ``os`` in ``sb3_softsac.persistence.atomic_files``.

    :param around: called instead of each operation, with its name, the function and the arguments
    """

    def __init__(self, around: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]):
        self._around = around

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return functools.partial(self._call, name, function) if name in OPERATIONS else function

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        return self._around(name, function, args)


class Killer:
    """
    For a :class:`Shim`: ends the process at one of the operations. All that the system took before is kept, synced or
    not, as with any process that is killed.

    :param at: the operation, counted from 0; None: none
    :param after: end the process after it, not before
    :param operation: count only operations of this name; None: all
    """

    def __init__(self, at: int | None, after: bool = False, operation: str | None = None):
        self.at, self.after, self.operation = at, after, operation
        self.count = 0

    def __call__(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        is_last = self.count == self.at and self.operation in (None, name)
        self.count += self.operation in (None, name)
        if is_last and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = without_sync(name, function, args)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def make_buffer() -> ReplayBuffer:
    return ReplayBuffer(ROWS, spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1.0, 1.0, (1,)), device="cpu")


def add_rows(buffer: Any, first: int, last: int) -> None:
    """Rows ``first`` to ``last`` of an endless stream in which each is unlike all others; random state likewise."""

    def observation(i: float) -> np.ndarray:
        return np.resize([i, i + 0.25, -i], buffer.observations.shape[1:]).astype(np.float32)

    for i in range(first, last):
        done = i % 7 == 6
        next_obs = observation(i + 0.5 if done else i + 1)
        buffer.add(observation(i), next_obs, np.array([[np.cos(i)]]), np.array([i]), np.array([done]), [{}])
    buffer.seed(last)


def contents(buffer: Any) -> dict[str, Any]:
    rows = buffer_state.get_rows(buffer, 0, buffer.size())
    return {"state": buffer_state.get_state(buffer), **{name: array.tobytes() for name, array in rows.items()}}


@functools.cache
def expected(step: int) -> dict[str, Any]:
    buffer = make_buffer()
    add_rows(buffer, 0, step)
    return contents(buffer)


def save(folder: RunFolder, buffer: ReplayBuffer, step: int, keep_last: int = 2) -> None:
    """Save a checkpoint whose model file is as small as can be."""

    def write_state(file: BinaryIO) -> tuple[int, str]:
        with ArchiveWriter(file) as archive:
            archive.add_json("data", {"step": step})
            replay = {"description": buffer_state.describe(buffer), "state": buffer_state.get_state(buffer)}
            return archive.close({"num_timesteps": step, "replay": {**replay, "segments": None}})

    folder.save(step, write_state, buffer, keep_last)


def load(path: pathlib.Path) -> tuple[RunFolder, ReplayBuffer, int]:
    """Load the newest checkpoint of a folder, and make sure that it is one that was saved."""
    buffer = make_buffer()
    with open_model_file(path) as file:
        step = file.archive.json("data")["step"]
        assert file.run is not None
        assert file.run[1]["num_timesteps"] == step
        file.restore_replay(buffer)
        file.run[0].continues(file.run[1], buffer)
    assert contents(buffer) == expected(step), f"what was loaded is not what was saved at step {step}"
    return file.run[0], buffer, step


def load_quietly(path: pathlib.Path) -> tuple[RunFolder, ReplayBuffer, int]:
    """The same; a fall-back is fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path)


def save_on(
    folder: RunFolder, buffer: ReplayBuffer, step: int, n_saves: int, keep_last: int = 2, steps: int = STEPS
) -> Iterator[int]:
    """Go on from ``step``; yields the step of each save that has returned."""
    for _ in range(n_saves):
        add_rows(buffer, step, step + steps)
        step += steps
        save(folder, buffer, step, keep_last)
        yield step


def in_child(work: Callable[[Callable[[str], None]], None], kill_after: float | None = None) -> tuple[list[str], int]:
    """
    Fork, and wait for the end of the child.

    :param work: what the child does; what it reports has reached the parent before the call returns
    :param kill_after: seconds after the child's first report
    :return: reports, and what ``os.waitpid`` says
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            work(lambda line: cast(None, os.write(writer, f"{line}\n".encode())))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        text = pipe.read(1) if kill_after is not None else b""
        if kill_after is not None:
            wait(kill_after)
            os.kill(child, signal.SIGKILL)
        while part := pipe.read(1 << 16):
            text += part
    return text.decode().splitlines(), os.waitpid(child, 0)[1]


def wait(seconds: float) -> None:
    signal.sigtimedwait([], seconds)


class RecordedDisk:
    """
    Does the operations that reach it through a :class:`Shim`, and remembers them; then says what a power failure after
    the first n of them may leave.

    The file system promises as little as POSIX: data are safe after an fsync of the file, names after one of the
    folder. Each change of a name may be on the disk or not, whatever others are. A rename is two of them.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.operations: list[tuple[Any, ...]] = []
        self._paths: dict[int, str] = {}

    def around(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        result = without_sync(name, function, args)
        if name == "open":
            self._paths[result] = self._relative(args[0])
            if args[1] & os.O_CREAT:
                self.operations.append(("create", self._paths[result]))
        elif name == "write":
            self.operations.append(("write", self._paths[args[0]], bytes(args[1][:result])))
        elif name == "fsync":
            self.operations.append(("fsync", self._paths[args[0]]))
        elif name != "close":
            self.operations.append((name, *map(self._relative, args[:2])))
        return result

    def mark(self, step: int) -> None:
        """A save has returned."""
        self.operations.append(("saved", step))

    def _relative(self, path: Any) -> str:
        return "" if type(path) is int else pathlib.Path(path).relative_to(self.root).as_posix()

    def states(self, cut: int) -> Iterator[Tree]:
        """
        :param cut: operations before the power fails
        :return: what may be on the disk then
        """
        files, names, pending = self._replay(cut)
        unsynced = [number for number, (now, synced) in enumerate(files) if now != synced]
        folders = [folder for folder in pending if pending[folder]]
        for chosen in _choices({folder: _subsets(len(pending[folder])) for folder in folders}):
            tree = {folder: dict(entries) for folder, entries in names.items()}
            for folder, subset in chosen.items():
                for i in subset:
                    name, target = pending[folder][i]
                    tree[folder].pop(name, None)
                    if target is not None:
                        tree[folder][name] = target
            for variants in _choices({number: _losses(*files[number]) for number in unsynced}):
                yield _reachable(tree, {number: now for number, (now, _) in enumerate(files)} | variants)

    def _replay(self, cut: int) -> tuple[list[tuple[bytes, bytes]], dict[str, Any], dict[str, list[Any]]]:
        files: list[tuple[bytes, bytes]] = []  # contents now, and those that are safe
        now: dict[str, int] = {}
        names: dict[str, dict[str, int | str]] = {".": {}}
        pending: dict[str, list[tuple[str, int | str | None]]] = {}

        def change(path: str, target: int | str | None) -> None:
            folder, _, name = path.rpartition("/")
            pending.setdefault(folder or ".", []).append((name, target))

        for operation, path, *more in self.operations[:cut]:
            if operation == "create":
                now[path] = len(files)
                files.append((b"", b""))
                change(path, now[path])
            elif operation == "write":
                files[now[path]] = files[now[path]][0] + more[0], files[now[path]][1]
            elif operation == "fsync" and path in now:
                files[now[path]] = files[now[path]][0], files[now[path]][0]
            elif operation == "fsync":
                for name, target in pending.pop(path, []):
                    names[path].pop(name, None)
                    if target is not None:
                        names[path][name] = target
            elif operation == "replace":
                now[more[0]] = now.pop(path)
                change(path, None)
                change(more[0], now[more[0]])
            elif operation == "unlink":
                del now[path]
                change(path, None)
            elif operation == "mkdir":
                names[path] = {}
                change(path, path)
        return files, names, pending


def _subsets(n: int) -> list[tuple[int, ...]]:
    """All subsets of n changes; of many: beginnings, endings, all but one, one."""
    if n <= 8:
        return [subset for size in range(n + 1) for subset in itertools.combinations(range(n), size)]
    everything = tuple(range(n))
    some = [everything[:i] for i in range(n)] + [everything[i:] for i in range(n)]
    some += [everything[:i] + everything[i + 1 :] for i in range(n)] + [(i,) for i in range(n)]
    return sorted(set(some))


def _losses(now: bytes, synced: bytes) -> list[bytes]:
    """What may be left of a file: all, what is safe, noise; a beginning, alone or with zeros after it; an end."""
    zeros, noise = bytes(len(now)), np.random.default_rng(0).bytes(len(now))
    cuts = [len(synced) + (len(now) - len(synced)) * i // 8 for i in range(1, 8)]
    parts = [part for cut in cuts for part in (now[:cut], now[:cut] + zeros[cut:], zeros[:cut] + now[cut:])]
    return [now, *parts, zeros, noise, synced]


def _choices(variants: dict[Any, list[Any]]) -> Iterator[dict[Any, Any]]:
    """Each variant of each part, with the others all at their first and all at their last; products, where few."""
    if not variants:
        yield {}
        return
    keys = list(variants)
    n_products = np.prod([len(variants[key]) for key in keys])
    if n_products <= 2000:
        for combination in itertools.product(*variants.values()):
            yield dict(zip(keys, combination, strict=True))
        return
    for other, key in itertools.product((0, -1), keys):
        for variant in variants[key]:
            yield {**{each: variants[each][other] for each in keys}, key: variant}


def _reachable(names: dict[str, dict[str, int | str]], data: dict[int, bytes]) -> Tree:
    tree: Tree = {}
    folders = ["."]
    while folders:
        folder = folders.pop()
        for name, target in names[folder].items():
            path = name if folder == "." else f"{folder}/{name}"
            tree[path] = None if isinstance(target, str) else data[target]
            if isinstance(target, str):
                folders.append(target)
    return tree


class Materialized:
    """
    A folder that becomes one tree after the other; only what differs is written.

    :param root: empty folder
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.tree: Tree = {}

    def become(self, tree: Tree) -> None:
        for path in sorted(self.tree, reverse=True):
            if path not in tree or (tree[path] is None) != (self.tree[path] is None):
                (self.root / path).rmdir() if self.tree[path] is None else (self.root / path).unlink()
        for path, data in sorted(tree.items()):
            if path in self.tree and self.tree[path] == data:
                continue
            if data is None:
                (self.root / path).mkdir()
            else:
                (self.root / path).write_bytes(data)
        self.tree = dict(tree)


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """
    :param data: contents of a file
    :param other: contents of another
    :param rng: draws what happens
    :return: cut off, extended, spliced, overwritten, ...; once or a few times
    """
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        i, j = sorted(rng.integers(len(changed) + 1, size=2).tolist())
        size = int(rng.choice([1, 2, 4, 8, 100, 1000]))
        match int(rng.integers(10)):
            case 0:
                del changed[i:]
            case 1:
                changed += rng.bytes(size)
            case 2:
                changed[i:] = other[int(rng.integers(len(other) + 1)) :]
            case 3:
                changed[i : i + size] = rng.bytes(size)
            case 4:
                changed[i : i + size] = bytes([int(rng.choice([0, 0xFF, 0x7F, 0x80]))]) * size
            case 5:
                changed[i : i + size] = other[i : i + size]
            case 6:
                del changed[i : i + size]
            case 7:
                changed[i:i] = changed[j : j + size]
            case 8:
                changed[i : i + size], changed[j : j + size] = changed[j : j + size], changed[i : i + size]
            case 9 if i < len(changed):
                changed[i] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def quick(action: Callable[[], T], seconds: float = 1.0) -> T:
    """
    :return: what ``action`` returns. It is done again if it takes longer, which may be due to something else: a
        collection of the garbage that all tests before have left takes longer than that
    """
    for _ in range(3):
        start = time.process_time()
        result = action()
        if time.process_time() - start < seconds:
            return result
    raise AssertionError(f"it takes more than {seconds} s of CPU time, each time")


def needs_little(work: Callable[[], None], megabytes: int = 100) -> None:
    """Do something in a child, and make sure that it takes little memory."""

    def measured(report: Callable[[str], None]) -> None:
        work()
        report(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    reports, status = in_child(measured)
    assert os.waitstatus_to_exitcode(status) == 0, "see the output"
    assert int(reports[-1]) - before < megabytes * 1024
