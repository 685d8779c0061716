"""
Exported policies give the actions of ``predict()``, through VecNormalize where there is one.

All ``.onnx`` files are run by one process, which cannot import torch (``RUN_ALL``).
"""

import importlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from fsspec.implementations.memory import MemoryFileSystem
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)
from torch import nn
from twins import SMALL, NormExtractor

from sb3_softsac import CheckpointCallback, SoftSAC, checkpoint
from sb3_softsac.execution.runner import matmul_precision
from sb3_softsac.export import TOLERANCE, load_run, main, space_as_json
from sb3_softsac.networks import BatchNorm

onnxruntime = pytest.importorskip("onnxruntime")
for _name in ("onnx", "onnxscript"):
    pytest.importorskip(_name)

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 7)
ACTIONS = spaces.Box(np.float32([-3.0, 0.5]), np.float32([1.0, 7.0]))
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
FAR = spaces.Box(1e5 - 1.0, 1e5 + 1.0, (3,), np.float64)  # float32 would keep two digits behind the point
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
MIXED = spaces.Dict(
    {
        "bits": spaces.MultiBinary(4),
        "gears": spaces.MultiDiscrete([2, 3]),
        "image": IMAGE,
        "level": spaces.Discrete(3),
        "speed": spaces.Box(-1.0, 4.0, (2,), np.float32),
        "vector": VECTOR,
    }
)
RUN_ALL = f"""
import json, runpy, sys
from pathlib import Path
sys.modules["torch"] = None  # importing it raises
import numpy as np, onnxruntime
folder = Path(sys.argv[1])
for path in folder.glob("*.json"):
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = {{}}
    for batch, arrays in json.loads(path.read_text()).items():
        inputs = {{name: np.array(values, dtype) for name, (values, dtype) in arrays.items()}}
        outputs[batch] = {{n: o.tolist() for n, o in zip(names, session.run(names, inputs), strict=True)}}
    path.with_suffix(".out").write_text(json.dumps(outputs))
sys.argv[1:] = [str(folder / "agent.onnx"), "Pendulum-v1"]
runpy.run_path({str(ROOT / "examples" / "onnx_policy.py")!r}, run_name="__main__")
"""


class Spaces(gym.Env):
    """Random observations of a space, which fit VecNormalize's memory but not its clipping."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Box = ACTIONS):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 0.0, False, False, {}


def vec_env(observation_space: spaces.Space[Any], action_space: spaces.Box = ACTIONS) -> VecEnv:
    return DummyVecEnv([lambda: Spaces(observation_space, action_space)])


def normalized(venv: VecEnv, **kwargs: Any) -> VecNormalize:
    normalize = VecNormalize(venv, **kwargs)
    normalize.seed(0)
    normalize.reset()
    for _ in range(20):
        normalize.step(np.array([venv.action_space.sample()]))
    return normalize


class OddExtractor(NormExtractor):
    """Running means that are not 0 and 1, as after training."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)


class Case(NamedTuple):
    env: Callable[[], Any]
    policy: str = "MlpPolicy"
    model: dict[str, Any] = {}  # noqa: RUF012
    with_log_std: bool = False


TANH = {"log_std_bounding": "tanh", "log_std_bounds": (-5, 2), "separate_log_std_net": True}
BATCH_NORM = {"net_arch": [16, 16], "normalization": "batch", "normalize_input": True, "n_atoms": 11}
MATRIX = spaces.Box(-2.0, np.array([[1.0, 2.0], [3.0, 4.0]]), dtype=np.float64)
CASES = {
    "plain": Case(lambda: gym.make("Pendulum-v1")),
    "log_std": Case(lambda: vec_env(VECTOR), model={"policy_kwargs": TANH}, with_log_std=True),
    "matrix": Case(lambda: vec_env(spaces.Box(-1e38, 1e38, (2, 2), np.float32), MATRIX)),
    "gsde": Case(lambda: vec_env(VECTOR), model={"use_sde": True}),
    "normalized": Case(lambda: normalized(vec_env(FAR), clip_obs=1.5)),
    "rewards_only": Case(lambda: normalized(vec_env(spaces.Discrete(5)), norm_obs=False)),
    "several_discrete": Case(lambda: vec_env(spaces.MultiDiscrete([3, 2]))),
    "frame_stack": Case(lambda: normalized(VecFrameStack(vec_env(VECTOR), 3), clip_obs=1.0)),
    "extractor": Case(lambda: vec_env(VECTOR), model={"policy_kwargs": {"features_extractor_class": OddExtractor}}),
    "batch_norm": Case(lambda: vec_env(VECTOR), model={"policy_kwargs": BATCH_NORM}, with_log_std=True),
    "residual": Case(lambda: vec_env(VECTOR), model={"policy_kwargs": {**BATCH_NORM, "residual_expansion": 2}}),
    "image": Case(lambda: vec_env(IMAGE), "CnnPolicy"),
    "channels_first": Case(
        lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=2, channel_first=True, discrete=False),
        "CnnPolicy",
    ),
    "image_stack": Case(lambda: VecFrameStack(vec_env(IMAGE), 2), "CnnPolicy"),
    "mixed": Case(
        lambda: normalized(vec_env(MIXED), norm_obs_keys=["speed", "vector"], clip_obs=1.0), "MultiInputPolicy"
    ),
    # Names that torch gives to values of its own, and one of an output
    "names": Case(
        lambda: vec_env(spaces.Dict(dict.fromkeys(("linear", "low", "action", "relu"), VECTOR))), "MultiInputPolicy"
    ),
}


