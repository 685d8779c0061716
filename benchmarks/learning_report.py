"""
Tables and pictures of learning runs, from what ``learning.py`` has recorded of them. Not a benchmark itself: call
``learning.py report``.
"""

import ast
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from learning import read_hyperparameters
from record import RESULTS, ROOT, fill_documents, markdown_table, relative
from rliable import library as rly
from rliable import metrics

matplotlib.use("Agg")  # before pyplot is imported
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

REFERENCE = "SB3 SAC"
NAMES = {"softsac": "SoftSAC", "sac": REFERENCE}
COLOURS = {"SoftSAC": "C0", "SoftSAC compact": "C3", REFERENCE: "0.45"}
LAST = 5  # evaluations that are a run's score
WINDOW = 0.2  # a return after t is the mean over those from 0.8 t to t
BOOTSTRAP_SAMPLES = 2000
DIAGNOSTICS = ("entropy", "log_std", "saturated_actions", "ent_coef", "q_value", "critic_loss")


class Run(NamedTuple):
    """One run, as recorded."""

    folder: Path
    env_id: str
    arm: str
    seed: int
    steps: int  # to be done
    evaluations: dict[str, np.ndarray]  # columns of its CSV file, each (N,)
    final: np.ndarray | None  # returns of the evaluation after training
    resumed: list[dict[str, Any]]
    learning_starts: int  # steps before the first update

    @property
    def score(self) -> float:
        """Mean of the last evaluations; never the best ones."""
        return float(self.evaluations["mean_return"][-LAST:].mean())

    @property
    def updated(self) -> np.ndarray:
        """(N,) environment steps since the first update."""
        return np.maximum(self.evaluations["steps"] - self.learning_starts, 0)

    def mean_before(self, updated: float) -> float:
        """
        :param updated: environment steps since the first update
        :return: mean return over the last part of these, ``WINDOW``
        """
        steps = np.linspace((1 - WINDOW) * updated, updated, 101)
        return float(np.interp(steps, self.updated, self.evaluations["mean_return"]).mean())

    @property
    def hours(self) -> np.ndarray:
        """(N,) training time: of the processor, since runs share the machine; of old records, on the clock."""
        seconds = self.evaluations.get("cpu_seconds", self.evaluations["seconds"])
        return np.asarray(seconds / 3600)

    @property
    def is_finished(self) -> bool:
        return self.final is not None or bool(self.evaluations["steps"][-1] >= self.steps)


Arms = dict[str, list[Run]]


def arm_name(record: dict[str, Any]) -> str:
    """
    :param record: what is in ``run.json``
    :return: name of the algorithm; with that of its hyperparameters, unless they are the default ones; and with what is
        different in the run
    """
    header = record["run"]
    config = Path(header["config"]).stem
    if config == "softsac":
        return " ".join([NAMES[header["algo"]], *(f"{name}={value}" for name, value in header.get("option", []))])
    return " ".join([NAMES[header["algo"]], config, *differences(record)])


