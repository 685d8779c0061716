"""Callbacks for training with SoftSAC."""

import warnings
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean


class SaveBestTrainingReturnCallback(BaseCallback):
    """
    Keep the best model by mean training return, once that has passed a threshold. Costs no evaluation episodes; the
    return is that of the exploring policy, averaged over the last ``stats_window_size`` episodes.

    :param threshold: mean return above which models are saved
    :param save_path: folder of ``<name>.zip`` and, with VecNormalize, ``<name>_vecnormalize.pkl``; None in the zoo: the
        run's folder
    :param name: file name without ending
    :param min_episodes: finished episodes before the mean counts (``stats_window_size``, if that is less)
    :param verbose: 1: print each save
    :raises ValueError: at the start of training, if there is no ``save_path``
    """

    def __init__(
        self,
        threshold: float = float("-inf"),
        save_path: str | None = None,
        name: str = "best_training_model",
        min_episodes: int = 10,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        self.threshold = float(threshold)
        self.save_path = save_path
        self.name = name
        self.min_episodes = min_episodes
        self.best_mean_return = self.threshold
        self._episodes_seen = -1

    def _init_callback(self) -> None:
        if self.save_path is None:
            raise ValueError("save_path=None works in the RL Zoo only, where it is the run's folder: pass a folder.")
        self._folder = Path(self.save_path)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # Only now has the algorithm counted the episodes that the rollout finished
        returns = [info["r"] for info in self.model.ep_info_buffer or ()]
        if not returns and self.model._episode_num > 0 and self._episodes_seen < 0:
            self._episodes_seen = 0
            warnings.warn(
                "SaveBestTrainingReturnCallback sees no returns of finished episodes and will save nothing: wrap the "
                "environments in Monitor, or the vectorised one in VecMonitor.",
                stacklevel=2,
            )
        enough = min(self.min_episodes, self.model._stats_window_size)
        if self.model._episode_num == self._episodes_seen or len(returns) < enough:
            return
        self._episodes_seen = self.model._episode_num
        mean_return = float(safe_mean(returns))
        if mean_return <= self.best_mean_return:
            return
        self.best_mean_return = mean_return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.model.save(self._folder / f"{self.name}.zip")
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            vec_normalize.save(str(self._folder / f"{self.name}_vecnormalize.pkl"))
        if self.verbose > 0:
            print(f"Mean training return {mean_return:.1f} at step {self.num_timesteps}: saved {self.name}.zip")
