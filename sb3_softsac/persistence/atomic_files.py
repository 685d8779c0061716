"""
Files that exist as a whole or not at all, even if the process is killed or the power fails.

A file is written under a temporary name, synced to the disk and renamed; then its folder is synced. Every operation
that changes the disk goes through ``os`` in this module, so that tests can fail, record or interrupt each of them. A
failed fsync is an error and is not repeated: after it, the contents of the disk are unknown.

On object storage, a file is uploaded in one request, which takes effect as a whole. There is nothing to sync or rename,
and there are no folders.
"""

import errno
import io
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from typing_extensions import TypeIs

TEMPORARY = ".tmp"
BUFFER = 1 << 20


class _Descriptor(io.RawIOBase):
    """A file descriptor that is written to through ``os`` of this module."""

    def __init__(self, fd: int):
        self.fd = fd

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self.fd, data)


def as_path(path: "str | os.PathLike[str]") -> Path:
    """
    :param path: path, or address on object storage: ``"s3://bucket/run"``, or a ``UPath``
    :return: a ``Path``; for an address a ``UPath``, which has the methods of ``Path`` that we use
    :raises ImportError: if the packages for object storage are not installed
    :raises ValueError: if ``path`` is an address that was made a ``Path``
    """
    if not isinstance(path, str | os.PathLike):  # a UPath
        return path
    if isinstance(path, str) and "://" in path:
        try:
            from upath import UPath
        except ImportError as error:
            raise ImportError(f"{path} needs universal-pathlib: pip install 'sb3-softsac[s3]'.") from error
        # What is listed may have changed since: others write there, too
        return cast(Path, UPath(path, use_listings_cache=False))
    if re.match(r"\w{2,}:/", Path(path).as_posix()):  # one letter is a drive of Windows
        raise ValueError(f"{path} was an address, but a Path keeps only one of its slashes: pass a string.")
    return Path(path)


def is_path(path: Any) -> "TypeIs[str | os.PathLike[str]]":
    """
    :param path: path, address or file object
    :return: whether it is not a file object
    """
    return not hasattr(path, "read")


def _is_remote(path: Path) -> bool:
    return not isinstance(path, Path)


def open_file(path: Path) -> BinaryIO:
    """
    :param path: existing file
    :return: file to read from; from object storage, it is read in one request
    """
    return io.BytesIO(path.read_bytes()) if _is_remote(path) else path.open("rb")


def names(folder: Path) -> list[str]:
    """
    :param folder: folder that need not exist
    :return: names of what is in it
    """
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _upload(path: Any, data: bytes, is_new: bool) -> None:
    try:
        path.fs.pipe_file(path.path, data, mode="create" if is_new else "overwrite")
    except FileExistsError:
        if path.read_bytes() != data:  # otherwise the request was repeated, since the first answer was lost
            raise


@contextmanager
def atomic_file(path: Path, sync: bool = True, is_new: bool = False) -> Iterator[BinaryIO]:
    """
    Write a file. It replaces ``path`` when the block ends without an exception; otherwise nothing changes.

    :param path: final name; missing folders are created
    :param sync: sync the folder too; False if the caller does it with :func:`sync_folder`, once for many files
    :param is_new: refuse to replace a file on object storage, where no lock keeps others from writing
    :return: file to append to
    :raises FileExistsError: see ``is_new``
    :raises OSError: any error of the system
    """
    if _is_remote(path):
        buffer = io.BytesIO()
        yield buffer
        _upload(path, buffer.getvalue(), is_new)
        return
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        raw = _Descriptor(fd)
        try:
            stream = io.BufferedWriter(raw, BUFFER)
            yield stream
            stream.flush()
            os.fsync(fd)
        finally:
            raw.close()  # what is left in the buffer after an error must not be written later, to a reused descriptor
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """
    Make the names of new files in a folder durable.

    :param folder: the folder
    """
    if os.name == "nt" or _is_remote(folder):  # Windows cannot open folders; NTFS keeps a journal of names
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not supported by some network file systems
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """
    Make a folder and its parents, durably.

    :param folder: the folder; may exist already
    """
    if _is_remote(folder) or folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """
    :param path: file to remove, if it exists; a folder stays
    """
    if _is_remote(path):
        with suppress(FileNotFoundError):
            path.unlink()
        return
    if path.is_dir() and not path.is_symlink():
        return
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_leftovers(folder: Path, name: str = ".*") -> None:
    """
    Remove temporary files that ended processes of this machine have left behind.

    :param folder: where to look
    :param name: regular expression of the final names
    """
    if _is_remote(folder):
        return
    pattern = re.compile(rf"\.({name})\.{re.escape(socket.gethostname())}\.(\d+){re.escape(TEMPORARY)}")
    for entry in os.listdir(folder):
        match = pattern.fullmatch(entry)
        if match and not _is_running(int(match[2])):
            remove(folder / entry)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # there, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
