"""Exploration noise that is held for random numbers of steps (FlashSAC, https://arxiv.org/abs/2604.04539)."""

import numpy as np
import torch as th

EXPONENT = -2.0  # of the distribution of lengths: P(n) ~ n^-2


class HeldNoise:
    """
    Standard normal noise that changes after random numbers of steps, in each environment by itself. A joint that is
    pushed the same way for a while moves further than one that is shaken.

    :param max_steps: largest number of steps
    """

    def __init__(self, max_steps: int):
        self.max_steps = max_steps
        self.noise = th.zeros(0, 0)  # (E, A)
        self.steps_left = th.zeros(0, dtype=th.int64)  # (E,)

    def next(self, n_envs: int, n_actions: int) -> th.Tensor:
        """
        :param n_envs: E
        :param n_actions: A
        :return: noise of the next step, drawn from torch's random state on the CPU, (E, A)
        """
        if self.noise.shape != (n_envs, n_actions):
            self.noise, self.steps_left = th.zeros(n_envs, n_actions), th.zeros(n_envs, dtype=th.int64)
        if is_over := np.flatnonzero(self.steps_left.numpy() == 0).tolist():
            weights = th.arange(1.0, self.max_steps + 1.0) ** EXPONENT
            self.steps_left[is_over] = 1 + th.multinomial(weights, len(is_over), replacement=True)
            self.noise[is_over] = th.randn(len(is_over), n_actions)
        self.steps_left -= 1
        return self.noise
