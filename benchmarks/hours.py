"""
Return over hours on two cores: what has been learned when the same time is spent.

    python benchmarks/speed_ratio.py run --arms sb3 compiled compact --threads 2 --rounds 8 \\
        --cells halfcheetah hopper walker2d ant_shipped humanoid_shipped --output benchmarks/results/speed/hours.jsonl
    python benchmarks/hours.py

Learning runs share their machines with others, and not all were made on the same machine, so their own times cannot be
compared. But what a run learns in a step does not depend on the machine, and how long a step takes is measured
for all arms in turns, on one machine. So these are the curves of ``learning.py`` over steps, divided by such rates.
Random steps before the first update and evaluations count as no time.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from learning_report import COLOURS, WINDOW, Arms, Run, draw_arm, read_runs, tidy
from matplotlib import pyplot as plt
from record import RESULTS, fill_documents, markdown_table, relative
from rliable import metrics
from speed import CELLS
from speed_ratio import pooled

ARMS = {"compact": "SoftSAC compact", "compiled": "SoftSAC", "sb3": "SB3 SAC"}  # of the rates: of the runs
RATES = RESULTS / "speed" / "hours.jsonl"
CURVES = (RESULTS / "learning", RESULTS / "learning_compact")
OUTPUT = RESULTS / "hours"
IN_README = ("Humanoid-v5", "HalfCheetah-v5")
MINUTES = (10, 20, 30, 40, 50)


class Curve(NamedTuple):
    """Runs of one arm on one task, and how fast it trains."""

    runs: list[Run]
    rate: float  # environment steps per second

    def minutes(self, run: Run) -> np.ndarray:
        """
        :param run: one of them
        :return: (N,) training time at its N evaluations
        """
        return np.asarray(run.updated / self.rate / 60)

    def end(self) -> float:
        """:return: minutes, when the first of the runs ends"""
        return float(min(self.minutes(run)[-1] for run in self.runs))

    def after(self, minutes: float) -> float:
        """
        :param minutes: training time
        :return: interquartile mean over the runs of the mean return shortly before
        """
        means = [run.mean_before(minutes * 60 * self.rate) for run in self.runs]
        return float(metrics.aggregate_iqm(np.array(means)[:, None]))


Tasks = dict[str, dict[str, Curve]]
"""By environment and arm."""


def read(rates: Path) -> Tasks:
    """
    :param rates: results of ``speed_ratio.py``
    :return: curves of all arms that have been run on a task, for each task with rates
    """
    runs: dict[str, Arms] = {}
    for folder in CURVES:
        for env_id, arms in read_runs(folder).items():
            runs.setdefault(env_id, {}).update(arms)
    tasks: Tasks = {}
    for row in pooled([json.loads(line) for line in rates.read_text().splitlines()]):
        env_id = CELLS[row["cell"]].env
        tasks[env_id] = {
            name: Curve(runs[env_id][name], float(np.nanmedian(row["rates"][arm])))
            for arm, name in ARMS.items()
            if name in runs[env_id] and arm in row["rates"]
        }
    return tasks


def table(tasks: Tasks) -> str:
    """
    :param tasks: see :func:`read`
    :return: Markdown table, a row for each task and arm
    """
    rows = []
    for env_id, arms in tasks.items():
        for name, curve in arms.items():
            cells = []
            for minutes in MINUTES:
                end = min(minutes, curve.end())
                shown = f"{curve.after(end):,.0f}" + (f" (at {end:.0f})" if end < minutes else "")
                cells.append(shown if end > (1 - WINDOW) * minutes else "")
            rows.append([env_id, name, str(len(curve.runs)), f"{curve.rate:.0f}", *cells])
    return markdown_table(["task", "arm", "seeds", "steps/s", *(f"after {minutes} min" for minutes in MINUTES)], rows)


def draw(tasks: Tasks, path: Path) -> None:
    """
    :param tasks: see :func:`read`; a panel each
    :param path: picture
    """
    figure, panels = plt.subplots(1, len(tasks), figsize=(1 + 3.4 * len(tasks), 4), layout="constrained", squeeze=False)
    labels = {}
    for axes, (env_id, arms) in zip(panels[0], tasks.items(), strict=True):
        for name, curve in arms.items():
            draw_arm(axes, curve.runs, [curve.minutes(run) / 60 for run in curve.runs], name, COLOURS[name])
        ends = sorted(curve.end() / 60 for curve in arms.values())
        axes.set(title=env_id, xlabel="hours on two cores")
        tidy(axes)
        axes.set_xlim(0, ends[-2] if len(ends) > 1 else ends[0])  # what goes on alone compares with nothing
        labels.update({label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=len(labels), frameon=False)
    panels[0, 0].set_ylabel("return of an evaluation")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Picture: {relative(path)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=RATES, help="results of speed_ratio.py")
    args = parser.parse_args()
    tasks = read(args.rates)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "report.md").write_text(table(tasks) + "\n")
    fill_documents({"hours": table(tasks)})
    draw(tasks, OUTPUT / "hours.png")
    draw({env_id: tasks[env_id] for env_id in IN_README if env_id in tasks}, OUTPUT / "readme.png")
    print(table(tasks))


if __name__ == "__main__":
    main()
