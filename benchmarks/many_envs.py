"""
Where the time of a step goes with up to 1,024 environments, beside SB3's SAC.

    python benchmarks/many_envs.py run
    python benchmarks/many_envs.py run --before ../clone-of-another-commit
    python benchmarks/many_envs.py report

The environments are trivial and vectorised, with HalfCheetah's spaces. One in a hundred steps ends an episode, or all
end together every 20 steps. Arms have processes of their own and take turns. Writes ``results/many_envs.json``;
``report`` puts the table of the medians into the documents.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from record import RESULTS, commit, fill_documents, markdown_table, write_json
from stable_baselines3.common.vec_env import VecEnv
from turns import Turn, take, workers

RUN = RESULTS / "many_envs.json"
NUMBERS = (1, 16, 256, 1024)
KINDS = {"apart": "episodes end apart", "together": "all end together"}
ROUNDS, STEPS = 15, 40
# Methods of the model, or of its buffer, whose time is told
PARTS = {
    "_sample_action": "actions",
    "_store_transition": "storing",
    "_update_info_buffer": "episodes",
    "sample": "minibatch",
}


class Trivial(VecEnv):
    """
    :param n_envs: number of environments
    :param kind: one of ``KINDS``
    """

    def __init__(self, n_envs: int, kind: str):
        self.rng = np.random.default_rng(0)
        self.kind = kind
        self.steps = 0
        super().__init__(n_envs, gym.spaces.Box(-np.inf, np.inf, (17,)), gym.spaces.Box(-1.0, 1.0, (6,)))

    def _observations(self) -> np.ndarray:
        return self.rng.normal(size=(self.num_envs, 17)).astype(np.float32)

    def reset(self) -> np.ndarray:
        return self._observations()

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> Any:
        self.steps += 1
        if self.kind == "apart":
            dones = self.rng.random(self.num_envs) < 0.01
        else:
            dones = np.full(self.num_envs, self.steps % 20 == 0)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(dones):
            infos[i] = {
                "terminal_observation": np.zeros(17, np.float32),
                "TimeLimit.truncated": bool(i % 2),
                "episode": {"r": 1.0, "l": 100, "t": 0.0},
            }
        return self._observations(), np.ones(self.num_envs, np.float32), dones, infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        return [seed] * self.num_envs


def make_turn(algorithm: str, n_envs: int, kind: str) -> Turn:
    """
    :param algorithm: SB3's or ours
    :param n_envs: number of environments
    :param kind: one of ``KINDS``
    :return: does some steps; microseconds of a step of all environments, by part
    """
    import stable_baselines3

    import sb3_softsac

    cls = stable_baselines3.SAC if algorithm == "SB3" else sb3_softsac.SoftSAC
    options: dict[str, Any] = {"learning_starts": n_envs, "buffer_size": 200 * n_envs, "device": "cpu", "seed": 0}
    model = cls("MlpPolicy", Trivial(n_envs, kind), policy_kwargs={"net_arch": [64, 64]}, **options)
    model.learn(5 * n_envs)
    seconds: dict[str, float] = defaultdict(float)

    def add_up(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        setattr(owner, name, timed)

    for name in PARTS:
        add_up(model.replay_buffer if name == "sample" else model, name)

    def turn() -> dict[str, float]:
        seconds.clear()
        start = time.perf_counter()
        model.learn(STEPS * n_envs, reset_num_timesteps=False, log_interval=10**9)
        whole = time.perf_counter() - start
        return {name: 1e6 * value / STEPS for name, value in {**seconds, "in all": whole}.items()}

    return turn


def measure(n_envs: int, kind: str, before: Path | None) -> dict[str, Any]:
    """
    :param n_envs: number of environments
    :param kind: one of ``KINDS``
    :param before: clone of another commit
    :return: microseconds of a step in each round, by arm and part
    """
    arms = ["SB3", *([] if before is None else ["before"]), "SoftSAC"]
    turns = {arm: partial(make_turn, arm, n_envs, kind) for arm in arms}
    with workers(turns, {} if before is None else {"before": before}) as pipes:
        rounds = take(pipes, ROUNDS)
    return {
        "n_envs": n_envs,
        "kind": kind,
        "microseconds": {arm: {part: [each[part] for each in rounds[arm]] for part in rounds[arm][0]} for arm in arms},
    }


def table_of(results: list[dict[str, Any]]) -> str:
    """
    :param results: of :func:`measure`
    :return: Markdown: SB3, another commit if there is one, and this one
    """
    parts = {**PARTS, "in all": "in all"}
    rows = []
    for each in results:
        medians = [[statistics.median(arm[part]) for arm in each["microseconds"].values()] for part in parts]
        cells = [" / ".join(f"{value:,.0f}" for value in values) for values in medians]
        rows.append([f"{each['n_envs']:,}, {KINDS[each['kind']]}", *cells])
    return markdown_table(["environments", *parts.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure")
    command.add_argument("--before", type=Path, metavar="CLONE", help="of another commit, to be measured as well")
    commands.add_parser("report", help="table")
    args = parser.parse_args()
    if args.command == "run":
        results = [measure(n, kind, args.before) for kind, n in itertools.product(KINDS, NUMBERS)]
        write_json(RUN, before=None if args.before is None else commit(args.before), results=results)
    text = table_of(json.loads(RUN.read_text())["results"])
    print(text)
    fill_documents({"many_envs": text})


if __name__ == "__main__":
    main()
