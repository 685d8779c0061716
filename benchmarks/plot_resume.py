"""
Draw a run that was never stopped and the same run killed and continued, on top of each other.

    python benchmarks/plot_resume.py WHOLE KILLED CONTINUED -o resume.png

The three are folders of the RL Zoo with evaluations; docs/guide/saving.md says how they are made. Prints
by how much the evaluations of the continued run differ from those of the whole one.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from plot_run import title

matplotlib.use("Agg")  # before pyplot is imported
from matplotlib import pyplot as plt

WHOLE, KILLED, CONTINUED = "#b8c7d9", "#4477aa", "#cc6633"


def evaluations(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    :param run: folder of a run of the zoo
    :return: environment steps (M,); returns of the episodes (M, episodes)
    """
    with np.load(run / "evaluations.npz") as data:
        return data["timesteps"], data["results"]


def plot(whole: Path, killed: Path, continued: Path, output: Path) -> float:
    """
    :param whole: run that was never stopped
    :param killed: run that was killed
    :param continued: run that went on from a checkpoint of the killed one
    :param output: picture to write
    :return: largest difference between evaluations of the whole and of the continued run
    :raises ValueError: if they have not evaluated at the same steps
    """
    steps, results = evaluations(whole)
    last_before = evaluations(killed)[0][-1]
    steps_again, results_again = evaluations(continued)
    if not np.array_equal(steps, steps_again):
        raise ValueError(f"The runs have evaluated at different steps: {steps} and {steps_again}.")
    difference = np.abs(results - results_again)

    figure, (curves, differences) = plt.subplots(
        2, 1, figsize=(8, 5.5), layout="constrained", sharex=True, height_ratios=[4, 1]
    )
    curves.plot(steps, results.mean(axis=1), color=WHOLE, linewidth=7, solid_capstyle="round", label="never stopped")
    before = steps_again <= last_before
    mean = results_again.mean(axis=1)
    curves.plot(steps_again[before], mean[before], "o-", color=KILLED, markersize=3, label="until it was killed")
    after = steps_again >= last_before
    curves.plot(steps_again[after], mean[after], "o-", color=CONTINUED, markersize=3, label="continued")
    curves.axvline(last_before, color="grey", linewidth=0.8, linestyle=":")
    curves.set(title=title(whole), ylabel=f"return, mean of {results.shape[1]} episodes")
    curves.legend(loc="lower right", framealpha=0.9)
    differences.plot(steps, difference.max(axis=1), color=CONTINUED)
    differences.set(xlabel="environment steps", ylabel="largest\ndifference", xlim=(0, None))
    differences.set_ylim(-0.1, max(1.0, 1.1 * difference.max()))
    for axes in (curves, differences):
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)
    plt.close(figure)
    return float(difference.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("whole", "killed", "continued"):
        parser.add_argument(name, type=Path, help="folder of a run")
    parser.add_argument("-o", "--output", type=Path, default=Path("resume.png"), help="picture; default: resume.png")
    args = parser.parse_args()
    try:
        difference = plot(args.whole, args.killed, args.continued, args.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    print(f"Largest difference between the evaluations of both runs: {difference}. Picture: {args.output}")


if __name__ == "__main__":
    main()
