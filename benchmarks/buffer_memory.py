"""
Memory and speed of SoftSAC's default replay buffer beside SB3's, filled with as many transitions as it holds.

Each buffer is filled in a process of its own, one after the other, with random observations of the environment's space
in episodes of realistic length: an episode's end is where SoftSAC's buffer has to keep an additional observation.

    python benchmarks/buffer_memory.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from record import RESULTS, markdown_table, write_json

# HalfCheetah's episodes are cut off after 1000 steps. Humanoid falls after some 22 steps of a random policy, and stays
# that clumsy for a good part of a run: taken for all of it, that is the worst case for SoftSAC's buffer.
EPISODE_LENGTH = {"HalfCheetah-v5": 1000, "Humanoid-v5": 22}
BUFFERS = ("sb3", "softsac")
BATCH_SIZE = 256
SAMPLES = 2000


def resident_bytes(field: str = "VmRSS") -> int:
    """
    :param field: ``"VmRSS"`` for now, ``"VmHWM"`` for the most there has been
    :return: memory of this process, in bytes (Linux)
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def storage_bytes(buffer: Any) -> int:
    """
    :param buffer: SB3's or SoftSAC's replay buffer
    :return: bytes of the arrays in it
    """
    if hasattr(buffer, "nbytes"):
        return int(buffer.nbytes)
    return sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray))


def fill(buffer: Any, env: gym.Env, length: int, n: int, seed: int = 0) -> None:
    """
    Add random transitions.

    :param buffer: SB3's or SoftSAC's replay buffer, for one environment
    :param env: environment, for its spaces and its time limit
    :param length: steps of an episode
    :param n: transitions to add
    :param seed: of their observations
    """
    time_limit = env.spec.max_episode_steps if env.spec is not None else None
    infos = [{"TimeLimit.truncated": length == time_limit}]
    rng = np.random.default_rng(seed)
    # Cycled through, as drawing new ones would take longer than storing them
    stream = rng.normal(size=(4 * length + 1, 1, *env.observation_space.shape))  # type: ignore[misc]
    action = np.zeros((1, *env.action_space.shape), dtype=np.float32)  # type: ignore[misc]
    reward, done, not_done = np.ones(1), np.ones(1, dtype=bool), np.zeros(1, dtype=bool)
    for step in range(n):
        at = step % (len(stream) - 1)
        if (step + 1) % length == 0:
            # The next episode begins at stream[at + 1], so this one must end somewhere else
            buffer.add(stream[at], stream[at + 1] + 1.0, action, reward, done, infos)
        else:
            buffer.add(stream[at], stream[at + 1], action, reward, not_done, [{}])


def measure(name: str, env_id: str, size: int) -> dict[str, Any]:
    """
    Fill one buffer and sample from it. To be called in a fresh process.

    :param name: ``"sb3"`` or ``"softsac"``
    :param env_id: key of ``EPISODE_LENGTH``
    :param size: transitions to store, the buffer's capacity
    :return: bytes by both measures, and microseconds for each ``add`` and ``sample``
    """
    import torch as th

    th.set_num_threads(1)
    if name == "softsac":
        from sb3_softsac.buffers import ReplayBuffer
    else:
        from stable_baselines3.common.buffers import ReplayBuffer  # type: ignore[assignment]

    env = gym.make(env_id)
    before = resident_bytes()
    buffer = ReplayBuffer(size, env.observation_space, env.action_space, device="cpu")
    start = time.perf_counter()
    fill(buffer, env, EPISODE_LENGTH[env_id], size)
    seconds_add = time.perf_counter() - start
    resident, peak = resident_bytes() - before, resident_bytes("VmHWM") - before

    buffer.sample(BATCH_SIZE)
    start = time.perf_counter()
    for _ in range(SAMPLES):
        buffer.sample(BATCH_SIZE)
    seconds_sample = time.perf_counter() - start
    return {
        "buffer": name,
        "env": env_id,
        "transitions": size,
        "episode_length": EPISODE_LENGTH[env_id],
        "resident_bytes": resident,
        "peak_resident_bytes": peak,
        "storage_bytes": storage_bytes(buffer),
        "add_us": 1e6 * seconds_add / size,
        "sample_us": 1e6 * seconds_sample / SAMPLES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000, help="transitions")
    parser.add_argument("--one", nargs=2, metavar=("BUFFER", "ENV"), help="measure this one here, print it as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.one[1], args.size)))
        return

    results = []
    for env_id in EPISODE_LENGTH:
        for name in BUFFERS:
            command = [sys.executable, __file__, "--size", str(args.size), "--one", name, env_id]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(f"{env_id}, {name}: done", file=sys.stderr)
    write_json(RESULTS / "buffer_memory.json", results=results)
    header = ["environment", "buffer", "resident MB", "peak MB", "storage MB", "add, µs", f"sample({BATCH_SIZE}), µs"]
    rows = [
        [
            row["env"],
            row["buffer"],
            f"{row['resident_bytes'] / 1e6:,.0f}",
            f"{row['peak_resident_bytes'] / 1e6:,.0f}",
            f"{row['storage_bytes'] / 1e6:,.0f}",
            f"{row['add_us']:.1f}",
            f"{row['sample_us']:.0f}",
        ]
        for row in results
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
