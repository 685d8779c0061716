"""
The zip files that everything is in: what they hold comes back, and no damaged one is taken for a whole one.

The slow tests flip every bit of a model file of 55 kB (450,000 loads) and damage it in 20,000 other ways.
"""

import hashlib
import io
import json
import os
import pathlib
import tracemalloc
import warnings
import zipfile
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from crash_tools import add_rows, contents, mutate, needs_little, quick
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softsac import SoftSAC
from sb3_softsac.persistence.archive import INDEX, ArchiveReader, ArchiveWriter, CheckpointError, naming
from sb3_softsac.persistence.model_file import open_model_file, read_data

CPU = th.device("cpu")
ARRAYS = {
    "float": np.arange(12, dtype=np.float32).reshape(4, 3),
    "empty": np.zeros((0, 3, 2), dtype=np.int64),
    "no width": np.zeros((5, 0), dtype=np.uint8),
    "rows of something": np.arange(60, dtype=np.int16).reshape(5, 3, 4)[1:4],
    "not contiguous": np.arange(60.0).reshape(5, 12)[:, ::3],
    "long": np.arange(3 << 18, dtype=np.float64).reshape(-1, 2),
    "one long row": np.arange(1 << 19, dtype=np.float64).reshape(1, -1),
}


def write(arrays: dict[str, np.ndarray] | None = None, index: dict[str, Any] | None = None) -> io.BytesIO:
    file = io.BytesIO()
    with ArchiveWriter(file) as archive:
        archive.add_json("tree", {"a": [1, None, "ü"]})
        for name, array in (ARRAYS if arrays is None else arrays).items():
            archive.add_array(f"{name}.npy", array)
        archive.close(index or {})
    return file


