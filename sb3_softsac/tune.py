"""
SoftSAC for Ray Tune: trials that are paused, moved and cloned bit for bit, as population-based training does.

It needs the extra ``tune`` (``pip install 'sb3-softsac[tune]'``).
"""

import json
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import safe_mean

from sb3_softsac.persistence.codec import NotEncodable, encode
from sb3_softsac.softsac import SoftSAC

try:
    from ray.tune import Trainable
except ImportError as error:
    raise ImportError("SoftSACTrainable needs Ray Tune: pip install 'sb3-softsac[tune]'") from error

MODEL, CONFIG = "model.zip", "config.json"
OWN = ("total_timesteps", "steps_per_iteration")  # names in the configuration that are not SoftSAC's
MADE_BY_SETUP = ("env", "policy", *OWN)


class SoftSACTrainable(Trainable):
    """
    A trial of Ray Tune. Its configuration holds the arguments of ``SoftSAC``, and:

    - ``env``: id of the environment, or a function that makes one, which may be vectorised
    - ``policy``: ``"MlpPolicy"`` by default
    - ``total_timesteps``: environment steps after which the trial ends
    - ``steps_per_iteration``: environment steps between two results; approximate, since all environments step together

    Results have ``episode_return``, the mean over the last ``stats_window_size`` training episodes, and
    ``timesteps_total``.

    A trial that is restored from a checkpoint, its own or another trial's, continues that run bit for bit, in
    mid-episode and with its random states. It applies those values of its configuration that differ from the
    checkpoint's: what Tune has mutated. A different ``seed`` restarts the random states.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """
        :param config: as described above
        :raises ValueError: if a name is missing, or a value is not valid
        """
        if missing := [name for name in ("env", *OWN) if name not in config]:
            raise ValueError(
                f"config has no {', '.join(missing)}: SoftSACTrainable needs env, total_timesteps and "
                "steps_per_iteration."
            )
        self.total_timesteps, self.steps_per_iteration = (config[name] for name in OWN)
        env = config["env"]
        arguments = {"policy": "MlpPolicy", **config, "env": env() if callable(env) else env}
        self.model = SoftSAC(**{name: value for name, value in arguments.items() if name not in OWN})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Set up another trial in this process, which avoids starting a new one."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The result of an iteration."""
        model = self.model
        until = model.num_timesteps + self.steps_per_iteration
        pause = (lambda *_: model.num_timesteps < until) if until < self.total_timesteps else None
        # Up to the end, not to the pause: schedules follow the whole trial
        model.learn(self.total_timesteps - model.num_timesteps, pause, reset_num_timesteps=False)
        return {
            "episode_return": float(safe_mean([info["r"] for info in model.ep_info_buffer or ()])),
            "timesteps_total": model.num_timesteps,
            "done": model.num_timesteps >= self.total_timesteps,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """
        Save the whole run.

        :param checkpoint_dir: folder for the file
        """
        self.model.save(Path(checkpoint_dir) / MODEL)
        (Path(checkpoint_dir) / CONFIG).write_text(json.dumps(_plain(self.config)))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """
        Continue from a checkpoint.

        :param checkpoint: folder of :meth:`save_checkpoint`
        :raises CheckpointError: (a ValueError) if it is damaged or does not fit
        """
        there, here = json.loads((Path(checkpoint) / CONFIG).read_text()), _plain(self.config)
        changed = {
            name: self.config[name] for name in here if name not in MADE_BY_SETUP and there.get(name) != here[name]
        }
        self.model = SoftSAC.load(
            Path(checkpoint) / MODEL, self.model.env, device=self.model.device, force_reset=False, **changed
        )

    def cleanup(self) -> None:
        """Close the environments."""
        if self.model.env is not None:
            self.model.env.close()


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """:return: JSON trees of the values that are plain data: only those can have been mutated"""
    trees = {}
    for name, value in config.items():
        try:
            trees[name] = encode(value)
        except NotEncodable:
            continue
    return trees
