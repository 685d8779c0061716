"""
Model files: the state of a whole run, in one archive.

SB3's members keep their names, so its ``set_parameters`` can read the networks and optimisers. ``data`` holds the
attributes of the model, encoded by ``codec`` instead of pickled. ``softsac.json`` (random states, environments,
callbacks, layout of the replay buffer) and ``replay/<first row>/<array>.npy`` are new.
"""

import base64
import io
import os
import platform
import re
import sys
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import cloudpickle
import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, recursive_getattr
from stable_baselines3.common.utils import get_system_info

from sb3_softsac.buffers import ReplayBuffer
from sb3_softsac.persistence import atomic_files, buffer_state
from sb3_softsac.persistence.archive import DAMAGE, ArchiveReader, ArchiveWriter, CheckpointError, naming
from sb3_softsac.persistence.codec import KIND, NotEncodable, decode, encode
from sb3_softsac.persistence.run_folder import Checkpoint, RunFolder, checkpoint_of

PICKLED = ":serialized:"  # SB3's key
ACTOR_TARGET = "actor_target."  # prefix of its parameters: it is never trained, and may be made or dropped at load()
TRUSTS_PICKLES = "SB3_SOFTSAC_ALLOW_PICKLE"
"""Environment variable: with the value 1, as if ``allow_pickle=True`` were passed everywhere."""


def write_data(archive: ArchiveWriter, attributes: dict[str, Any]) -> None:
    """
    Write SB3's member ``data``.

    :param archive: archive to write to
    :param attributes: attributes of the model, by name
    :raises TypeError: naming an attribute that cannot even be pickled
    """
    trees, pickled = {}, []
    for name, value in attributes.items():
        try:
            trees[name] = encode(value, name)
        except NotEncodable as error:
            pickled.append(str(error))
            try:
                text = base64.b64encode(cloudpickle.dumps(value)).decode()
            except Exception as reason:  # pickling can raise anything
                raise TypeError(f"{error}, nor with pickle: {reason}. Pass exclude=[{name!r}] to save().") from reason
            trees[name] = {":type:": str(type(value)), PICKLED: text}
    if pickled:
        warnings.warn(
            f"Written with pickle: {'; '.join(pickled)}. To load the file, pass a substitute in "
            "custom_objects={...}, or allow_pickle=True if you trust it.",
            stacklevel=3,
        )
    archive.add_json("data", trees)


def plain_infos(infos: "deque[Any] | None", name: str) -> "deque[Any] | None":
    """
    Leave out the ``info_keywords`` of a ``Monitor`` whose values are not plain data.

    :param infos: SB3's ``ep_info_buffer`` (a dict for each episode) or ``ep_success_buffer``
    :param name: name of the buffer
    :return: a copy with plain data only, or ``infos`` itself if that has nothing else
    """
    if infos is None or _is_plain(list(infos)):
        return infos
    kept = [{k: v for k, v in info.items() if _is_plain(v)} if isinstance(info, dict) else info for info in infos]
    lost = {key for info, rest in zip(infos, kept, strict=True) if isinstance(info, dict) for key in info.keys() - rest}
    if lost:
        text = f"{', '.join(sorted(lost))} of {name} (Monitor's info_keywords) is not plain data and is not saved."
        warnings.warn(text, stacklevel=4)
    return deque(kept, maxlen=infos.maxlen)


def _is_plain(value: Any) -> bool:
    try:
        encode(value)
        return True
    except NotEncodable:
        return False