def rewritten(file: io.BytesIO, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    """The same members but for some, without the index being asked."""
    target = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in [*old.namelist(), *(name for name in change if name not in old.namelist())]:
            data = change.get(name, b"") if name in change else old.read(name)
            if data is not None:
                new.writestr(name, data)
    return target


# -- What is written ---------------------------------------------------------------------------------------------------


def test_round_trip() -> None:
    file = write(index={"more": [1, 2]})
    reader = ArchiveReader(file, "file")
    reader.verify()
    assert reader.index is not None
    assert reader.index["more"] == [1, 2]
    assert reader.json("tree") == {"a": [1, None, "ü"]}
    for name, array in ARRAYS.items():
        assert f"{name}.npy" in reader
        found = reader.array(f"{name}.npy", array.dtype, (None, *array.shape[1:]))
        np.testing.assert_array_equal(found, array)
        with zipfile.ZipFile(file) as plain:  # NumPy can read it too
            np.testing.assert_array_equal(np.load(io.BytesIO(plain.read(f"{name}.npy"))), array)
    assert "else" not in reader


def test_size_and_hash_are_those_of_the_file() -> None:
    file = io.BytesIO()
    with ArchiveWriter(file) as archive:
        archive.add_json("tree", 1)
        assert archive.close({}) == (len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest())


def test_equal_contents_make_equal_files() -> None:
    assert write().getvalue() == write().getvalue()


def test_arrays_are_written_piece_by_piece() -> None:
    array = np.ones((1 << 21, 4), dtype=np.float32)  # 32 MB

    class Sink(io.RawIOBase):
        def write(self, data: Any) -> int:
            return len(data)

    tracemalloc.start()
    try:
        with ArchiveWriter(Sink()) as archive:  # type: ignore[arg-type]
            archive.add_array("array.npy", array)
            archive.close({})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


# -- What is refused ---------------------------------------------------------------------------------------------------


def refused(file: io.BytesIO, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ArchiveReader(file, "the file").verify()


def test_damage_is_named() -> None:
    file = write()
    data = file.getvalue()
    refused(io.BytesIO(b""), "the file cannot be read")
    refused(io.BytesIO(b"x" * 1000), "the file cannot be read")
    refused(io.BytesIO(b"x" + data), "a part is missing")
    refused(io.BytesIO(data + b"x"), "the file cannot be read|a part is missing")
    refused(rewritten(file, {"tree": b'{"a":[1,null,"\\u00fd"]}'}), "tree in the file")
    refused(rewritten(file, {"tree": b"{}"}), "tree in the file has 2 bytes, not 23")
    refused(rewritten(file, {"tree": None}), "tree")
    refused(rewritten(file, {"other": b""}), "other")
    refused(rewritten(file, {}, zipfile.ZIP_DEFLATED), "compressed")
    refused(rewritten(file, {INDEX: b'{"format": 2}'}), "format 2, but this version of sb3_softsac reads format 1")
    for index in (b"1", b"[]", b"null", b"{}", b"[" * 10000, b"\xff", b"", b'{"format": 1}', b'{"format": NaN}'):
        refused(rewritten(file, {INDEX: index}), "the file|format")
    for members in (None, [], 3, {"tree": 3}, {"tree": None}, [[1, 2]], {name: {} for name in ["tree", *ARRAYS]}):
        refused(rewritten(file, {INDEX: json.dumps({"format": 1, "members": members}).encode()}), "the file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the second name
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as new:
            new.writestr("a", b"1")
            new.writestr("a", b"2")
    refused(target, "two members of the same name")


def test_members_that_lie_about_their_size() -> None:
    """Members on top of each other: many times the file's size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("a", bytes(1000))
        info = new.getinfo("a")
        for name in "bcde":
            other = zipfile.ZipInfo(name)
            other.header_offset, other.file_size, other.compress_size = 0, info.file_size, info.compress_size
            other.CRC = info.CRC
            new.filelist.append(other)
            new.NameToInfo[name] = other
    refused(file, "more bytes than it has")


def test_a_truncated_file_is_not_its_last_member() -> None:
    """zipfile looks for the end of a zip file from behind, and finds that of a ``.pth`` member."""
    file = io.BytesIO()
    inner = io.BytesIO()
    th.save({"a": th.zeros(3)}, inner)
    with ArchiveWriter(file) as archive:
        archive.add_json("data", {})
        with archive.member("policy.pth") as stream:
            stream.write(inner.getvalue())
        archive.close({})
    end = file.getvalue().index(inner.getvalue()) + len(inner.getvalue())
    assert zipfile.is_zipfile(io.BytesIO(file.getvalue()[:end]))  # else this shows nothing
    refused(io.BytesIO(file.getvalue()[:end]), "a part is missing")
    refused(io.BytesIO(file.getvalue()[: end + 100]), "a part is missing")


def test_members_that_are_passed_over() -> None:
    """One bit in the length of a member's comment makes those that come after it a part of the comment."""
    data = bytearray(write({}).getvalue())
    last = data.rindex(b"PK\1\2")
    first = data.rindex(b"PK\1\2", 0, last)
    data[first + 33] ^= 0x40
    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # else this shows nothing
        assert archive.namelist() == ["tree"]
    refused(io.BytesIO(data), "a part is missing")


def test_our_file_without_its_index() -> None:
    """It would be taken for one of SB3's, and nothing of the run restored."""
    archive = ArchiveReader(rewritten(write({}), {INDEX: None, "data": b'{"gamma": {"$": "tuple"}}'}), "it")
    with pytest.raises(CheckpointError, match="index is missing"):
        read_data(archive, None, {}, False)


def test_arrays_that_do_not_fit() -> None:
    reader = ArchiveReader(write({"x": np.zeros((4, 3), dtype=np.float32)}), "it")
    assert reader.array("x.npy", np.dtype("<f4"), (4, 3)).shape == (4, 3)
    for dtype, shape in (("<f8", (4, 3)), ("<f4", (4, 4)), ("<f4", (4,)), ("<f4", (None, 3, 1)), (">f4", (4, 3))):
        with pytest.raises(CheckpointError, match=r"x\.npy in it holds float32 of shape \(4, 3\)"):
            reader.array("x.npy", np.dtype(dtype), shape)
    with pytest.raises(CheckpointError, match="no member y"):
        reader.array("y", np.dtype("<f4"), (1,))


def header(text: str, data: bytes = bytes(48), version: int = 1) -> bytes:
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + data


HEADERS = [
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3)}\n"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -3)}\n"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}\n"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 3)}\n"),
    header("{'descr': '<f4', 'fortran_order': True, 'shape': (4, 3)}\n"),
    header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3)}\n"),
    header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (4, 3)}\n"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), 'more': 1}\n"),
    header("__import__('os').system('false')\n"),
    header("(" * 5000),
    header("'''"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}\n" + " " * 20000),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}\n", version=2),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}\n", data=bytes(47)),
    b"\x93NUMPY\x01\x00\xff\xff{}",
    b"\x93NUMPY\x01",
    b"",
]


