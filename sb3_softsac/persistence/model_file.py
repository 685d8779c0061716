"""
Model files: everything that a run consists of, in one archive.

The members that SB3 writes have its names: its ``set_parameters`` reads networks and optimisers. ``data`` holds the
attributes of the model, those that JSON does not know in the form of ``codec`` and not pickled. New are
``softsac.json`` (random states, environments, callbacks, the replay buffer's layout) and
``replay/<first row>/<array>.npy``.
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
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import cloudpickle
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, recursive_getattr
from stable_baselines3.common.utils import get_system_info
from torch import nn

from sb3_softsac.persistence import atomic_files, buffer_state
from sb3_softsac.persistence.archive import DAMAGE, ArchiveReader, ArchiveWriter, CheckpointError, naming
from sb3_softsac.persistence.buffer_state import Segment
from sb3_softsac.persistence.codec import KIND, NotEncodable, decode, encode
from sb3_softsac.persistence.run_folder import Manifest, RunFolder, checkpoint_of

PICKLED = ":serialized:"  # SB3's key


def write_data(archive: ArchiveWriter, attributes: dict[str, Any]) -> None:
    """
    Write SB3's member ``data``.

    :param archive: where to
    :param attributes: of the model, by name
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
                raise TypeError(
                    f"{error}, and not with pickle: {reason}. Pass exclude=[{name!r}] to save()."
                ) from reason
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
    :param infos: SB3's ``ep_info_buffer`` (a dict for each episode) or ``ep_success_buffer``
    :param name: its name
    :return: the same, without what a ``Monitor`` has added by its ``info_keywords`` that is not plain data
    """
    if infos is None or _is_plain(list(infos)):
        return infos
    kept = [{k: v for k, v in info.items() if _is_plain(v)} if isinstance(info, dict) else info for info in infos]
    lost = {key for info, rest in zip(infos, kept, strict=True) if isinstance(info, dict) for key in info.keys() - rest}
    if lost:
        text = f"{', '.join(sorted(lost))} of {name} (Monitor's info_keywords) is not plain data, and not saved."
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

    :param archive: where from
    :param custom_objects: values that take the place of those in the file, by name
    :param given: values that take the place of those that are pickled
    :param allow_pickle: unpickle what is pickled
    :return: attributes of the model, by name
    :raises CheckpointError: if something is pickled that is neither substituted nor to be unpickled
    """
    trees = archive.json("data")
    if not isinstance(trees, dict):
        raise CheckpointError(f"data in {archive.name} is not a model's.")
    if archive.index is None and any(isinstance(tree, dict) and KIND in tree for tree in trees.values()):
        raise CheckpointError(f"{archive.name} is damaged: SoftSAC has written it, and its index is missing.")
    pickled = [name for name, tree in trees.items() if isinstance(tree, dict) and PICKLED in tree]
    custom_objects = {name: given[name] for name in pickled if name in given} | (custom_objects or {})
    refused = [] if allow_pickle else [name for name in pickled if name not in custom_objects]
    if refused:
        substitutes = ", ".join(f"{name!r}: ..." for name in refused)
        raise CheckpointError(
            f"{archive.name} holds pickled objects ({', '.join(refused)}), and unpickling can run any code. Either "
            f"pass what they were, custom_objects={{{substitutes}}}, or, if you trust where the file comes from, "
            "allow_pickle=True."
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


def write_parameters(archive: ArchiveWriter, model: BaseAlgorithm) -> None:
    """
    Write SB3's ``.pth`` members, its version and its system information.

    :param archive: where to
    :param model: whose parameters
    """
    names = model._get_torch_save_params()[1]
    variables = {name: recursive_getattr(model, name) for name in names}
    for name, state in {"pytorch_variables": variables, **model.get_parameters()}.items():
        data = io.BytesIO()  # on a full disk, th.save would raise something else than OSError
        th.save(state, data)
        with archive.member(f"{name}.pth") as stream:
            stream.write(data.getbuffer())
    with archive.member("_stable_baselines3_version") as stream:
        stream.write(stable_baselines3.__version__.encode())
    with archive.member("system_info.txt") as stream:
        stream.write(_system_info().encode())


@cache
def _system_info() -> str:
    text: str = get_system_info(print_info=False)[1]
    return text


def read_parameters(archive: ArchiveReader, model: BaseAlgorithm, optional: set[str]) -> None:
    """
    Read SB3's ``.pth`` members into a model.

    :param archive: where from
    :param model: with networks and optimisers of the same shapes
    :param optional: names that may be in the file or in the model only
    :raises CheckpointError: if the file has other parameters than the model
    """
    names, variable_names = model._get_torch_save_params()
    found = {name.removesuffix(".pth") for name in archive.sizes if name.endswith(".pth")} - {"pytorch_variables"}
    if (found ^ set(names)) - optional:
        raise CheckpointError(
            f"{archive.name} has the parameters {sorted(found)}, but {sorted(names)} are needed: was it saved with "
            "another ent_coef or by another algorithm?"
        )
    parameters = {name: archive.torch(f"{name}.pth", model.device) for name in names if name in found}
    with naming(f"the parameters in {archive.name}"):
        model.set_parameters(parameters, exact_match=parameters.keys() == set(names), device=model.device)
        if "pytorch_variables.pth" not in archive:
            return
        for name, value in archive.torch("pytorch_variables.pth", model.device).items():
            if value is not None and name in variable_names:
                variable = recursive_getattr(model, name)
                if variable.shape != value.shape:
                    raise CheckpointError(f"{name} in {archive.name} has the shape {tuple(value.shape)}.")
                variable.data = value.data


def frozen_parameters(policy: nn.Module) -> list[str]:
    """
    :param policy: networks
    :return: names of the parameters that are not trained, which state dicts do not hold
    """
    return [name for name, parameter in policy.named_parameters() if not parameter.requires_grad]


def freeze(policy: nn.Module, names: list[str] | None, what: str) -> None:
    """
    Freeze the parameters that were frozen before.

    :param policy: networks
    :param names: what :func:`frozen_parameters` has returned; None: of a file that does not say
    :param what: name of the file
    """
    if names is None:
        return
    added = sorted(set(frozen_parameters(policy)) - set(names))
    if added:  # by the constructor of a network: that may be new, and is wanted
        warnings.warn(
            f"The continuation may differ: {', '.join(added)} is frozen here, and was trained in {what}.", stacklevel=4
        )
    parameters = dict(policy.named_parameters())
    for name in names:
        if name not in parameters:
            raise CheckpointError(f"{what} has a frozen parameter {name}, which the policy lacks.")
        parameters[name].requires_grad_(False)


def write_replay(archive: ArchiveWriter, buffer: SB3ReplayBuffer) -> None:
    """
    :param archive: where to
    :param buffer: replay buffer whose rows are written
    """
    for segment in buffer_state.segments(buffer):
        buffer_state.write_rows(archive, buffer, segment, f"replay/{segment[0]}/")


class ModelFile:
    """
    The source of ``load``: a model file, or a checkpoint of a run folder.

    :param archive: the model file
    :param run: folder and manifest, if it is part of a checkpoint
    """

    def __init__(self, archive: ArchiveReader, run: tuple[RunFolder, Manifest] | None = None):
        self.archive = archive
        self.run = run
        self.index = archive.index or {}
        self.name = archive.name

    @property
    def replay(self) -> dict[str, Any] | None:
        """
        :return: description of the replay buffer; None if its rows are not in the file
        """
        replay = self.index.get("replay")
        return None if replay is None or (replay["segments"] is None and self.run is None) else replay

    def restore_replay(self, buffer: SB3ReplayBuffer) -> None:
        """
        :param buffer: empty replay buffer, to be filled
        """
        with naming(f"the replay buffer in {self.name}"):
            assert self.replay is not None
            buffer_state.restore(buffer, self.replay, self._parts(self.replay), self.name)

    def _parts(self, replay: dict[str, Any]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        if self.run is not None:
            yield from self.run[0].read_segments(self.run[1], replay)
            return
        for first, last in replay["segments"]:
            segment: Segment = first, last
            yield first, buffer_state.read_rows(self.archive, replay["description"], segment, f"replay/{first}/")


@contextmanager
def open_model_file(path: str | Path | BinaryIO) -> Iterator[ModelFile]:
    """
    Open and verify a model file.

    :param path: model file (``.zip`` may be left out), file object, or folder of a run's checkpoints
    :return: the newest checkpoint of a folder that is whole, the file otherwise
    :raises CheckpointError: if it is damaged
    :raises FileNotFoundError: if it is not there
    """
    if not isinstance(path, str | os.PathLike):
        with _using("the file object"):
            yield _verified(path, "the file object")
        return
    name = Path(path)
    zip_name = name.with_name(f"{name.name}.zip")
    if name.is_dir() and (RunFolder(name).numbers() or not zip_name.exists()):
        folder = RunFolder(name)
        manifest = folder.newest_valid()
        run: tuple[RunFolder, Manifest] | None = (folder, manifest)
        name = name / manifest["state"]["file"]
    else:
        if not name.is_file() and zip_name.exists():
            name = zip_name
        run = checkpoint_of(name)
    with name.open("rb") as file, _using(str(name)):
        yield _verified(file, str(name), run)


@contextmanager
def _using(name: str) -> Iterator[None]:
    """Impossible settings can fail anywhere. A ValueError has a message of its own."""
    try:
        yield
    except ValueError:
        raise
    except (*DAMAGE, AssertionError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _verified(file: BinaryIO, name: str, run: tuple[RunFolder, Manifest] | None = None) -> ModelFile:
    archive = ArchiveReader(file, name)
    archive.verify()
    return ModelFile(archive, run)


def read_replay_buffer(path: str | Path | BinaryIO, buffer: SB3ReplayBuffer, allow_pickle: bool) -> SB3ReplayBuffer:
    """
    :param path: file of ``save_replay_buffer``, model file, or pickle of SB3's (``.zip``, ``.pkl`` may be left out)
    :param buffer: empty replay buffer, to be filled
    :param allow_pickle: unpickle
    :return: ``buffer``, or the unpickled one where its class is another
    :raises CheckpointError: if the file is damaged, does not fit, or would have to be unpickled
    """
    if isinstance(path, str | os.PathLike) and not Path(path).exists():
        found = [Path(f"{path}{suffix}") for suffix in (".zip", ".pkl") if Path(f"{path}{suffix}").exists()]
        path = found[0] if found else path
    if _is_zip(path):
        with open_model_file(path) as file:
            if file.replay is None:
                raise CheckpointError(f"{file.name} has no replay buffer.")
            file.restore_replay(buffer)
        return buffer
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is not a file of SoftSAC's. If it is a pickle that SB3's save_replay_buffer has written, and you "
            "trust where it comes from, pass allow_pickle=True: unpickling can run any code."
        )
    return buffer_state.adopt(load_from_pkl(path), buffer)  # type: ignore[arg-type]


def _is_zip(path: str | Path | BinaryIO) -> bool:
    if not isinstance(path, str | os.PathLike):
        position = path.tell()
        found = zipfile.is_zipfile(path)
        path.seek(position)  # a pickle is read from there
        return found
    if Path(path).is_dir():
        return True
    with Path(path).open("rb") as file:
        return zipfile.is_zipfile(file)


@contextmanager
def new_file(path: str | Path | BinaryIO, suffix: str = ".zip") -> Iterator[BinaryIO]:
    """
    :param path: file name, with or without ``suffix``, or file object
    :param suffix: of files without one
    :return: file to append to; a named file is complete or does not exist
    """
    if not isinstance(path, str | os.PathLike):
        if path.seekable() and path.tell() != 0:
            raise ValueError(f"The file object is at position {path.tell()}: a model file can begin at its start only.")
        yield path
        return
    path = Path(path)
    path = path if path.suffix else path.with_name(path.name + suffix)
    if path.parent.is_dir():
        atomic_files.remove_leftovers(path.parent, re.escape(path.name))
    with atomic_files.atomic_file(path) as file:
        yield file


def machine(device: th.device, n_threads: int | None) -> dict[str, Any]:
    """
    :param device: of the model
    :param n_threads: threads of torch, if they are known
    :return: what has to be the same for a continuation to be the same bit for bit
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
