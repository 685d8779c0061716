"""
Small tasks and the variants, through the RL Zoo's own commands: train to the end, then 100 episodes of enjoy.

    python benchmarks/zoo_tasks.py --logs logs
    python benchmarks/zoo_tasks.py --table

Each finished task is a line of ``results/zoo_tasks.jsonl``; those that are there already are not run again. Remove that
file to repeat them all.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, circumstances, markdown_table

RECORDS = RESULTS / "zoo_tasks.jsonl"
EPISODES = 100


class Task(NamedTuple):
    """One training run, and the mean return that it has to reach."""

    env_id: str
    episode_length: int
    goal: float
    seed: int
    variant: str | None = None

    def train_command(self, logs: Path) -> list[str]:
        command = ["-m", "rl_zoo3.train", "--algo", "softsac", "--env", self.env_id, "--seed", str(self.seed)]
        return [*command, "-f", str(logs), *(["-conf", f"variants/{self.variant}.yml"] if self.variant else [])]

    def enjoy_command(self, logs: Path) -> list[str]:
        steps = EPISODES * self.episode_length
        command = ["-m", "rl_zoo3.enjoy", "--algo", "softsac", "--env", self.env_id, "-f", str(logs)]
        return [*command, "-n", str(steps), "--seed", "1000", "--no-render", "--device", "cpu"]


TASKS = [
    *(Task("Pendulum-v1", 200, -180.0, seed) for seed in (1, 2, 3)),
    Task("InvertedPendulum-v5", 1000, 1000.0, 1),
    Task("Pendulum-v1", 200, -200.0, 1, "pendulum_separate_log_std"),
    Task("InvertedPendulum-v5", 1000, 1000.0, 1, "inverted_pendulum_delayed"),
    Task("Pendulum-v1", 200, -200.0, 1, "pendulum_actor_target"),
]


def finished() -> dict[Task, dict[str, Any]]:
    """
    :return: records of the tasks that have been run
    """
    lines = RECORDS.read_text().splitlines() if RECORDS.is_file() else []
    records = [json.loads(line) for line in lines]
    return {Task(**record["task"]): record for record in records}


def run(task: Task, logs: Path) -> None:
    """
    Train, evaluate and append the record.

    :param task: what to run
    :param logs: folder of the zoo's logs; the task gets one of its own in it
    """
    logs = logs / f"{task.env_id}_{task.variant or 'default'}_{task.seed}"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with (logs / "train.txt").open("w") as output:
        subprocess.run([sys.executable, *task.train_command(logs)], env=environment, stdout=output, check=True)
    seconds = time.perf_counter() - start
    command = [sys.executable, *task.enjoy_command(logs)]
    text = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    match = re.search(r"^(\d+) Episodes\nMean reward: (\S+) \+/- (\S+)", text, re.MULTILINE)
    assert match is not None, text
    record = {
        **circumstances(),
        "task": task._asdict(),
        "commands": [
            " ".join(["OMP_NUM_THREADS=1 python", *words])
            for words in (task.train_command(Path("logs")), task.enjoy_command(Path("logs")))
        ],
        "episodes": int(match[1]),
        "mean_return": float(match[2]),
        "std_return": float(match[3]),
        "training_seconds": round(seconds, 1),
    }
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{task}: {record['mean_return']} +- {record['std_return']}", flush=True)


def table() -> str:
    """
    :return: Markdown table of all records
    """
    rows = []
    for task, record in finished().items():
        rows.append([
            task.env_id,
            f"`variants/{task.variant}.yml`" if task.variant else "`softsac.yml`",
            str(task.seed),
            f"{record['mean_return']:.1f} ± {record['std_return']:.1f}",
            f"{task.goal:g}",
        ])  # fmt: skip
    return markdown_table(["environment", "configuration", "seed", f"return, {EPISODES} episodes", "target"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of the zoo's logs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--table", action="store_true", help="only print the table of what has been run")
    args = parser.parse_args()
    if not args.table:
        to_do = [task for task in TASKS if task not in finished()]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda task: run(task, args.logs), to_do))
    print(table())


if __name__ == "__main__":
    main()