def differences(record: dict[str, Any]) -> list[str]:
    """
    :param record: what is in ``run.json``
    :return: hyperparameters of the run that are not what its file says today, as ``--option`` takes them, sorted: the
        file may have been changed since then
    """
    header = record["run"]
    today = flat(read_hyperparameters(ROOT / header["config"], header["env"], header["algo"]))
    then = flat({name: _value(text) for name, text in record["hyperparameters"].items()})
    then.pop("policy_kwargs.use_sde", None)  # which SB3 adds
    names = sorted(name for name in today | then if today.get(name) != then.get(name))
    return [f"{name}={_text(then.get(name))}" for name in names]


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    :param arguments: of the constructor
    :return: the same with their parts by name: ``policy_kwargs.unit_norm``
    """
    parts = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            parts.update({f"{name}.{key}": each for key, each in flat(value).items()})
        else:
            parts[name] = value
    return parts


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_run(folder: Path) -> Run:
    """
    :param folder: of a run, with ``run.json`` and ``evaluations.csv``
    :return: the run
    """
    record = json.loads((folder / "run.json").read_text())
    header = record["run"]
    header_line, *lines = (folder / "evaluations.csv").read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # not one that a kill has cut off
    data = np.atleast_1d(np.genfromtxt([header_line, *whole], delimiter=",", names=True))
    final = folder / "final.csv"
    return Run(
        folder,
        header["env"],
        arm_name(record),
        header["seed"],
        header["steps"],
        {name: data[name] for name in data.dtype.names or ()},
        np.atleast_1d(np.genfromtxt(final, delimiter=",", names=True))["episode_return"] if final.exists() else None,
        record.get("resumed", []),
        int(record["hyperparameters"].get("learning_starts", 100)),
    )


def read_runs(folder: Path) -> dict[str, Arms]:
    """
    :param folder: runs are in it, or in folders below
    :return: runs by environment and arm, the reference last
    """
    runs = []
    for path in sorted(folder.rglob("run.json")):
        evaluations = path.with_name("evaluations.csv")
        if evaluations.exists() and evaluations.read_text().count("\n") > 1:
            runs.append(read_run(path.parent))
        else:
            print(f"{relative(path.parent)} has no evaluation yet, and is left out.")
    if not runs:
        raise FileNotFoundError(f"There are no runs with evaluations in {folder}.")
    tasks: dict[str, Arms] = {}
    for run in sorted(runs, key=lambda run: (run.env_id, run.arm == REFERENCE, run.arm, run.seed)):
        tasks.setdefault(run.env_id, {}).setdefault(run.arm, []).append(run)
    return tasks


def bootstrap(scores: Any, function: Callable[..., np.ndarray], reps: int) -> tuple[np.ndarray, np.ndarray]:
    """
    :param scores: (runs, tasks), or a list of two such arrays, which are drawn from independently
    :param function: of arrays like that; K numbers
    :param reps: samples
    :return: values (K,), and their 95% intervals (2, K) by stratified bootstrap (https://arxiv.org/abs/2108.13264)
    """
    state = np.random.get_state()
    np.random.seed(0)  # rliable draws indices from NumPy's own state, whatever random_state it is given
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # arch wants another generator than rliable hands it
            points, intervals = rly.get_interval_estimates(
                {"it": scores}, function, reps=reps, random_state=np.random.RandomState(0)
            )
    finally:
        np.random.set_state(state)
    return points["it"], intervals["it"]


def estimate(scores: Any, function: Callable[..., float]) -> tuple[float, float, float]:
    """
    :param scores: see :func:`bootstrap`
    :param function: of arrays like that
    :return: value, and its 95% interval
    """
    points, intervals = bootstrap(scores, lambda *arrays: np.array([function(*arrays)]), BOOTSTRAP_SAMPLES)
    return float(points[0]), float(intervals[0, 0]), float(intervals[1, 0])


def scores_of(runs: list[Run]) -> np.ndarray:
    """
    :param runs: N runs of one task
    :return: (N, 1) scores
    """
    return np.array([[run.score] for run in runs])


def task_table(tasks: dict[str, Arms]) -> str:
    """
    :param tasks: see :func:`read_runs`
    :return: Markdown table, a row for each task and arm
    """
    rows = []
    for env_id, arms in tasks.items():
        for arm, runs in arms.items():
            scores = scores_of(runs)
            shown = f"{scores.mean():,.0f}"
            if len(runs) > 1:
                value, low, high = estimate(scores, metrics.aggregate_iqm)
                shown = f"{value:,.0f} ({low:,.0f} to {high:,.0f})"
            finals = [run.final for run in runs if run.final is not None]
            final = "" if len(finals) < len(runs) else f"{np.mean(finals):,.1f} ({len(finals[0])} episodes)"
            hours = f"{np.mean([run.hours[-1] for run in runs]):.2f}"
            unfinished = sum(not run.is_finished for run in runs)
            rows.append([
                env_id, arm, f"{runs[0].steps:,}", ", ".join(f"{score:,.0f}" for score in scores[:, 0]), shown, final,
                hours + (f", {unfinished} unfinished" if unfinished else ""),
            ])  # fmt: skip
    header = [
        *("task", "arm", "steps", "scores of the seeds", "interquartile mean (95%)"),
        *("after training", "hours of training"),
    ]
    return markdown_table(header, rows)


def comparison_table(tasks: dict[str, Arms]) -> str:
    """
    :param tasks: see :func:`read_runs`
    :return: Markdown table: each arm beside the reference, in each task that both have been run on for as many steps
    """
    rows = []
    arms = sorted({arm for task in tasks.values() if REFERENCE in task for arm in task} - {REFERENCE})
    for arm in arms:
        shared = {env_id: (task[arm], task[REFERENCE]) for env_id, task in tasks.items() if {arm, REFERENCE} <= {*task}}
        for env_id, (runs, others) in shared.items():
            if len({run.steps for run in runs + others}) > 1:
                continue
            pair = [scores_of(runs), scores_of(others)]
            rows.append([env_id, arm, *_compared(pair)])
    return markdown_table(["task", "arm", f"difference from {REFERENCE}", "probability of improvement"], rows)


def _compared(pair: list[np.ndarray]) -> list[str]:
    def difference(scores: np.ndarray, others: np.ndarray) -> float:
        return float(metrics.aggregate_iqm(scores) - metrics.aggregate_iqm(others))

    value, low, high = (f"{number:+,.0f}" for number in estimate(pair, difference))
    if min(map(len, pair)) == 1:  # one run tells nothing of the next
        return [value, ""]
    probability = estimate(pair, metrics.probability_of_improvement)
    return [f"{value} ({low} to {high})", "{:.2f} ({:.2f} to {:.2f})".format(*probability)]


def resumption_table(tasks: dict[str, Arms]) -> str:
    """
    :param tasks: see :func:`read_runs`
    :return: Markdown table of where runs were killed and continued, and whether what was evaluated again came out the
        same
    """
    rows = []
    for run in (run for arms in tasks.values() for runs in arms.values() for run in runs):
        for start in run.resumed:
            again = [_at(line, run) for line in start["made_again"]]
            same = sum(bool(equal) for equal in again)
            rows.append([
                f"{run.env_id}, {run.arm}, seed {run.seed}", start["date"], f"{start['at_step']:,}",
                f"{same} of {len(again)}",
            ])  # fmt: skip
    if not rows:
        return "No run was interrupted."
    return markdown_table(["run", "continued", "from the checkpoint at step", "evaluations repeated equally"], rows)


def _at(line: str, run: Run) -> bool:
    """Whether an evaluation that is repeated in the file has the same return."""
    steps, mean_return, std_return = map(float, line.split(",")[:3])
    (row,) = np.flatnonzero(run.evaluations["steps"] == steps)
    return bool(run.evaluations["mean_return"][row] == mean_return and run.evaluations["std_return"][row] == std_return)


def draw_curves(tasks: dict[str, Arms], path: Path) -> None:
    """
    Curves over steps, and below them over training time (see :func:`draw_arm`).

    :param tasks: see :func:`read_runs`
    :param path: picture
    """
    figure, panels = plt.subplots(
        2, len(tasks), figsize=(1 + 4.2 * len(tasks), 7), layout="constrained", squeeze=False, sharey="col"
    )
    for (env_id, arms), column in zip(tasks.items(), panels.T, strict=True):
        column[0].set(title=env_id, xlabel="environment steps")
        column[1].set(xlabel="hours of training")
        column[0].xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_thousands))
        for i, (arm, runs) in enumerate(arms.items()):
            label, colour = f"{arm}, {_count(len(runs), 'seed')}", COLOURS.get(arm, f"C{i + 1}")
            draw_arm(column[0], runs, [run.evaluations["steps"] for run in runs], label, colour)
            draw_arm(column[1], runs, [run.hours for run in runs], label, colour)
        for axes in column:
            tidy(axes)
        # Above the picture: long names would cover the curves
        column[0].legend(fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 1.08))
    panels[0, 0].set_ylabel("return of an evaluation")
    panels[1, 0].set_ylabel("return of an evaluation")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Picture: {relative(path)}")


def draw_arm(axes: Axes, runs: list[Run], xs: list[np.ndarray], label: str, colour: str) -> None:
    """
    Curves of one arm: thin lines are seeds, the thick one is their interquartile mean with its 95% interval. Crosses
    are where a run was killed and continued.

    :param axes: of the task
    :param runs: of the arm on the task
    :param xs: where their evaluations are on the horizontal axis, (N,) each
    :param label: for the legend
    :param colour: of all lines
    """
    for x, run in zip(xs, runs, strict=True):
        axes.plot(x, run.evaluations["mean_return"], color=colour, linewidth=0.6, alpha=0.6)
        steps, stops = run.evaluations["steps"], [start["at_step"] for start in run.resumed]
        heights = np.interp(stops, steps, run.evaluations["mean_return"])
        axes.plot(np.interp(stops, steps, x), heights, "kx", markersize=6, zorder=3)
    length = min(len(x) for x in xs)
    centre, low, high = _band(np.stack([run.evaluations["mean_return"][:length] for run in runs]))
    x = np.mean([one[:length] for one in xs], axis=0)
    axes.plot(x, centre, color=colour, linewidth=2, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_diagnostics(tasks: dict[str, Arms], path: Path) -> None:
    """
    What was logged of the updates, a line for each seed.

    :param tasks: see :func:`read_runs`
    :param path: picture
    """
    names = [
        name
        for name in DIAGNOSTICS
        if any(name in run.evaluations for arms in tasks.values() for runs in arms.values() for run in runs)
    ]
    if not names:
        return
    figure, panels = plt.subplots(
        len(names), len(tasks), figsize=(1 + 3.4 * len(tasks), 2.2 * len(names)), layout="constrained", squeeze=False,
        sharex="col",
    )  # fmt: skip
    for (env_id, arms), column in zip(tasks.items(), panels.T, strict=True):
        column[0].set_title(env_id)
        column[-1].set_xlabel("environment steps")
        column[-1].xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_thousands))
        for name, axes in zip(names, column, strict=True):
            for i, (arm, runs) in enumerate(arms.items()):
                for run in runs:
                    values = run.evaluations.get(name)
                    if values is not None and not np.isnan(values).all():
                        axes.plot(run.evaluations["steps"], values, color=COLOURS.get(arm, f"C{i + 1}"), linewidth=0.9)
            tidy(axes)
            if name in ("critic_loss", "ent_coef"):
                axes.set_yscale("log")
    for name, axes in zip(names, panels[:, 0], strict=True):
        axes.set_ylabel(name.replace("_", " "))
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"Picture: {relative(path)}")


def _band(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interquartile means (N,) of returns (runs, N), and their intervals."""
    if len(returns) == 1:
        return returns[0], returns[0], returns[0]

    def means(scores: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(scores[..., i]) for i in range(scores.shape[-1])])

    points, intervals = bootstrap(returns[:, None], means, 500)
    return points, intervals[0], intervals[1]


