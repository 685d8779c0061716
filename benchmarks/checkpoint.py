"""
What checkpoints cost: SoftSAC's beside SB3's ``save`` plus ``save_replay_buffer``, with a full replay buffer.

Everything is measured in processes of its own, one after the other, with the default networks and one thread:

- full: one file of the whole model (SB3: two), and loading it in a fresh process: seconds, bytes, extra peak memory;
- incremental: checkpoints with 10,000 new transitions each into a folder (SB3 has but the full ones);
- what such a checkpoint every 10,000 steps adds to a run, from the speed of a short piece of that run.

::

    python benchmarks/checkpoint.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gymnasium as gym
from buffer_memory import EPISODE_LENGTH, fill, resident_bytes, storage_bytes
from record import RESULTS, markdown_table, write_json

ALGOS = ("sb3", "softsac")
NEW_ROWS = 10_000
REPEATS = 5
LOADS = 3
STEPS = 1500  # to measure the speed of training


def cost_of(function: Callable[[], Any]) -> dict[str, float]:
    """
    :param function: called once
    :return: seconds, bytes written, and the most memory beyond that of the start, in bytes (Linux)
    """
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    memory, written = resident_bytes(), _written_bytes()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "bytes": _written_bytes() - written,
        "extra_peak_bytes": resident_bytes("VmHWM") - memory,
    }


def _written_bytes() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["wchar"])


def measure(algo: str, env_id: str, size: int, folder: Path) -> dict[str, Any]:
    """
    Save a model with a full replay buffer in all ways. To be called in a fresh process.

    :param algo: ``"sb3"`` or ``"softsac"``
    :param env_id: environment
    :param size: transitions in the replay buffer
    :param folder: where to
    :return: costs
    """
    import torch as th
    from stable_baselines3 import SAC

    from sb3_softsac import SoftSAC
    from sb3_softsac.persistence.run_folder import RunFolder

    th.set_num_threads(1)
    env = gym.make(env_id)
    make: Any = SoftSAC if algo == "softsac" else SAC
    options: dict[str, Any] = {"compile": True} if algo == "softsac" else {}
    model = make("MlpPolicy", env, buffer_size=size, seed=0, device="cpu", **options)
    model.learn(200)
    start = time.perf_counter()
    model.learn(STEPS, reset_num_timesteps=False)
    steps_per_second = STEPS / (time.perf_counter() - start)
    fill(model.replay_buffer, env, EPISODE_LENGTH[env_id], size)
    result: dict[str, Any] = {
        "algo": algo,
        "env": env_id,
        "transitions": size,
        "storage_bytes": storage_bytes(model.replay_buffer),
        "steps_per_second": steps_per_second,
    }

    def save() -> None:
        model.save(folder / "model.zip")
        if algo == "sb3":
            model.save_replay_buffer(folder / "replay_buffer.pkl")

    save()  # warm
    result["save"] = [cost_of(save) for _ in range(REPEATS)]
    if algo == "sb3":
        result["incremental"] = result["save"]  # there is no other way
        return result

    run = RunFolder(folder / "run")
    replay_seconds = []
    save_segments = RunFolder._save_segments

    def timed(self: RunFolder, buffer: Any) -> Any:
        start = time.perf_counter()
        segments = save_segments(self, buffer)
        replay_seconds.append(time.perf_counter() - start)
        return segments

    def checkpoint() -> None:
        run.save(
            model.num_timesteps,
            lambda file: model.write(file, rows_elsewhere=True),
            model.replay_buffer,
            keep_last=2,
        )

    with patch.object(RunFolder, "_save_segments", timed):
        result["first"] = cost_of(checkpoint)
        result["incremental"] = []
        for repeat in range(REPEATS):
            fill(model.replay_buffer, env, EPISODE_LENGTH[env_id], NEW_ROWS, seed=1 + repeat)
            result["incremental"].append(cost_of(checkpoint))
            result["incremental"][-1]["replay_seconds"] = replay_seconds[-1]
            assert run.last is not None
            result["incremental"][-1]["state_bytes"] = run.last["state"]["size"]
    return result


def measure_load(algo: str, env_id: str, folder: Path) -> dict[str, Any]:
    """
    Load what :func:`measure` has saved. To be called in a fresh process.

    :return: cost; extra peak memory is that beyond what the loaded model takes
    """
    import torch as th
    from stable_baselines3 import SAC

    from sb3_softsac import SoftSAC

    th.set_num_threads(1)
    env = gym.make(env_id)
    make: Any = SoftSAC if algo == "softsac" else SAC
    models = []

    def load() -> None:
        models.append(make.load(folder / "model.zip", env, device="cpu"))
        if algo == "sb3":
            models[-1].load_replay_buffer(folder / "replay_buffer.pkl")

    before = resident_bytes()
    cost = cost_of(load)
    cost["resident_bytes"] = resident_bytes() - before
    cost["extra_peak_bytes"] -= cost["resident_bytes"]
    return cost


def _median(costs: list[dict[str, float]], name: str) -> float:
    return statistics.median(cost[name] for cost in costs)


def report(results: list[dict[str, Any]]) -> None:
    """Print the tables of docs/results.md."""
    header = ["1,000,000 transitions", "", "file MB", "save s", "extra memory MB", "load s", "extra memory"]
    rows = []
    for row in results:
        save, load = row["save"], row["load"]
        rows.append(
            [
                row["env"],
                row["algo"],
                f"{_median(save, 'bytes') / 1e6:,.0f}",
                f"{_median(save, 'seconds'):.2f}",
                f"{_median(save, 'extra_peak_bytes') / 1e6:,.0f}",
                f"{_median(load, 'seconds'):.2f}",
                f"{max(0.0, _median(load, 'extra_peak_bytes')) / row['storage_bytes']:.1%}",
            ]
        )
    print(markdown_table(header, rows), end="\n\n")
    header = [
        f"{NEW_ROWS:,} new transitions",
        "",
        "MB written",
        "replay MB",
        "stall ms",
        "replay ms",
        "of the run's time",
    ]
    rows = []
    for row in results:
        each = row["incremental"]
        seconds, written = _median(each, "seconds"), _median(each, "bytes")
        replay = statistics.median(cost["bytes"] - cost.get("state_bytes", 0) for cost in each)
        replay_seconds = statistics.median(cost.get("replay_seconds", cost["seconds"]) for cost in each)
        share = seconds / (NEW_ROWS / row["steps_per_second"] + seconds)
        rows.append(
            [
                row["env"],
                row["algo"],
                f"{written / 1e6:,.1f}",
                f"{replay / 1e6:,.1f}",
                f"{1e3 * seconds:,.0f}",
                f"{1e3 * replay_seconds:,.0f}",
                f"{share:.2%}",
            ]
        )
    print(markdown_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000, help="transitions")
    parser.add_argument("--one", nargs=4, metavar=("save|load", "ALGO", "ENV", "FOLDER"), help="measure this one here")
    args = parser.parse_args()
    if args.one:
        what, algo, env_id, folder = args.one
        if what == "save":
            print(json.dumps(measure(algo, env_id, args.size, Path(folder))))
        else:
            print(json.dumps(measure_load(algo, env_id, Path(folder))))
        return

    results = []
    for env_id in EPISODE_LENGTH:
        for algo in ALGOS:
            with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
                parts = []
                for what in ("save", *["load"] * LOADS):
                    command = [sys.executable, __file__, "--size", str(args.size), "--one", what, algo, env_id, folder]
                    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                    parts.append(json.loads(output.splitlines()[-1]))
            results.append({**parts[0], "load": parts[1:]})
            print(f"{env_id}, {algo}: done", file=sys.stderr)
    write_json(RESULTS / "checkpoint.json", results=results)
    report(results)


if __name__ == "__main__":
    main()
