"""What SB3's own suite asks of its SAC, asked of SoftSAC: saving, loading, environments, buffers, determinism."""

import io
import pathlib
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_softsac import CheckpointError, ReplayBuffer, SoftSAC
from sb3_softsac.policies import CnnPolicy, MultiInputPolicy, SoftSACPolicy

SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16]},
    "buffer_size": 500,
    "learning_starts": 20,
    "batch_size": 8,
    "device": "cpu",
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed_ent_coef": {"ent_coef": 0.2},
    "gsde": {"use_sde": True},
    "all_options": {
        "qf_learning_rate": 1e-3, "ent_coef_learning_rate": 2e-3, "policy_delay": 2, "policy_delay_compensation": True,
        "random_steps": 25, "use_actor_target": True, "ent_coef_loss": "exp", "entropy_space": "env",
        "max_grad_norm": 1.0, "n_steps": 2, "target_update_interval": 2,
        "policy_kwargs": {
            "net_arch": [16], "log_std_bounding": "tanh", "log_std_bounds": (-5, 2), "separate_log_std_net": True,
            "weight_init": "xavier", "n_critics": 3,
        },
    },
}  # fmt: skip


def make_model(env: Any = "Pendulum-v1", **kwargs: Any) -> SoftSAC:
    return SoftSAC("MlpPolicy", env, **{**SMALL, "seed": 0, **kwargs})


def everything(model: SoftSAC | SAC) -> dict[str, Any]:
    """All parameters and optimiser states, flat."""
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                flatten(f"{prefix}.{key}", part)
        elif isinstance(value, list):
            for i, part in enumerate(value):
                flatten(f"{prefix}.{i}", part)
        else:
            flat[prefix] = value.clone() if isinstance(value, th.Tensor) else value

    flatten("", model.get_parameters())
    flat["log_ent_coef"] = None if model.log_ent_coef is None else model.log_ent_coef.detach().clone()
    return flat


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = th.equal(actual[name], value) if isinstance(value, th.Tensor) else actual[name] == value
        assert same, name


@pytest.mark.parametrize("case", CASES)
def test_save_load(case: str, tmp_path: pathlib.Path) -> None:
    model = make_model(**CASES[case])
    model.learn(60)
    obs = np.stack([model.observation_space.sample() for _ in range(10)])
    expected = model.predict(obs, deterministic=True)[0]
    before = everything(model)
    model.save(tmp_path / "model.zip")
    for env in (None, "Pendulum-v1"):
        loaded = SoftSAC.load(tmp_path / "model.zip", env=None if env is None else gym.make(env), device="cpu")
        assert_same(everything(loaded), before)
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        for name in CASES[case].keys() - {"policy_kwargs"}:  # SB3 writes it as JSON: tuples come back as lists
            assert getattr(loaded, name) == getattr(model, name)
    # ... and learns on
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 120
    changed = everything(loaded)
    assert any(not th.equal(changed[k], v) for k, v in before.items() if isinstance(v, th.Tensor) and "weight" in k)


def test_loaded_model_does_the_same_update(tmp_path: pathlib.Path) -> None:
    """Optimiser states and counters are part of the file: the next update of both is the same."""
    model = make_model(**CASES["all_options"])
    model.learn(61)
    model.save(tmp_path / "model.zip")
    loaded = SoftSAC.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu")
    loaded.replay_buffer = deepcopy(model.replay_buffer)
    loaded.set_logger(model.logger)
    for each in (model, loaded):
        th.manual_seed(0)
        each.train(gradient_steps=3, batch_size=8)
    assert loaded._n_updates == model._n_updates
    assert_same(everything(loaded), everything(model))


@pytest.mark.parametrize("with_buffer", [True, False])
def test_continuing_without_the_buffer_fills_it_first(with_buffer: bool, tmp_path: pathlib.Path) -> None:
    model = make_model(learning_starts=30)
    model.learn(50)
    model.save(tmp_path / "model.zip", exclude=["replay_buffer"])
    model.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = SoftSAC.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu")
    if with_buffer:
        loaded.load_replay_buffer(tmp_path / "replay.pkl")
    loaded.action_space.sample = None  # type: ignore[method-assign,assignment]  # no random actions any more
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 110
    assert loaded._n_updates - model._n_updates == (60 if with_buffer else 60 - 30)
    loaded.learn(5, reset_num_timesteps=False)
    assert loaded._n_updates - model._n_updates == (65 if with_buffer else 65 - 30)


