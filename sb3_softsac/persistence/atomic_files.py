"""
Files that exist as a whole or not at all, even if the process is killed or the power fails.

A file is written under a temporary name, synced to the disk and renamed; then its folder is synced. Every operation
that changes the disk goes through ``os`` in this module, so that tests can fail, record or interrupt each of them. A
failed fsync is an error and is not repeated: after it, the contents of the disk are unknown.
"""

import errno
import io
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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


@contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """
    Write a file. It replaces ``path`` when the block ends without an exception; otherwise nothing changes.

    :param path: final name; missing folders are created
    :param sync: sync the folder too; False if the caller does it with :func:`sync_folder`, once for many files
    :return: file to append to
    :raises OSError: any error of the system
    """
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
    if os.name == "nt":  # Windows cannot open folders; NTFS keeps a journal of names
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
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """
    :param path: file to remove, if it exists; a folder stays
    """
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
