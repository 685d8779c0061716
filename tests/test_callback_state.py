"""What a continued run cannot have back is said: callbacks, logs, frozen parameters, settings of wrappers."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from resume_script import Case, differences, pendulum, plain, snapshot
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.logger import Figure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softsac import SoftSAC


class Counts(BaseCallback):
    """Has a setting, and a count that is lost."""

    def __init__(self, setting: int = 3):
        super().__init__()
        self.setting = setting
        self.count = 0
        self.at = object()

    def _on_step(self) -> bool:
        self.count += 1
        return True


class CountsToo(Counts):
    pass


class Keeps(Counts):
    """The same, with a count that is kept."""

    def get_state(self) -> Any:
        return self.count

    def set_state(self, state: Any) -> None:
        self.count = state


class Unreadable(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1", max_episode_steps=10))
        self.numbers = iter(range(1000))

    def reset(self, **kwargs: Any) -> Any:
        next(self.numbers)
        return super().reset(**kwargs)


def continued(path: Path, callback: BaseCallback | list[BaseCallback] | None, **kwargs: Any) -> list[str]:
    """What is said when the run of a file goes on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = SoftSAC.load(path, kwargs.pop("env", None) or pendulum(), device="cpu", force_reset=False, **kwargs)
        model.learn(5, callback)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def saved(path: Path, callback: BaseCallback | list[BaseCallback] | None = None, **kwargs: Any) -> SoftSAC:
    model = Case(kwargs=kwargs).make()
    model.learn(40, callback)
    model.save(path)
    return model


def test_attributes_of_a_users_callback(tmp_path: Path) -> None:
    saved(tmp_path / "model.zip", [Counts()])
    (text,) = continued(tmp_path / "model.zip", [Counts()])
    assert "The continuation may differ: Counts: count had different values" in text and "get_state()" in text
    (text,) = continued(tmp_path / "model.zip", [Counts(setting=4)])
    assert "count, setting had different values" in text
    saved(tmp_path / "model.zip", [Keeps()])
    assert continued(tmp_path / "model.zip", [Keeps()]) == []


def test_state_that_nothing_takes(tmp_path: Path) -> None:
    saved(tmp_path / "model.zip", [Keeps()])
    assert continued(tmp_path / "model.zip", None) == []  # left out by the user
    assert continued(tmp_path / "model.zip", CallbackList([Keeps(), Counts()])) == []  # added by the user
    (text,) = continued(tmp_path / "model.zip", [CountsToo()])
    assert "CountsToo starts from scratch" in text and "test_callback_state.Keeps" in text


def test_set_state_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model.zip", [Keeps()])
    monkeypatch.delattr(Keeps, "set_state")
    (text,) = continued(tmp_path / "model.zip", [Keeps()])
    assert "Keeps: it has no set_state(state)" in text


def test_evaluations_in_an_environment_that_cannot_be_read(tmp_path: Path) -> None:
    def evaluation(env: Any) -> EvalCallback:
        return EvalCallback(DummyVecEnv([env]), eval_freq=15, n_eval_episodes=1, verbose=0, warn=False)

    saved(tmp_path / "model.zip", evaluation(Unreadable))
    texts = continued(tmp_path / "model.zip", evaluation(Unreadable))
    assert len(texts) == 1 and "EvalCallback: its evaluations may differ: environment 0: Unreadable.numbers" in texts[0]
    saved(tmp_path / "model.zip", evaluation(lambda: gym.make("Pendulum-v1")))
    assert continued(tmp_path / "model.zip", evaluation(lambda: gym.make("Pendulum-v1"))) == []


def test_what_was_logged_and_cannot_be_written(tmp_path: Path) -> None:
    model = saved(tmp_path / "model.zip")
    model.logger.record("a/picture", Figure(None, close=False), exclude=("stdout", "log", "json", "csv"))
    model.logger.record("a/number", 3.0)
    model.save(tmp_path / "model.zip")
    (text,) = continued(tmp_path / "model.zip", None)
    assert text == "The continuation may differ: a/picture was logged, but could not be saved."


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    """State dicts do not say which parameters are trained."""
    model = saved(tmp_path / "model.zip")
    model.actor.latent_pi[0].weight.requires_grad_(False)
    model.critic.qf0[2].bias.requires_grad_(False)  # type: ignore[union-attr, index]
    model.learn(5, reset_num_timesteps=False)
    model.save(tmp_path / "model.zip")
    loaded = SoftSAC.load(tmp_path / "model.zip", pendulum(), device="cpu", force_reset=False)
    model.learn(20, reset_num_timesteps=False)
    loaded.learn(20)
    assert differences(plain(snapshot(model)), plain(snapshot(loaded))) == []
    assert not loaded.actor.latent_pi[0].weight.requires_grad and loaded.actor.latent_pi[2].weight.requires_grad