@pytest.mark.parametrize("kind", ["str", "suffixless", "pathlib", "bytes"])
def test_save_load_targets(kind: str, tmp_path: pathlib.Path) -> None:
    model = make_model()
    (tmp_path / "new").mkdir()
    target: Any = {
        "str": str(tmp_path / "model.zip"), "suffixless": str(tmp_path / "new" / "model"),
        "pathlib": tmp_path / "model.zip", "bytes": io.BytesIO(),
    }[kind]  # fmt: skip
    model.save(target)
    if kind == "bytes":
        target.seek(0)
    assert_same(everything(SoftSAC.load(target, device="cpu")), everything(model))


def test_open_file(tmp_path: pathlib.Path) -> None:
    model = make_model()
    with open(tmp_path / "model.zip", "wb") as file:
        model.save(file)
    with open(tmp_path / "model.zip", "rb") as file:
        assert_same(everything(SoftSAC.load(file, device="cpu")), everything(model))


def test_exclude_and_include(tmp_path: pathlib.Path) -> None:
    model = make_model(tensorboard_log=None)
    model.learn(30)
    model.save(tmp_path / "plain.zip")
    data, params, variables = load_from_zip_file(tmp_path / "plain.zip")
    assert data is not None and variables is not None
    assert "learning_rate" in data and "replay_buffer" not in data
    assert params.keys() == {"policy", "actor.optimizer", "critic.optimizer", "ent_coef_optimizer"}
    assert variables.keys() == {"log_ent_coef"}
    model.save(tmp_path / "excluded.zip", exclude=["learning_rate"])
    assert "learning_rate" not in load_from_zip_file(tmp_path / "excluded.zip")[0]  # type: ignore[operator]
    model.save(tmp_path / "light.zip", exclude=["replay_buffer"])
    model.save_exclude = ("replay_buffer",)
    model.save(tmp_path / "light_too.zip")
    model.save(tmp_path / "included.zip", include=["replay_buffer"])
    for name, size in {"plain": 30, "light": 0, "light_too": 0, "included": 30}.items():
        loaded = SoftSAC.load(tmp_path / f"{name}.zip", env=gym.make("Pendulum-v1"), device="cpu")
        assert loaded.replay_buffer.size() == size
    np.testing.assert_array_equal(loaded.replay_buffer.observations, model.replay_buffer.observations)


def test_get_and_set_parameters() -> None:
    model, other = make_model(), make_model(seed=1)
    for each in (model, other):
        each.learn(40)
    other.set_parameters(deepcopy(model.get_parameters()))
    assert_same(
        {k: v for k, v in everything(other).items() if k != "log_ent_coef"},
        {k: v for k, v in everything(model).items() if k != "log_ent_coef"},
    )
    parameters = model.get_parameters()
    del parameters["critic.optimizer"]
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters(parameters)
    other.set_parameters(parameters, exact_match=False)
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({"no_such_network": {}})


def test_custom_objects(tmp_path: pathlib.Path) -> None:
    model = make_model(learning_rate=lambda progress: 1e-3 * progress)
    with pytest.warns(UserWarning, match="Written with pickle: learning_rate is a builtins.function"):
        model.save(tmp_path / "model.zip")
    for substitute in ({"custom_objects": {"learning_rate": 0.5}}, {"learning_rate": 0.5}):
        loaded = SoftSAC.load(tmp_path / "model.zip", device="cpu", **substitute)
        assert loaded.learning_rate == 0.5 and loaded.lr_schedule(0.3) == 0.5
    with pytest.raises(ValueError, match=r"\(learning_rate\).*custom_objects=\{'learning_rate'.*allow_pickle=True"):
        SoftSAC.load(tmp_path / "model.zip", device="cpu")
    trusted = SoftSAC.load(tmp_path / "model.zip", device="cpu", allow_pickle=True)
    assert trusted.learning_rate(0.5) == pytest.approx(5e-4)


def test_load_with_new_options(tmp_path: pathlib.Path) -> None:
    make_model().save(tmp_path / "model.zip")
    loaded = SoftSAC.load(
        tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu", use_actor_target=True, policy_delay=2
    )
    assert loaded.actor_target is not None
    for ours, theirs in zip(loaded.actor.parameters(), loaded.actor_target.parameters(), strict=True):
        assert th.equal(ours, theirs)
    loaded.learn(40)
    loaded.save(tmp_path / "with_target.zip")
    assert SoftSAC.load(tmp_path / "with_target.zip", device="cpu").actor_target is not None
    without = SoftSAC.load(tmp_path / "with_target.zip", device="cpu", use_actor_target=False)
    assert without.actor_target is None
    with pytest.raises(ValueError, match="policy_delay=-1"):
        SoftSAC.load(tmp_path / "model.zip", device="cpu", policy_delay=-1)


