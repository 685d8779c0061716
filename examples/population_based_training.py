"""
Four runs with different learning rates and discounts, in which the worst is replaced by a copy of the best, with other
values, at each interval.

    pip install 'sb3-softsac[tune]'
    python examples/population_based_training.py --env HalfCheetah-v5
"""

import argparse
from pathlib import Path

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from sb3_softsac.tune import SoftSACTrainable

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=20_000, help="of each run")
    parser.add_argument("--interval", type=int, default=2_000, help="steps between replacements")
    parser.add_argument("--folder", type=Path, default="population", help="where results and checkpoints go")
    args = parser.parse_args()

    scheduler = PopulationBasedTraining(
        time_attr="timesteps_total",
        perturbation_interval=args.interval,
        hyperparam_mutations={"learning_rate": tune.loguniform(1e-4, 3e-3), "gamma": [0.95, 0.98, 0.99, 0.995]},
        synch=True,  # all wait for each other, so that runs of equal length are compared
    )
    results = tune.Tuner(
        tune.with_resources(SoftSACTrainable, {"cpu": 1}),
        param_space={
            **{"env": args.env, "total_timesteps": args.steps, "steps_per_iteration": args.interval},
            **{"learning_rate": tune.loguniform(1e-4, 3e-3), "gamma": tune.choice([0.95, 0.98, 0.99, 0.995])},
        },
        tune_config=tune.TuneConfig(
            metric="episode_return", mode="max", num_samples=4, scheduler=scheduler, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="pbt",
            storage_path=str(args.folder.resolve()),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=True),
        ),
    ).fit()
    best = results.get_best_result()
    print(f"Best return {best.metrics['episode_return']:.1f}: SoftSAC.load('{best.checkpoint.path}/model.zip')")
