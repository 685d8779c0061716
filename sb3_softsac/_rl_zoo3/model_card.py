"""Model cards of the Hugging Face Hub, for the zoo's ``push_to_hub``."""

import importlib
import importlib.util
import io
import json
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sb3_softsac._rl_zoo3.methods import ALGO
from sb3_softsac.softsac import SoftSAC


def generate_metadata(model_name: str, env_id: str, mean_reward: float, std_reward: float) -> dict[str, Any]:
    """The head of a model card, as the function of this name returned it before sb3-team-hf-integration 3.2."""
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if hasattr(hub, "generate_metadata"):
        return hub.generate_metadata(model_name, env_id, mean_reward, std_reward)
    return hub._generate_metadata(model_name, env_id, mean_reward, std_reward).to_dict()


def metadata_save(path: Path, metadata: dict[str, Any]) -> None:
    """
    Writes the head of a model card. That of a SoftSAC model also gets its evaluation and its learning curve, and usage
    lines that work.

    :param path: the card, in the folder of what is uploaded
    :param metadata: the head
    """
    card = path.read_text(encoding="utf-8")
    if card.lstrip().startswith(f"# **{SoftSAC.__name__}**"):
        path.write_text(_completed_card(card, path.parent), encoding="utf-8")
    importlib.import_module("huggingface_hub.repocard").metadata_save(path, metadata)


def _completed_card(card: str, folder: Path) -> str:
    # Without the variable, load_from_hub refuses
    card = card.replace("python -m rl_zoo3.load_from_hub", "TRUST_REMOTE_CODE=True python -m rl_zoo3.load_from_hub")
    usage = "\n## Usage"
    result = json.loads((folder / "results.json").read_text())
    actions = "deterministic" if result["is_deterministic"] else "sampled"
    evaluation = (
        f"\n## Evaluation\nReturn of {result['n_eval_episodes']} episodes with {actions} actions: "
        f"{result['mean_reward']:.2f} +/- {result['std_reward']:.2f}\n"
    )
    if _draw_learning_curve(folder / "train_eval_metrics.zip", folder / "learning_curve.png"):
        evaluation += "\n![Return of the evaluations during training](learning_curve.png)\n"
    needed = f"\n`--algo {ALGO}` comes with the package sb3-softsac (here {version('sb3-softsac')}): install it, too.\n"
    return card.replace(usage, evaluation + usage, 1).replace(
        "\nInstall the RL Zoo", f"{needed}\nInstall the RL Zoo", 1
    )


def _draw_learning_curve(metrics: Path, picture: Path) -> bool:
    """:return: whether there are evaluations, and matplotlib"""
    with zipfile.ZipFile(metrics) as archive:
        if "evaluations.npz" not in archive.namelist() or importlib.util.find_spec("matplotlib") is None:
            return False
        evaluations = np.load(io.BytesIO(archive.read("evaluations.npz")))
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="return")
    mean, std = (getattr(evaluations["results"], name)(axis=1) for name in ("mean", "std"))
    axes.plot(evaluations["timesteps"], mean)
    axes.fill_between(evaluations["timesteps"], mean - std, mean + std, alpha=0.3)
    figure.savefig(picture)
    return True
