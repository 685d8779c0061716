"""
Floating-point operations in the matrix products of an environment step, for plain SAC and the presets.

    python benchmarks/arithmetic.py

They are counted in eager updates on the CPU: means over as many as all delays need. A step's action is left out. Writes
``results/arithmetic.json``, and puts the table into the documents.
"""

from typing import Any

import gymnasium as gym
from record import RESULTS, fill_documents, markdown_table, write_json
from torch.utils.flop_counter import FlopCounterMode

from sb3_softsac import SoftSAC, preset
from sb3_softsac.presets import PRESETS

TASKS = ("HalfCheetah-v5", "Humanoid-v5")
PLAIN = "plain SAC"
N_STEPS = 6  # a multiple of all delays


def count(env_id: str, options: dict[str, Any]) -> int:
    """
    :param env_id: task
    :param options: arguments of ``SoftSAC``
    :return: operations of one environment step
    """
    options = {**options, "learning_starts": 20, "buffer_size": 1000, "compile": False, "device": "cpu", "seed": 0}
    model = SoftSAC("MlpPolicy", gym.make(env_id), **options).learn(25)
    model._n_updates = 0
    with FlopCounterMode(display=False) as counter:
        model.train(N_STEPS * model.gradient_steps, model.batch_size)
    return counter.get_total_flops() // N_STEPS


def main() -> None:
    arms: dict[str, dict[str, Any]] = {PLAIN: {}, **{name: preset(name) for name in PRESETS}}
    counts = {name: {env_id: count(env_id, options) for env_id in TASKS} for name, options in arms.items()}
    write_json(RESULTS / "arithmetic.json", operations=counts)
    rows = [
        [name, *(f"{each[env_id] / 1e9:.2f} ({each[env_id] / counts[PLAIN][env_id]:.1f})" for env_id in TASKS)]
        for name, each in counts.items()
    ]
    header = ["", *(f"{env_id}, GFLOP (times plain SAC)" for env_id in TASKS)]
    fill_documents({"arithmetic": markdown_table(header, rows)})


if __name__ == "__main__":
    main()