def read_data(
    archive: ArchiveReader, custom_objects: dict[str, Any] | None, given: dict[str, Any], allow_pickle: bool
) -> dict[str, Any]:
    """
    Read SB3's member ``data``.

    :param archive: archive to read from
    :param custom_objects: values that replace those in the file, by name
    :param given: values that replace pickled ones, by name
    :param allow_pickle: unpickle all other pickled values
    :return: attributes of the model, by name
    :raises CheckpointError: if ``allow_pickle`` is False and a pickled value has no replacement
    """
    trees = archive.json("data")
    if not isinstance(trees, dict):
        raise CheckpointError(f"data in {archive.name} does not belong to a model.")
    if archive.index is None and any(isinstance(tree, dict) and KIND in tree for tree in trees.values()):
        raise CheckpointError(f"{archive.name} is damaged: SoftSAC wrote it, but its index is missing.")
    pickled = [name for name, tree in trees.items() if isinstance(tree, dict) and PICKLED in tree]
    custom_objects = {name: given[name] for name in pickled if name in given} | (custom_objects or {})
    refused = [] if allow_pickle or pickles_are_trusted() else [name for name in pickled if name not in custom_objects]
    if refused:
        substitutes = ", ".join(f"{name!r}: ..." for name in refused)
        raise CheckpointError(
            f"{archive.name} holds pickled objects ({', '.join(refused)}), and unpickling can run any code. Pass "
            f"substitutes, custom_objects={{{substitutes}}}, or allow_pickle=True if you trust the file (with the RL "
            f"Zoo: set {TRUSTS_PICKLES}=1)."
        )
    data = {}
    for name, tree in trees.items():
        if name in custom_objects:
            data[name] = custom_objects[name]
        elif name in pickled:
            try:
                data[name] = cloudpickle.loads(base64.b64decode(tree[PICKLED]))
            except Exception as error:  # unpickling can raise anything
                raise CheckpointError(
                    f"{name} in {archive.name} cannot be unpickled ({type(error).__name__}: {error}): pass "
                    f"custom_objects={{{name!r}: ...}}."
                ) from error
        else:
            with naming(f"{name} in {archive.name}"):
                data[name] = decode(tree)
    return data


def pickles_are_trusted() -> bool:
    """Whether the user has said so for all commands of the shell, such as the RL Zoo's, which cannot be told."""
    return os.environ.get(TRUSTS_PICKLES) == "1"


def write_parameters(archive: ArchiveWriter, model: BaseAlgorithm) -> None:
    """
    Write SB3's ``.pth`` members, its version and its system information.

    :param archive: archive to write to
    :param model: the model
    """
    names = model._get_torch_save_params()[1]
    variables = {name: recursive_getattr(model, name) for name in names}
    for name, state in {"pytorch_variables": variables, **model.get_parameters()}.items():
        data = io.BytesIO()  # on a full disk, th.save would not raise an OSError
        th.save(state, data)
        with archive.member(f"{name}.pth") as stream:
            stream.write(data.getbuffer())
    with archive.member("_stable_baselines3_version") as stream:
        stream.write(stable_baselines3.__version__.encode())
    with archive.member("system_info.txt") as stream:
        stream.write(_system_info().encode())


@cache
def _system_info() -> str:
    return get_system_info(print_info=False)[1]


def read_parameters(archive: ArchiveReader, model: BaseAlgorithm, left_out: set[str]) -> None:
    """
    Read SB3's ``.pth`` members into a model.

    :param archive: archive to read from
    :param model: model with the same networks and optimisers
    :param left_out: names of those that the model keeps as they are, whether they are in the file or not
    :raises CheckpointError: if the parameters of the file and the model differ
    """
    names, variable_names = model._get_torch_save_params()
    found = {name.removesuffix(".pth") for name in archive.sizes if name.endswith(".pth")} - {"pytorch_variables"}
    if (found ^ set(names)) - left_out:
        raise CheckpointError(
            f"{archive.name} has the parameters {sorted(found)}, but {sorted(names)} are needed: was it saved with a "
            "different ent_coef, or by another algorithm?"
        )
    wanted = (set(names) & found) - left_out
    parameters = {name: archive.torch(f"{name}.pth", model.device) for name in names if name in wanted}
    with naming(f"the parameters in {archive.name}"):
        model.set_parameters(parameters, exact_match=parameters.keys() == set(names), device=model.device)
        if "pytorch_variables.pth" not in archive:
            return
        for name, value in archive.torch("pytorch_variables.pth", model.device).items():
            if value is not None and name in set(variable_names) - left_out:
                variable = recursive_getattr(model, name)
                if variable.shape != value.shape:
                    raise CheckpointError(f"{name} in {archive.name} has the shape {tuple(value.shape)}.")
                variable.data = value.data


def _trainable(model: Any) -> dict[str, th.Tensor]:
    """Parameters of the policy, but not of the actor target, and the logarithm of a learned entropy coefficient."""
    learned = {} if model.log_ent_coef is None else {"log_ent_coef": model.log_ent_coef}
    of_policy = {n: p for n, p in model.policy.named_parameters() if not n.startswith(ACTOR_TARGET)}
    return of_policy | learned


def frozen_parameters(model: Any) -> list[str]:
    """
    :param model: ``SoftSAC``
    :return: names of what is not trained, which state dicts do not hold
    """
    return [name for name, tensor in _trainable(model).items() if not tensor.requires_grad]