def test_a_right_array_header() -> None:
    """The one that the others differ from."""
    data = header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}\n")
    reader = ArchiveReader(rewritten(write({}), {"x.npy": data, INDEX: None}), "it")
    np.testing.assert_array_equal(reader.array("x.npy", np.dtype("<f4"), (None, 3)), np.zeros((4, 3)))


@pytest.mark.parametrize("data", HEADERS)
def test_hostile_array_headers(data: bytes) -> None:
    reader = ArchiveReader(rewritten(write({}), {"x.npy": data, INDEX: None}), "it")

    def read() -> None:
        for shape in ((4, 3), (None, 3), (None, None)):
            with pytest.raises(CheckpointError, match=r"x\.npy in it"):
                reader.array("x.npy", np.dtype("<f4"), shape)

    needs_little(read, 20)


def test_naming() -> None:
    with pytest.raises(CheckpointError, match="it cannot be read: KeyError"), naming("it"):
        raise KeyError("x")
    with pytest.raises(OSError), naming("it"):  # the disk's fault, not the file's
        raise OSError("x")


# -- Damage to a model file --------------------------------------------------------------------------------------------


def make_model(env: DummyVecEnv, seed: int, n_steps: int) -> SoftSAC:
    model = SoftSAC(
        "MlpPolicy", env, policy_kwargs={"net_arch": [4]}, buffer_size=24, learning_starts=5, batch_size=4, seed=seed,
        device="cpu",
    )  # fmt: skip
    model.learn(n_steps)
    return model


@pytest.fixture(scope="module")
def env() -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make("Pendulum-v1")])


