"""
Runs an exported policy, with numpy and onnxruntime alone: no torch, no Stable-Baselines3.

    python -m sb3_softsac.export softsac_pendulum.zip -o policy.onnx
    python examples/onnx_policy.py policy.onnx Pendulum-v1
"""

import sys

import gymnasium as gym
import numpy as np
import onnxruntime


def main(path: str, env_id: str, n_episodes: int = 3) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the fastest for a small network
    policy = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    env = gym.make(env_id)
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=episode)
        total, is_over = 0.0, False
        while not is_over:
            parts = obs if isinstance(obs, dict) else {"obs": obs}
            batch = {name: np.asarray(part)[np.newaxis] for name, part in parts.items()}
            action = policy.run(["action"], batch)[0][0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, is_over = total + float(reward), terminated or truncated
        print(f"Episode {episode}: return {total:.1f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
