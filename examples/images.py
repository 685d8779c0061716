"""
Images: push a bright square to the middle of the picture, seeing only pixels.

    python examples/images.py
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_softsac import SoftSAC


class PushSquare(gym.Env[np.ndarray, np.ndarray]):
    """The action is a force: how fast the square moves is only seen in several pictures."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def picture(self) -> np.ndarray:
        pixels = np.zeros((36, 36, 1), np.uint8)
        row, column = (16 + 14 * self.position).astype(int)
        pixels[row : row + 5, column : column + 5] = 255
        return pixels

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.uniform(-1, 1, 2), np.zeros(2)
        return self.picture(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.velocity = 0.9 * self.velocity + 0.05 * action
        self.position = np.clip(self.position + self.velocity, -1, 1)
        return self.picture(), -float(np.abs(self.position).sum()), False, False, {}


gym.register("PushSquare-v0", PushSquare, max_episode_steps=50)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()

    env = VecFrameStack(make_vec_env(lambda: gym.make("PushSquare-v0"), seed=1), n_stack=3)
    # The replay buffer needs 4 KB for each step, half of SB3's: it stores an observation once
    model = SoftSAC("CnnPolicy", env, buffer_size=50_000, train_freq=4, gradient_steps=1, seed=1, verbose=1)
    model.learn(args.steps)