def freeze(model: Any, names: list[str] | None, what: str) -> None:
    """
    Freeze what was frozen in a saved model.

    :param model: ``SoftSAC``
    :param names: result of :func:`frozen_parameters`; None: not in the file
    :param what: name of the file
    :raises CheckpointError: if the policy lacks one of them
    """
    if names is None:
        return
    added = sorted(set(frozen_parameters(model)) - set(names))
    if added:  # by the constructor of a network, so on purpose
        warnings.warn(
            f"The continuation may differ: {', '.join(added)} is frozen here, but was trained in {what}.", stacklevel=4
        )
    parameters = _trainable(model)
    for name in names:
        if name.startswith(ACTOR_TARGET):  # in older files
            continue
        if name not in parameters:
            raise CheckpointError(f"{what} has a frozen parameter {name}, which the policy lacks.")
        parameters[name].requires_grad_(False)


class ModelFile:
    """
    The source of ``load``: a model file, or a checkpoint of a run folder.

    :param archive: the model file
    :param run: the checkpoint of a run folder that it is part of, if any
    """

    def __init__(self, archive: ArchiveReader, run: Checkpoint | None = None):
        self.archive = archive
        self.run = run
        self.index = archive.index or {}
        self.name = archive.name

    @property
    def replay(self) -> dict[str, Any] | None:
        """
        Entry of the replay buffer in the index: ``description``, ``state`` and ``segments``, see ``buffer_state``; None
        if its rows are not in the file.
        """
        replay = self.index.get("replay")
        return None if replay is None or (replay["segments"] is None and self.run is None) else replay

    def read_buffer(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> ReplayBuffer:
        """
        :param observation_space: of the model
        :param action_space: of the model
        :return: the replay buffer of the file, or one of ours with the transitions of SB3's, HER's included
        :raises CheckpointError: if there is none, or if it is of a user's class
        """
        if self.replay is None:
            raise CheckpointError(f"{self.name} has no replay buffer.")
        with naming(f"the replay buffer in {self.name}"):
            buffer = buffer_state.empty_like(self.replay["description"], observation_space, action_space)
        self.restore_replay(buffer)
        if isinstance(buffer, ReplayBuffer):
            return buffer
        own = ReplayBuffer(buffer.buffer_size * buffer.n_envs, observation_space, action_space, "cpu", buffer.n_envs)
        own.copy_transitions(buffer)
        return own

    def restore_replay(self, buffer: SB3ReplayBuffer) -> None:
        """
        Fill an empty replay buffer from the file.

        :param buffer: the replay buffer
        :raises CheckpointError: if it does not fit
        """
        if self.replay is None:
            raise CheckpointError(f"{self.name} has no replay buffer.")
        with naming(f"the replay buffer in {self.name}"):
            buffer_state.restore(buffer, self.replay, self._parts(self.replay), self.name)

    def _parts(self, replay: dict[str, Any]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        if self.run is not None:
            yield from self.run.folder.read_segments(self.run.manifest, replay)
            return
        for first, last in replay["segments"]:
            yield first, buffer_state.read_rows(self.archive, replay["description"], (first, last), f"replay/{first}/")


@contextmanager
def open_model_file(path: str | Path | BinaryIO) -> Iterator[ModelFile]:
    """
    Open and verify a model file.

    :param path: model file (``.zip`` may be left out), file object, or folder of a run's checkpoints
    :return: the file; of a folder, its newest valid checkpoint
    :raises CheckpointError: if it is damaged
    :raises FileNotFoundError: if it does not exist
    """
    name, run = "the file object", None
    source: AbstractContextManager[BinaryIO]
    if atomic_files.is_path(path):
        found, run, source = _open(atomic_files.as_path(path))
        name = str(found)
    else:
        source = nullcontext(path)
    with source as file:
        try:
            archive = ArchiveReader(file, name)
            archive.verify()
            yield ModelFile(archive, run)
        except ValueError:  # its message names the setting
            raise
        except (*DAMAGE, AssertionError) as error:  # impossible settings can fail anywhere
            raise CheckpointError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _open(path: Path) -> tuple[Path, Checkpoint | None, BinaryIO]:
    found, run = _find(path)
    try:
        return found, run, atomic_files.open_file(found)
    except FileNotFoundError:
        # With keep_last=1, the process that writes there may have replaced the checkpoint since it was verified
        if run is None or max(run.folder.numbers(), default=-1) <= run.manifest["number"]:
            raise
        return _open(path)


def _find(path: Path) -> tuple[Path, Checkpoint | None]:
    path = path if path.name else path.resolve()  # Path(".") has no name
    zip_path = path.with_name(f"{path.name}.zip")
    if path.is_dir() and (RunFolder(path).numbers() or not zip_path.exists()):
        folder = RunFolder(path)
        manifest = folder.newest_valid()
        if zip_path.exists():
            warnings.warn(
                f"There are both {path} and {zip_path}: the newest checkpoint in the folder is loaded. Pass "
                f"{zip_path.name!r} to load the file.",
                stacklevel=6,
            )
        return path / manifest["state"]["file"], Checkpoint(folder, manifest)
    if not path.is_file() and zip_path.exists():
        path = zip_path
    return path, checkpoint_of(path)


def read_replay_buffer(path: str | Path | BinaryIO, buffer: SB3ReplayBuffer, allow_pickle: bool) -> SB3ReplayBuffer:
    """
    Read a replay buffer from a file of its own, or from a model file.

    :param path: file of ``save_replay_buffer``, model file, or pickle of SB3 (``.pkl``, ``.zip`` may be left out)
    :param buffer: empty replay buffer to fill
    :param allow_pickle: allow a pickle, which can run any code
    :return: ``buffer``, or the unpickled buffer if that is of another class
    :raises CheckpointError: if the file is damaged, does not fit, or is a pickle without ``allow_pickle``
    """
    if atomic_files.is_path(path) and not atomic_files.as_path(path).exists():
        names = [f"{path}{suffix}" for suffix in (".pkl", ".zip")]
        path = next((name for name in names if atomic_files.as_path(name).exists()), path)
    if _is_zip(path):
        with open_model_file(path) as file:
            file.restore_replay(buffer)
        return buffer
    if not (allow_pickle or pickles_are_trusted()):
        raise CheckpointError(
            f"{path} was not written by SoftSAC. If it is a pickle of SB3's save_replay_buffer and you trust it, pass "
            f"allow_pickle=True (with the RL Zoo: set {TRUSTS_PICKLES}=1): unpickling can run any code."
        )
    loaded = load_from_pkl(path)  # type: ignore[arg-type]
    if not hasattr(loaded, "handle_timeout_termination"):  # SB3 before 2.1
        loaded.handle_timeout_termination, loaded.timeouts = False, np.zeros_like(loaded.dones)
    return buffer_state.adopt(loaded, buffer)


def _is_zip(path: str | Path | BinaryIO) -> bool:
    if not atomic_files.is_path(path):
        position = path.tell()
        found = zipfile.is_zipfile(path)
        path.seek(position)  # where a pickle starts
        return found
    path = atomic_files.as_path(path)
    if path.is_dir():
        return True
    with atomic_files.open_file(path) as file:
        return zipfile.is_zipfile(file)


@contextmanager
def new_file(path: str | Path | BinaryIO, suffix: str = ".zip") -> Iterator[BinaryIO]:
    """
    Create or replace a file.

    :param path: file name, or file object
    :param suffix: added to a name without one
    :return: file to append to; a named file exists as a whole or not at all
    :raises ValueError: if a file object is not at its start
    """
    if not atomic_files.is_path(path):
        if path.seekable() and path.tell() != 0:
            raise ValueError(f"The file object is at position {path.tell()}, not 0: pass an empty one.")
        yield path
        return
    path = atomic_files.as_path(path)
    # The RL Zoo makes a folder named after the environment, which may have a dot in its name
    path = path if path.suffix and not path.is_dir() else path.with_name(f"{path.name}{suffix}")
    if path.parent.is_dir():
        atomic_files.remove_leftovers(path.parent, re.escape(path.name))
    with atomic_files.atomic_file(path) as file:
        yield file


def machine(device: th.device, n_threads: int | None) -> dict[str, Any]:
    """
    :param device: device of the model
    :param n_threads: threads of torch, if they are known
    :return: properties of the machine that must be equal for a bit-exact continuation
    """
    return {
        "device": device.type,
        "torch": th.__version__,
        "threads of torch": n_threads,
        "precision of float32 products": th.get_float32_matmul_precision(),
        "vector instructions": th.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "numpy": np.__version__,
        "mujoco": getattr(sys.modules.get("mujoco"), "__version__", None),
    }
