"""
Rollouts: choose actions, step the environments and store transitions.

SB3 calls callbacks after the environments' step, but before it stores the transitions, and counts the steps of a
rollout in local variables. A model that a callback saves lacks these transitions, and cannot continue in mid-rollout.
:class:`RolloutAlgorithm` calls callbacks between two steps, and keeps its counts in the model.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import obs_as_tensor, should_collect_more_steps
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_normalize, unwrap_vec_wrapper
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac.policies import SACPolicy

from sb3_softsac.buffers import map_obs
from sb3_softsac.type_aliases import TorchObs
from sb3_softsac.validation import check_outer_wrappers


class RolloutAlgorithm(OffPolicyAlgorithm):
    """SB3's off-policy algorithm, with rollouts that can be interrupted and continued after any step."""

    actor: Any
    random_steps: int | None

    after_step: deque[Callable[[], None]] | None = None  # each called once, after all callbacks have seen the step

    _late_callbacks: Iterable[BaseCallback] = ()  # those that have not seen the last step of a loaded run
    # Steps and episodes of the rollout in progress, and whether the log of its last step is still due
    _rollout: tuple[int, int, bool] | None = None
    _is_interrupted = False  # in a step, whose environment is ahead of everything else, or in an update
    _warmed_up = False  # no more random actions, whatever num_timesteps is
    _warmed_up_with: int | None = None  # random_steps of the run for which that was decided

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        # SB3 starts learning and ends random actions at the same step
        random_steps = learning_starts if self.random_steps is None else self.random_steps
        random_steps = 0 if self._warmed_up else random_steps
        if self._predict_is_overridden() or self.num_timesteps < random_steps:
            return super()._sample_action(random_steps, action_noise, n_envs)
        # Equal to SB3's actions, which predict() unscales and which are then scaled again
        assert self._last_obs is not None
        actions = self._explore(obs_as_tensor(self._last_obs, self.device)).cpu().numpy()
        scaled_actions = actions.reshape(-1, *cast(Any, self.action_space).shape)
        if action_noise is not None:
            scaled_actions = np.clip(scaled_actions + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_actions), scaled_actions

    def _explore(self, obs: TorchObs) -> th.Tensor:
        """
        :param obs: observations of E environments
        :return: sampled scaled actions, (E, A)
        """
        self.policy.set_training_mode(False)  # in every step, since the user may have added a module
        with th.no_grad():
            return cast(Any, self.policy).actor(obs)

    def _predict_is_overridden(self) -> bool:
        """Whether a user's class overrides one of SB3's methods for prediction."""
        sb3s = (BaseAlgorithm.predict, BasePolicy.predict, SACPolicy._predict, BasePolicy.obs_to_tensor)
        methods = (self.predict, self.policy.predict, self.policy._predict, self.policy.obs_to_tensor)
        return any(getattr(m, "__func__", None) is not sb3 for m, sb3 in zip(methods, sb3s, strict=True))

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: SB3ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """
        Collect transitions, as in SB3, and more if the replay buffer has too few to learn from: with HER until the
        first episode has ended, and in a run that continues without its replay buffer until the new one has
        ``learning_starts`` transitions.

        :param env: training environments, E
        :param callback: called after each step, once its transitions are stored
        :param train_freq: number of steps or episodes
        :param replay_buffer: stores the transitions
        :param action_noise: noise added to the scaled actions
        :param learning_starts: environment steps before the first gradient update
        :param log_interval: episodes between log entries
        :return: counts of the last rollout, and whether training continues
        """
        args = env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
        rollout = self._collect_rollout(*args)
        told = None
        while rollout.continue_training and (lack := self._lack_of(replay_buffer)) is not None:
            if self.num_timesteps >= self._total_timesteps:
                what = "Updates were left out" if self._n_updates > 0 else "Nothing was learned"
                warnings.warn(f"{what}: training ended before {lack}", stacklevel=3)
                return rollout._replace(continue_training=False)  # no update
            if lack != told:
                self._say(f"Updates are delayed: they are due before {lack}")
                told = lack
            rollout = self._collect_rollout(*args)
        return rollout

    def _lack_of(self, buffer: SB3ReplayBuffer) -> str | None:
        """
        :return: what updates have to wait for, and how to avoid it; None: the replay buffer has enough transitions, or
            no updates are due
        """
        if self.num_timesteps <= self.learning_starts or self.gradient_steps == 0:
            return None
        if isinstance(buffer, HerReplayBuffer) and not np.any(buffer.ep_length > 0):
            if buffer.full:
                raise ValueError(
                    f"buffer_size={self.buffer_size} holds no whole episode of {self.n_envs} environment(s), of which "
                    "HerReplayBuffer draws goals: choose one of at least two episodes times the number of environments."
                )
            return (
                "the end of the first episode, which HerReplayBuffer needs. Set learning_starts to more than the steps "
                "of an episode times the number of environments."
            )
        if self._num_timesteps_at_start > 0 and not buffer.full and buffer.size() * self.n_envs <= self.learning_starts:
            return (
                f"the new replay buffer had learning_starts={self.learning_starts} transitions. The run continues "
                "without its own replay buffer: pass a lower learning_starts to load(), or train longer."
            )
        return None

    def _say(self, text: str) -> None:
        if self.verbose >= 1:
            print(text)

    def _collect_rollout(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: SB3ReplayBuffer,
        action_noise: ActionNoise | None,
        learning_starts: int,
        log_interval: int | None,
    ) -> RolloutReturn:
        if self.policy.training:
            self.policy.set_training_mode(False)
        if env.num_envs > 1:
            assert train_freq.unit == TrainFrequencyUnit.STEP, "You must use only one env when doing episodic training."
        if self._rollout is None:
            if self.use_sde:
                self.actor.reset_noise(env.num_envs)
            self._rollout = 0, 0, False
        num_collected_steps, num_collected_episodes, must_log = self._rollout
        callback.on_rollout_start()
        late, self._late_callbacks = self._late_callbacks, ()
        goes_on = all([each.on_step() for each in late])
        if goes_on and must_log:
            self.dump_logs()

        while goes_on and should_collect_more_steps(train_freq, num_collected_steps, num_collected_episodes):
            if self.use_sde and self.sde_sample_freq > 0 and num_collected_steps % self.sde_sample_freq == 0:
                self.actor.reset_noise(env.num_envs)
            actions, buffer_actions = self._sample_action(learning_starts, action_noise, env.num_envs)
            self._is_interrupted = True
            new_obs, rewards, dones, infos = env.step(actions)
            new_obs = map_obs(with_usual_strides, new_obs)
            self.num_timesteps += env.num_envs
            num_collected_steps += 1
            self._update_info_buffer(infos, dones)
            self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            self._on_step()
            num_collected_episodes += int(np.count_nonzero(dones))
            must_log = self._end_episodes(dones, action_noise, log_interval)
            self._rollout = num_collected_steps, num_collected_episodes, must_log
            self._is_interrupted = False

            callback.update_locals(locals())
            goes_on = callback.on_step()
            self._run_after_step()
            if goes_on and must_log:
                self.dump_logs()
                self._rollout = num_collected_steps, num_collected_episodes, False
        if goes_on:
            callback.on_rollout_end()
            self._rollout = None
        return RolloutReturn(num_collected_steps * env.num_envs, num_collected_episodes, continue_training=goes_on)

    def _end_episodes(self, dones: np.ndarray, action_noise: ActionNoise | None, log_interval: int | None) -> bool:
        """
        :param dones: whether an episode of each environment has ended, (E,)
        :return: whether a log entry is due
        """
        must_log = False
        for idx in np.flatnonzero(dones).tolist():
            self._episode_num += 1
            if action_noise is not None:
                action_noise.reset(**({"indices": [idx]} if len(dones) > 1 else {}))
            must_log |= log_interval is not None and self._episode_num % log_interval == 0
        return must_log

    def _store_transition(
        self,
        replay_buffer: SB3ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        # SB3's method fails if VecTransposeImage wraps VecNormalize, as SB3 does itself (issues 724 and 819), and with
        # VecNormalize(norm_obs=False) and discrete observations
        normalize, last_obs, new_original_obs = self._vec_normalize_env, self._last_obs, new_obs
        if normalize is not None:
            last_obs, new_original_obs = self._last_original_obs, self._original_obs()
            original_reward = normalize.get_original_reward()
            if self.env is not normalize:
                check_outer_wrappers(
                    cast(VecEnv, self.env), rewards=(reward, normalize.normalize_reward(original_reward))
                )
            reward = original_reward
        next_obs = deepcopy(new_original_obs)
        for i in np.flatnonzero(dones).tolist():
            terminal_obs = infos[i].get("terminal_observation")
            if terminal_obs is not None:
                terminal_obs = terminal_obs if normalize is None else normalize.unnormalize_obs(terminal_obs)
                map_obs(lambda rows, obs, i=i: rows.__setitem__(i, _rounded_like(rows, obs)), next_obs, terminal_obs)
        replay_buffer.add(last_obs, next_obs, buffer_action, reward, dones, infos)  # type: ignore[arg-type]
        self._last_obs, self._last_original_obs = new_obs, new_original_obs

    def _original_obs(self) -> Any:
        """Observations before normalisation, with images transposed as for the model."""
        assert self.env is not None and self._vec_normalize_env is not None
        obs = self._vec_normalize_env.get_original_obs()
        transpose = unwrap_vec_wrapper(self.env, VecTransposeImage)
        if transpose is not None and unwrap_vec_normalize(transpose) is self._vec_normalize_env:
            obs = transpose.transpose_observations(obs)
        return map_obs(with_usual_strides, obs)

    def _run_after_step(self) -> None:
        while self.after_step:  # a signal may add to it at any time
            self.after_step.popleft()()


def _rounded_like(rows: np.ndarray, obs: np.ndarray) -> np.ndarray:
    """VecNormalize has made floats of integers, and gives back some that are a bit smaller."""
    return np.rint(obs) if rows.dtype.kind in "iu" else obs


def with_usual_strides(obs: np.ndarray) -> np.ndarray:
    """
    Copy images to C order. A transposed image has the strides of channels-last order, with which convolutions round
    differently, and files do not keep strides.

    :param obs: observations of E environments
    :return: the same observations, with images in C order
    """
    # Always copy: images of one channel are contiguous in either order for NumPy, but not for PyTorch
    return obs.copy() if obs.ndim > 2 else obs
