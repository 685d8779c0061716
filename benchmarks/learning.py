"""
Learning curves of SoftSAC and SB3's SAC with the same hyperparameters: those of ``hyperparams/softsac.yml``.

    python benchmarks/learning.py run --algo softsac --env HalfCheetah-v5 --steps 300000 --seed 1 --out runs/softsac_1
    python benchmarks/learning.py run --algo sac --env HalfCheetah-v5 --steps 300000 --seed 1 --out runs/sac_1
    python benchmarks/learning.py resume runs/softsac_1
    python benchmarks/learning.py report runs

A run's folder holds ``run.json`` (how it was made, and where it was killed and resumed), ``evaluations.csv``, which
gets one row after each evaluation, and at the end ``final.csv`` (returns of more episodes) and ``model.zip``. Runs
of SoftSAC can be killed at any time and resumed from their last checkpoint, also after SIGTERM, which leaves one. SB3's
SAC cannot: its runs have to be made in one go.
"""

import argparse
import csv
import inspect
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from record import RESULTS, ROOT, circumstances, relative, write_json
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from sb3_softsac import CheckpointCallback, SoftSAC, schedules

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"softsac": SoftSAC, "sac": SAC}
LEARNING_RATES = ("learning_rate", "qf_learning_rate", "ent_coef_learning_rate")
# Said on the command line, or about what comes after training
IGNORED_KEYS = ("n_timesteps", "callback")
COLUMNS = (
    *("steps", "mean_return", "std_return", "mean_length", "seconds", "cpu_seconds", "mean_training_return"),
    *("entropy", "log_std", "saturated_actions", "ent_coef", "q_value", "critic_loss"),  # as far as the arm logs them
)
FIRST_EVALUATION_SEED = 10_000
FIRST_FINAL_SEED = 20_000


def read_hyperparameters(config: Path, env_id: str, algo: str) -> dict[str, Any]:
    """
    Arguments of the constructor, from a file in the zoo's format.

    :param config: yml file
    :param env_id: its entry, or else that of ``default``, is taken
    :param algo: key of ``ALGORITHMS``; arguments that it does not have are left out, also those of its policy
    :return: arguments
    :raises ValueError: if there is no entry, and for keys that are not arguments of SoftSAC: here are no wrappers and
        no normalisation
    """
    entries = yaml.safe_load(config.read_text())
    key = env_id if env_id in entries else "default"
    if key not in entries:
        raise ValueError(f"{config} has no entry for {env_id}, only for {sorted(entries)}.")
    entry = {key: value for key, value in entries[key].items() if key not in IGNORED_KEYS}
    unknown = set(entry) - set(inspect.signature(SoftSAC).parameters)
    if unknown:
        raise ValueError(f"{config}, {env_id}: {sorted(unknown)} can only be used with the zoo, not with this script.")
    arguments = {key: value for key, value in entry.items() if key in inspect.signature(ALGORITHMS[algo]).parameters}
    for key in LEARNING_RATES:
        if algo == "sac" and isinstance(arguments.get(key), str):
            arguments[key] = schedules.parse(arguments[key])
    for key in ("policy_kwargs", "replay_buffer_kwargs"):
        if isinstance(arguments.get(key), str):
            # As the zoo does; the file is the user's own
            arguments[key] = eval(arguments[key], {"nn": nn})
    if algo == "sac" and "policy_kwargs" in arguments:
        known = inspect.signature(SACPolicy).parameters
        arguments["policy_kwargs"] = {key: value for key, value in arguments["policy_kwargs"].items() if key in known}
    if isinstance(arguments.get("train_freq"), list):
        arguments["train_freq"] = tuple(arguments["train_freq"])
    return arguments


