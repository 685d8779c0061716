"""
Draw the learning curve of one run of the RL Zoo: training returns and evaluations over environment steps.

    python benchmarks/plot_run.py logs/softsac/Pendulum-v1_1 -o learning_curve.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")  # before pyplot is imported
from matplotlib import pyplot as plt

TRAINING, EVALUATION = "#4477aa", "#cc6633"


def training_returns(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    Read the files that SB3's ``Monitor`` has written, one for each environment.

    :param run: folder of the run
    :return: environment steps at the end of each episode, over all environments (N,); its return (N,)
    :raises FileNotFoundError: if there is no such file
    """
    files = sorted(run.glob("*.monitor.csv"))
    if not files:
        raise FileNotFoundError(
            f"{run} has no *.monitor.csv: pass the folder of a run, like logs/softsac/Pendulum-v1_1."
        )
    # The first line is a JSON header; `t` is the wall time at the end of the episode
    tables = [np.genfromtxt(file, delimiter=",", names=True, skip_header=1) for file in files]
    episodes = np.concatenate([np.atleast_1d(table) for table in tables])
    episodes = episodes[np.argsort(episodes["t"], kind="stable")]
    return episodes["l"].cumsum(), episodes["r"]


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """
    :param values: (N,)
    :param window: number of values in each mean
    :return: mean of each value and those before it, of fewer at the start (N,)
    """
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def title(run: Path) -> str:
    """
    :param run: folder of the run, ``<logs>/<algo>/<environment>_<number>``
    :return: environment, algorithm and, if the zoo has noted it, seed
    """
    parts = [run.name.rpartition("_")[0], run.parent.name]
    for file in run.glob("*/args.yml"):
        # The zoo dumps an OrderedDict, which the safe loader does not know: the base loader reads it as plain lists
        pairs = yaml.load(file.read_text(), Loader=yaml.BaseLoader)[0]
        parts.append(f"seed {dict(pairs)['seed']}")
    return ", ".join(parts)


def plot(run: Path, output: Path, window: int) -> None:
    """
    :param run: folder of the run
    :param output: picture to write
    :param window: episodes that the rolling mean is taken over
    """
    steps, returns = training_returns(run)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, returns, ".", color=TRAINING, alpha=0.45, markeredgewidth=0, label="training episode")
    axes.plot(
        steps,
        rolling_mean(returns, window),
        color=TRAINING,
        linewidth=1.8,
        label=f"training, mean of {window} episodes",
    )

    evaluations = run / "evaluations.npz"
    if evaluations.is_file():
        with np.load(evaluations) as data:
            at, results = data["timesteps"], data["results"]  # (M,), (M, episodes)
        mean, std = results.mean(axis=1), results.std(axis=1)
        label = f"evaluation, {results.shape[1]} episodes: mean ± std"
        axes.plot(at, mean, "o-", color=EVALUATION, markersize=3.5, label=label)
        axes.fill_between(at, mean - std, mean + std, color=EVALUATION, alpha=0.2, linewidth=0)

    axes.set(title=title(run), xlabel="environment steps", ylabel="return of an episode", xlim=(0, None))
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", framealpha=0.9)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="LOG_FOLDER", type=Path, help="folder of the run")
    parser.add_argument("-o", "--output", type=Path, help="picture; default: LOG_FOLDER/learning_curve.png")
    parser.add_argument("-w", "--window", type=int, default=10, help="episodes of the rolling mean")
    args = parser.parse_args()
    output = args.output or args.run / "learning_curve.png"
    try:
        plot(args.run, output, args.window)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"Learning curve: {output}")


if __name__ == "__main__":
    main()
