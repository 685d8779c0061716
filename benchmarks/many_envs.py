"""
Where the time of a step goes with up to 1,024 environments, beside SB3's SAC.

    python benchmarks/many_envs.py

The environments are trivial and vectorised, with HalfCheetah's spaces; one in a hundred steps ends an episode. Arms
take turns, and medians over the rounds are told. Writes ``results/many_envs.json``, and puts the table into the
documents.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from record import RESULTS, fill_documents, markdown_table, write_json
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_softsac import SoftSAC

NUMBERS = (1, 16, 256, 1024)
ARMS: dict[str, type[OffPolicyAlgorithm]] = {"SB3": SAC, "SoftSAC": SoftSAC}
ROUNDS, STEPS = 7, 40
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
    """

    def __init__(self, n_envs: int):
        self.rng = np.random.default_rng(0)
        super().__init__(n_envs, gym.spaces.Box(-np.inf, np.inf, (17,)), gym.spaces.Box(-1.0, 1.0, (6,)))

    def _observations(self) -> np.ndarray:
        return self.rng.normal(size=(self.num_envs, 17)).astype(np.float32)

    def reset(self) -> np.ndarray:
        return self._observations()

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> Any:
        dones = self.rng.random(self.num_envs) < 0.01
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


class Arm:
    """
    :param model: SB3's or ours, after its first steps
    """

    def __init__(self, model: OffPolicyAlgorithm):
        self.model = model
        self.seconds: dict[str, float] = defaultdict(float)
        for name in PARTS:
            self._time(model.replay_buffer if name == "sample" else model, name)

    def _time(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, name, timed)

    def round(self) -> dict[str, float]:
        """
        :return: microseconds of a step of all environments, by part
        """
        self.seconds.clear()
        start = time.perf_counter()
        self.model.learn(STEPS * self.model.n_envs, reset_num_timesteps=False, log_interval=10**9)
        seconds = {"in all": time.perf_counter() - start} | {PARTS[name]: self.seconds[name] for name in PARTS}
        return {name: 1e6 * value / STEPS for name, value in seconds.items()}


def measure(n_envs: int) -> dict[str, dict[str, float]]:
    """
    :param n_envs: number of environments
    :return: microseconds of a step of all of them, by arm and part
    """
    arms = {}
    for name, cls in ARMS.items():
        options: dict[str, Any] = {"learning_starts": n_envs, "buffer_size": 200 * n_envs, "device": "cpu", "seed": 0}
        model = cls("MlpPolicy", Trivial(n_envs), gradient_steps=1, policy_kwargs={"net_arch": [64, 64]}, **options)
        arms[name] = Arm(model.learn(5 * n_envs))
    rounds = [{name: arm.round() for name, arm in arms.items()} for _ in range(ROUNDS)]
    return {
        name: {part: statistics.median(each[name][part] for each in rounds) for part in rounds[0][name]}
        for name in arms
    }


def main() -> None:
    results = {str(n): measure(n) for n in NUMBERS}
    write_json(RESULTS / "many_envs.json", microseconds=results)
    parts = [*PARTS.values(), "in all"]
    rows = [
        [f"{int(n):,}", *(f"{arms['SB3'][part]:,.0f} / {arms['SoftSAC'][part]:,.0f}" for part in parts)]
        for n, arms in results.items()
    ]
    fill_documents({"many_envs": markdown_table(["environments", *parts], rows)})


if __name__ == "__main__":
    main()