@pytest.mark.parametrize("kwargs", [{}, {"ent_coef": 0.3}, {"use_sde": True}, {"n_steps": 3}])
def test_sb3_sac_zip_loads(kwargs: dict[str, Any], tmp_path: pathlib.Path) -> None:
    sac = SAC("MlpPolicy", "Pendulum-v1", **{**SMALL, "seed": 0, **kwargs})
    sac.learn(60)
    sac.save(tmp_path / "sac.zip")
    obs = np.stack([sac.observation_space.sample() for _ in range(20)])
    with pytest.raises(ValueError, match=r"policy_class.*allow_pickle=True"):
        SoftSAC.load(tmp_path / "sac.zip", device="cpu")
    model = SoftSAC.load(tmp_path / "sac.zip", device="cpu", allow_pickle=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], sac.predict(obs, deterministic=True)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = SoftSAC.load(tmp_path / "sac.zip", env=gym.make("Pendulum-v1"), device="cpu", allow_pickle=True)
    assert type(model.policy) is SoftSACPolicy
    assert isinstance(model.replay_buffer, ReplayBuffer)
    assert model.replay_buffer.n_steps == kwargs.get("n_steps", 1)
    changed = SoftSAC.load(
        tmp_path / "sac.zip", env=gym.make("Pendulum-v1"), device="cpu", allow_pickle=True, n_steps=2, gamma=0.5
    )
    assert (changed.replay_buffer.n_steps, changed.replay_buffer.gamma) == (2, 0.5)
    assert_same(everything(model), everything(sac))
    model.learn(60, reset_num_timesteps=False)
    assert model.num_timesteps == 120


@pytest.mark.parametrize(
    ("policy", "ours"), [("CnnPolicy", CnnPolicy), ("MultiInputPolicy", MultiInputPolicy)], ids=["cnn", "dict"]
)
def test_sb3_sac_zip_of_other_policies(policy: str, ours: Any, tmp_path: pathlib.Path) -> None:
    env: Any = SimpleMultiObsEnv(discrete_actions=False, channel_last=False)
    if policy == "CnnPolicy":
        env = gym.wrappers.TransformObservation(env, lambda obs: obs["img"], env.observation_space["img"])
    sac = SAC(policy, env, **SMALL)
    sac.save(tmp_path / "sac.zip")
    model = SoftSAC.load(tmp_path / "sac.zip", device="cpu", env=env, allow_pickle=True)
    assert type(model.policy) is ours
    obs, _ = env.reset()
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], sac.predict(obs, deterministic=True)[0])
    model.learn(40)


@pytest.mark.parametrize("case", CASES)
def test_deterministic_training(case: str) -> None:
    results = []
    for _ in range(2):
        model = make_model(**CASES[case], action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)))
        model.learn(80)
        results.append((everything(model), evaluate_policy(model, model.get_env(), n_eval_episodes=2)))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    other = make_model(**CASES[case], seed=7)
    other.learn(80)
    assert any(not th.equal(v, results[0][0][k]) for k, v in everything(other).items() if isinstance(v, th.Tensor))


def test_global_seed_is_enough() -> None:
    """The zoo's hyperparameter optimisation seeds the global random states only."""
    results = []
    for _ in range(2):
        set_random_seed(3)
        model = make_model(seed=None)
        model.env.seed(0)
        model.action_space.seed(0)
        model.learn(60)
        results.append(everything(model))
    assert_same(*results)


def test_set_env() -> None:
    model = make_model()
    model.learn(40)
    env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: 77.0)
    model.set_env(env)
    model.learn(40)
    np.testing.assert_array_equal(model.replay_buffer.rewards[40:80], 77.0)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(gym.make("InvertedPendulum-v5"))
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env("Pendulum-v1", n_envs=2))