@pytest.fixture(scope="module")
def saved(env: DummyVecEnv, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two model files, as small as can be."""
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    found = []
    for seed in (0, 1):
        make_model(env, seed, 20 + seed).save(path)
        found.append(path.read_bytes())
    return found


def members(path: pathlib.Path) -> dict[str, bytes]:
    """All that a model is made from, if the file passes for a whole one."""
    with open_model_file(path) as file:
        read_data(file.archive, None, {}, False)  # looks whether the index is there
        return {name: file.archive.open(name).read() for name in file.archive.sizes}


class Attempts:
    """Counts what comes of damaged files; only a file that says the same as the whole one may pass."""

    def __init__(self, path: pathlib.Path, whole: dict[str, bytes]):
        self.path = path
        self.whole = whole
        self.counts = {"refused": 0, "equal": 0}

    def __call__(self, what: Any) -> bool:
        found = quick(self._members)
        assert found in (None, self.whole), f"{what} was not noticed"
        self.counts["refused" if found is None else "equal"] += 1
        return found is not None

    def _members(self) -> dict[str, bytes] | None:
        try:
            return members(self.path)
        except CheckpointError:
            return None


def flip_bits(path: pathlib.Path, data: bytes, bits: list[int]) -> tuple[Attempts, list[int]]:
    path.write_bytes(data)
    attempts = Attempts(path, members(path))
    equal = []
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            byte = bit // 8
            os.pwrite(file.fileno(), bytes([data[byte] ^ 1 << bit % 8]), byte)
            if attempts(f"bit {bit % 8} of byte {byte}"):
                equal.append(bit)
            os.pwrite(file.fileno(), data[byte : byte + 1], byte)
    assert path.read_bytes() == data
    return attempts, equal


def loads_equal(path: pathlib.Path, data: bytes, bits: list[int], env: DummyVecEnv) -> None:
    """A file in which only a bit without a meaning differs makes the same model."""

    def load() -> tuple[Any, ...]:
        model = SoftSAC.load(path, env, device="cpu")
        parameters = [parameter.tolist() for parameter in model.policy.parameters()]
        return parameters, contents(model.replay_buffer), model.num_timesteps, model._n_updates

    path.write_bytes(data)
    whole = load()
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert load() == whole


@pytest.mark.damage
def test_flip_bits(saved: list[bytes], env: DummyVecEnv, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    n_bits = 8 * len(saved[0])
    structure = range(n_bits - 8 * 1100, n_bits)  # the zip file's list of members
    bits = sorted({*rng.choice(n_bits, 10_000, replace=False).tolist(), *structure})
    attempts, equal = flip_bits(tmp_path / "model.zip", saved[0], bits)
    assert attempts.counts["refused"] > 15_000
    assert 0 < attempts.counts["equal"] < 5000  # times, versions, system attributes
    loads_equal(tmp_path / "model.zip", saved[0], rng.choice(equal, 20).tolist(), env)


@pytest.mark.slow
def test_flip_every_bit(saved: list[bytes], env: DummyVecEnv, tmp_path: pathlib.Path) -> None:
    n_bits = 8 * len(saved[0])
    attempts, equal = flip_bits(tmp_path / "model.zip", saved[0], list(range(n_bits)))
    assert sum(attempts.counts.values()) == n_bits > 400_000
    assert attempts.counts["equal"] < 0.03 * n_bits
    loads_equal(tmp_path / "model.zip", saved[0], np.random.default_rng(0).choice(equal, 1000).tolist(), env)


def damage(path: pathlib.Path, saved: list[bytes], n: int) -> None:
    rng = np.random.default_rng(0)
    path.write_bytes(saved[0])
    attempts = Attempts(path, members(path))
    for i in range(n):
        data = mutate(saved[0], saved[1], rng)
        path.write_bytes(data)
        if data == saved[1]:
            continue
        attempts(f"mutation {i}")
    assert attempts.counts["refused"] > 0.9 * n


@pytest.mark.damage
def test_random_damage(saved: list[bytes], tmp_path: pathlib.Path) -> None:
    needs_little(lambda: damage(tmp_path / "model.zip", saved, 3000))


@pytest.mark.slow
def test_more_random_damage(saved: list[bytes], tmp_path: pathlib.Path) -> None:
    needs_little(lambda: damage(tmp_path / "model.zip", saved, 20_000))


def test_members_of_two_files_are_not_mixed(saved: list[bytes], tmp_path: pathlib.Path) -> None:
    """Each member is whole, and so is the zip file: only the index knows."""
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(io.BytesIO(saved[1])) as other:
        names = other.namelist()
        for name in names:
            path.write_bytes(rewritten(io.BytesIO(saved[0]), {name: other.read(name)}).getvalue())
            same = other.read(name) == zipfile.ZipFile(io.BytesIO(saved[0])).read(name)
            if same:  # SB3's version, the system
                assert name in ("_stable_baselines3_version", "system_info.txt", "replay/0/dones.npy") or "side" in name
                continue
            with pytest.raises(CheckpointError):
                members(path)
    assert len(names) > 10


def test_a_buffer_of_another_file(saved: list[bytes], env: DummyVecEnv, tmp_path: pathlib.Path) -> None:
    model = make_model(env, 0, 6)
    add_rows(model.replay_buffer, 6, 20)
    model.save_replay_buffer(tmp_path / "buffer")
    before = contents(model.replay_buffer)
    data = (tmp_path / "buffer.pkl").read_bytes()
    for i in np.random.default_rng(0).choice(8 * len(data), 1000, replace=False).tolist():
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        try:
            model.load_replay_buffer(io.BytesIO(damaged))
        except CheckpointError:
            pass
        assert contents(model.replay_buffer) == before
