"""Learning to the end, with the shipped hyperparameters. Minutes each: `make test-slow`."""

from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_softsac import SoftSAC

HYPERPARAMS = yaml.safe_load((Path(__file__).parent.parent / "hyperparams" / "softsac.yml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "goal"), [("Pendulum-v1", -180.0), ("InvertedPendulum-v5", 1000.0)])
def test_reaches_the_goal(env_id: str, goal: float) -> None:
    arguments = dict(HYPERPARAMS[env_id])
    n_timesteps = int(arguments.pop("n_timesteps"))
    model = SoftSAC(env=gym.make(env_id), seed=1, device="cpu", **arguments).learn(n_timesteps)
    mean_return, _ = evaluate_policy(model, Monitor(gym.make(env_id)), n_eval_episodes=100)
    assert mean_return >= goal