def test_replay_buffer_files(tmp_path: pathlib.Path) -> None:
    model = make_model()
    model.learn(250)
    model.save_replay_buffer(tmp_path / "replay")
    other = make_model()
    other.load_replay_buffer(tmp_path / "replay")
    for name in ("observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(other.replay_buffer, name), getattr(model.replay_buffer, name))
    np.testing.assert_array_equal(other.replay_buffer.next_observations, model.replay_buffer.next_observations)
    other.learn(40)
    # SB3's buffer, from a SAC run
    sac = SAC("MlpPolicy", "Pendulum-v1", **SMALL)
    sac.learn(30)
    sac.save_replay_buffer(tmp_path / "sb3.pkl")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        other.load_replay_buffer(tmp_path / "sb3.pkl")
    assert other.replay_buffer.size() == 290  # as it was
    other.load_replay_buffer(tmp_path / "sb3.pkl", allow_pickle=True)
    assert type(other.replay_buffer) is ReplayBuffer
    np.testing.assert_array_equal(other.replay_buffer.rewards[:30], sac.replay_buffer.rewards[:30])
    np.testing.assert_allclose(other.replay_buffer.next_observations[:30], sac.replay_buffer.next_observations[:30])
    other.learn(40)


class CountingBuffer(SB3ReplayBuffer):
    """A user's own buffer."""

    samples = 0

    def __init__(self, *args: Any, flavour: str = "plain", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.flavour = flavour

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self.samples += 1
        return super().sample(*args, **kwargs)


def test_users_replay_buffer_class(tmp_path: pathlib.Path) -> None:
    model = make_model(replay_buffer_class=CountingBuffer, replay_buffer_kwargs={"flavour": "sour"})
    model.learn(60)
    assert isinstance(model.replay_buffer, CountingBuffer)
    assert model.replay_buffer.flavour == "sour" and model.replay_buffer.samples == 40
    with pytest.warns(UserWarning, match="replay_buffer_class is a .*CountingBuffer"):
        model.save(tmp_path / "model.zip")
    loaded = SoftSAC.load(
        tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu", replay_buffer_class=CountingBuffer
    )
    assert isinstance(loaded.replay_buffer, CountingBuffer)
    assert loaded.replay_buffer.flavour == "sour" and loaded.replay_buffer.samples == 40
    np.testing.assert_array_equal(loaded.replay_buffer.next_observations, model.replay_buffer.next_observations)
    with pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
        make_model(replay_buffer_class=CountingBuffer, n_steps=3)


class OurSubclass(ReplayBuffer):
    """A user's own buffer, derived from ours."""


class OurSubclassWithSB3sSignature(ReplayBuffer):
    """One that knows nothing of n-step returns."""

    def __init__(self, buffer_size: int, observation_space: Any, action_space: Any, device: Any = "auto",
                 n_envs: int = 1, optimize_memory_usage: bool = False):  # fmt: skip
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage)


def test_subclass_of_our_buffer() -> None:
    make_model(replay_buffer_class=OurSubclassWithSB3sSignature).learn(40)
    model = make_model(replay_buffer_class=OurSubclass, n_steps=3, optimize_memory_usage=True)
    model.learn(40)
    model.learn(40)
    assert isinstance(model.replay_buffer, OurSubclass)
    assert model.replay_buffer.n_steps == 3 and not model.replay_buffer.dones.any()


@pytest.mark.parametrize("how", ["load", "set_env", "in mid-episode"])
def test_frugal_buffer_of_sb3_ends_episodes_at_a_reset(tmp_path: pathlib.Path, how: str) -> None:
    """Its newest next observation is the next one that comes, which may be the first of another episode."""
    model = make_model(
        replay_buffer_class=SB3ReplayBuffer,
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
    ).learn(30)
    if how == "set_env":
        model.set_env(make_vec_env("Pendulum-v1"))
    else:
        model.save(tmp_path / "model.zip")
        model = SoftSAC.load(tmp_path / "model.zip", "Pendulum-v1", device="cpu", force_reset=how == "load")
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer is not None
    assert model.replay_buffer.dones[:40, 0].tolist() == 29 * [0.0] + [float(how != "in mid-episode")] + 10 * [0.0]


def test_target_actor_is_not_noted_in_the_policy_kwargs(tmp_path: pathlib.Path) -> None:
    policy_kwargs = {"net_arch": [16]}
    make_model(use_actor_target=True, policy_kwargs=policy_kwargs).save(tmp_path / "model.zip")
    loaded = SoftSAC.load(tmp_path / "model.zip", device="cpu", policy_kwargs=policy_kwargs)
    assert loaded.actor_target is not None


def test_sb3s_buffer_on_request() -> None:
    model = make_model(replay_buffer_class=SB3ReplayBuffer)
    model.learn(40)
    assert type(model.replay_buffer) is SB3ReplayBuffer


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_her(n_envs: int, strategy: str, tmp_path: pathlib.Path) -> None:
    def make_env() -> gym.Env:
        return BitFlippingEnv(n_bits=4, continuous=True)

    env = DummyVecEnv([make_env for _ in range(n_envs)])
    model = SoftSAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": strategy, "copy_info_dict": True}, **SMALL
    )  # fmt: skip
    before = everything(model)
    model.learn(100)
    assert any(not th.equal(v, before[k]) for k, v in everything(model).items() if "critic.qf0" in k)
    model.save(tmp_path / "her.zip")
    model.save_replay_buffer(tmp_path / "her.pkl")
    loaded = SoftSAC.load(tmp_path / "her.zip", env=env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "her.pkl", truncate_last_traj=False)
    np.testing.assert_array_equal(loaded.replay_buffer.ep_length, model.replay_buffer.ep_length)
    loaded.learn(60, reset_num_timesteps=False)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("is_dict", [False, True])
