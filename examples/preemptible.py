"""
A run on a machine that may be taken away. The same command starts it and, after each interruption, continues it:

    python examples/preemptible.py --folder checkpoints

At SIGTERM or SIGUSR1 it saves a checkpoint and exits with status 143. ``slurm/array.sh`` runs it under Slurm.
"""

import argparse

import gymnasium as gym

from sb3_softsac import CheckpointCallback, SoftSAC, has_checkpoints

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--folder", default="checkpoints")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the whole run")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    env = gym.make(args.env)
    if has_checkpoints(args.folder):
        model = SoftSAC.load(args.folder, env, force_reset=False)
    else:
        model = SoftSAC("MlpPolicy", env, seed=args.seed, verbose=1)
    print(f"Starting at step {model.num_timesteps}", flush=True)
    callback = CheckpointCallback(save_freq=10_000, save_path=args.folder)
    model.learn(args.steps - model.num_timesteps, callback=callback)
    callback.save()  # a finished run that is started again has nothing to do
    print(f"Finished at step {model.num_timesteps}")
