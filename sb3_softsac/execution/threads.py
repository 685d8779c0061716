"""The number of torch threads: as many as the work keeps busy, on cores that no other process uses."""

import os
import statistics
import time
from pathlib import Path

import torch as th

# Threads spin while they wait for each other. With less work per thread than this (multiplications in the largest
# product), or with more threads than free cores, they wait longer than they work
WORK_PER_THREAD = 4_000_000
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_AT_IMPORT = th.get_num_threads()
_used = _AT_IMPORT


def are_chosen() -> bool:
    """
    :return: whether the user has set the number, with ``torch.set_num_threads`` or in the environment
    """
    return th.get_num_threads() not in (_AT_IMPORT, _used) or any(name in os.environ for name in CHOSEN_BY_USER)


def choose(work: int) -> int:
    """
    :param work: multiplications in the largest matrix product of an update
    :return: number of threads; the user's own, if there is one
    """
    if are_chosen():
        return th.get_num_threads()
    return max(1, min(_AT_IMPORT, round(work / WORK_PER_THREAD), n_cores() - n_busy()))


def use(number: int) -> None:
    """
    :param number: threads for torch to use
    """
    global _used
    if th.get_num_threads() != number:
        th.set_num_threads(number)
    _used = number


def n_cores() -> int:
    """
    :return: cores that this process may use
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
