"""
Zip files of JSON, arrays and ``.pth`` members, that are checked before anything in them is used.

SB3's model files are such archives. Ours have one member more, ``softsac.json``, with the size and the SHA-256 of every
other one. Members are stored, never compressed: nothing in a file can grow when it is read.
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
FORMAT = 1
CHUNK = 1 << 20
END = struct.Struct("<4s4H2LH")  # what a zip file without comment ends with


class CheckpointError(ValueError):
    """A file is damaged, does not fit, or would have to be trusted to be read."""


class _Hashed(io.RawIOBase):
    """Passes on what is written and remembers its length and its hash; cannot seek, so nothing is written twice."""

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
    Context manager; :meth:`close` ends it.

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
        # A fixed date: equal contents make equal files
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
        :param array: array whose rows are contiguous; it is not copied as a whole
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

        :param tree: what the index says besides the members
        :return: size of the file in bytes, and its SHA-256
        """
        with self._zip.open(zipfile.ZipInfo(INDEX), "w") as stream:
            index = {"format": FORMAT, "members": self.members, **tree}
            stream.write(json.dumps(index, separators=(",", ":")).encode())
        self._zip.close()
        return self._file.size, self._file.hash.hexdigest()


# What reading a damaged zip file, JSON text, array or tensor can raise
DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """
    Turn what damage can raise into a :class:`CheckpointError` that says which part is damaged.

    :param what: the part
    """
    try:
        yield
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


class ArchiveReader:
    """
    :param file: binary file that can seek
    :param name: how error messages call it
    :raises CheckpointError: if it is not a zip file, or one that could not be of ours or SB3's
    """

    def __init__(self, file: BinaryIO, name: str):
        self.name = name
        with naming(name):
            file_size = file.seek(0, io.SEEK_END)
            self._zip = zipfile.ZipFile(file)
            infos = self._zip.infolist()
            self.sizes = {info.filename: info.file_size for info in infos}
            if len(self.sizes) != len(infos):
                raise CheckpointError(f"{name} has two members of one name.")
            file.seek(-END.size, io.SEEK_END)
            signature, _, _, _, n_infos, _, _, _ = END.unpack(file.read(END.size))
            if signature != b"PK\5\6" or n_infos != min(len(infos), 0xFFFF) or (infos and infos[0].header_offset != 0):
                # zipfile would take a .pth member at the end of a truncated file for all of it, and passes over members
                raise CheckpointError(f"{name} cannot be read: a part is missing, or its list of members damaged.")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise CheckpointError(f"{name} has a compressed member ({info.filename}): it is not a model file.")
            if sum(self.sizes.values()) > file_size:
                raise CheckpointError(f"{name} claims members of more bytes than it has: it is damaged.")
            index = self.json(INDEX) if INDEX in self.sizes else None
        if INDEX in self.sizes and not (isinstance(index, dict) and index.get("format") == FORMAT):
            found = index.get("format") if isinstance(index, dict) else index
            raise CheckpointError(
                f"{name} has the format {found!r}, this version of sb3_softsac reads {FORMAT}: open it with the "
                "version that wrote it."
            )
        self.index: dict[str, Any] | None = index

    def verify(self) -> None:
        """
        Compare every member with the index, and read them all.

        :raises CheckpointError: naming the member that is damaged, missing or unexpected
        """
        if self.index is None:  # a file of SB3's: the zip's own check sums are all there is
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
                    raise CheckpointError(f"{name} in {self.name} does not have the contents that were written.")

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def open(self, name: str) -> IO[bytes]:
        """
        :param name: name of a member
        :raises CheckpointError: if there is none
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
        :param device: where its tensors go
        :return: its contents; only tensors and plain containers can be in it
        """
        what = f"{name} in {self.name}"
        with naming(what), self.open(name) as stream:
            data = io.BytesIO(stream.read())
            if data.getvalue().startswith(b"PK\3\4"):
                with zipfile.ZipFile(data) as inner:
                    if any(info.compress_type != zipfile.ZIP_STORED for info in inner.infolist()):
                        raise CheckpointError(f"{what} is compressed: torch does not write such files.")
            if b"bytearray" in data.getvalue():  # torch would make one of any length
                raise CheckpointError(f"{what} holds something else than tensors.")
            data.seek(0)
            tree = th.load(data, map_location=device, weights_only=True)
            if any(tensor.untyped_storage().nbytes() < tensor.nbytes for tensor in _tensors(tree)):
                raise CheckpointError(f"{what} has a tensor with more elements than data.")
            return tree

    def array(self, name: str, dtype: np.dtype, shape: tuple[int | None, ...]) -> np.ndarray:
        """
        :param name: name of a member in the npy format
        :param dtype: expected dtype
        :param shape: its shape; None: any length
        :raises CheckpointError: before anything is allocated, if it holds something else
        """
        what = f"{name} in {self.name}"
        with naming(what), self.open(name) as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise CheckpointError(f"{what} is not of NumPy's npy format 1.0.")
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

    def close(self) -> None:
        self._zip.close()


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
    :param stream: read to its end
    :return: SHA-256, hexadecimal
    """
    sha = hashlib.sha256()
    while data := stream.read(CHUNK):
        sha.update(data)
    return sha.hexdigest()
