"""Soft Actor-Critic for Stable-Baselines3: exact log-probability, lean replay memory, every option."""

from sb3_softsac.buffers import ReplayBuffer
from sb3_softsac.callbacks import CheckpointCallback, SaveBestTrainingReturnCallback
from sb3_softsac.persistence.archive import CheckpointError
from sb3_softsac.persistence.run_folder import has_checkpoints
from sb3_softsac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SoftSACPolicy
from sb3_softsac.presets import preset
from sb3_softsac.softsac import SoftSAC

try:  # registers SoftSAC with rl_zoo3, where the interpreter's start did not (no .pth files, python -S)
    import _sb3_softsac_startup
except ImportError:
    pass
else:
    _sb3_softsac_startup.install()

__version__ = "0.1.0"

__all__ = [
    "CheckpointCallback",
    "CheckpointError",
    "CnnPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "ReplayBuffer",
    "SaveBestTrainingReturnCallback",
    "SoftSAC",
    "SoftSACPolicy",
    "__version__",
    "has_checkpoints",
    "preset",
]
