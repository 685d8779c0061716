"""
Zip files of JSON, arrays and ``.pth`` members, which are verified before anything in them is used.

SB3's model files are such archives. Ours have an additional member, ``softsac.json``: an index with the size and
SHA-256 of every other member. Members are stored, never compressed, so reading cannot take more memory than the file.
"""

import hashlib
import io
import json
import math
import pickle
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import numpy as np
import torch as th

INDEX = "softsac.json"
FORMAT = 1  # of archives, and of manifests in run folders
CHUNK = 1 << 20
END = struct.Struct("<4s4H2LH")  # last record of a zip file without comment


class CheckpointError(ValueError):
    """A file is damaged, does not fit, or can only be read with ``allow_pickle=True``."""


class _Hashed(io.RawIOBase):
    """Forwards what is written, and counts and hashes it. It cannot seek, so no byte is rewritten."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.stream.write(view)
        self.hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self.stream.flush()


class ArchiveWriter:
    """
    Writes an archive. Use it as a context manager, and call :meth:`close` before its end.

    :param file: binary file to append to
    """

    def __init__(self, file: BinaryIO):
        self._file = _Hashed(file)
        self._zip = zipfile.ZipFile(self._file, "w")
        self.members: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "ArchiveWriter":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *args: object) -> None:
        if exception_type is not None:
            self._zip.fp = None  # otherwise it would write its end when it is garbage collected

    @contextmanager
    def member(self, name: str) -> Iterator[IO[bytes]]:
        """
        :param name: name of a new member
        :return: stream to write it to
        """
        # ZipInfo has a fixed date: equal contents make equal files
        with self._zip.open(zipfile.ZipInfo(name), "w", force_zip64=True) as stream:
            hashed = _Hashed(stream)
            yield hashed  # type: ignore[misc]
        self.members[name] = {"size": hashed.size, "sha256": hashed.hash.hexdigest()}

    def add_json(self, name: str, tree: Any) -> None:
        with self.member(name) as stream:
            stream.write(json.dumps(tree, separators=(",", ":")).encode())

    def add_array(self, name: str, array: np.ndarray) -> None:
        """
        :param name: name of a new member, in NumPy's npy format
        :param array: array with contiguous rows; it is written in pieces, without a copy of the whole
        """
        with self.member(name) as stream:
            head = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(stream, head)
            rows = max(1, CHUNK // max(1, array[:1].nbytes))
            for first in range(0, len(array), rows):
                stream.write(np.ascontiguousarray(array[first : first + rows]).reshape(-1).view(np.uint8).data)

    def close(self, tree: Any) -> tuple[int, str]:
        """
        Finish the file.

        :param tree: entries of the index, besides the members
        :return: size of the file in bytes, and its SHA-256
        """
        self.add_json(INDEX, {"format": FORMAT, "members": dict(self.members), **tree})
        self._zip.close()
        return self._file.size, self._file.hash.hexdigest()


# Exceptions that a damaged zip file, JSON text, array or tensor can raise
DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """
    Turn exceptions from damage into a :class:`CheckpointError` that names the damaged part.

    :param what: name of the part
    """
    try:
        yield
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def check_format(what: str, tree: Any) -> None:
    """
    :param what: name of a file
    :param tree: its JSON tree
    :raises CheckpointError: if a version with another format wrote it
    """
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{what} has format {found!r}, but this version of sb3_softsac reads format {FORMAT}: open it with the "
            "version that wrote it."
        )


class ArchiveReader:
    """
    Reads an archive. The constructor checks its structure, :meth:`verify` its contents.

    :param file: binary file that can seek
    :param name: its name in error messages
    :raises CheckpointError: if it is not a zip file, or cannot be a file of SoftSAC or SB3
    """

    def __init__(self, file: BinaryIO, name: str):
        self.name = name
        with naming(name):
            file_size = file.seek(0, io.SEEK_END)
            self._zip = zipfile.ZipFile(file)
            infos = self._zip.infolist()
            self.sizes = {info.filename: info.file_size for info in infos}
            if len(self.sizes) != len(infos):
                raise CheckpointError(f"{name} has two members of the same name.")
            file.seek(-END.size, io.SEEK_END)
            signature, _, _, _, n_infos, _, _, _ = END.unpack(file.read(END.size))
            if signature != b"PK\5\6" or n_infos != min(len(infos), 0xFFFF) or (infos and infos[0].header_offset != 0):
                # zipfile itself would take the last .pth member of a truncated file for the file, and can skip members
                raise CheckpointError(f"{name} cannot be read: a part is missing, or the list of members is damaged.")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise CheckpointError(f"{name} is not a model file: its member {info.filename} is compressed.")
            if sum(self.sizes.values()) > file_size:
                raise CheckpointError(f"{name} is damaged: its members claim more bytes than it has.")
            self.index: dict[str, Any] | None = None
            if INDEX in self.sizes:
                self.index = self.json(INDEX)
                check_format(name, self.index)

    def verify(self) -> None:
        """
        Read every member and compare it with the index.

        :raises CheckpointError: naming the member that is damaged, missing or unexpected
        """
        if self.index is None:  # a file of SB3 has only the CRC-32 of each member, which zipfile checks
            for name in self.sizes:
                with naming(f"{name} in {self.name}"), self.open(name) as stream:
                    sha256_of(stream)
            return
        with naming(f"the index of {self.name}"):
            members = dict(self.index["members"])
            for name in sorted({*members, *self.sizes} - {INDEX}):
                if name not in members or name not in self.sizes:
                    raise CheckpointError(f"{self.name} has a missing or unexpected member: {name}.")
                if self.sizes[name] != members[name]["size"]:
                    raise CheckpointError(
                        f"{name} in {self.name} has {self.sizes[name]} bytes, not {members[name]['size']}."
                    )
        for name, member in members.items():
            with naming(f"{name} in {self.name}"), self.open(name) as stream:
                if sha256_of(stream) != member["sha256"]:
                    raise CheckpointError(f"{name} in {self.name} is damaged: its SHA-256 differs from the index.")

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def open(self, name: str) -> IO[bytes]:
        """
        :param name: name of a member
        :return: stream to read it from
        :raises CheckpointError: if there is no such member
        """
        if name not in self.sizes:
            raise CheckpointError(f"{self.name} has no member {name}.")
        with naming(f"{name} in {self.name}"):
            return self._zip.open(name)

    def json(self, name: str) -> Any:
        with naming(f"{name} in {self.name}"), self.open(name) as stream:
            return json.loads(stream.read().decode())

    def torch(self, name: str, device: th.device) -> Any:
        """
        :param name: name of a ``.pth`` member
        :param device: device of the tensors
        :return: its contents: tensors in plain containers
        """
        what = f"{name} in {self.name}"
        with naming(what), self.open(name) as stream:
            data = io.BytesIO(stream.read())
            if data.getvalue().startswith(b"PK\3\4"):
                with zipfile.ZipFile(data) as inner:
                    if any(info.compress_type != zipfile.ZIP_STORED for info in inner.infolist()):
                        raise CheckpointError(f"{what} is damaged: torch never writes compressed files.")
            if b"bytearray" in data.getvalue():  # torch would allocate one of any length
                raise CheckpointError(f"{what} holds something other than tensors.")
            data.seek(0)
            tree = th.load(data, map_location=device, weights_only=True)
            if any(tensor.untyped_storage().nbytes() < tensor.nbytes for tensor in _tensors(tree)):
                raise CheckpointError(f"{what} has a tensor with more elements than data.")
            return tree

    def array(self, name: str, dtype: np.dtype, shape: tuple[int | None, ...]) -> np.ndarray:
        """
        :param name: name of a member in the npy format
        :param dtype: expected dtype
        :param shape: expected shape; None: any length
        :return: the array, read-only
        :raises CheckpointError: if the dtype or shape is different, before any memory is allocated
        """
        what = f"{name} in {self.name}"
        with naming(what), self.open(name) as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise CheckpointError(f"{what} is not in NumPy's npy format 1.0.")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(stream)
            fits = len(found_shape) == len(shape) and all(
                n in (None, found) for n, found in zip(shape, found_shape, strict=True)
            )
            if not fits or found_dtype != dtype or fortran:
                raise CheckpointError(
                    f"{what} holds {found_dtype} of shape {found_shape}, not {dtype} of shape {shape}."
                )
            n_bytes = math.prod(found_shape) * dtype.itemsize
            if n_bytes != self.sizes[name] - stream.tell():
                raise CheckpointError(f"{what} has {self.sizes[name] - stream.tell()} bytes of data, not {n_bytes}.")
            return np.frombuffer(stream.read(), dtype).reshape(found_shape)


def _tensors(tree: Any) -> Iterator[th.Tensor]:
    left, seen = [tree], set()
    while left:
        item = left.pop()
        if isinstance(item, th.Tensor):
            yield item
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item


def sha256_of(stream: IO[bytes]) -> str:
    """
    :param stream: stream to read to its end
    :return: hexadecimal SHA-256
    """
    sha = hashlib.sha256()
    while data := stream.read(CHUNK):
        sha.update(data)
    return sha.hexdigest()
