"""
What each part of ``compact`` brings: runs that leave one out, or change it, beside runs of the whole.

    python benchmarks/learning.py run --algo softsac --config hyperparams/compact.yml --env HalfCheetah-v5 --seed 1 \\
        --steps 100000 --eval-freq 5000 --option policy_kwargs.unit_norm=null --out runs/unit_norm_1
    python benchmarks/ablation.py

Reads runs in ``results/ablation``, and those of the whole in ``results/learning_compact``. Beside their scores (means
of the last five evaluations) it says how much arithmetic is in the matrix products of a step: a part that brings
little may still be cheap, and one that brings much dear. So each score is compared twice: with that of the whole after
as many steps, and after as much arithmetic, which is after fewer steps.
"""

from typing import Any, NamedTuple

import numpy as np
import yaml
from arithmetic import count
from learning import read_hyperparameters, set_option
from learning_report import Arms, Run, read_runs, tidy
from matplotlib import pyplot as plt
from record import RESULTS, ROOT, fill_documents, markdown_table, relative

FOLDER, WHOLE_FOLDER = RESULTS / "ablation", RESULTS / "learning_compact"
CONFIG = ROOT / "hyperparams" / "compact.yml"
WHOLE = "SoftSAC compact"
# What is done to `compact`, by what `learning_report.differences` says
VARIANTS = {
    "policy_kwargs.normalization=null": "no batch norm in hidden layers",
    "policy_kwargs.normalize_input=false": "no batch norm of inputs",
    "policy_kwargs.unit_norm=null": "weights of any norm",
    "normalize_rewards=std policy_kwargs.n_atoms=null": "critics of values, no distributions",
    "normalize_rewards=null": "rewards as they are",
    "max_noise_repeat=1": "fresh noise in each step",
    "joint_batch=null": "next states in a batch of their own",
    "use_critic_target=false": "no target critics",
    "learning_rate=0.0003": "constant learning rate",
    "policy_kwargs.residual_expansion=2": "blocks half as wide",
    "policy_kwargs.residual_expansion=null": "layers without blocks",
}


class Variant(NamedTuple):
    """A row of the table."""

    name: str
    operations: int  # of matrix products, in a step of the first task
    runs: dict[str, list[Run]]  # by environment

    def score(self, env_id: str) -> float:
        """
        :param env_id: one of the tasks
        :return: mean over its runs; nan without any
        """
        return float(np.mean([run.score for run in self.runs[env_id]])) if env_id in self.runs else float("nan")

    def score_after(self, part: float, env_id: str) -> float:
        """
        :param part: of the arithmetic of a whole run
        :param env_id: one of the tasks
        :return: mean over the runs of what their score would be if they had been stopped then
        """
        return float(np.mean([run.mean_before(part * run.updated[-1]) for run in self.runs[env_id]]))


def options_of(run: Run) -> dict[str, Any]:
    """
    :param run: one of the ablation
    :return: arguments of ``SoftSAC``
    """
    arguments = read_hyperparameters(CONFIG, run.env_id, "softsac")
    for option in run.arm.removeprefix(WHOLE).split():
        name, _, value = option.partition("=")
        set_option(arguments, name, yaml.safe_load(value))
    return arguments


def read_tasks() -> dict[str, Arms]:
    """
    :return: the recorded runs, see ``read_runs``; also those of the whole
    """
    tasks, whole = read_runs(FOLDER), read_runs(WHOLE_FOLDER)
    return {env_id: {**arms, WHOLE: whole[env_id][WHOLE]} for env_id, arms in tasks.items()}


def read(tasks: dict[str, Arms]) -> list[Variant]:
    """
    :param tasks: see :func:`read_tasks`
    :return: the whole first, then as in ``VARIANTS``
    """
    env_id = next(iter(tasks))
    variants = []
    for key, name in {"": WHOLE, **VARIANTS}.items():
        arm = f"{WHOLE} {key}".strip()
        runs = {task: arms[arm] for task, arms in tasks.items() if arm in arms}
        if runs:
            arguments = options_of(next(iter(runs.values()))[0])
            del arguments["policy"]
            variants.append(Variant(name, count(env_id, arguments), runs))
    return variants


def table(variants: list[Variant], env_ids: list[str]) -> str:
    """
    :param variants: the whole first
    :param env_ids: tasks
    :return: Markdown table
    """
    whole = variants[0]
    rows = []
    for variant in variants:
        part = variant.operations / whole.operations
        cells = [variant.name, f"{part:.2f}"]
        for env_id in env_ids:
            score, seeds = variant.score(env_id), len(variant.runs.get(env_id, []))
            others = [whole.score(env_id), *([whole.score_after(part, env_id)] if part < 1.0 else [])]
            changes = ", ".join(f"{score / other - 1.0:+.0%}" for other in others)
            shown = f"{score:,.0f}" + ("" if variant is whole else f" ({changes})")
            cells.append("" if seeds == 0 else shown + (f", {seeds} seeds" if seeds > 1 else ""))
        rows.append(cells)
    return markdown_table(["", "arithmetic", *env_ids], rows)


def draw(variants: list[Variant], env_ids: list[str]) -> None:
    """
    Scores of all variants, a panel for each task; dots are seeds.

    :param variants: the whole first
    :param env_ids: tasks
    """
    figure, panels = plt.subplots(
        1, len(env_ids), figsize=(3 + 3.6 * len(env_ids), 1.2 + 0.34 * len(variants)), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for env_id, axes in zip(env_ids, panels[0], strict=True):
        for place, variant in enumerate(variants):
            scores = [run.score for run in variant.runs.get(env_id, [])]
            axes.barh(place, np.nan_to_num(variant.score(env_id)), color="C3" if place == 0 else "0.75", height=0.7)
            axes.plot(scores, [place] * len(scores), "k.", markersize=4)
        axes.axvline(variants[0].score(env_id), color="C3", linewidth=0.8)
        axes.set(title=env_id, xlabel="score")
        tidy(axes)
    panels[0, 0].set_yticks(range(len(variants)), [variant.name for variant in variants])
    panels[0, 0].invert_yaxis()
    figure.savefig(FOLDER / "ablation.png", dpi=110)
    plt.close(figure)
    print(f"Picture: {relative(FOLDER / 'ablation.png')}")


def main() -> None:
    tasks = read_tasks()
    variants = read(tasks)
    text = table(variants, list(tasks))
    (FOLDER / "report.md").write_text(f"Written by `python benchmarks/ablation.py`.\n\n{text}\n")
    fill_documents({"ablation": text})
    draw(variants, list(tasks))
    print(text)


if __name__ == "__main__":
    main()
