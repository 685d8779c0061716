"""The scale of rewards: what brings returns into the support of categorical critics, whatever units a task has."""

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_softsac.buffers import ReplayBuffer, rows_by_age

EPSILON = 1e-8


class RewardScale:
    """
    Running standard deviation of discounted returns, by which rewards are divided when they are sampled (SimbaV2,
    https://arxiv.org/abs/2502.15280). The replay buffer holds the environment's rewards.

    :param gamma: discount factor
    """

    gamma: float | None = None  # not in older files
    n_imported = 0  # rows of the replay buffer from elsewhere than the environment that are taken in
    bounded_by: str | None = None  # SHA-256 of the offline data that max_return takes in

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.returns = np.zeros(0)  # of the episodes in progress, (E,)
        self.max_return = 0.0  # largest absolute value until now
        self.statistics = RunningMeanStd(shape=())

    def update(self, rewards: np.ndarray, dones: np.ndarray) -> None:
        """
        :param rewards: of a step, (E,)
        :param dones: which episodes have ended, terminated or truncated, (E,)
        """
        self._add(self._next_returns(rewards, dones))

    def update_from(self, buffer: SB3ReplayBuffer) -> None:
        """
        Take in what a replay buffer holds already.

        :param buffer: replay buffer, SB3's or ours
        """
        # In ours, dones do not tell where a reset or a dataset has cut an episode short
        ends = buffer.ends if isinstance(buffer, ReplayBuffer) else buffer.dones
        returns = [self._next_returns(buffer.rewards[row], ends[row]) for row in rows_by_age(buffer).tolist()]
        if returns:
            self._add(np.concatenate(returns))

    def bound_by(self, buffer: SB3ReplayBuffer) -> None:
        """
        Let the returns of other data stay within the bound, too. The standard deviation remains as it is.

        :param buffer: the data
        """
        assert self.gamma is not None
        theirs = RewardScale(self.gamma)
        theirs.update_from(buffer)
        self.max_return = max(self.max_return, theirs.max_return)

    def end_episodes(self) -> None:
        """All environments are reset."""
        self.returns = np.zeros(0)

    def divisor(self, bound: float | None = None) -> float:
        """
        :param bound: no discounted sum of past rewards becomes larger than this; None: whatever they become
        :return: what rewards are divided by; 1 until there is one that is not zero
        """
        if self.max_return == 0.0:
            return 1.0
        std = float(np.sqrt(self.statistics.var + EPSILON))
        return std if bound is None else max(std, self.max_return / bound)

    def _next_returns(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        assert self.gamma is not None
        if len(self.returns) != len(rewards):
            self.returns = np.zeros(len(rewards))
        before = self.gamma * self.returns
        returns: np.ndarray = before + rewards
        self.returns = np.where(dones, 0.0, np.where(np.isfinite(returns), returns, before))
        return returns

    def _add(self, returns: np.ndarray) -> None:
        returns = returns[np.isfinite(returns)]  # one that is not would stay in the statistics for good
        if len(returns) == 0:
            return
        self.statistics.update(returns)
        self.max_return = max(self.max_return, float(np.abs(returns).max()))
