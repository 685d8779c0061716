"""
Training through the RL Zoo from start to end, SoftSAC beside SB3's SAC: wall-clock time of the commands themselves.

    python benchmarks/zoo_speed.py --env Pendulum-v1 --steps 20000 --repeats 3

Each run is a process of its own, imports and evaluations included. SoftSAC compiles anew each time, as on a machine
that has never done so. Results: ``results/zoo_speed.json``. The package has to be installed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import RESULTS, markdown_table, write_json

ALGORITHMS = ("sac", "softsac")


def seconds(algo: str, env_id: str, steps: int, seed: int) -> float:
    """
    :param algo: of the zoo
    :param env_id: environment
    :param steps: environment steps
    :param seed: seed
    :return: wall-clock time of the whole command
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rl_zoo3.train", "--algo", algo, "--env", env_id, "-n", str(steps)]
        command += ["--seed", str(seed), "-f", str(Path(folder, "logs"))]
        caches = ("TORCHINDUCTOR_CACHE_DIR", "SB3_SOFTSAC_CACHE_DIR")
        environment = {**os.environ, **dict.fromkeys(caches, str(Path(folder, "compiled")))}
        start = time.perf_counter()
        subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="environment id")
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    runs: dict[str, list[float]] = {algo: [] for algo in ALGORITHMS}
    for seed in range(args.repeats):
        for algo in ALGORITHMS:
            runs[algo].append(seconds(algo, args.env, args.steps, seed))
            print(f"{algo}, seed {seed}: {runs[algo][-1]:.1f} s", flush=True)
    ratios = [sac / softsac for sac, softsac in zip(runs["sac"], runs["softsac"], strict=True)]
    write_json(RESULTS / "zoo_speed.json", env=args.env, steps=args.steps, seconds=runs, ratios=ratios)
    rows = [[algo, f"{statistics.median(times):.1f}"] for algo, times in runs.items()]
    print(markdown_table(["algorithm", f"{args.steps:,} steps of {args.env}, s (median)"], rows))
    print(f"SoftSAC is {statistics.median(ratios):.2f} times as fast (median of the runs' ratios)")


if __name__ == "__main__":
    main()
