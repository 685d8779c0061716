"""
One run at a time writes to a folder of checkpoints.

The lock is ``flock``, held by the operating system for the process: it ends with the process, however that ends. A file
whose mere existence is the lock would outlive a killed job and refuse its successor. On NFS, Linux makes ``flock`` a
lock of the server, which holds between machines. It ends when the client's lease does (NFSv4: after 90 s by default),
so also with a dead machine. Lustre and some FUSE file systems have such locks only if they are mounted with them.
"""

import errno
import os
import socket
import warnings
from datetime import datetime, timezone
from pathlib import Path

import filelock

from sb3_softsac.persistence.archive import CheckpointError

NAME = ".softsac.lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """
    :param folder: existing folder of checkpoints
    :return: lock to release; children that this process forks do not hold it
    :raises CheckpointError: if another process, or another run of this one, holds the lock
    :raises OSError: if the folder cannot be written to
    """
    # With on_acquired, filelock never falls back to a file that outlives its process
    lock = filelock.FileLock(folder / NAME, thread_local=False, on_acquired=_sign)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise CheckpointError(
            f"{folder} is in use by {_holder(folder)}: give each run its own folder, or wait until that one has ended."
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warnings.warn(
            f"The file system of {folder} has no locks ({error.strerror}): make sure that no other job writes there.",
            stacklevel=2,
        )
    return lock


def _sign(fd: int) -> None:
    """Write into the lock who holds it, for the message to others."""
    job = os.environ.get("SLURM_JOB_ID")
    who = f"process {os.getpid()} on {socket.gethostname()}" + (f" (Slurm job {job})" if job else "")
    os.ftruncate(fd, 0)
    os.write(fd, f"{who} since {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC".encode())


def _holder(folder: Path) -> str:
    try:
        return (folder / NAME).read_text(errors="replace") or "another process"
    except OSError:  # Windows does not let others read what is locked
        return "another process"
