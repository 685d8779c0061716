"""
Policies for use without SB3: an ``.onnx`` or ``.pt2`` file that takes observations of the environment and returns its
actions.

``python -m sb3_softsac.export PATH -o policy.onnx`` does the same for a run's file or folder. Everything between the
environment and the network is in the graph: moving an image's channels first, VecNormalize's statistics and clipping,
SB3's preprocessing, and the step from tanh to the units of the action space.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage
from torch import nn

import sb3_softsac
from sb3_softsac.buffers import Obs, map_obs
from sb3_softsac.execution.runner import matmul_precision
from sb3_softsac.persistence import atomic_files
from sb3_softsac.persistence.archive import CheckpointError
from sb3_softsac.persistence.envs.object_state import chain_of
from sb3_softsac.persistence.model_file import new_file
from sb3_softsac.persistence.run_folder import RunFolder
from sb3_softsac.policies import Actor
from sb3_softsac.softsac import SoftSAC
from sb3_softsac.type_aliases import TorchObs

SUFFIXES = (".onnx", ".pt2")
INPUT = "obs"  # of an observation that is not a Dict
OUTPUTS = ("action", "mean", "log_std")
TOLERANCE = 1e-5  # of the range of an action
MAX_SAMPLES, MAX_NUMBERS = 256, 1_000_000  # observations of the check, and numbers in them
INSTALL = "pip install 'sb3-softsac[export]'"

Run = Callable[[Obs], list[np.ndarray]]


class PolicyInput(nn.Module):
    """
    Turns one observation, or one key of a Dict, into the policy's input, as the VecEnv wrappers do.

    :param is_channels_last: images are given as (B, height, width, channels)
    :param statistics: VecNormalize's for this observation, channels first; None: it is not normalised
    :param epsilon: VecNormalize's
    :param clip: VecNormalize's ``clip_obs``
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, is_channels_last: bool, statistics: RunningMeanStd | None, epsilon: float, clip: float):
        super().__init__()
        self.is_channels_last = is_channels_last
        self.is_normalized = statistics is not None
        self.clip = clip
        if statistics is not None:
            # In float64, as in VecNormalize: a mean may be thousands of standard deviations
            self.register_buffer("mean", th.as_tensor(statistics.mean, dtype=th.float64))
            self.register_buffer("std", th.as_tensor(np.sqrt(statistics.var + epsilon), dtype=th.float64))

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: (B, ...), as the environment gives it
        :return: (B, ...), as the policy reads it
        """
        if self.is_channels_last:
            obs = obs.permute(0, 3, 1, 2)
        if self.is_normalized:
            obs = ((obs - self.mean) / self.std).clamp(-self.clip, self.clip).float()
        return obs


class ExportedPolicy(nn.Module):
    """
    The graph of a file: from the environment's observations to its actions.

    :param actor: computes scaled actions
    :param inputs: by key of a Dict observation; ``{"obs": ...}`` for any other
    :param action_space: the environment's
    :param with_log_std: also return mean and log_std
    """

    low: th.Tensor
    high: th.Tensor
    range: th.Tensor

    def __init__(
        self, actor: Actor, inputs: Mapping[str, PolicyInput], action_space: spaces.Box, with_log_std: bool = False
    ):
        super().__init__()
        self.actor = actor
        self.keys = list(inputs)
        self.inputs = nn.ModuleList(inputs.values())
        self.with_log_std = with_log_std
        self.register_buffer("low", th.as_tensor(action_space.low))
        self.register_buffer("high", th.as_tensor(action_space.high))
        self.register_buffer("range", th.as_tensor(action_space.high - action_space.low))

    def forward(self, obs: TorchObs) -> tuple[th.Tensor, ...]:
        """
        :param obs: batch of observations
        :return: deterministic actions (B, ...), shaped as the action space; and, ``with_log_std``, mean and log_std
            (B, A) of the Gaussian before tanh
        """
        if isinstance(obs, dict):
            obs = {key: part(obs[key]) for key, part in zip(self.keys, self.inputs, strict=True)}
        else:
            obs = self.inputs[0](obs)
        scaled = self.actor(obs, deterministic=True).reshape(-1, *self.low.shape)
        # Rounding may go beyond the upper bound, see SoftSACPolicy.unscale_action
        outputs: tuple[th.Tensor, ...] = (th.minimum(self.low + 0.5 * (scaled + 1.0) * self.range, self.high),)
        if self.with_log_std:
            outputs += self.actor.get_action_dist_params(obs)[:2]
        return tuple(output.detach() for output in outputs)  # so that .numpy() works on those of a .pt2


def export(
    model: SoftSAC,
    path: str | Path,
    *,
    with_log_std: bool = False,
    vec_normalize: VecNormalize | None = None,
    channels_last: bool | None = None,
    verbose: int | None = None,
) -> float:
    """
    Write the policy to a file that needs neither SB3 nor this package, after comparing it with ``model.predict()``.

    The inputs are a batch of the environment's observations, with the dtype of their space: one array ``obs`` (B, ...),
    or one for each key of a Dict. VecNormalize, if there is one, is in the file. The first output, ``action``, is what
    the environment takes, (B, ...), shaped as the action space. An output whose name is also a key gets a suffix:
    ``action_output``.

    :param model: the model, which is not changed
    :param path: file to write, ``.onnx`` or ``.pt2`` (``torch.export.load(path).module()`` takes observations)
    :param with_log_std: further outputs ``mean`` and ``log_std``, (B, A), of the Gaussian before tanh: a stochastic
        policy takes ``tanh(mean + exp(log_std) * noise)``, rescaled from [-1, 1] to the action space
    :param vec_normalize: the VecNormalize whose statistics to use; None: those of the model's environment, or of the
        file that it was loaded from without an environment
    :param channels_last: images are given as (height, width, channels); None: as the model's environment gives them.
        The policy itself has the channels first
    :param verbose: 1: print what was written, and the largest difference; None: the model's ``verbose``
    :return: largest difference from ``predict()`` over random observations, in units of the action range
    :raises ValueError: if an argument is invalid, the policy cannot be exported, or the difference is above 1e-5; an
        existing file is then left alone
    :raises ImportError: if ``onnx`` or ``onnxscript`` is not installed
    :raises OSError: if the file cannot be written
    """
    path = atomic_files.as_path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path={str(path)!r} has the suffix {path.suffix!r}: use {' or '.join(SUFFIXES)}.")
    if path.is_dir():  # new_file() would add .zip
        raise IsADirectoryError(f"path={str(path)!r} is a folder: choose another name.")
    if with_log_std and model.use_sde:
        raise ValueError(
            "with_log_std=True is not possible with use_sde=True, whose noise depends on the latent features: leave it "
            "out."
        )
    is_onnx = path.suffix == ".onnx"
    if is_onnx:
        _require_onnx()
    normalize = _vec_normalize(model) if vec_normalize is None else vec_normalize
    wrapping = _Wrapping(model.observation_space, normalize, _channels_last(model, channels_last))
    assert isinstance(model.action_space, spaces.Box)
    model.policy.set_training_mode(False)
    policy = ExportedPolicy(model.actor, wrapping.inputs(), model.action_space, with_log_std).to(model.device).eval()

    observations = wrapping.sample(np.random.default_rng(0))
    program = _program(policy, _first(observations, 2), model.device)
    metadata = _metadata(model, wrapping)
    data = _onnx_file(program, observations, metadata, policy) if is_onnx else _pt2_file(program, metadata)
    run = _onnx_run(data) if is_onnx and find_spec("onnxruntime") else _torch_run(program if is_onnx else data)
    error = _largest_difference(run, _expected(model, wrapping, with_log_std), observations, model.action_space)
    if not error <= TOLERANCE:
        raise ValueError(
            f"{path} was not written: its actions would differ from predict() by {error:.1e} of the action range, but "
            f"only {TOLERANCE:g} is allowed. Make sure that the network computes the same for any batch size and draws "
            "no random numbers in evaluation mode."
        )
    with new_file(path) as file:
        file.write(data)
    if (model.verbose if verbose is None else verbose) >= 1:
        print(f"Wrote {path} ({len(data):,} bytes)")
        for name, part in wrapping.parts.items():
            print(f"Input {name}: {part.dtype}, {', '.join(map(str, ('B', *(part.shape or ()))))}")
        print(f"Largest difference from predict(): {error:.1e} of the action range")
    return error


# --- between the environment and the policy ---------------------------------------------------------------------------


class _Wrapping:
    """
    What the VecEnv wrappers do to observations.

    :param policy_space: what the policy reads
    :param normalize: VecNormalize, if there is one that normalises observations
    :param images: keys of what the environment gives as (height, width, channels)
    """

    def __init__(self, policy_space: spaces.Space[Any], normalize: VecNormalize | None, images: list[str]):
        self.normalize = normalize if normalize is not None and normalize.norm_obs else None
        self.is_dict = isinstance(policy_space, spaces.Dict)
        self.images = images
        self.policy_parts = _parts(policy_space)
        self.parts = {
            key: _with_channels_last(part) if key in self.images else part for key, part in self.policy_parts.items()
        }
        self.statistics: dict[str, RunningMeanStd] = {}
        if self.normalize is not None:
            obs_rms: Any = self.normalize.obs_rms
            self.statistics = dict(obs_rms) if isinstance(obs_rms, dict) else {INPUT: obs_rms}
        for key, statistics in self.statistics.items():
            there, here = statistics.mean.shape, getattr(self.policy_parts.get(key), "shape", None)
            if there != here:
                raise ValueError(
                    f"vec_normalize={self.normalize} has statistics of shape {there} for {key!r}, but the policy "
                    f"reads {here}: pass the VecNormalize that the model was trained with."
                )

    @property
    def space(self) -> spaces.Space[Any]:
        """Space of the observations that go in."""
        return spaces.Dict(self.parts) if self.is_dict else self.parts[INPUT]

    def inputs(self) -> dict[str, PolicyInput]:
        """The same as a graph."""
        epsilon, clip = (self.normalize.epsilon, self.normalize.clip_obs) if self.normalize is not None else (0.0, 0.0)
        return {key: PolicyInput(key in self.images, self.statistics.get(key), epsilon, clip) for key in self.parts}

    def __call__(self, obs: Obs) -> Obs:
        """
        :param obs: batch of observations, as the environment gives them
        :return: what ``predict()`` takes
        """
        if isinstance(obs, dict):
            images = {key: VecTransposeImage.transpose_image(obs[key]) for key in self.images}
            obs = {**obs, **images}
        elif self.images:
            obs = VecTransposeImage.transpose_image(obs)
        return obs if self.normalize is None else self.normalize.normalize_obs(obs)

    def sample(self, rng: np.random.Generator) -> Obs:
        """
        :param rng: random numbers
        :return: batch of random observations, as the environment gives them
        """
        size = sum(int(np.prod(part.shape or ())) for part in self.parts.values())
        n = max(2, min(MAX_SAMPLES, MAX_NUMBERS // size))
        samples = {key: _sample(part, self.statistics.get(key), n, rng) for key, part in self.policy_parts.items()}
        samples = {key: np.moveaxis(part, 1, -1) if key in self.images else part for key, part in samples.items()}
        return samples if self.is_dict else samples[INPUT]


def _with_channels_last(space: spaces.Space[Any]) -> spaces.Box:
    assert isinstance(space, spaces.Box)
    low, high = np.moveaxis(space.low, 0, -1), np.moveaxis(space.high, 0, -1)
    return spaces.Box(low, high, dtype=space.dtype)


def _sample(
    space: spaces.Space[Any], statistics: RunningMeanStd | None, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Observations (n, ...): if they are normalised, spread beyond the clipping; else all over the space."""
    if not isinstance(space, spaces.Box):
        batch = batch_space(copy.deepcopy(space), n)
        batch.seed(int(rng.integers(2**31)))
        return np.asarray(batch.sample())
    shape = (n, *space.shape)
    if np.issubdtype(space.dtype, np.integer):  # Gymnasium's sample() rounds large bounds
        return rng.integers(space.low, space.high, size=shape, dtype=space.dtype, endpoint=True)
    normal = rng.standard_normal(shape)
    if statistics is not None:
        scales = np.exp(rng.uniform(-3.0, 3.0, (n, *[1] * len(space.shape))))
        return (statistics.mean + np.sqrt(statistics.var) * scales * normal).astype(space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        is_small = high - low < 1e6
        uniform = low + rng.uniform(size=shape) * (high - low)
    return np.where(is_small, uniform, np.clip(normal, low, high)).astype(space.dtype)


def _vec_normalize(model: SoftSAC) -> VecNormalize | None:
    if model.env is not None:
        return model.get_vec_normalize_env()
    return None if model._unread is None else model._unread.vec_normalize(model.observation_space)


def _parts(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {INPUT: space}


def _channels_last(model: SoftSAC, asked: bool | None) -> list[str]:
    """Keys of the images that go in with their channels last."""
    parts = _parts(model.observation_space)
    # VecNormalize makes float32 of images, and takes away their bounds
    solid = [key for key, part in parts.items() if is_image_space(part, normalized_image=True)]
    images = [key for key in solid if is_image_space(parts[key])] or solid
    if asked and not images:
        raise ValueError(
            f"channels_last=True needs images, but the policy reads {model.observation_space}: leave it out."
        )
    if asked is None and model.env is not None:
        layers = [x for x in chain_of(model.env) if isinstance(x, VecTransposeImage) and not x.skip]
        is_dict = isinstance(model.observation_space, spaces.Dict)
        return [key for layer in layers for key in (layer.image_space_keys if is_dict else images)]
    is_last = asked if asked is not None else model._unread is not None and model._unread.is_transposed
    return images if is_last else []


# --- the files --------------------------------------------------------------------------------------------------------


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"An .onnx file needs {' and '.join(missing)}: {INSTALL}. A .pt2 file needs nothing else.", name=missing[0]
        )


def _program(policy: ExportedPolicy, example: Obs, device: th.device) -> Any:
    """The graph, with any batch size, on the CPU, without the paths of source files."""
    batch = {0: th.export.Dim("batch")}
    shapes = dict.fromkeys(example, batch) if isinstance(example, dict) else batch
    with _explained("torch.export"), th.no_grad():
        program = th.export.export(policy, (_tensors(example, device),), dynamic_shapes=(shapes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    if device.type != "cpu":
        program = importlib.import_module("torch.export.passes").move_to_device_pass(program, "cpu")
    return program


def _onnx_file(program: Any, example: Obs, metadata: dict[str, str], policy: ExportedPolicy) -> bytes:
    batch = {0: "batch"}
    shapes = dict.fromkeys(example, batch) if isinstance(example, dict) else batch
    with _explained("torch.onnx"), _quiet():
        exported: Any = th.onnx.export(
            program, (), dynamo=True, external_data=False, dynamic_shapes=(shapes,), verbose=False
        )
    graph = exported.model.graph
    inputs = policy.keys
    outputs = [f"{name}_output" if name in inputs else name for name in OUTPUTS[: len(graph.outputs)]]
    # torch does not make sure that names are unique if it is given some
    inner = [value for node in graph for value in node.outputs] + list(graph.initializers.values())
    for value in inner:
        if value.name in (*inputs, *outputs):
            value.name = f"inner/{value.name}"
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    for node in graph:
        node.metadata_props.clear()  # what torch notes for the search for errors is as large as a small network
    exported.model.metadata_props.update(metadata)
    return exported.model_proto.SerializeToString()


def _pt2_file(program: Any, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with _quiet():
        th.export.save(program, file, extra_files=metadata)
    return file.getvalue()


@contextlib.contextmanager
def _explained(exporter: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch has many
        reason = error.__cause__ or error
        first_line = str(reason).strip().partition("\n")[0]
        raise ValueError(
            f"{exporter} cannot express this policy ({type(reason).__name__}: {first_line}). "
            "Your own networks must not branch on the values of tensors or depend on the batch size."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's messages about its internals, and about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _metadata(model: SoftSAC, wrapping: _Wrapping) -> dict[str, str]:
    return {
        "observation_space": json.dumps(space_as_json(wrapping.space)),
        "action_space": json.dumps(space_as_json(model.action_space)),
        "sb3_softsac_version": sb3_softsac.__version__,
        "num_timesteps": str(model.num_timesteps),
    }


def space_as_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """
    :param space: ``Box``, ``Discrete``, ``MultiDiscrete``, ``MultiBinary``, or a ``Dict`` of them
    :return: a dict for JSON: ``type``, and ``spaces`` of a Dict, or else ``shape``, ``dtype`` and the space's
        attributes; bounds that are all equal are one number, and infinite ones null
    """
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: space_as_json(part) for key, part in space.spaces.items()}}
    result = {"type": type(space).__name__, "shape": list(space.shape or ()), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Box):
        return {**result, "low": _bounds_as_json(space.low), "high": _bounds_as_json(space.high)}
    names = ("n", "nvec", "start")
    return {**result, **{name: np.asarray(getattr(space, name)).tolist() for name in names if hasattr(space, name)}}


def _bounds_as_json(bounds: np.ndarray) -> Any:
    if bounds.size and (bounds == bounds.flat[0]).all():
        return float(bounds.flat[0]) if np.isfinite(bounds.flat[0]) else None
    with_null: Any = bounds.astype(object)
    with_null[~np.isfinite(bounds)] = None
    return with_null.tolist()


# --- the check --------------------------------------------------------------------------------------------------------


def _expected(model: SoftSAC, wrapping: _Wrapping, with_log_std: bool) -> Run:
    def run(obs: Obs) -> list[np.ndarray]:
        obs = wrapping(obs)
        outputs = [model.predict(obs, deterministic=True)[0]]
        if with_log_std:
            with th.no_grad():
                mean, log_std, _ = model.actor.get_action_dist_params(model.policy.obs_to_tensor(obs)[0])
            outputs += [mean.cpu().numpy(), log_std.cpu().numpy()]
        return outputs

    return run


def _onnx_run(data: bytes) -> Run:
    session = importlib.import_module("onnxruntime").InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(obs: Obs) -> list[np.ndarray]:
        return session.run(None, obs if isinstance(obs, dict) else {INPUT: obs})

    return run


def _torch_run(program: Any) -> Run:
    """:param program: a program of torch.export, or the bytes of its file"""
    if isinstance(program, bytes):
        with _quiet():
            program = th.export.load(io.BytesIO(program))
    module = program.module()

    def run(obs: Obs) -> list[np.ndarray]:
        with th.no_grad():
            return [output.numpy() for output in module(_tensors(obs, th.device("cpu")))]

    return run


def _largest_difference(run: Run, expected: Run, observations: Obs, action_space: spaces.Box) -> float:
    """Of actions relative to their range, of other outputs relative to their magnitude where it is above 1."""
    differences = []
    for obs in (observations, _first(observations, 1)):
        with matmul_precision("highest"), th.backends.cudnn.flags(enabled=True, allow_tf32=False):
            wanted = expected(obs)
        for i, (here, there) in enumerate(zip(run(obs), wanted, strict=True)):
            unit = action_space.high - action_space.low if i == 0 else np.maximum(1.0, np.abs(there))
            differences.append(np.max(np.abs(here - there) / unit))
    return float(np.max(differences))  # nan if one is


def _first(obs: Obs, n: int) -> Obs:
    return map_obs(lambda part: part[:n], obs)


def _tensors(obs: Obs, device: th.device) -> TorchObs:
    return map_obs(lambda part: th.as_tensor(part, device=device), obs)


# --- the command line -------------------------------------------------------------------------------------------------


def load_run(path: str | Path, allow_pickle: bool = False) -> tuple[SoftSAC, VecNormalize | None]:
    """
    Load the model of a run, without its environment.

    :param path: model file, checkpoint folder, or the RL Zoo's folder of a run: its best model, else its last one, else
        its newest checkpoint
    :param allow_pickle: unpickle files of SB3 and the zoo's ``vecnormalize.pkl``, which can run any code
    :return: the model; and the zoo's VecNormalize, if the model file has no statistics
    :raises CheckpointError: (a ValueError) if a file is damaged, or needs ``allow_pickle=True``
    :raises FileNotFoundError: if there is no model
    """
    path = atomic_files.as_path(path)
    path = path if path.name else path.resolve()  # Path(".") has no name
    is_model = not path.is_dir() or RunFolder(path).numbers() or path.with_name(f"{path.name}.zip").exists()
    model_path, pickled = (path, _statistics_beside(path)) if is_model else _of_zoo(path)
    model = SoftSAC.load(model_path, device="cpu", allow_pickle=allow_pickle)
    assert model._unread is not None
    if pickled is None or model._unread.statistics is not None:
        return model, None
    if not allow_pickle:
        raise CheckpointError(
            f"{model_path} has no statistics of VecNormalize, and {pickled} is a pickle, which can run any code: if "
            "you trust it, pass allow_pickle=True."
        )
    with atomic_files.open_file(pickled) as file:
        normalize = pickle.load(file)
    if not isinstance(normalize, VecNormalize):
        raise CheckpointError(f"{pickled} is not a VecNormalize, but a {type(normalize).__name__}.")
    return model, normalize


def _of_zoo(folder: Path) -> tuple[Path, Path | None]:
    """Model and ``vecnormalize.pkl`` in a folder of the zoo: <env>_1/best_model.zip, <env>.zip and <env>/."""
    last = [path for path in sorted(folder.glob("*.zip")) if path.with_suffix("").is_dir()]
    candidates = [folder / "best_model.zip", *last, folder / "checkpoints"]
    found = [path for path in candidates if path.exists()]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no checkpoints, nor a best_model.zip or <env>.zip of the RL Zoo: pass the model file itself."
        )
    pickles = sorted(folder.glob("*/vecnormalize.pkl"))
    return found[0], pickles[0] if pickles else None


def _statistics_beside(path: Path) -> Path | None:
    """``<env>/vecnormalize.pkl`` beside a file of the zoo, which also writes ``<env>/config.yml``."""
    pickles = sorted(path.parent.glob("*/vecnormalize.pkl"))
    return next((pickle for pickle in pickles if pickle.with_name("config.yml").exists()), None)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sb3_softsac.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("path", metavar="PATH", help="model file, checkpoint folder or the zoo's run folder")
    parser.add_argument("-o", "--output", default="policy.onnx", help="file to write (.onnx or .pt2)")
    parser.add_argument("--with-log-std", action="store_true", help="also return mean and log_std, before tanh")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="images are given as (height, width, channels), or as (channels, height, width)",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="unpickle what SB3 wrote, which can run any code")
    args = parser.parse_args()
    try:
        model, normalize = load_run(args.path, args.allow_pickle)
        export(
            model,
            args.output,
            with_log_std=args.with_log_std,
            vec_normalize=normalize,
            channels_last=args.channels_last,
            verbose=1,
        )
    except (ImportError, OSError, ValueError) as error:
        print("error:", str(error).replace("allow_pickle=True", "--allow-pickle"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