def evaluate(
    model: BaseAlgorithm, env: gym.Env, episodes: int, first_seed: int = FIRST_EVALUATION_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """
    Run the deterministic policy from the same first states each time, so that evaluations can be compared.

    :param model: the agent
    :param env: environment of its own, not the one that is trained on
    :param episodes: N
    :param first_seed: of the first episode's reset; each has its own
    :return: returns (N,) and lengths (N,)
    """
    returns, lengths = np.zeros(episodes), np.zeros(episodes)
    for episode in range(episodes):
        obs, _ = env.reset(seed=first_seed + episode)
        done = False
        while not done:
            action, _ = model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += float(reward)
            lengths[episode] += 1
            done = terminated or truncated
    return returns, lengths


class EvaluationCallback(BaseCallback):
    """
    Evaluate regularly and append the results to a file.

    :param path: CSV file with ``COLUMNS``; seconds, on the clock and of the processor, are those of training, without
        evaluations and pauses between a kill and the run's continuation
    :param env: environment to evaluate on
    :param freq: environment steps between evaluations
    :param episodes: episodes of each evaluation
    """

    def __init__(self, path: Path, env: gym.Env, freq: int, episodes: int):
        super().__init__()
        self.path = path
        self.env = env
        self.freq = freq
        self.episodes = episodes
        self.spent = np.zeros(2)

    def get_state(self) -> list[float]:
        """:return: what a checkpoint keeps of it"""
        return list(self.spent)

    def set_state(self, state: list[float]) -> None:
        """
        :param state: what :meth:`get_state` has returned
        """
        self.spent = np.array(state)

    def _on_training_start(self) -> None:
        if not self.path.exists():
            with self.path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)
        self.mark = clocks()

    def _on_step(self) -> bool:
        now = clocks()
        self.spent += now - self.mark
        self.mark = now
        if self.num_timesteps % self.freq == 0:
            self._evaluate()
            self.mark = clocks()
        return True

    def _evaluate(self) -> None:
        returns, lengths = evaluate(self.model, self.env, self.episodes)
        training = safe_mean([info["r"] for info in self.model.ep_info_buffer or ()])
        logged = [self.logger.name_to_value.get(f"train/{name}", float("nan")) for name in COLUMNS[7:]]
        row = [returns.mean(), returns.std(), lengths.mean(), *self.spent, training, *logged]
        # Opened each time: the row is in the file as soon as it is known
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([self.num_timesteps, *(f"{value:.6g}" for value in row)])


def clocks() -> np.ndarray:
    """
    :return: (2,) seconds on the clock, and of the processor for this process and those it has waited for
    """
    times = os.times()
    return np.array([time.perf_counter(), sum(times[:4])])


