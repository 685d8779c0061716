"""
Size of exported policies, and how long one action takes (batch of 1, one thread): ``predict()``, the C++ with which
SoftSAC explores, the ``.pt2`` file in torch and the ``.onnx`` file in onnxruntime.

    python benchmarks/export.py run
    python benchmarks/export.py report

All get a NumPy observation and return a NumPy action in the environment's units. They take turns: in each round, every
one does some actions. Writes ``results/export.json``; ``report`` puts the table into the documents.
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from record import RESULTS, ROOT, fill_documents, markdown_table, write_json
from stable_baselines3.common.envs import FakeImageEnv

from sb3_softsac import SoftSAC, checkpoint
from sb3_softsac.execution.runner import Runner
from sb3_softsac.export import load_run

onnxruntime: Any = importlib.import_module("onnxruntime")  # it has no types

RUN = RESULTS / "export.json"
TASKS = ("Pendulum-v1", "HalfCheetah-v5", "Humanoid-v5", "84 x 84 image")
ARMS = {"predict": "`predict()`", "pt2": "`.pt2`", "cpp": "C++", "onnx": "`.onnx`"}
SIZES = {"zip": "model file", "pt2": "`.pt2`", "onnx": "`.onnx`"}
Act = Callable[[np.ndarray], np.ndarray]


def make_model(task: str) -> SoftSAC:
    """
    :param task: one of ``TASKS``
    :return: the agent in ``trained_agents/``, or for images an untrained one
    """
    if task in TASKS[:-1]:
        return load_run(ROOT / "trained_agents" / "softsac" / f"{task}_1")[0]
    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, channel_first=True, discrete=False)
    return SoftSAC("CnnPolicy", env, buffer_size=10, device="cpu")


def arms_of(model: SoftSAC, files: dict[str, Path]) -> dict[str, Act]:
    """
    :param model: model
    :param files: exported ones by suffix
    :return: functions of a batch of one observation, by arm
    """
    arms: dict[str, Act] = {"predict": lambda obs: model.predict(obs, deterministic=True)[0]}
    module = th.export.load(files["pt2"]).module()

    def pt2(obs: np.ndarray) -> np.ndarray:
        with th.no_grad():
            action: np.ndarray = module(th.as_tensor(obs))[0].numpy()
        return action

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(files["onnx"], options, providers=["CPUExecutionProvider"])
    arms |= {"pt2": pt2, "onnx": lambda obs: session.run(["action"], {"obs": obs})[0]}

    runner = Runner(model.policy, model._ent_coef, True, print)

    def cpp(obs: np.ndarray) -> np.ndarray:
        scaled = runner.act(th.as_tensor(obs, dtype=th.float32))
        assert scaled is not None
        action: np.ndarray = model.policy.unscale_action(scaled.numpy())
        return action

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # if there is no compiler
        is_plain = runner.act(th.zeros(1, *model.observation_space.shape)) is not None  # type: ignore[misc]
    return {**arms, "cpp": cpp} if is_plain else arms


def measure(task: str, rounds: int, calls: int) -> dict[str, Any]:
    """
    :param task: one of ``TASKS``
    :param rounds: turns of each arm
    :param calls: actions in a turn
    :return: bytes and differences of the files; microseconds per action of each arm in each round
    """
    model = make_model(task)
    with tempfile.TemporaryDirectory() as folder:
        files = {suffix: Path(folder) / f"policy.{suffix}" for suffix in SIZES}
        model.save(Path(folder) / "model.zip", exclude=["replay_buffer"])
        checkpoint.export(Path(folder) / "model.zip", files["zip"])
        differences = {suffix: model.export(files[suffix]) for suffix in ("pt2", "onnx")}
        sizes = {suffix: path.stat().st_size for suffix, path in files.items()}
        arms = arms_of(model, files)
        space = model.observation_space
        obs = np.random.default_rng(0).random((1, *space.shape)).astype(space.dtype)  # type: ignore[misc]
        microseconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(1 + rounds):
            for arm, act in arms.items():
                start = time.perf_counter()
                for _ in range(calls):
                    act(obs)
                microseconds[arm].append(1e6 * (time.perf_counter() - start) / calls)
    rest = {arm: times[1:] for arm, times in microseconds.items()}  # the first round is a warm-up
    return {"task": task, "bytes": sizes, "differences": differences, "microseconds": rest}


def table_of(results: list[dict[str, Any]]) -> str:
    """
    :param results: of :func:`measure`
    :return: Markdown
    """
    header = ["policy", *(f"µs, {name}" for name in ARMS.values()), *(f"MB, {name}" for name in SIZES.values())]
    rows = []
    for row in results:
        times = row["microseconds"]
        cells = [f"{statistics.median(times[arm]):,.0f}" if arm in times else "" for arm in ARMS]
        rows.append([row["task"], *cells, *(f"{row['bytes'][suffix] / 1e6:.2f}" for suffix in SIZES)])
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--rounds", type=int, default=30, help="turns of each")
    command.add_argument("--calls", type=int, default=200, help="actions in a turn")
    commands.add_parser("report", help="table")
    args = parser.parse_args()
    if args.command == "run":
        th.set_num_threads(1)
        results = [measure(task, args.rounds, args.calls) for task in TASKS]
        write_json(RUN, onnxruntime=onnxruntime.__version__, results=results)
    text = table_of(json.loads(RUN.read_text())["results"])
    print(text)
    fill_documents({"export": text})


if __name__ == "__main__":
    main()
