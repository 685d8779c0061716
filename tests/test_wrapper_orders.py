"""Wrappers of vectorised environments in the orders in which users have them."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from resume_script import Image, differences, multi_obs, plain, snapshot
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_softsac import ReplayBuffer, SoftSAC

SMALL: dict[str, Any] = {"buffer_size": 200, "learning_starts": 10, "batch_size": 4, "device": "cpu", "seed": 0}


class ImageAndVector(gym.Wrapper[Any, Any, Any, Any]):
    """A picture with channels last, and a vector that wants normalisation."""

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        vector = gym.spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)
        self.observation_space = gym.spaces.Dict({"image": env.observation_space, "vector": vector})

    def reset(self, **kwargs: Any) -> Any:
        image, info = self.env.reset(**kwargs)
        return self._observe(image), info

    def step(self, action: Any) -> Any:
        image, *rest = self.env.step(action)
        return self._observe(image), *rest

    def _observe(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image, "vector": 100.0 + self.env.unwrapped.at.astype(np.float32)}  # type: ignore[attr-defined]


def of_images() -> VecEnv:
    return VecNormalize(DummyVecEnv([Image, Image]), norm_obs=False)


def of_dicts() -> VecEnv:
    return VecNormalize(DummyVecEnv([lambda: ImageAndVector(Image())] * 2), norm_obs_keys=["vector"])


def transposed_below() -> VecEnv:
    return VecNormalize(VecTransposeImage(DummyVecEnv([Image, Image])), norm_obs=False)


def of_stacks() -> VecEnv:
    return VecMonitor(VecNormalize(VecFrameStack(DummyVecEnv([Image, Image]), 2), norm_obs=False))


ORDERS = {
    "images": ("CnnPolicy", of_images),
    "dicts": ("MultiInputPolicy", of_dicts),
    "stacks": ("CnnPolicy", of_stacks),
}


@pytest.mark.parametrize("order", ORDERS)
def test_vec_normalize_over_images(order: str, tmp_path: Path) -> None:
    """SB3 fails at the first transition (its issues 724 and 819). Trained, evaluated, saved, and continued exactly."""
    policy, make_env = ORDERS[order]
    evaluation = EvalCallback(
        make_env(), eval_freq=15, n_eval_episodes=1, log_path=str(tmp_path), verbose=0, warn=False
    )
    model = SoftSAC(policy, make_env(), **SMALL)  # type: ignore[arg-type]
    model.learn(60, evaluation)
    assert len(evaluation.evaluations_results) == 2
    model.save(tmp_path / "model.zip")
    model.learn(20, reset_num_timesteps=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = SoftSAC.load(tmp_path / "model.zip", make_env(), device="cpu", force_reset=False)
    loaded.learn(20)
    assert differences(plain(snapshot(model)), plain(snapshot(loaded))) == []


def test_what_the_buffer_holds_of_images() -> None:
    """The same as with the transposition below VecNormalize by hand, ends of episodes included."""
    ours, by_hand = (
        SoftSAC("CnnPolicy", make_env(), **SMALL).learn(60).replay_buffer  # past the end of an episode, of 25 steps
        for make_env in (of_images, transposed_below)
    )
    assert isinstance(ours, ReplayBuffer) and isinstance(by_hand, ReplayBuffer)
    assert ours.dones.sum() == 2 and ours.observations.shape == (100, 2, 1, 36, 36)  # type: ignore[union-attr]
    for name in ("observations", "next_observations", "actions", "rewards", "dones"):
        np.testing.assert_array_equal(getattr(ours, name)[:30], getattr(by_hand, name)[:30], err_msg=name)


def test_what_the_buffer_holds_of_dicts() -> None:
    """Vectors as the environment gives them, and normalised when they are sampled."""
    model = SoftSAC("MultiInputPolicy", of_dicts(), **SMALL)
    model.learn(60)
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer) and isinstance(buffer.observations, dict)
    assert buffer.observations["vector"][:30].min() >= 100.0 and buffer.observations["image"].max() == 255
    sample = buffer.sample(50, env=model.get_vec_normalize_env())
    assert abs(sample.observations["vector"]).max() <= 10.0 and sample.observations["image"].max() == 255  # type: ignore[index]


def test_rewards_of_discrete_observations_are_normalized() -> None:
    """SB3's SAC fails where the first episode ends."""
    env = gym.wrappers.TransformObservation(
        gym.make("Pendulum-v1", max_episode_steps=8), lambda obs: int(obs[0] > 0), gym.spaces.Discrete(2)
    )
    model = SoftSAC("MlpPolicy", VecNormalize(DummyVecEnv([lambda: env]), norm_obs=False), **SMALL)
    model.learn(20)
    assert model._n_updates == 10


@pytest.mark.parametrize("name", ["VecFrameStack", "VecExtractDictObs"])
def test_vec_normalize_below_what_changes_observations(name: str) -> None:
    """At once, and not at the first step: SB3 issue 693."""
    if name == "VecFrameStack":
        env: VecEnv = VecFrameStack(VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")])), 3)
    else:
        env = VecExtractDictObs(VecNormalize(DummyVecEnv([multi_obs]), norm_obs_keys=["vec"]), "vec")
    with pytest.raises(
        ValueError, match=rf"{name} is wrapped around VecNormalize.*VecNormalize\({name}\(env, \.\.\.\)\)"
    ):
        SoftSAC("MlpPolicy", env, **SMALL)
    # What leaves observations alone may be anywhere
    SoftSAC("MlpPolicy", VecMonitor(VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))), **SMALL).learn(20)


class Changing(VecEnvWrapper):
    """Multiplies what passes through it by other factors, in spaces that stay the same."""

    def __init__(self, venv: VecEnv, of_obs: float = 1.0, of_rewards: float = 1.0):
        super().__init__(venv)
        self.of_obs, self.of_rewards = of_obs, of_rewards

    def reset(self) -> Any:
        return self.venv.reset() * self.of_obs

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs * self.of_obs, rewards * self.of_rewards, dones, infos


@pytest.mark.parametrize("norm_reward", [False, True])
@pytest.mark.parametrize("name", ["observations", "rewards", None])
def test_values_that_a_wrapper_changes(name: str | None, norm_reward: bool) -> None:
    """The replay buffer holds what was there before VecNormalize: the policy would see other values than it learns."""
    factors = {"of_obs": 0.5 if name == "observations" else 1.0, "of_rewards": 2.0 if name == "rewards" else 1.0}

    def make_env(is_outer: bool) -> VecEnv:
        env: VecEnv = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
        if is_outer:
            return VecMonitor(Changing(VecNormalize(env, norm_reward=norm_reward), **factors))
        return VecNormalize(Changing(env, **factors), norm_reward=norm_reward)

    SoftSAC("MlpPolicy", make_env(is_outer=False), **SMALL).learn(10)
    model = SoftSAC("MlpPolicy", make_env(is_outer=True), **SMALL)
    if name is None:
        model.learn(10)
    else:
        with pytest.raises(ValueError, match=f"wrapped around VecNormalize and changes its {name}.* swap the two"):
            model.learn(10)