def test_vec_normalize(n_envs: int, is_dict: bool) -> None:
    """The buffer holds what the environment gave; batches are normalised when they are sampled."""

    def make_env() -> gym.Env:
        if is_dict:
            return gym.wrappers.FilterObservation(SimpleMultiObsEnv(discrete_actions=False), ["vec"])
        return gym.make("Pendulum-v1")

    venv = VecNormalize(DummyVecEnv([make_env for _ in range(n_envs)]), norm_obs=True, norm_reward=True)
    model = SoftSAC("MultiInputPolicy" if is_dict else "MlpPolicy", venv, **SMALL)
    model.learn(230)
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer)
    if is_dict:
        buffer.seed(1)
        raw = buffer.sample(200).observations["vec"].numpy()
        buffer.seed(1)
        normalised = buffer.sample(200, env=venv).observations["vec"].numpy()
        assert raw.min() >= 0.0 and not np.allclose(raw, normalised)
        np.testing.assert_allclose(normalised, venv.normalize_obs({"vec": raw})["vec"], rtol=1e-5, atol=1e-6)
        return
    cosines_sines = buffer.observations[: buffer.size(), :, :2]
    np.testing.assert_allclose((cosines_sines**2).sum(axis=-1), 1.0, atol=1e-5)
    next_cosines_sines = np.asarray(buffer.next_observations[: buffer.size(), :, :2])
    np.testing.assert_allclose((next_cosines_sines**2).sum(axis=-1), 1.0, atol=1e-5)
    assert buffer.rewards[: buffer.size()].min() < -1.5
    batch = buffer.sample(200, env=venv)
    assert abs(batch.observations.mean()) < 0.5 and batch.rewards.min() > -1.5


@pytest.mark.parametrize("n_steps", [1, 3])
def test_vec_normalize_saves_and_loads(n_steps: int, tmp_path: pathlib.Path) -> None:
    venv = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    model = make_model(venv, n_steps=n_steps)
    model.learn(60)
    model.save(tmp_path / "model.zip")
    venv.save(str(tmp_path / "normalize.pkl"))
    new_venv = VecNormalize.load(str(tmp_path / "normalize.pkl"), make_vec_env("Pendulum-v1", n_envs=2))
    loaded = SoftSAC.load(tmp_path / "model.zip", env=new_venv, device="cpu")
    obs = venv.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(40, reset_num_timesteps=False)


def test_sb3_callbacks(tmp_path: pathlib.Path) -> None:
    callbacks = [
        EvalCallback(gym.make("Pendulum-v1"), eval_freq=30, n_eval_episodes=1, best_model_save_path=str(tmp_path)),
        CheckpointCallback(25, str(tmp_path), save_replay_buffer=True),
    ]
    with pytest.warns(UserWarning, match="not of the same type|wrapped with a ``Monitor``"):
        make_model().learn(60, callback=callbacks)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best_model.zip", "rl_model_50_steps.zip", "rl_model_replay_buffer_50_steps.pkl"} <= names


@pytest.mark.learning
def test_identity_env_is_solved() -> None:
    model = SoftSAC("MlpPolicy", IdentityEnvBox(eps=0.5), learning_starts=100, learning_rate=3e-3, seed=0,
                    policy_kwargs={"net_arch": [64]}, batch_size=64, buffer_size=2000, device="cpu")  # fmt: skip
    model.learn(1500)
    mean_return, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    assert mean_return > 90.0