def _thousands(value: float, _position: int) -> str:
    return f"{value / 1000:g}k" if value else "0"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def tidy(axes: Axes) -> None:
    """
    :param axes: get the look of all pictures
    """
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def report_tables(tasks: dict[str, Arms]) -> dict[str, str]:
    """
    :param tasks: see :func:`read_runs`
    :return: tables of the report by name
    """
    tables = {"tasks": task_table(tasks)}
    if any(REFERENCE in arms and len(arms) > 1 for arms in tasks.values()):
        tables["comparison"] = comparison_table(tasks)
    return {**tables, "resumed": resumption_table(tasks)}


def report(folder: Path) -> str:
    """
    Write ``report.md``, ``curves.png`` and ``diagnostics.png`` into a folder of runs; tables of runs that are committed
    also into README.md and the pages in docs/.

    :param folder: see :func:`read_runs`
    :return: text of the report
    """
    tasks = read_runs(folder)
    tables = report_tables(tasks)
    parts = [
        "Written by `python benchmarks/learning.py report`. A run's score is the mean of its last five evaluations, of",
        "10 deterministic episodes each.",
    ]
    text = "\n".join(parts) + "".join(f"\n\n{table}" for table in tables.values()) + "\n"
    (folder / "report.md").write_text(text)
    if folder.resolve().parent == RESULTS:
        fill_documents({f"{folder.name}: {name}": table for name, table in tables.items()})
    draw_curves(tasks, folder / "curves.png")
    draw_diagnostics(tasks, folder / "diagnostics.png")
    return text
