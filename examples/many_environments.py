"""
Several environments, each in a process of its own, as many updates as steps.

    python examples/many_environments.py --env HalfCheetah-v5
"""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_softsac import SoftSAC

if __name__ == "__main__":  # the processes import this file
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--n-envs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100_000, help="of all environments together")
    args = parser.parse_args()

    env = make_vec_env(args.env, args.n_envs, seed=1, vec_env_cls=SubprocVecEnv)
    # One step in each environment, then (-1) as many updates as there were steps
    model = SoftSAC("MlpPolicy", env, train_freq=1, gradient_steps=-1, learning_starts=1_000, seed=1, verbose=1)
    model.learn(args.steps)
    print(f"{model.num_timesteps} steps, {model._n_updates} updates")
    env.close()