def test_frozen_entropy_coefficient_stays_frozen(tmp_path: Path) -> None:
    model = saved(tmp_path / "model.zip")
    model.log_ent_coef.requires_grad_(False)
    model.save(tmp_path / "model.zip")
    before = model.log_ent_coef.item()
    loaded = SoftSAC.load(tmp_path / "model.zip", pendulum(), device="cpu")
    loaded.learn(20)
    assert loaded.log_ent_coef.item() == before
    assert SoftSAC.load(tmp_path / "model.zip", ent_coef=0.1).log_ent_coef is None


@pytest.mark.parametrize("force_reset", [True, False])
def test_settings_of_vec_normalize_that_change_observations(tmp_path: Path, force_reset: bool) -> None:
    def env(**kwargs: Any) -> VecNormalize:
        return VecNormalize(pendulum(), **kwargs)

    SoftSAC("MlpPolicy", env(), learning_starts=10, batch_size=8, device="cpu").learn(12).save(tmp_path / "model.zip")
    for settings in ({"clip_obs": 3.0}, {"epsilon": 0.1}, {"norm_obs": False}):
        ((name, value),) = settings.items()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            SoftSAC.load(tmp_path / "model.zip", env(**settings), device="cpu", force_reset=force_reset)
        assert any(name in str(each.message) and str(value) in str(each.message) for each in caught), settings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftSAC.load(tmp_path / "model.zip", env(gamma=0.5, clip_reward=1.0), device="cpu")


class Freezes(FlattenExtractor):
    is_frozen = False

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.scale = th.nn.Parameter(th.ones(self.features_dim), requires_grad=not self.is_frozen)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) * self.scale


def test_parameters_that_a_network_freezes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="Written with pickle"):
        saved(tmp_path / "model.zip", policy_kwargs={"features_extractor_class": Freezes})
    assert continued(tmp_path / "model.zip", None, allow_pickle=True) == []
    monkeypatch.setattr(Freezes, "is_frozen", True)
    (text,) = continued(tmp_path / "model.zip", None, allow_pickle=True)
    assert "actor.features_extractor.scale" in text and "is frozen here, but was trained in" in text


def test_parameters_without_gradient_are_compiled_at_once(tmp_path: Path) -> None:
    """Whether an update can be compiled is told from the optimisers alone, the same in a continued run."""
    model = saved(tmp_path / "model.zip")
    model.actor.register_parameter("unused", th.nn.Parameter(th.zeros(2)))
    model.actor.optimizer.add_param_group({"params": [model.actor.unused]})
    model.learn(5, reset_num_timesteps=False)
    states = model.actor.optimizer.state_dict()
    runner = model._runner
    assert runner is not None and runner.learner.has_state()
    restored = Case().make()
    restored.actor.register_parameter("unused", th.nn.Parameter(th.zeros(2)))
    restored.actor.optimizer.add_param_group({"params": [restored.actor.unused]})
    restored.actor.optimizer.load_state_dict(states)
    restored.critic.optimizer.load_state_dict(model.critic.optimizer.state_dict())
    restored.ent_coef_optimizer.load_state_dict(model.ent_coef_optimizer.state_dict())  # type: ignore[union-attr]
    assert restored._present_runner().learner.has_state()


def test_other_settings_of_vec_normalize(tmp_path: Path) -> None:
    """They are for the user to choose anew; that they differ is said."""
    model = Case(make_env=lambda: VecNormalize(pendulum())).make()
    model.learn(40)
    model.save(tmp_path / "model.zip")
    assert continued(tmp_path / "model.zip", None, env=VecNormalize(pendulum())) == []
    (text,) = continued(tmp_path / "model.zip", None, env=VecNormalize(pendulum(), clip_obs=3.0, gamma=0.9))
    assert text == "The continuation may differ: VecNormalize has clip_obs=3.0 (was 10.0), gamma=0.9 (was 0.99)."


def test_precision_of_products(tmp_path: Path) -> None:
    saved(tmp_path / "model.zip")
    th.set_float32_matmul_precision("medium")
    try:
        (text,) = continued(tmp_path / "model.zip", None)
    finally:
        th.set_float32_matmul_precision("highest")
    assert "precision of float32 products: highest then, medium now" in text
