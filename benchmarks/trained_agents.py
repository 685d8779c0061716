"""
The agents in ``trained_agents/``: made from finished runs of ``learning.py``, in the RL Zoo's layout, for its enjoy.

    python benchmarks/trained_agents.py export runs/softsac_Ant-v5_1
    python benchmarks/trained_agents.py table
    MUJOCO_GL=osmesa python benchmarks/trained_agents.py gif Ant-v5 --env-kwargs "camera_name:'track'"
    python -m rl_zoo3.enjoy --algo softsac --env Ant-v5 -f trained_agents

Agents of ``hyperparams/softsac.yml`` have number 1 there (the zoo's ``--exp-id``), those of ``compact.yml`` number 2.
They are the policies at the end of training, not the best that were seen on the way. Files hold the networks, but no
replay buffer and no state of the optimisers: training that goes on from them begins with a fresh Adam.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from learning_report import read_run
from record import ROOT, fill_documents, markdown_table, relative

from sb3_softsac import SoftSAC

FOLDER = ROOT / "trained_agents"
LIST = FOLDER / "agents.json"
MAX_BYTES = 6_000_000
NUMBERS = {"softsac": 1, "compact": 2}
"""Of an agent's folder, by configuration."""


def read_list() -> dict[str, dict[str, Any]]:
    """
    :return: what is known of each agent, by its folder
    """
    agents: dict[str, dict[str, Any]] = json.loads(LIST.read_text()) if LIST.exists() else {}
    return agents


def export(folder: Path) -> None:
    """
    :param folder: a finished run of SoftSAC
    """
    record = json.loads((folder / "run.json").read_text())
    header, run = record["run"], read_run(folder)
    if header["algo"] != "softsac" or not run.is_finished or run.final is None:
        raise SystemExit(f"{folder} is not a finished run of SoftSAC.")
    if header.get("option"):
        raise SystemExit(f"{folder} was run with {header['option']}: agents are those of the plain hyperparameters.")
    config = (ROOT / header["config"]).resolve()
    target = FOLDER / "softsac" / f"{run.env_id}_{NUMBERS[config.stem]}"
    params = target / run.env_id
    params.mkdir(parents=True, exist_ok=True)

    model = SoftSAC.load(folder / "model.zip", device="cpu")
    for optimizer in (model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer):
        if optimizer is not None:
            optimizer.state.clear()
    path = target / f"{run.env_id}.zip"
    model.save(path, exclude=["replay_buffer"])
    assert path.stat().st_size <= MAX_BYTES, f"{path} has {path.stat().st_size:,} bytes"

    entries = yaml.safe_load(config.read_text())
    entry = entries.get(run.env_id) or entries["default"]
    entry = OrderedDict(sorted({**entry, "n_timesteps": float(run.steps)}.items()))
    entry.pop("callback", None)  # about training
    (params / "config.yml").write_text(yaml.dump(entry))
    args = {"algo": "softsac", "env": run.env_id, "seed": run.seed, "n_timesteps": run.steps, "env_kwargs": None}
    (params / "args.yml").write_text(yaml.dump(OrderedDict(sorted(args.items()))))
    np.savez(
        target / "evaluations.npz",
        timesteps=run.evaluations["steps"].astype(np.int64),
        results=run.evaluations["mean_return"][:, None],
        ep_lengths=run.evaluations["mean_length"][:, None],
    )

    options = {name: header[name] for name in ("algo", "env", "config", "steps", "seed", "eval_freq", "final_episodes")}
    if options["final_episodes"] == 200:
        del options["final_episodes"]
    if config.stem == "softsac":
        del options["config"]
    words = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
    agents = read_list()
    agents[target.name] = {
        "environment": run.env_id,
        "configuration": config.stem,
        "mean_return": round(float(run.final.mean()), 1),
        "std_return": round(float(run.final.std()), 1),
        "episodes": len(run.final),
        "steps": run.steps,
        "hours": round(float(run.hours[-1]), 2),
        "command": " ".join(["python benchmarks/learning.py run", *words, f"--out runs/{target.name}"]),
    }
    LIST.write_text(json.dumps(dict(sorted(agents.items())), indent=2) + "\n")
    print(f"{relative(path)}: {path.stat().st_size / 1e6:.1f} MB")


def table() -> str:
    """
    :return: Markdown table of the agents
    """
    rows = [
        [
            agent["environment"],
            agent["configuration"],
            f"{agent['mean_return']:,.1f} ± {agent['std_return']:,.1f}",
            str(agent["episodes"]),
            f"{agent['steps']:,}",
            f"{agent['hours']:.2f}",
            f"`{agent['command']}`",
        ]
        for agent in read_list().values()
    ]
    return markdown_table(
        ["environment", "configuration", "return", "episodes", "steps", "hours of training", "command"], rows
    )


def gif(env_id: str, options: list[str], n_steps: int = 200) -> None:
    """
    Make a video with the zoo's ``record_video``, and of that a small animation.

    :param env_id: environment with a shipped agent
    :param options: more of ``record_video``'s
    :param n_steps: length
    """
    from moviepy import VideoFileClip  # record_video needs it, too

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rl_zoo3.record_video", "--algo", "softsac", "--env", env_id, *options]
        command += ["-f", str(FOLDER), "-n", str(n_steps), "--deterministic", "-o", folder]
        subprocess.run(command, check=True)
        (video,) = Path(folder).rglob("*.mp4")
        path = FOLDER / f"{env_id}.gif"
        VideoFileClip(str(video)).resized(width=240).write_gif(str(path), fps=10, logger=None)
    print(f"{relative(path)}: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("export", help="make agents from runs")
    command.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folders of finished runs")
    commands.add_parser("table", help="print what is known of them, and put it into the documents")
    command = commands.add_parser("gif", help="make an animation; what follows goes to the zoo's record_video")
    command.add_argument("env")
    args, rest = parser.parse_known_args()
    if args.command == "gif":
        gif(args.env, rest)
        return
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    for folder in args.runs if args.command == "export" else ():
        export(folder)
    print(table())
    fill_documents({"agents": table()})


if __name__ == "__main__":
    main()
