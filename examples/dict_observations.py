"""
An environment of your own with Dict observations: steer a point to a goal, past a wind that changes direction.

    python examples/dict_observations.py
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_softsac import SoftSAC


class WindyPoint(gym.Env[dict[str, Any], np.ndarray]):
    """The agent sees its position as numbers, and from which of four sides the wind blows as a category."""

    WIND = 0.02 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])

    def __init__(self) -> None:
        position = spaces.Box(-2, 2, (2,), np.float32)
        self.observation_space = spaces.Dict({"position": position, "wind": spaces.Discrete(4)})
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def observation(self) -> dict[str, Any]:
        return {"position": self.position.astype(np.float32), "wind": self.wind}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        self.wind = int(self.np_random.integers(4))
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        self.position = np.clip(self.position + 0.1 * action + self.WIND[self.wind], -2, 2)
        distance = float(np.linalg.norm(self.position))
        return self.observation(), -distance, distance < 0.05, False, {}


gym.register("WindyPoint-v0", WindyPoint, max_episode_steps=50)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5_000)
    args = parser.parse_args()

    model = SoftSAC("MultiInputPolicy", gym.make("WindyPoint-v0"), seed=1)
    model.learn(args.steps)
    mean, std = evaluate_policy(model, Monitor(gym.make("WindyPoint-v0")), n_eval_episodes=20)
    print(f"Return of 20 episodes: {mean:.2f} +/- {std:.2f}")