def make(case: Case) -> SoftSAC:
    model = SoftSAC(case.policy, case.env(), **{**SMALL, "policy_kwargs": {}, **case.model})
    for module in model.actor.modules():
        if isinstance(module, BatchNorm):  # as after training
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    with th.no_grad():  # actions all over their range
        for parameter in model.actor.mu.parameters():
            parameter.mul_(5.0)
    return model


def observations(venv: VecEnv, n: int) -> Any:
    """
    :return: batch of n observations, as the environment beneath VecNormalize and VecTransposeImage gives them
    """
    while type(venv) not in (DummyVecEnv, VecFrameStack):
        venv = venv.venv
    space = venv.observation_space
    space.seed(n)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack(samples)


def expected(model: SoftSAC, obs: Any) -> np.ndarray:
    normalize = model.get_vec_normalize_env()
    return model.predict(obs if normalize is None else normalize.normalize_obs(obs), deterministic=True)[0]


@pytest.mark.processes
def test_onnx_without_torch(tmp_path: Path) -> None:
    """All in one test, since one process runs them."""
    models = {name: make(case) for name, case in CASES.items()}
    for name, model in models.items():
        assert model.export(tmp_path / f"{name}.onnx", with_log_std=CASES[name].with_log_std) <= TOLERANCE
        inputs = {}
        for n in BATCHES:
            obs = observations(model.env, n)
            parts = obs if isinstance(obs, dict) else {"obs": obs}
            inputs[n] = {key: (part.tolist(), str(part.dtype)) for key, part in parts.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps(inputs))
    load_run(ROOT / "trained_agents" / "softsac" / "Pendulum-v1_1")[0].export(tmp_path / "agent.onnx")
    result = subprocess.run([sys.executable, "-c", RUN_ALL, tmp_path], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    returns = re.findall(r"return (-?[0-9.]+)", result.stdout)
    assert len(returns) == 3 and min(map(float, returns)) > -400.0, result.stdout
    for name, model in models.items():
        outputs = json.loads((tmp_path / f"{name}.out").read_text())
        check(name, model, {int(n): {key: np.array(array) for key, array in of.items()} for n, of in outputs.items()})


def check(name: str, model: SoftSAC, outputs: dict[int, dict[str, np.ndarray]]) -> None:
    """
    :param name: of the case
    :param model: the model that was exported
    :param outputs: of its file, by batch size and name
    """
    action = "action_output" if name == "names" else "action"
    unit = model.action_space.high - model.action_space.low
    for n, of in outputs.items():
        obs = observations(model.env, n)
        want = expected(model, obs)
        assert list(of) == ([action, "mean", "log_std"] if CASES[name].with_log_std else [action])
        assert of[action].shape == want.shape == (n, *model.action_space.shape)
        np.testing.assert_allclose(of[action] / unit, want / unit, rtol=0, atol=TOLERANCE, err_msg=name)
        assert n == 1 or np.ptp(want / unit, axis=0).max() > 1e-3, f"{name}: the actions are all the same"
        if CASES[name].with_log_std:
            with th.no_grad():
                mean, log_std, _ = model.actor.get_action_dist_params(th.as_tensor(obs))
            np.testing.assert_allclose(of["mean"], mean.numpy(), rtol=TOLERANCE, atol=TOLERANCE)
            np.testing.assert_allclose(of["log_std"], log_std.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["log_std", "mixed"])
def test_torch_export(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "policy.pt2"
    model = make(case)
    assert model.export(path, with_log_std=case.with_log_std) <= TOLERANCE
    metadata = {"observation_space": "", "num_timesteps": ""}
    policy = th.export.load(path, extra_files=metadata).module()
    assert json.loads(metadata["observation_space"])["type"] == ("Dict" if name == "mixed" else "Box")
    assert metadata["num_timesteps"] == "0"
    for n in BATCHES:
        obs = observations(model.env, n)
        tensors = {key: th.as_tensor(part) for key, part in obs.items()} if name == "mixed" else th.as_tensor(obs)
        action, *others = policy(tensors)
        assert len(others) == (2 if case.with_log_std else 0)
        np.testing.assert_allclose(action.numpy(), expected(model, obs), atol=TOLERANCE)


BOTH = spaces.Dict({"image": IMAGE, "vector": VECTOR})
RAW: dict[str, Any] = {"policy_kwargs": {"normalize_images": False}}
ABOVE = {
    "normalized": Case(lambda: normalized(VecTransposeImage(vec_env(IMAGE))), "CnnPolicy", RAW),
    "normalized_dict": Case(lambda: normalized(VecTransposeImage(vec_env(BOTH))), "MultiInputPolicy", RAW),
    "image_of_dict": Case(lambda: VecExtractDictObs(VecTransposeImage(vec_env(BOTH)), "image"), "CnnPolicy"),
    "vector_of_dict": Case(lambda: VecExtractDictObs(VecTransposeImage(vec_env(BOTH)), "vector")),
}


@pytest.mark.parametrize("channels_last", [None, False])
@pytest.mark.parametrize("with_env", [True, False])
@pytest.mark.parametrize("name", ABOVE)
def test_layers_above_transposed_images(name: str, with_env: bool, channels_last: bool | None, tmp_path: Path) -> None:
    """Their observations may be no images any more."""
    model = make(ABOVE[name])
    space = model.observation_space
    obs = observations(DummyVecEnv([lambda: Spaces(space)]), 7)  # as the policy would see them without normalisation
    parts = obs if isinstance(obs, dict) else {"obs": obs}
    want = expected(model, obs)
    if not with_env:
        model.save(tmp_path / "model.zip")
        model = SoftSAC.load(tmp_path / "model.zip", device="cpu")
    model.export(tmp_path / "policy.pt2", channels_last=channels_last)
    if channels_last is None:
        parts = {key: part.transpose(0, 2, 3, 1) if part.ndim == 4 else part for key, part in parts.items()}
    tensors = {key: th.as_tensor(part) for key, part in parts.items()}
    (action,) = th.export.load(tmp_path / "policy.pt2").module()(tensors if isinstance(obs, dict) else tensors["obs"])
    np.testing.assert_allclose(action.numpy(), want, atol=TOLERANCE)


def test_metadata(tmp_path: Path) -> None:
    model = make(CASES["plain"])
    model.learn(30)
    model.export(tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["num_timesteps"] == "30" and metadata["sb3_softsac_version"]
    assert json.loads(metadata["action_space"]) == {
        "type": "Box", "shape": [1], "dtype": "float32", "low": -2.0, "high": 2.0
    }  # fmt: skip
    (obs,), (action,) = session.get_inputs(), session.get_outputs()
    assert (obs.name, obs.shape, obs.type) == ("obs", ["batch", 3], "tensor(float)")
    assert (action.name, action.shape, action.type) == ("action", ["batch", 1], "tensor(float)")
    assert str(Path(__file__).parents[1]).encode() not in (tmp_path / "policy.onnx").read_bytes()


def test_spaces_as_json() -> None:
    tree = space_as_json(MIXED)["spaces"]
    assert tree["level"] == {"type": "Discrete", "shape": [], "dtype": "int64", "n": 3, "start": 0}
    assert tree["gears"]["nvec"] == [2, 3] and tree["bits"]["n"] == 4
    assert tree["vector"]["low"] is None and tree["image"]["high"] == 255.0
    half = space_as_json(spaces.Box(np.float32([0, -np.inf]), np.float32([1, 2])))
    assert half["low"] == [0.0, None] and half["high"] == [1.0, 2.0]


def test_low_precision_of_products_is_not_a_difference(tmp_path: Path) -> None:
    model = make(CASES["plain"])
    with matmul_precision("medium"):  # bfloat16, on processors that have it
        assert model.export(tmp_path / "policy.onnx") <= TOLERANCE
        assert th.get_float32_matmul_precision() == "medium"


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    states = []
    for exports in (True, False):
        model = make(CASES["plain"])
        model.learn(25)
        if exports:
            model.export(tmp_path / "policy.onnx")
        model.learn(5, reset_num_timesteps=False)
        states.append(model.policy.state_dict())
    th.testing.assert_close(*states, rtol=0, atol=0)


# --- what is not possible ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "options", "message"),
    [
        ("plain", "policy.pth", {}, r"path='policy.pth' has the suffix '.pth': use .onnx or .pt2"),
        ("plain", "policy", {}, r"path='policy' has the suffix ''"),
        ("gsde", "p.onnx", {"with_log_std": True}, "with_log_std=True is not possible with use_sde=True"),
        ("plain", "p.onnx", {"channels_last": True}, "channels_last=True needs images"),
        ("plain", "p.onnx", {"vec_normalize": "frame_stack"}, r"statistics of shape \(9,\) for 'obs'.* reads \(3,\)"),
    ],
)
def test_arguments_that_are_not_valid(
    name: str, path: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "vec_normalize" in options:
        options = {"vec_normalize": CASES[options["vec_normalize"]].env()}
    with pytest.raises(ValueError, match=message):
        make(CASES[name]).export(path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_without_onnx(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'sb3-softsac\[export\]'"):
        make(CASES["plain"]).export(tmp_path / "policy.onnx")


def test_without_onnxruntime_torch_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert make(CASES["plain"]).export(tmp_path / "policy.onnx") <= TOLERANCE


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_that_cannot_be_written(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"taken{suffix}").mkdir()
    (tmp_path / "file").write_text("")
    model = make(CASES["plain"])
    for path in (tmp_path / f"taken{suffix}", tmp_path / "file" / f"policy{suffix}"):
        with pytest.raises(OSError):
            model.export(path)
    assert {path.name for path in tmp_path.iterdir()} == {f"taken{suffix}", "file"}


class NoisyExtractor(NormExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) + th.randn_like(observations)


class BranchingExtractor(NormExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations if observations.sum() > 0 else -observations)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [(NoisyExtractor, "differ from predict"), (BranchingExtractor, "must not branch on the values of tensors")],
)
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_stays_if_the_policy_cannot_be_exported(
    extractor: type[NormExtractor], message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"policy{suffix}"
    path.write_text("as it was")
    model = SoftSAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"features_extractor_class": extractor}, **SMALL)
    with pytest.raises(ValueError, match=message):
        model.export(path)
    assert path.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 1


# --- runs -------------------------------------------------------------------------------------------------------------


def export_by_command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    return main()


@pytest.fixture(scope="module")
def trained() -> SoftSAC:
    model = make(Case(lambda: normalized(vec_env(MIXED), norm_obs_keys=["vector"], clip_obs=1.0), "MultiInputPolicy"))
    model.learn(22)
    return model


@pytest.mark.parametrize("kind", ["file", "checkpoints", "best", "last", "killed", "here", "checkpoints here"])
def test_command_reads_runs(
    kind: str, trained: SoftSAC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "Env-v0_1"
    (run / "Env-v0").mkdir(parents=True)
    path = run
    if kind == "file":
        path = tmp_path / "model.zip"
        trained.save(path)
    elif kind in ("best", "last", "here"):
        trained.save(run / ("Env-v0.zip" if kind == "last" else "best_model.zip"))
        (run / "rl_model_20_steps.zip").write_text("not that")
    else:
        path = run if kind == "killed" else tmp_path / "run"
        folder = run / "checkpoints" if kind == "killed" else path
        callback = CheckpointCallback(1, folder)
        callback.init_callback(trained)
        callback.save()
    if "here" in kind:
        monkeypatch.chdir(path)
        path = Path(".")
    out = tmp_path / "out" / "policy.pt2"
    assert export_by_command(monkeypatch, path, "-o", out) == 0
    printed = capsys.readouterr().out
    assert "Largest difference from predict()" in printed and "Input image: uint8, B, 36, 40, 3" in printed
    policy, obs = th.export.load(out).module(), observations(trained.env, 7)
    (action,) = policy({key: th.as_tensor(part) for key, part in obs.items()})
    np.testing.assert_allclose(action.numpy(), expected(trained, obs), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["", "/best_model", "/best_model.zip"])
def test_command_reads_and_writes_object_storage(
    name: str, trained: SoftSAC, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("upath")
    try:
        trained.save("memory://bucket/Env-v0_1/best_model.zip")
        arguments = f"memory://bucket/Env-v0_1{name}", "-o", "memory://bucket/policy.pt2", "--no-channels-last"
        assert export_by_command(monkeypatch, *arguments) == 0
        assert "/bucket/policy.pt2" in MemoryFileSystem.store
        assert "Input image: uint8, B, 3, 36, 40" in capsys.readouterr().out
    finally:
        MemoryFileSystem.store.clear()


def test_statistics_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SB3's SAC and the zoo leave it: a zip without statistics, and a pickle."""
    normalize = CASES["normalized"].env()
    model = SAC("MlpPolicy", normalize, buffer_size=10, device="cpu")
    (tmp_path / "Env-v0").mkdir()
    normalize.save(tmp_path / "Env-v0" / "vecnormalize.pkl")
    model.save(tmp_path / "Env-v0.zip")
    out = tmp_path / "policy.pt2"
    assert export_by_command(monkeypatch, tmp_path, "-o", out) == 1 and not out.exists()
    assert "or --allow-pickle if you trust the file" in capsys.readouterr().err
    assert export_by_command(monkeypatch, tmp_path, "-o", out, "--allow-pickle") == 0
    obs = observations(normalize, 7)
    (action,) = th.export.load(out).module()(th.as_tensor(obs))
    want, _ = model.predict(normalize.normalize_obs(obs), deterministic=True)
    np.testing.assert_allclose(action.numpy(), want, atol=TOLERANCE)

    (tmp_path / "Env-v0" / "config.yml").write_text("")  # as in each folder of the zoo
    assert export_by_command(monkeypatch, tmp_path / "Env-v0.zip", "-o", out, "--allow-pickle") == 0
    (same,) = th.export.load(out).module()(th.as_tensor(obs))
    np.testing.assert_allclose(same.numpy(), want, atol=TOLERANCE)

    (tmp_path / "Env-v0.zip").unlink()
    make(CASES["plain"]).save(tmp_path / "Env-v0.zip")
    with pytest.raises(ValueError, match=r"vecnormalize.pkl is a pickle.*allow_pickle=True"):
        load_run(tmp_path)
    (tmp_path / "Env-v0" / "vecnormalize.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(ValueError, match="is not a VecNormalize, but a list"):
        load_run(tmp_path, allow_pickle=True)


def test_light_file(tmp_path: Path, trained: SoftSAC) -> None:
    """It has the statistics, and says how images are given."""
    trained.save(tmp_path / "model.zip")
    checkpoint.export(tmp_path / "model.zip", tmp_path / "light.zip")
    model = SoftSAC.load(tmp_path / "light.zip", device="cpu")
    obs = observations(trained.env, 7)
    for channels_last in (None, False):
        model.export(tmp_path / "policy.pt2", channels_last=channels_last)
        image = obs["image"] if channels_last is None else obs["image"].transpose(0, 3, 1, 2)
        tensors = {key: th.as_tensor(part) for key, part in {**obs, "image": image}.items()}
        (action,) = th.export.load(tmp_path / "policy.pt2").module()(tensors)
        np.testing.assert_allclose(action.numpy(), expected(trained, obs), atol=TOLERANCE)


def test_light_file_keeps_parameters_frozen(tmp_path: Path) -> None:
    model = make(CASES["plain"])
    frozen = next(model.actor.latent_pi.parameters())
    frozen.requires_grad_(False)
    model.save(tmp_path / "model.zip")
    checkpoint.export(tmp_path / "model.zip", tmp_path / "light.zip")
    loaded = SoftSAC.load(tmp_path / "light.zip", device="cpu")
    assert [parameter.requires_grad for parameter in loaded.actor.latent_pi.parameters()][:2] == [False, True]


def test_light_file_does_not_replace_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(CASES["plain"]).save(tmp_path / "policy.zip")
    before = (tmp_path / "policy.zip").read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"policy.zip is the file to export from: choose another output"):
        checkpoint.export(tmp_path / "policy.zip", Path("policy.zip"))
    assert (tmp_path / "policy.zip").read_bytes() == before


def test_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "has no checkpoints"), (tmp_path / "nothing.zip", "No such file")):
        assert export_by_command(monkeypatch, path) == 1
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree")
def test_documents_show_the_recorded_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    benchmark, record = importlib.import_module("export"), importlib.import_module("record")
    table = benchmark.table_of(json.loads(benchmark.RUN.read_text())["results"])
    text = (ROOT / "docs" / "guide" / "export.md").read_text()
    assert record.filled(text, {"export": table}) == text and table in text