# --- Idioms -----------------------------------------------------------------------------------------------------------


def test_pickles_can_be_trusted_by_the_environment(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's commands pass no flag."""
    SAC("MlpPolicy", "Pendulum-v1", **SMALL).learn(25).save(tmp_path / "sac.zip")
    monkeypatch.setenv("SB3_SOFTSAC_ALLOW_PICKLE", "0")
    with pytest.raises(CheckpointError, match=r"set SB3_SOFTSAC_ALLOW_PICKLE=1"):
        SoftSAC.load(tmp_path / "sac.zip")
    monkeypatch.setenv("SB3_SOFTSAC_ALLOW_PICKLE", "1")
    assert SoftSAC.load(tmp_path / "sac.zip").num_timesteps == 25


def test_deleted_replay_buffer(tmp_path: pathlib.Path) -> None:
    """SB3's tests delete it before they load it; whatever else is done then sees that there is none."""
    model = make_model()
    model.learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    kept = model.replay_buffer
    del model.replay_buffer
    with pytest.raises(AttributeError):
        _ = model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer")
    del model.replay_buffer
    model.save(tmp_path / "model")
    model.load_replay_buffer(tmp_path / "buffer")
    assert isinstance(model.replay_buffer, ReplayBuffer) and isinstance(kept, ReplayBuffer)
    np.testing.assert_array_equal(model.replay_buffer.observations, kept.observations)
    del model.replay_buffer
    model.learn(40, reset_num_timesteps=False)  # a new one
    assert model.replay_buffer.size() == 40


def test_whatever_has_a_default_can_be_excluded(tmp_path: pathlib.Path) -> None:
    small, usual = make_model(seed=None).learn(25), make_model(policy_kwargs={}, seed=None).learn(25)
    small.save(tmp_path / "whole")
    data, _, _ = load_from_zip_file(tmp_path / "whole.zip")
    assert data is not None
    names = sorted(data)
    required = {"policy_class", "observation_space", "action_space", "n_envs"}
    assert required < set(names) and len(names) > 50
    for name in names:
        model = usual if name == "policy_kwargs" else small  # its default is networks of the usual size
        model.save(tmp_path / "part", exclude=[name])
        if name in required:
            with pytest.raises(CheckpointError, match=rf"no {name}.*Pass {name}=\.\.\. to load"):
                SoftSAC.load(tmp_path / "part", env=model.env, device="cpu")
            loaded = SoftSAC.load(tmp_path / "part", env=model.env, device="cpu", **{name: getattr(model, name)})
        else:
            loaded = SoftSAC.load(tmp_path / "part", env=model.env, device="cpu")
            SoftSAC.load(tmp_path / "part", device="cpu")
        assert_same(everything(loaded), everything(model))
        loaded.learn(5)
    model = make_model(verbose=1)
    model.save(tmp_path / "part", exclude=["verbose", "policy_kwargs"])
    with pytest.raises(
        CheckpointError, match=r"The file has no policy_kwargs: pass policy_kwargs=\.\.\. to load"
    ):  # other networks than the default's
        SoftSAC.load(tmp_path / "part", device="cpu")
    loaded = SoftSAC.load(tmp_path / "part", device="cpu", policy_kwargs={"net_arch": [16]})
    assert loaded.verbose == 0 and loaded.policy.net_arch == [16]
    assert_same(everything(loaded), everything(model))


def test_without_its_last_observation_an_episode_does_not_go_on(tmp_path: pathlib.Path) -> None:
    model = make_model()
    model.learn(25)
    model.save(tmp_path / "model", exclude=["_last_obs"])
    with pytest.warns(UserWarning, match="new episode.*saved without _last_obs"):
        SoftSAC.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu", force_reset=False)


@pytest.mark.parametrize("verbose", [0, 1])
def test_her_waits_for_the_first_episode(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Where SB3 stops with an error."""
    env = BitFlippingEnv(n_bits=12, continuous=True, max_steps=30)
    her: dict[str, Any] = {"replay_buffer_class": HerReplayBuffer, "learning_starts": 5, "seed": 0}
    model = SoftSAC("MultiInputPolicy", env, device="cpu", batch_size=8, buffer_size=1000, verbose=verbose, **her)
    model.learn(50)
    assert model._n_updates == 50 - 29  # the first one at the end of the episode
    said = capsys.readouterr().out
    assert said.count("Updates are delayed: they are due before the end of the first episode") == verbose


class FlippingForPoints(BitFlippingEnv):
    """:param points: reward of each step"""

    def __init__(self, points: float):
        super().__init__(n_bits=4, continuous=True, max_steps=5)
        self.points = points

    def compute_reward(self, *args: Any) -> Any:
        return np.full_like(super().compute_reward(*args), self.points)


def test_her_asks_the_present_environment() -> None:
    """SB3's buffer would ask the first one, even if it was closed."""
    old, new = (DummyVecEnv([lambda points=points: FlippingForPoints(points)]) for points in (1.0, 2.0))
    model = SoftSAC("MultiInputPolicy", old, replay_buffer_class=HerReplayBuffer, **SMALL)
    model.learn(60)
    model.set_env(new)
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    assert set(model.replay_buffer.sample(100).rewards.unique().tolist()) == {1.0, 2.0}  # as it was, and relabelled
    model.learn(20, reset_num_timesteps=False)


def test_her_without_an_episode_has_learned_nothing() -> None:
    env = gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=12, continuous=True, max_steps=10**6), 10**6)
    her: dict[str, Any] = {"replay_buffer_class": HerReplayBuffer, "learning_starts": 5, "seed": 0}
    model = SoftSAC("MultiInputPolicy", env, device="cpu", batch_size=8, buffer_size=1000, **her)
    with pytest.warns(UserWarning, match="Nothing was learned: training ended before the end of the first episode"):
        model.learn(20)
    assert model._n_updates == 0 and model.num_timesteps == 20


