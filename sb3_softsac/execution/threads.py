"""How many threads torch should use: as many as the work keeps busy, on cores that nobody else uses."""

import os
import statistics
import time
from pathlib import Path

import torch as th

# A thread that waits for another spins. With less work than this for each (multiplications in the largest product), or
# with more threads than free cores, waiting takes longer than working
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
    :return: number of threads; what the user has set stays
    """
    if are_chosen():
        return th.get_num_threads()
    return max(1, min(_AT_IMPORT, round(work / WORK_PER_THREAD), n_cores() - n_busy()))


def use(number: int) -> None:
    """
    :param number: of threads that torch shall use
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
    :param samples: number of looks
    :param interval: seconds between them
    :return: threads of others that run now; 0 where the system does not tell
    """
    running = []
    try:
        for _ in range(samples):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)
            time.sleep(interval)
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, int(statistics.median(running)))
