"""
The number of torch threads: as many as the work keeps busy, on cores of our own.

On a shared node, a job has cores of its own (by CPU affinity, a container's quota or Slurm), whatever the rest of the
node does. Otherwise, running threads of other processes count.
"""

import os
import statistics
import time
from pathlib import Path

import loky
import torch as th

# Threads spin while they wait for each other. With less work per thread than this (multiplications in the largest
# product), or with more threads than free cores, they wait longer than they work
WORK_PER_THREAD = 4_000_000
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_AT_IMPORT = th.get_num_threads()
_used = _AT_IMPORT
_is_kept = False


def are_chosen() -> bool:
    """Whether the user has set the number, with ``torch.set_num_threads`` or in the environment."""
    is_set = _is_kept or th.get_num_threads() not in (_AT_IMPORT, _used)
    return is_set or any(name in os.environ for name in CHOSEN_BY_USER)


def keep() -> None:
    """From now on, the present number is the user's choice, also if it is torch's own."""
    global _is_kept
    _is_kept = True


def choose(work: int) -> int:
    """
    :param work: multiplications in the largest matrix product of an update
    :return: number of threads; the user's own, if there is one
    """
    if are_chosen():
        return th.get_num_threads()
    cores = n_cores()
    is_share = cores < (os.cpu_count() or 1)
    return max(1, min(_AT_IMPORT, round(work / WORK_PER_THREAD), cores if is_share else cores - n_busy()))


def use(number: int) -> None:
    """
    :param number: threads for torch to use
    """
    global _used
    if th.get_num_threads() != number:
        th.set_num_threads(number)
    _used = number


def n_cores() -> int:
    """Cores that this process may use, at least 1: by CPU affinity, cgroup and ``SLURM_CPUS_PER_TASK``."""
    of_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    cores: int = loky.cpu_count()
    return min(cores, max(1, int(of_task))) if of_task.isdecimal() else cores


def n_busy(samples: int = 9, interval: float = 0.01) -> int:
    """
    :param samples: number of samples of the system's run queue, of which the median counts
    :param interval: seconds between them
    :return: running threads of other processes; 0 where the system does not tell
    """
    running = []
    try:
        for _ in range(samples):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)
            time.sleep(interval)
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, int(statistics.median(running)))