@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(3, start=1), gym.spaces.MultiDiscrete([2, 3], start=[0, -1])], ids=type
)
@pytest.mark.parametrize("is_part", [False, True])
def test_discrete_values_that_do_not_start_at_0(space: Any, is_part: bool) -> None:
    class Numbers(gym.Env):
        observation_space = gym.spaces.Dict({"number": space}) if is_part else space
        action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    name = r"observation_space\['number'\]" if is_part else "observation_space"
    with pytest.raises(ValueError, match=rf"{name}=.*Discrete\(.* does not start at 0.*Shift them"):
        SoftSAC("MultiInputPolicy" if is_part else "MlpPolicy", Numbers())


def test_small_images() -> None:
    with pytest.raises(
        ValueError, match=r"observation_space is an image of 20 x 40 pixels.*36 x 36.*ResizeObs.*extrac"
    ):
        SoftSAC("CnnPolicy", FakeImageEnv(screen_height=20, screen_width=40, n_channels=1, discrete=False))
    env = SimpleMultiObsEnv(discrete_actions=False)
    env.observation_space["img"] = gym.spaces.Box(0, 255, (35, 64, 3), dtype=np.uint8)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"observation_space\['img'\] is an image of 35 x 64 pixels"):
        SoftSAC("MultiInputPolicy", env)
    least = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
    SoftSAC("CnnPolicy", least, buffer_size=10)
    # A network of one's own takes what it can
    small = FakeImageEnv(screen_height=20, screen_width=40, n_channels=1, discrete=False)
    SoftSAC("CnnPolicy", small, buffer_size=10, policy_kwargs={"features_extractor_class": FlattenExtractor})


class Counting(gym.Env):
    """All observations are alike, and rewards count the steps of the episode: 1, 2, 3, ..."""

    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_number = 0
        return 0, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        return 0, float(self.step_number), False, self.step_number >= 9, {}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["own", "n_steps"])
