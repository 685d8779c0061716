"""
Learns from a Minari dataset and from the environment that it was collected in, half and half.

    python -m sb3_softsac.checkpoint export-dataset checkpoints pendulum/softsac-v0
    python examples/offline_to_online.py pendulum/softsac-v0
"""

import argparse

import minari
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_softsac import SoftSAC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="id of the dataset")
    parser.add_argument("--steps", type=int, default=10_000, help="in the environment")
    args = parser.parse_args()
    dataset = minari.load_dataset(args.dataset)
    model = SoftSAC(
        "MlpPolicy",
        dataset.recover_environment(),
        offline_data=dataset,
        offline_fraction=0.5,
        policy_kwargs={"normalization": "layer"},
        verbose=1,
    )
    model.learn(args.steps)
    mean, std = evaluate_policy(model, Monitor(dataset.recover_environment()), n_eval_episodes=10)
    print(f"Return {mean:.1f} +- {std:.1f} after {args.steps} steps")


if __name__ == "__main__":
    main()
