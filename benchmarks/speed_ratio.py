"""
How many times as fast SoftSAC trains as Stable-Baselines3's SAC and SBX's, on a machine whose own speed varies.

    python benchmarks/speed_ratio.py run --sbx-python sbx/bin/python
    python benchmarks/speed_ratio.py report
    python benchmarks/speed_ratio.py run --arms compiled before --before ../clone-of-another-commit --output FILE

All arms of a cell (see ``speed.py``, also for SBX's environment) train at the same time, but only one of them at any
moment: each in a process of its own, warmed up, does the steps of one slice (half a second or so) while the others
wait. A round is a slice of each. What slows the machine down for longer than a round slows all arms, and the ratios
within a round do not know of it. The rates of all rounds are added to a file; ``report`` pools what was measured in
several sittings, prints the medians of the ratios, with 95% intervals by bootstrap over the rounds, puts the table into
the documents that have room for it, and draws ``speed.png``.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, circumstances, commit, fill_documents, markdown_table, relative
from speed import ARMS, CELLS, Settings, make_model, process_of, use_cores

WARMUP_UPDATES = 300
RUNS = RESULTS / "speed" / "ratios.jsonl"
# Where the documents have a table of these results, by its name there
TABLES = {RUNS: "speed", RESULTS / "speed_other_host" / "ratios.jsonl": "speed_other_host"}
COMPARED = ("sb3", "compiled", "sbx")


def work(args: argparse.Namespace) -> None:
    """
    Train, and after the warm-up do one slice for each line of input. Prints ``ready``, then the rate of each slice.

    :param args: arguments of the command ``worker``
    """
    settings: Settings = json.loads(args.settings)
    use_cores(settings["threads"])
    model, _ = make_model(settings)
    slice_start: tuple[float, int] | None = None

    def on_step(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        nonlocal slice_start
        if slice_start is None:
            if model._n_updates < WARMUP_UPDATES:
                return True
            print("ready", flush=True)
        else:
            seconds, steps = time.perf_counter() - slice_start[0], model.num_timesteps - slice_start[1]
            if steps < settings["steps"]:
                return True
            print(steps / seconds, flush=True)
        goes_on = bool(sys.stdin.readline())
        slice_start = time.perf_counter(), model.num_timesteps
        return goes_on

    model.learn(10**9, callback=on_step)


@contextmanager
def worker(settings: Settings, python: str, package: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """
    :param settings: of the arm
    :param python: interpreter
    :param package: folder of another sb3_softsac than the installed one
    :return: process that has been warmed up and waits
    """
    command, environment = process_of(settings, python, __file__)
    if package is not None:
        environment["PYTHONPATH"] = str(package.resolve())
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    try:
        _read_line(process, "ready")
        yield process
    finally:
        process.stdin.close()
        process.wait()


def _read_line(process: subprocess.Popen[str], expected: str | None = None) -> str:
    """The next line that is expected, or else a number: simulators print warnings of their own."""
    assert process.stdout is not None
    for line in process.stdout:
        word = line.strip()
        if word == expected or (expected is None and word.replace(".", "", 1).isdigit()):
            return word
    sys.exit(f"A worker has ended, see above: {process.args!r}")


def slice_settings(name: str, arm: str, threads: int) -> Settings:
    """
    :param name: of the cell
    :param arm: who trains
    :param threads: of torch, or cores of JAX
    :return: settings of the arm's worker: whole rollouts, half a second or more where the networks are the default's
    """
    cell = CELLS[name]
    rollout = cell.train_freq * cell.n_envs
    n_rollouts = max(2, round(0.6 * ARMS[arm].rate / rollout))
    settings = {"cell": name, "arm": arm, "threads": threads, "repeat": 1, **cell._asdict()}
    del settings["label"]
    return {**settings, "steps": n_rollouts * rollout}


def run(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the command ``run``
    """
    pythons = {arm: args.sbx_python if arm == "sbx" else sys.executable for arm in args.arms}
    packages = {"before": args.before}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.cells:
        all_settings = {arm: slice_settings(name, arm, args.threads) for arm in args.arms}
        with ExitStack() as stack:
            workers = {
                arm: stack.enter_context(worker(settings, pythons[arm], packages.get(arm)))
                for arm, settings in all_settings.items()
            }
            rates: dict[str, list[float]] = {arm: [] for arm in workers}
            for _ in range(args.rounds):
                for arm, process in workers.items():
                    assert process.stdin is not None
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    rates[arm].append(round(float(_read_line(process)), 1))
        row = {"cell": name, "threads": args.threads, "settings": all_settings, "rates": rates, **circumstances()}
        if args.before is not None:
            row["before"] = commit(args.before)
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, {arm: round(float(np.median(of_arm))) for arm, of_arm in rates.items()}, flush=True)


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    :param rows: of the file of results
    :return: a row for each cell and number of threads, with the rounds of all sittings
    """
    groups: dict[tuple[str, int], list[dict[str, list[float]]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["threads"]), []).append(row["rates"])
    result = []
    for (cell, threads), sittings in groups.items():
        rates: dict[str, list[float]] = {}
        for arm in (arm for arm in ARMS if any(arm in sitting for sitting in sittings)):
            rates[arm] = [r for each in sittings for r in each.get(arm, [math.nan] * len(next(iter(each.values()))))]
        result.append({"cell": cell, "threads": threads, "sittings": len(sittings), "rates": rates})
    return sorted(result, key=lambda row: (-row["threads"], list(CELLS).index(row["cell"])))


def ratio(rates: list[float], others: list[float]) -> tuple[float, float, float] | None:
    """
    :param rates: of R rounds; NaN where the arm did not take part
    :param others: of another arm in the same rounds
    :return: median of the ratios, and its 95% interval by bootstrap; None if there is no round of both
    """
    ratios = np.divide(rates, others)
    ratios = ratios[~np.isnan(ratios)]
    if not len(ratios):
        return None
    samples = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """
    Draw medians of the ratios to SB3's environment steps per second, with two threads or about as many.

    :param rows: see :func:`pooled`
    :param path: picture
    """
    import matplotlib  # not in SBX's environment

    matplotlib.use("Agg")  # before pyplot is imported
    from matplotlib import pyplot as plt

    threads = min((row["threads"] for row in rows), key=lambda n: abs(n - 2))
    shown = {row["cell"]: row["rates"] for row in rows if row["threads"] == threads}
    cells = [cell for cell in CELLS if cell in shown]
    arms = [arm for arm in ARMS if any(arm in rates for rates in shown.values())]
    width = 0.85 / len(arms)
    figure, axes = plt.subplots(figsize=(max(8.0, 0.4 * len(cells) * (len(arms) + 0.6)), 4.8), layout="constrained")
    for i, arm in enumerate(arms):
        here = {x: ratio(shown[cell][arm], shown[cell]["sb3"]) for x, cell in enumerate(cells) if arm in shown[cell]}
        places = [x + (i - (len(arms) - 1) / 2) * width for x, compared in here.items() if compared]
        ratios = [compared[0] for compared in here.values() if compared]
        bars = axes.bar(places, ratios, 0.93 * width, color=ARMS[arm].colour, label=ARMS[arm].label)
        axes.bar_label(bars, [f"{number:.2f}" for number in ratios], padding=2, fontsize=8)
    axes.set_xticks(range(len(cells)), [CELLS[cell].label for cell in cells])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.margins(x=0.01, y=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(arms), frameon=False, borderaxespad=0, fontsize=9,
        handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    figure.suptitle(f"Environment steps per second, in units of SB3's (CPU, threads: {threads})", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    print(f"Picture: {relative(path)}")


def report(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the command ``report``
    """
    rows = pooled([json.loads(line) for line in args.runs.read_text().splitlines()])
    arms = [arm for arm in COMPARED if any(arm in row["rates"] for row in rows)]
    table = []
    for row in rows:
        rates = row["rates"]
        cells = [f"{np.nanmedian(rates[arm]):,.0f}" if arm in rates else "" for arm in arms]
        for other in ("sb3", "sbx"):
            compared = ratio(rates["compiled"], rates[other]) if {"compiled", other} <= rates.keys() else None
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*compared) if compared else "")
        label = CELLS[row["cell"]].label.replace("\n", " ")
        n_rounds = f"{len(next(iter(rates.values())))} in {row['sittings']}"
        table.append([label, str(row["threads"]), n_rounds, *cells])
    names = [ARMS[arm].label for arm in arms]
    text = markdown_table(["task", "threads", "rounds in sittings", *names, "to SB3 (95%)", "to SBX (95%)"], table)
    print(text)
    if all("sb3" in row["rates"] for row in rows):
        draw(rows, args.runs.parent / "speed.png")
    if (name := TABLES.get(args.runs.resolve())) is not None:
        fill_documents({name: text})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="tasks")
    command.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(COMPARED), help="who trains")
    command.add_argument("--threads", type=int, default=2, help="of each arm")
    command.add_argument("--rounds", type=int, default=30, help="slices of each arm")
    command.add_argument("--sbx-python", metavar="PATH", help="interpreter of SBX's environment")
    command.add_argument("--before", type=Path, metavar="FOLDER", help="clone of the commit of the arm 'before'")
    command.add_argument("--output", type=Path, default=RUNS, help="file that results are appended to")
    command.set_defaults(do=run)

    command = commands.add_parser("report", help="table and picture")
    command.add_argument("--runs", type=Path, default=RUNS, help="file of results")
    command.set_defaults(do=report)

    command = commands.add_parser("worker", help="train in slices (called by run)")
    command.add_argument("settings", help="JSON")
    command.set_defaults(do=work)

    args = parser.parse_args()
    if args.do is run and "sbx" in args.arms and args.sbx_python is None:
        parser.error("SBX needs its interpreter: --sbx-python PATH, or leave it out: --arms sb3 compiled.")
    if args.do is run and "before" in args.arms and args.before is None:
        parser.error("The arm 'before' needs a clone of its commit: --before FOLDER.")
    args.do(args)


if __name__ == "__main__":
    main()
