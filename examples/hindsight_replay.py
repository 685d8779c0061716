"""
Hindsight experience replay: reach a random goal, with a reward only on arrival.

    python examples/hindsight_replay.py
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer

from sb3_softsac import SoftSAC


class Reach(gym.Env[dict[str, np.ndarray], np.ndarray]):
    def __init__(self) -> None:
        names = ("observation", "achieved_goal", "desired_goal")
        self.observation_space = spaces.Dict({name: spaces.Box(-1, 1, (3,), np.float32) for name in names})
        self.action_space = spaces.Box(-1, 1, (3,), np.float32)

    def observation(self) -> dict[str, np.ndarray]:
        return {"observation": self.position, "achieved_goal": self.position, "desired_goal": self.goal.copy()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        position, goal = self.np_random.uniform(-1, 1, (2, 3)).astype(np.float32)
        self.position, self.goal = position.copy(), goal.copy()  # which a resumed run can restore one by one
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        self.position = np.clip(self.position + 0.2 * action, -1, 1, dtype=np.float32)
        reward = float(self.compute_reward(self.position, self.goal, {}))
        return self.observation(), reward, False, False, {"is_success": reward == 0}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """HER calls this with batches, to judge what was reached by other goals."""
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.2).astype(np.float32)


gym.register("Reach-v0", Reach, max_episode_steps=20)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()

    model = SoftSAC(
        "MultiInputPolicy",
        gym.make("Reach-v0"),
        learning_starts=200,  # at least one whole episode
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
        seed=1,
        verbose=1,  # prints success_rate
    )
    model.learn(args.steps)
