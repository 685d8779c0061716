"""
Steps per second of environments in this process, in processes and in Ray actors, without learning.

    python benchmarks/vec_envs.py run
    python benchmarks/vec_envs.py report

A simulator takes 0.1, 1, 10 or 100 ms for a step. It computes, as most do, or waits, as one does that runs elsewhere.
The VecEnvs take turns: in each round, every one does some steps. Writes ``results/vec_envs.json``; ``report`` puts the
table into the documents.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import ray
from record import RESULTS, fill_documents, markdown_table, write_json
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_softsac.ray import RayVecEnv

RUN = RESULTS / "vec_envs.json"
MILLISECONDS = (0.1, 1.0, 10.0, 100.0)
SIMULATORS = {"computes": "that computes", "waits": "that waits"}
ARMS: dict[str, Callable[..., VecEnv]] = {
    "DummyVecEnv": DummyVecEnv,
    "SubprocVecEnv": SubprocVecEnv,
    "RayVecEnv": RayVecEnv,
    "RayVecEnv, 4 per actor": partial(RayVecEnv, envs_per_actor=4),
}


class Simulator(gym.Env[np.ndarray, np.ndarray]):
    """
    An environment with HalfCheetah's spaces. ``seconds`` is what a step takes, in which it ``computes`` or waits.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (17,))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (6,))
        self.seconds = 0.0
        self.computes = True
        self.obs = np.zeros(17)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.computes:
            # Time of the processor, so that a step is as much work on a machine with too few cores
            end = time.thread_time() + self.seconds
            while time.thread_time() < end:
                self.obs = np.tanh(self.obs)
        else:
            time.sleep(self.seconds)
        return self.obs.astype(np.float32), 0.0, False, False, {}


def measure(envs: dict[str, VecEnv], milliseconds: float, kind: str, rounds: int, seconds: float) -> dict[str, Any]:
    """
    :param envs: VecEnvs of simulators, by arm
    :param milliseconds: that a step of the simulator takes
    :param kind: one of ``SIMULATORS``
    :param rounds: turns of each VecEnv
    :param seconds: that a turn is to take, in a VecEnv that does one environment after the other
    :return: steps per second, all environments together, of each VecEnv in each round
    """
    n_envs = envs["DummyVecEnv"].num_envs
    n_steps = max(3, round(seconds / (n_envs * milliseconds / 1000)))
    actions = np.zeros((n_envs, 6), dtype=np.float32)
    for env in envs.values():
        env.set_attr("seconds", milliseconds / 1000)
        env.set_attr("computes", kind == "computes")
    rates: dict[str, list[float]] = {arm: [] for arm in envs}
    for _ in range(1 + rounds):
        for arm, env in envs.items():
            start = time.perf_counter()
            for _ in range(n_steps):
                env.step(actions)
            rates[arm].append(n_steps * n_envs / (time.perf_counter() - start))
    # The first round is a warm-up
    per_second = {arm: each[1:] for arm, each in rates.items()}
    return {"milliseconds": milliseconds, "simulator": kind, "n_envs": n_envs, "steps_per_second": per_second}


def table_of(results: list[dict[str, Any]]) -> str:
    """
    :param results: of :func:`measure`
    :return: Markdown
    """
    rows = []
    for row in results:
        rates = [statistics.median(row["steps_per_second"][arm]) for arm in ARMS]
        name = f"{row['milliseconds']:g} ms, {SIMULATORS[row['simulator']]}"
        rows.append([name, *(f"{rate:,.0f}" for rate in rates)])
    return markdown_table(["step of a simulator", *(f"`{arm}`" if arm.isalpha() else arm for arm in ARMS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--envs", type=int, default=8, help="number of environments")
    command.add_argument("--rounds", type=int, default=10, help="turns of each")
    command.add_argument("--seconds", type=float, default=2.0, help="of a turn, if steps are done one after the other")
    command.add_argument("--milliseconds", type=float, nargs="+", default=MILLISECONDS, help="of a simulator's step")
    commands.add_parser("report", help="table")
    args = parser.parse_args()
    if args.command == "run":
        ray.init(include_dashboard=False)
        envs = {arm: make([Simulator] * args.envs) for arm, make in ARMS.items()}
        for env in envs.values():
            env.reset()
        results = [
            measure(envs, milliseconds, kind, args.rounds, args.seconds)
            for kind in SIMULATORS
            for milliseconds in args.milliseconds
        ]
        for env in envs.values():
            env.close()
        write_json(RUN, ray=ray.__version__, results=results)
    text = table_of(json.loads(RUN.read_text())["results"])
    print(text)
    fill_documents({"vec_envs": text})


if __name__ == "__main__":
    main()
