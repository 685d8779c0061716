"""The scale of rewards: what brings returns into the support of categorical critics, whatever units a task has."""

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd

EPSILON = 1e-8


class RewardScale:
    """
    Running standard deviation of discounted returns, by which rewards are divided when they are sampled (SimbaV2,
    https://arxiv.org/abs/2502.15280). The replay buffer holds the environment's rewards.
    """

    def __init__(self) -> None:
        self.returns = np.zeros(0)  # of the episodes in progress, (E,)
        self.max_return = 0.0  # largest absolute value until now
        self.statistics = RunningMeanStd(shape=())

    def update(self, rewards: np.ndarray, dones: np.ndarray, gamma: float) -> None:
        """
        :param rewards: of a step, (E,)
        :param dones: which episodes have ended, terminated or truncated, (E,)
        :param gamma: discount factor
        """
        if len(self.returns) != len(rewards):
            self.returns = np.zeros(len(rewards))
        self.returns = gamma * self.returns + rewards
        self.statistics.update(self.returns)
        self.max_return = max(self.max_return, float(np.abs(self.returns).max()))
        self.returns[dones] = 0.0

    def end_episodes(self) -> None:
        """All environments are reset."""
        self.returns = np.zeros(0)

    def divisor(self, bound: float | None = None) -> float:
        """
        :param bound: no return until now becomes larger than this; None: whatever they become
        :return: what rewards are divided by
        """
        std = float(np.sqrt(self.statistics.var + EPSILON))
        return std if bound is None else max(std, self.max_return / bound)