def run(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the command ``run``
    """
    if (args.out / "run.json").exists():
        sys.exit(f"{args.out} already holds a run: choose another folder, remove it, or resume the run.")
    arguments = read_hyperparameters(args.config, args.env, args.algo)
    for name, value in args.option:
        set_option(arguments, name, yaml.safe_load(value))
    options = {key: relative(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del options["do"], options["out"]
    th.set_num_threads(args.threads)
    model = ALGORITHMS[args.algo](
        env=Monitor(gym.make(args.env)), seed=args.seed, device=args.device, verbose=0, **arguments
    )
    hyperparameters = {key: str(value) for key, value in arguments.items()}
    write_json(args.out / "run.json", run=options, hyperparameters=hyperparameters, resumed=[])
    train(model, options, args.out)


def set_option(arguments: dict[str, Any], name: str, value: Any) -> None:
    """
    :param arguments: of the constructor, changed in place
    :param name: of one of them, or of a part of one: ``policy_kwargs.unit_norm``
    :param value: its value
    """
    *parents, last = name.split(".")
    for parent in parents:
        arguments = arguments.setdefault(parent, {})
    arguments[last] = value


def resume(args: argparse.Namespace) -> None:
    """
    Continue runs of SoftSAC from their last checkpoints. Evaluations after that are made again; ``run.json`` keeps the
    first ones, for ``report`` to compare.

    :param args: arguments of the command ``resume``
    """
    for folder in args.runs:
        header = json.loads((folder / "run.json").read_text())
        options = header["run"]
        if options["algo"] != "softsac":
            sys.exit(f"{folder}: {options['algo']} cannot be resumed, remove the folder and run it again.")
        if not (folder / "checkpoints").is_dir():
            sys.exit(f"{folder} has no checkpoint (any more): it is finished, or has to be removed and run again.")
        th.set_num_threads(options["threads"])
        model = SoftSAC.load(
            folder / "checkpoints", Monitor(gym.make(options["env"])), device=options["device"], force_reset=False
        )
        rows = (folder / "evaluations.csv").read_text().splitlines()
        done = [int(row.partition(",")[0]) for row in rows[1:]]
        kept = [rows[0], *(row for row, steps in zip(rows[1:], done, strict=True) if steps <= model.num_timesteps)]
        again = rows[len(kept) :]
        (folder / "evaluations.csv").write_text("\n".join([*kept, ""]))
        start = {**circumstances(), "at_step": model.num_timesteps, "made_again": again}
        header["resumed"].append(start)
        (folder / "run.json").write_text(json.dumps(header, indent=2) + "\n")
        print(f"{folder}: goes on from step {model.num_timesteps:,}", flush=True)
        train(model, options, folder)


def train(model: BaseAlgorithm, options: dict[str, Any], folder: Path) -> None:
    """
    :param model: to be trained to the end of the run
    :param options: what ``run.json`` says of the run
    :param folder: of the run
    """
    callbacks: list[BaseCallback] = [
        EvaluationCallback(
            folder / "evaluations.csv", gym.make(options["env"]), options["eval_freq"], options["eval_episodes"]
        )
    ]
    if isinstance(model, SoftSAC):
        callbacks.append(CheckpointCallback(options["checkpoint_freq"], folder / "checkpoints", keep_last=1))
    left = options["steps"] - model.num_timesteps
    model.learn(left, callback=callbacks, reset_num_timesteps=model.num_timesteps == 0)
    final_evaluation(model, options, folder)
    model.save(folder / "model.zip", exclude=[] if options.get("keep_buffer") else ["replay_buffer"])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"Finished: {folder}", flush=True)


def final_evaluation(model: BaseAlgorithm, options: dict[str, Any], folder: Path) -> None:
    """
    Evaluate after training, over more episodes than in between, and from other first states.

    :param model: the trained agent
    :param options: what ``run.json`` says of the run
    :param folder: of the run; gets ``final.csv``
    """
    returns, lengths = evaluate(model, gym.make(options["env"]), options["final_episodes"], FIRST_FINAL_SEED)
    rows = [f"{value:.6g},{length:.0f}\n" for value, length in zip(returns, lengths, strict=True)]
    (folder / "final.csv").write_text("".join(["episode_return,length\n", *rows]))
    print(f"{folder}: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes", flush=True)


def report(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the command ``report``
    """
    from learning_report import report as report_on  # here: rliable is not needed for training

    print(report_on(args.folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser(
        "run", help="train and evaluate", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("--algo", choices=list(ALGORITHMS), required=True, help="algorithm")
    command.add_argument("--env", required=True, help="environment id")
    command.add_argument("--steps", type=int, required=True, help="environment steps")
    command.add_argument("--seed", type=int, default=0, help="seed")
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command.add_argument(
        "--config", type=Path, default=ROOT / "hyperparams" / "softsac.yml", help="yml of the zoo's format"
    )
    command.add_argument(
        "--option", type=lambda text: text.split("=", 1), action="append", default=[], metavar="NAME=VALUE",
        help="argument of the constructor, or a part of one (policy_kwargs.unit_norm), in place of the configuration's",
    )  # fmt: skip
    command.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    command.add_argument("--device", default="cpu", help="device of the networks")
    command.add_argument("--eval-freq", type=int, default=10_000, help="environment steps between evaluations")
    command.add_argument("--eval-episodes", type=int, default=10, help="episodes of each evaluation")
    command.add_argument("--final-episodes", type=int, default=200, help="episodes of the evaluation after training")
    command.add_argument("--checkpoint-freq", type=int, default=25_000, help="environment steps between checkpoints")
    command.add_argument("--keep-buffer", action="store_true", help="save the replay buffer in model.zip")
    command.set_defaults(do=run)

    command = commands.add_parser("resume", help="continue runs that were killed, one after the other")
    command.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folders of runs of SoftSAC")
    command.set_defaults(do=resume)

    command = commands.add_parser("report", help="tables and pictures of all runs in a folder")
    command.add_argument(
        "folder", type=Path, nargs="?", default=RESULTS / "learning", help="it gets report.md and pictures"
    )
    command.set_defaults(do=report)

    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
