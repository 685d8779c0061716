"""
What the parts of the execution bring that could be left out: products replaced in Inductor's graphs, and the choice of
the number of threads.

    python benchmarks/optional_parts.py run
    python benchmarks/optional_parts.py report

Each variant of a case has a process of its own, and they take turns: in each round, every one does some updates of SAC
with two layers of 256 and batches of 256, if the case does not say otherwise. Writes ``results/optional_parts.json``;
``report`` puts the table into the documents. The results are of a commit with one part more: a pass that computed
Adam's scalars apart from the loops. It brought nothing, and is gone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from record import RESULTS, fill_documents, markdown_table, write_json
from turns import Turn, take, workers

RUN = RESULTS / "optional_parts.json"
PRODUCTS = ("all", "torch's products", "no change of products")
SMALL = {"policy_kwargs": {"net_arch": [64, 64]}, "batch_size": 64}


class Case(NamedTuple):
    """What is updated, and what is compared."""

    policy: str
    env_id: str
    options: dict[str, Any]
    threads: int | None  # None: the variants differ in it
    is_busy: bool = False  # beside a process that keeps a core busy


CASES = {
    "HalfCheetah, gSDE, 1 thread": Case("MlpPolicy", "HalfCheetah-v5", {"use_sde": True}, 1),
    "HalfCheetah, gSDE, 2 threads": Case("MlpPolicy", "HalfCheetah-v5", {"use_sde": True}, 2),
    "Humanoid, layer norm, 1 thread": Case(
        "MlpPolicy", "Humanoid-v5", {"policy_kwargs": {"normalization": "layer"}}, 1
    ),
    "Humanoid, layer norm, 2 threads": Case(
        "MlpPolicy", "Humanoid-v5", {"policy_kwargs": {"normalization": "layer"}}, 2
    ),
    "images of 64 x 64, batch size 64, 2 threads": Case("CnnPolicy", "images", {"batch_size": 64}, 2),
    "HalfCheetah, 2 x 64, batch size 64": Case("MlpPolicy", "HalfCheetah-v5", SMALL, None),
    "HalfCheetah, 2 x 64, batch size 64, one core busy": Case("MlpPolicy", "HalfCheetah-v5", SMALL, None, True),
    "HalfCheetah": Case("MlpPolicy", "HalfCheetah-v5", {}, None),
    "HalfCheetah, one core busy": Case("MlpPolicy", "HalfCheetah-v5", {}, None, True),
}


def variants_of(case: Case) -> list[str]:
    """
    :param case: one of ``CASES``
    :return: names of its variants; the first is what users get
    """
    return ["chosen threads", "as many as cores"] if case.threads is None else list(PRODUCTS)


def leave_out(variant: str) -> None:
    """
    :param variant: this process does without the part from now on
    """
    from sb3_softsac.execution.cpp import matmul

    if variant == "torch's products":
        matmul.ours_are_faster = lambda: False
    if variant == "no change of products":
        matmul.replace_products = lambda *_: None


def make_turn(case: Case, variant: str, n_updates: int) -> Turn:
    """
    :param case: what is updated
    :param variant: with what
    :param n_updates: in a turn
    :return: does them; number of threads, and seconds of an update
    """
    import gymnasium as gym
    import torch as th
    from stable_baselines3.common.envs import FakeImageEnv

    from sb3_softsac import SoftSAC

    # Inductor's cache knows the files of the passes, but not what is left out here
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    leave_out(variant)
    if case.env_id == "images":
        env: gym.Env[Any, Any] = FakeImageEnv(screen_height=64, screen_width=64, n_channels=3, discrete=False)
    else:
        env = gym.make(case.env_id)
    threads = th.get_num_threads() if variant == "as many as cores" else case.threads or "auto"
    options: dict[str, Any] = {"buffer_size": 2000, "learning_starts": 300, "device": "cpu", "seed": 0}
    model = SoftSAC(case.policy, env, compile=True, num_threads=threads, **{**options, **case.options})
    model.learn(310)
    assert model._runner is not None
    assert model._runner.compiles

    def turn() -> tuple[int, float]:
        start = time.perf_counter()
        for _ in range(n_updates):
            model.train(gradient_steps=1, batch_size=model.batch_size)
        return th.get_num_threads(), (time.perf_counter() - start) / n_updates

    return turn


@contextmanager
def busy_core(is_busy: bool) -> Iterator[None]:
    """
    :param is_busy: whether a process keeps a core busy meanwhile
    """
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure(case: Case, rounds: int, n_updates: int) -> dict[str, dict[str, Any]]:
    """
    :param case: one of ``CASES``
    :param rounds: turns of each variant
    :param n_updates: in a turn
    :return: seconds of an update in each round, and number of threads, by variant
    """
    turns = {variant: partial(make_turn, case, variant, n_updates) for variant in variants_of(case)}
    with busy_core(case.is_busy), workers(turns) as pipes:
        taken = take(pipes, rounds)
    return {
        variant: {"threads": each[0][0], "seconds": [seconds for _, seconds in each]} for variant, each in taken.items()
    }


def table_of(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """
    :param results: of :func:`measure`, by case
    :return: Markdown: milliseconds, and medians and quartiles of the ratios to what users get
    """
    rows = []
    for name, variants in results.items():
        reference = next(iter(variants.values()))["seconds"]
        for variant, each in variants.items():
            ratios = np.divide(each["seconds"], reference)
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            milliseconds = 1000 * statistics.median(each["seconds"])
            cells = [f"{each['threads']}", f"{milliseconds:.2f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
            rows.append([f"{name}: {variant}", *cells])
    return markdown_table(["update", "threads", "ms", "of the first"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    command.add_argument("--rounds", type=int, default=15, help="turns of each variant")
    command.add_argument("--updates", type=int, default=40, help="in a turn")
    commands.add_parser("report", help="table")
    args = parser.parse_args()
    if args.command == "run":
        results = {}
        for name in args.cases:
            results[name] = measure(CASES[name], args.rounds, args.updates)
            print(table_of({name: results[name]}), flush=True)
        write_json(RUN, results=results)
    text = table_of(json.loads(RUN.read_text())["results"])
    print(text)
    fill_documents({"optional_parts": text})


if __name__ == "__main__":
    main()
