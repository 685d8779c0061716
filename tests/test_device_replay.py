"""Minibatches that are gathered from a copy of the replay buffer: the same as from the buffer itself."""

import copy
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_buffer_state import SPACES, Feed, steps
from test_buffers import ACTION_SPACE
from test_cuda_graph import assert_equal_tensors, graphs, needs_gpu, tensors, train
from torch.utils import _pytree as pytree

from sb3_softsac import CheckpointCallback, SoftSAC, softsac
from sb3_softsac.buffers import ReplayBuffer, map_obs, rows_of
from sb3_softsac.execution import device_replay
from sb3_softsac.execution.cuda_graph import CudaGraph
from sb3_softsac.execution.device_replay import DeviceReplay, StoredBatch, gathered

__all__ = ["graphs"]  # a fixture
CPU = th.device("cpu")


@pytest.fixture
def cpu_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made on the CPU as on a GPU."""
    monkeypatch.setattr(device_replay, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(device_replay, "fits", lambda *args: True)


def assert_same_batch(replay: DeviceReplay, batch_size: int = 20) -> None:
    buffer = replay.buffer
    other = copy.deepcopy(buffer.rng)
    storage = replay.update()
    batch = gathered(replay.sample(batch_size), storage)
    after, buffer.rng = copy.deepcopy(buffer.rng), other
    expected = buffer.sample(batch_size)
    assert buffer.rng.bit_generator.state == after.bit_generator.state, "as many random numbers are drawn"
    assert type(batch) is type(expected)
    for name, part, wanted in zip(expected._fields, batch, expected, strict=True):
        if wanted is None:
            assert part is None
            continue
        assert part is not None
        one, two = ({"": x} if isinstance(x, th.Tensor) else x for x in (part, wanted))
        for key in two:
            assert one[key].dtype == two[key].dtype and th.equal(one[key], two[key]), (name, key)


@pytest.mark.parametrize("kind", list(SPACES))
@given(data=st.data(), n_envs=st.integers(1, 3), capacity=st.integers(1, 12), n_steps=st.integers(1, 4))
def test_batches_equal_the_buffers(kind: str, data: st.DataObject, n_envs: int, capacity: int, n_steps: int) -> None:
    space = SPACES[kind]
    buffer = ReplayBuffer(capacity * n_envs, space, ACTION_SPACE, "cpu", n_envs, n_steps=n_steps, gamma=0.9)
    feed = Feed(n_envs, space)
    replay = DeviceReplay(buffer, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_replay, "PIECE", data.draw(st.sampled_from([1, 200, device_replay.PIECE]), "PIECE"))
        for _ in range(data.draw(st.integers(1, 4), "rounds")):
            for events in data.draw(steps(n_envs, 20), "rows"):
                feed.add([buffer], events)
            change = data.draw(st.sampled_from(["nothing", "nothing", "in place", "reset", "state"]), "change")
            if change == "in place":
                buffer.actions += 1.0
                buffer.rewards += 1.0
                buffer.mark_changed()
            elif change == "reset":
                buffer.reset()
            elif change == "state":
                buffer.set_state(buffer.get_state())
            if buffer.size():
                assert_same_batch(replay)


def test_only_what_is_new_is_copied() -> None:
    buffer, feed = ReplayBuffer(50, SPACES["box"], ACTION_SPACE, "cpu"), Feed(1)
    replay = DeviceReplay(buffer, CPU)
    for _ in range(30):
        feed.add([buffer], ["go on"])
    replay.update()
    for stored in replay.storage:
        stored.fill_(-1.0)
    replay.update()
    assert all(stored.eq(-1.0).all() for stored in replay.storage)
    feed.add([buffer], ["go on"])
    replay.update()
    # The newest row of before too: only now it is known where its next observation is
    written = [(stored != -1.0).flatten(1).any(1).nonzero().flatten().tolist() for stored in replay.storage]
    assert written == [[29, 30]] * 3


def test_rows_that_were_there_before() -> None:
    """Demonstrations that a user has written to the arrays, past ``add``."""
    buffer, feed = ReplayBuffer(50, SPACES["box"], ACTION_SPACE, "cpu", 2), Feed(2)
    filled = ReplayBuffer(50, SPACES["box"], ACTION_SPACE, "cpu", 2)
    for _ in range(20):
        feed.add([filled], ["go on", "terminated"])
    for name in ("observations", "actions", "rewards", "dones"):
        getattr(buffer, name)[:20] = getattr(filled, name)[:20]
    buffer.pos = 20
    assert buffer.n_added == 0
    replay = DeviceReplay(buffer, CPU)
    assert_same_batch(replay)
    feed.add([buffer], ["go on", "go on"])
    assert_same_batch(replay)


def test_observations_without_numbers() -> None:
    space = gym.spaces.Dict({"none": gym.spaces.Box(0, 1, (0,)), "some": gym.spaces.Box(0, 1, (2,))})
    for key in ("some", "none"):
        buffer = ReplayBuffer(20, gym.spaces.Dict({key: space[key]}), ACTION_SPACE, "cpu")
        obs = {key: np.ones((1, *space[key].shape))}
        for _ in range(5):
            buffer.add(obs, obs, np.zeros((1, 2)), np.ones(1), np.zeros(1), [{}])
        assert_same_batch(DeviceReplay(buffer, CPU))


def test_minibatches_of_several_updates_are_slices_of_one() -> None:
    buffer, feed = ReplayBuffer(50, SPACES["dict"], ACTION_SPACE, "cpu", 2, n_steps=3), Feed(2, SPACES["dict"])
    replay = DeviceReplay(buffer, CPU)
    for row in range(20):
        feed.add([buffer], ["terminated" if row % 6 == 5 else "go on", "go on"])
    storage = replay.update()
    drawn = replay.sample(12)
    assert isinstance(drawn, StoredBatch)
    whole, part = gathered(drawn, storage), gathered(rows_of(drawn, slice(4, 8)), storage)
    for one, all_ in zip(part, whole, strict=True):
        map_obs(lambda a, b: np.testing.assert_array_equal(a, b[4:8]), one, all_)


# Models


class Steps(gym.Env):
    """Observations that count, Dict or not; episodes of two lengths, one of them ended by a time limit."""

    def __init__(self, is_dict: bool = False):
        box = gym.spaces.Box(-np.inf, np.inf, (3,))
        image = gym.spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
        self.is_dict = is_dict
        self.observation_space = gym.spaces.Dict({"vector": box, "image": image}) if is_dict else box
        self.action_space = gym.spaces.Box(-2.0, 2.0, (2,))
        self.n = self.episodes = 0

    def observe(self) -> Any:
        vector = np.array([self.n, self.n % 7, self.episodes], dtype=np.float32) / 10
        image = np.full((1, 36, 36), self.n % 256, dtype=np.uint8)
        return {"vector": vector, "image": image} if self.is_dict else vector

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.n, self.episodes = 0, self.episodes + 1
        return self.observe(), {}

    def step(self, action: np.ndarray) -> Any:
        self.n += 1
        length = 9 if self.episodes % 2 else 14
        return self.observe(), float(action.sum()), self.n == length == 9, self.n == length == 14, {}


def learned(total_timesteps: int, norm_reward: bool = False, **kwargs: Any) -> SoftSAC:
    model = make(**kwargs)
    if norm_reward:
        model.set_env(VecNormalize(model.env, norm_obs=False))
    return model.learn(total_timesteps).learn(30, reset_num_timesteps=False)


def make(is_dict: bool = False, n_envs: int = 1, device: str = "cpu", **kwargs: Any) -> SoftSAC:
    env = DummyVecEnv([lambda: Steps(is_dict)] * n_envs)
    options: dict[str, Any] = {"learning_starts": 20, "buffer_size": 70, "batch_size": 8, "seed": 0}
    # A zero gradient's rounding must not become a whole step of Adam
    policy_kwargs: dict[str, Any] = {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-3}}
    if is_dict:
        policy_kwargs["features_extractor_kwargs"] = {"cnn_output_dim": 8}
    options |= {"policy_kwargs": policy_kwargs, **kwargs}
    model = SoftSAC("MultiInputPolicy" if is_dict else "MlpPolicy", env, device=device, **options)
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "wrap": {"n_envs": 3, "train_freq": 2, "gradient_steps": 3},
    "dict": {"is_dict": True, "n_envs": 2},
    "n-step": {"n_steps": 3, "gradient_steps": 2, "train_freq": 2},
    "rewards": {"n_envs": 2, "norm_reward": True},
}


@pytest.mark.usefixtures("cpu_is_of_use")
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case: str) -> None:
    models = [learned(120, **CASES[case], compile=False, buffer_on_device=on_device) for on_device in (False, True)]
    assert models[0]._device_replay is None and isinstance(models[1]._device_replay, DeviceReplay)
    assert_equal_tensors(*models, atol=0.0)
    assert models[0].replay_buffer.rng.bit_generator.state == models[1].replay_buffer.rng.bit_generator.state


@pytest.mark.usefixtures("cpu_is_of_use")
@pytest.mark.parametrize("case", ["one", "n-step"])
def test_graphs_gather(graphs: list[CudaGraph], case: str) -> None:
    """The copy changes between replays, and a graph sees it, where it is."""
    models = [learned(120, **CASES[case], compile=compile, buffer_on_device=True) for compile in (False, True)]
    assert_equal_tensors(*models, atol=3e-5)
    assert [graph.n_captures for graph in graphs] == [1]
    # Neither storage nor observations are copied: rows, numbers, noise twice, whether all was finite
    numbers = (8, 3 if "n_steps" in CASES[case] else 2)
    assert [tuple(place.shape) for place in graphs[0]._inputs if place is not None] == [
        (8, 2),
        numbers,
        (8, 2),
        (8, 2),
        (),
    ]
    # Another copy is somewhere else
    for model in models:
        model.replay_buffer = copy.deepcopy(model.replay_buffer)
        model.set_random_seed(1)
        model.learn(10, reset_num_timesteps=False)
    assert_equal_tensors(*models, atol=3e-5)
    assert [graph.n_captures for graph in graphs] == [2]


@pytest.mark.usefixtures("cpu_is_of_use")
def test_continues_from_a_checkpoint(tmp_path: Path) -> None:
    whole = make(compile=False, buffer_on_device=True).learn(100)
    model = make(compile=False, buffer_on_device=True)
    model.learn(60, callback=CheckpointCallback(save_freq=50, save_path=tmp_path))
    env = DummyVecEnv([Steps])
    again = SoftSAC.load(tmp_path, env, force_reset=False)
    assert again.buffer_on_device is True and again._device_replay is None
    again.learn(100 - again.num_timesteps)
    assert isinstance(again._device_replay, DeviceReplay)
    assert_equal_tensors(whole, again, atol=0.0)


@pytest.mark.usefixtures("cpu_is_of_use")
def test_copies_and_files_hold_no_copy(tmp_path: Path) -> None:
    model = make(compile=False, buffer_on_device=True).learn(30)
    assert copy.deepcopy(model)._device_replay is None
    model.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", DummyVecEnv([Steps]))
    assert loaded._device_replay is None
    buffer = model.replay_buffer
    assert len(pickle.dumps(buffer)) < 2 * buffer.nbytes + 10_000


@pytest.mark.usefixtures("cpu_is_of_use")
def test_buffer_that_was_exchanged_is_sampled_itself() -> None:
    """Until the next ``learn()``, which copies it."""
    other = make(seed=1).learn(40)
    model, expected = (make(compile=False, buffer_on_device=on_device).learn(40) for on_device in (True, False))
    for each in (model, expected):
        each.replay_buffer = copy.deepcopy(other.replay_buffer)
        train(each, 3)
    assert_equal_tensors(expected, model, atol=0.0)
    model.learn(1, reset_num_timesteps=False)
    assert model._device_replay is not None and model._device_replay.buffer is model.replay_buffer


@pytest.mark.usefixtures("cpu_is_of_use")
@pytest.mark.parametrize("change", ["set_env", "norm_obs", "sample", "in place"])
def test_what_changes_how_batches_are_drawn(change: str) -> None:
    def normalised(model: SoftSAC, norm_obs: bool) -> None:
        env = VecNormalize(DummyVecEnv([Steps]))
        env.obs_rms.mean[:], env.norm_obs = 0.5, norm_obs
        model.set_env(env, force_reset=False)

    models = []
    for on_device in (False, True):
        model = make(compile=False, buffer_on_device=on_device)
        if change == "norm_obs":
            normalised(model, False)
        model.learn(40)
        if change == "set_env":
            normalised(model, True)
        elif change == "norm_obs":
            model.get_vec_normalize_env().norm_obs = True
        elif change == "sample":
            draw = model.replay_buffer.sample
            model.replay_buffer.sample = lambda n, env=None, draw=draw: draw(n, env)._replace(rewards=th.ones(n, 1))
        else:
            model.replay_buffer.observations += 1.0
            model.replay_buffer.mark_changed()
        before = [tensor.clone() for tensor in tensors(model)]
        train(model, 3)
        assert (model._device_replay is not None) == (on_device and change == "in place")
        assert any(not th.equal(old, new) for old, new in zip(before, tensors(model), strict=True))
        models.append(model)
    assert_equal_tensors(*models, atol=0.0)


class OwnSamples(ReplayBuffer):
    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_samples(*args, **kwargs)


@pytest.mark.usefixtures("cpu_is_of_use")
def test_where_there_can_be_no_copy() -> None:
    small: dict[str, Any] = {"learning_starts": 10, "buffer_size": 70}

    def her(**kwargs: Any) -> SoftSAC:
        env = BitFlippingEnv(n_bits=3, continuous=True)
        return SoftSAC("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **small, **kwargs)

    def normalised(**kwargs: Any) -> SoftSAC:
        return SoftSAC("MlpPolicy", VecNormalize(DummyVecEnv([Steps])), **small, **kwargs)

    def own(**kwargs: Any) -> SoftSAC:
        return make(replay_buffer_class=OwnSamples, **kwargs)

    for make_, reason in (
        (her, "HerReplayBuffer is not"),
        (normalised, "norm_obs=True"),
        (own, "OwnSamples is not"),
    ):
        with pytest.raises(ValueError, match=f"buffer_on_device=True is not possible: .*{reason}"):
            make_(buffer_on_device=True).learn(1)
        model = make_(buffer_on_device="auto").learn(30)
        assert model._n_updates > 0 and model._device_replay is None


@pytest.mark.usefixtures("cpu_is_of_use")
def test_refusal_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    whole = make(compile=False).learn(60)
    make(compile=False).learn(30).save(tmp_path / "model")
    model = SoftSAC.load(tmp_path / "model", DummyVecEnv([Steps]), force_reset=False)
    model.buffer_on_device, model.replay_buffer.__class__ = True, OwnSamples
    with pytest.raises(ValueError, match="buffer_on_device=True is not possible"):
        model.learn(30)
    model.buffer_on_device = False
    th.rand(1)
    model.learn(30)  # from the random states of the file
    assert_equal_tensors(whole, model, atol=0.0)


def test_has_no_effect_without_a_gpu() -> None:
    """So that a model that was trained with one can be loaded."""
    assert make(compile=False, buffer_on_device=True).learn(30)._device_replay is None


@pytest.mark.usefixtures("cpu_is_of_use")
def test_no_copy_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*args: Any) -> None:
        raise th.OutOfMemoryError("CUDA out of memory")

    for fits, make_copy in ((False, DeviceReplay), (True, full)):
        monkeypatch.setattr(device_replay, "fits", lambda *args, fits=fits: fits)
        monkeypatch.setattr(softsac, "DeviceReplay", make_copy)
        model = make(compile=False, verbose=1).learn(30)
        assert model._device_replay is None and model._n_updates > 0
        assert "replay buffer is too large for a copy on cpu (buffer_on_device)" in capsys.readouterr().out
    with pytest.raises(th.OutOfMemoryError):
        make(compile=False, buffer_on_device=True).learn(30)


@pytest.mark.parametrize("value", ["yes", 2, 1, None])
def test_values_that_are_not_valid(value: Any) -> None:
    with pytest.raises(ValueError, match=f"buffer_on_device={value!r} is not valid: it must be True, False or 'auto'"):
        make(buffer_on_device=value)


def test_memory_that_a_copy_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(1000, SPACES["dict"], ACTION_SPACE, "cpu", 2)
    size = sum(tensor.nbytes for tensor in pytree.tree_leaves(DeviceReplay(buffer, CPU).storage))
    unused = 1000  # of what torch has taken
    monkeypatch.setattr(th.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(th.cuda, "memory_allocated", lambda device: 5000 - unused)
    for free, fits in ((2 * size - unused, True), (2 * size - unused - 1, False), (0, False)):
        monkeypatch.setattr(th.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert device_replay.fits(buffer, th.device("cuda")) == fits


# With a GPU


@needs_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compile", [False, True])
def test_gpu_training_is_the_same(case: str, compile: bool) -> None:
    options = {**CASES[case], "device": "cuda", "compile": compile}
    models = [learned(120, **options, buffer_on_device=on_device) for on_device in (False, "auto")]
    assert models[0]._device_replay is None and isinstance(models[1]._device_replay, DeviceReplay)
    assert_equal_tensors(*models, atol=1e-3 if case == "dict" else 1e-5)  # gradients of convolutions vary
    for model in models:  # another copy, elsewhere
        model.replay_buffer = copy.deepcopy(model.replay_buffer)
        model.set_random_seed(1)
        model.learn(10, reset_num_timesteps=False)
    assert_equal_tensors(*models, atol=1e-3 if case == "dict" else 1e-5)