def test_no_return_goes_on_behind_a_reset(kind: str, seed: int, tmp_path: Path) -> None:
    """Whatever resets the environments, ends an episode in the replay buffer, even if no observation shows it."""
    rng = np.random.default_rng(seed)
    options = {**SMALL, "gamma": 1.0, "learning_starts": 1000, "buffer_size": 600}
    if kind == "own":
        options["n_steps"] = 3
    else:
        options |= {
            "replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 1.0}, "n_steps": 3
        }  # fmt: skip

    def make_env(n_envs: int) -> VecEnv:
        return DummyVecEnv([Counting] * n_envs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`n_steps=3` is ignored|.* was rearranged|.* were left out")
        model = SoftSAC("MlpPolicy", make_env(2), **options)
        for _ in range(10):
            what = rng.choice(["learn", "load", "environment", "resized", "dataset"])
            if what == "environment":
                model.set_env(make_env(model.n_envs))
            elif what in ("load", "resized"):
                model.save(tmp_path / "model")
                # With another number of environments, all transitions are dealt anew
                n_envs = int(rng.integers(1, 4)) if kind == "own" and what == "resized" else model.n_envs
                model = SoftSAC.load(tmp_path / "model", make_env(n_envs))
            elif what == "dataset" and isinstance(model.replay_buffer, ReplayBuffer):
                model.replay_buffer.add_dataset(deepcopy(model.replay_buffer))
            model.learn(int(rng.integers(1, 20)), reset_num_timesteps=bool(rng.integers(2)))
    buffer = model.replay_buffer
    assert buffer is not None and not buffer.full and buffer.size() > 10
    rewards = buffer.rewards[: buffer.size()]
    are_longest = []
    for env, row in np.ndindex(buffer.n_envs, buffer.size()):
        possible = [rewards[row, env]]
        for next_row in range(row + 1, min(row + 3, buffer.size())):
            if rewards[next_row, env] != rewards[next_row - 1, env] + 1.0:
                break
            possible.append(possible[-1] + rewards[next_row, env])
        place = mock.patch.object(np.random, "randint", lambda *_, env=env, **__: np.array([env]))
        own_place = mock.patch.object(buffer, "rng", mock.Mock(integers=lambda *_, env=env, **__: np.array([env])))
        with place if kind == "n_steps" else own_place:
            sample = buffer._get_samples(np.array([row]))
        assert sample.rewards.item() in possible, (row, env)
        are_longest.append(sample.rewards.item() == possible[-1])
    # Where transitions were dealt anew, the next one in a column may happen to fit
    assert np.mean(are_longest) > (0.9 if kind == "own" else 0.999)


def test_n_steps_of_sb3s_files(tmp_path: Path) -> None:
    """Also those of a buffer that the user has chosen, with its own gamma."""
    kwargs = {"n_steps": 5, "gamma": 0.9}
    theirs = SAC("MlpPolicy", "Pendulum-v1", replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=kwargs)
    theirs.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", "Pendulum-v1", allow_pickle=True)
    assert isinstance(loaded.replay_buffer, ReplayBuffer)
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma, loaded.gamma) == (5, 0.9, 0.99)


def test_replay_buffers_of_old_versions(tmp_path: Path) -> None:
    """SB3 before 2.1 did not know truncation: its load_replay_buffer completes them."""
    theirs = SAC("MlpPolicy", "Pendulum-v1", learning_starts=100, buffer_size=300).learn(210)
    del theirs.replay_buffer.timeouts, theirs.replay_buffer.handle_timeout_termination
    theirs.save_replay_buffer(tmp_path / "buffer")
    model = SoftSAC("MlpPolicy", "Pendulum-v1", **SMALL)
    model.load_replay_buffer(tmp_path / "buffer", allow_pickle=True)
    assert model.replay_buffer is not None and model.replay_buffer.size() == 210
    assert model.replay_buffer.dones.sum() == 1 and model.replay_buffer.timeouts.sum() == 0


def test_her_needs_room_for_episodes() -> None:
    env = gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=12, continuous=True, max_steps=10**6), 60)
    her: dict[str, Any] = {"replay_buffer_class": HerReplayBuffer, "learning_starts": 70, "seed": 0}
    model = SoftSAC("MultiInputPolicy", env, device="cpu", batch_size=8, buffer_size=100, **her)
    with pytest.raises(ValueError, match=r"buffer_size=100 holds no whole episode .* at least two episodes"):
        model.learn(600)


@pytest.mark.parametrize("kind", ["offline", "loaded"])
def test_time_limits_as_terminations(kind: str, tmp_path: Path) -> None:
    """handle_timeout_termination=False is an option of all transitions that are sampled."""
    as_terminations = {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
    options = {**SMALL, "policy_kwargs": {"net_arch": [8]}}
    model = SoftSAC("MlpPolicy", DummyVecEnv([Counting]), **options).learn(90)
    model.save(tmp_path / "model")
    if kind == "loaded":
        buffer = SoftSAC.load(tmp_path / "model", DummyVecEnv([Counting]), **as_terminations).replay_buffer
    else:
        source = {"offline_data": tmp_path / "model.zip", **as_terminations}
        buffer = SoftSAC("MlpPolicy", DummyVecEnv([Counting]), **options, **source).offline_data
    assert model.replay_buffer is not None and buffer is not None
    assert model.replay_buffer.sample(500).dones.sum() == 0
    assert 0.05 < buffer.sample(500).dones.mean() < 0.2
