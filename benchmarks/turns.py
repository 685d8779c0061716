"""
Workers in separate processes that take turns: what slows the machine down slows all of them. Not a benchmark itself.

``speed_ratio.py`` has its own, since some of its arms need another interpreter.
"""

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Turn = Callable[[], Any]
"""What a worker does in one turn; its result can be sent to another process."""


@contextmanager
def workers(
    turns: Mapping[str, Callable[[], Turn]], packages: dict[str, Path] | None = None
) -> Iterator[dict[str, Connection]]:
    """
    Start workers one after the other, each when the one before is ready.

    :param turns: functions, by name, that make ready in a new process; they can be pickled
    :param packages: folders of another ``sb3_softsac`` than the installed one, by name
    :return: to ask them for turns
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for name, make in turns.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(make, theirs), daemon=True)
        path = list(sys.path)
        try:
            if packages and name in packages:
                sys.path.insert(0, str(packages[name].resolve()))  # the new process takes it over
            process.start()
        finally:
            sys.path[:] = path
        theirs.close()
        ours.recv()
        processes.append(process)
        pipes[name] = ours
    try:
        yield pipes
    finally:
        for process, pipe in zip(processes, pipes.values(), strict=True):
            pipe.close()
            process.join()


def _work(make: Callable[[], Turn], pipe: Connection) -> None:
    turn = make()
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(turn())


def take(pipes: dict[str, Connection], rounds: int) -> dict[str, list[Any]]:
    """
    :param pipes: of :func:`workers`
    :param rounds: turns of each, after one for a warm-up
    :return: their results in each round, by name
    """
    results: dict[str, list[Any]] = {name: [] for name in pipes}
    for _ in range(1 + rounds):
        for name, pipe in pipes.items():
            pipe.send(None)
            results[name].append(pipe.recv())
    return {name: each[1:] for name, each in results.items()}
