"""
``python -m sb3_softsac.checkpoint ls|verify|export|export-dataset PATH``: inspect model files and folders of
checkpoints, and make other files of them.

It runs no code from a file, and unpickles nothing.
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

import gymnasium as gym
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_softsac import datasets
from sb3_softsac.persistence import atomic_files
from sb3_softsac.persistence.archive import INDEX, ArchiveWriter, CheckpointError, naming
from sb3_softsac.persistence.codec import decode
from sb3_softsac.persistence.envs import env_state
from sb3_softsac.persistence.envs.object_state import are_same, arguments_of, chain_of, class_name
from sb3_softsac.persistence.model_file import ModelFile, open_model_file
from sb3_softsac.persistence.run_folder import RunFolder
from sb3_softsac.softsac import SoftSAC


def _print(line: object, file: TextIO | None = None) -> None:
    """Print without control characters, with which names in a file could change what the terminal shows."""
    print("".join(character if character.isprintable() else " " for character in str(line)), file=file)


def ls(path: Path) -> None:
    """
    Print the contents of a model file, or the checkpoints of a folder.

    :param path: file or folder
    :raises CheckpointError: if a file is damaged, or a folder has no checkpoints
    """
    if not path.is_dir():
        with open_model_file(path) as file:
            _ls_file(file)
        return
    folder = RunFolder(path)
    if not folder.numbers():
        raise CheckpointError(f"{path} has no checkpoints (no ckpt-*.json in it).")
    for number in folder.numbers():
        try:
            manifest = folder.manifest(number)
        except CheckpointError as error:
            _print(f"{number:>6}  {error}")
            continue
        sizes = [entry["size"] for entry in manifest["segments"]]
        _print(
            f"{number:>6}  step {manifest['num_timesteps']:>10,}  {manifest['state']['file']} "
            f"({manifest['state']['size']:,} bytes)  replay: {sum(sizes):,} bytes in {len(sizes)} segments"
        )


def _ls_file(file: ModelFile) -> None:
    index = file.index
    _print(f"{file.name}: {'SoftSAC' if index else 'SB3'} model file")
    for name in ("num_timesteps", "n_envs", "machine"):
        if name in index:
            _print(f"{name}: {index[name]}")
    replay = index.get("replay")
    if replay is not None:
        state = replay["description"]
        where = "in this file" if replay["segments"] is not None else "in replay/ of its folder"
        _print(
            f"replay buffer: {state['class']}, {state['buffer_size']} rows x {state['n_envs']} environment(s), {where}"
        )
    elif index:
        _print("replay buffer: none")
    for name, size in file.archive.sizes.items():
        _print(f"{size:>14,}  {name}")


def verify(path: Path) -> bool:
    """
    Verify every byte of a model file, or of all checkpoints of a folder, and print the result.

    :param path: file or folder
    :return: whether nothing is damaged
    """
    if not path.is_dir():
        try:
            with open_model_file(path) as model_file:
                if not model_file.index and "data" not in model_file.archive:
                    raise CheckpointError(f"{path} is a zip, but not a model file: it has no member data.")
                if model_file.index.get("replay") is not None and model_file.replay is None:
                    raise CheckpointError(
                        f"{path} is a part of a checkpoint that was never completed, or that is in another folder: the "
                        "rows of its replay buffer are missing."
                    )
                _print(f"{path}: {'whole' if model_file.index else 'readable (a file of SB3, which has no hashes)'}")
        except CheckpointError as error:
            _print(error)
            return False
        return True
    folder = RunFolder(path)
    whole = bool(folder.numbers())
    if not whole:
        _print(f"{path} has no checkpoints (no ckpt-*.json in it)")
    for number in folder.numbers():
        try:
            manifest = folder.manifest(number)
            with open_model_file(path / manifest["state"]["file"]):
                _print(f"checkpoint {number} (step {manifest['num_timesteps']}): whole")
        except CheckpointError as error:
            _print(f"checkpoint {number}: {error}")
            whole = False
    return whole


def export(path: Path, output: Path) -> None:
    """
    Write a small model file for prediction and fine-tuning: networks, optimisers, settings, VecNormalize's statistics
    and how images are given.

    :param path: model file or folder of checkpoints
    :param output: file to write
    :raises CheckpointError: if ``path`` is damaged
    :raises ValueError: if ``output`` is ``path``
    """
    if output.exists() and path.exists() and output.resolve() == path.resolve():
        raise ValueError(f"{output} is the file to export from: choose another output, -o FILE.")
    with open_model_file(path) as file, atomic_files.atomic_file(output) as target, ArchiveWriter(target) as archive:
        if "data" not in file.archive:
            raise CheckpointError(f"{path} is not a model file: it has no member data.")
        for name in file.archive.sizes:
            if name.startswith("replay/") or name == INDEX:
                continue
            with file.archive.open(name) as source, archive.member(name) as member:
                shutil.copyfileobj(source, member)
        index = {name: file.index.get(name) for name in ("num_timesteps", "n_envs", "frozen")}
        archive.close({**index, "env": env_state.without_envs(file.index.get("env"))})
    _print(f"Wrote {output} ({output.stat().st_size:,} bytes)")


def export_dataset(
    path: Path | str,
    dataset_id: str,
    n_episodes: int | None = None,
    env_id: str | None = None,
    deterministic: bool = True,
) -> None:
    """
    Write a Minari dataset: the transitions of a replay buffer, in episodes, or new episodes of the policy.

    Actions are in the environment's units. Observations are as in the replay buffer: before ``VecNormalize``, images
    with channels first. An episode that was not over is truncated.

    :param path: model file or folder of checkpoints
    :param dataset_id: of the new dataset, for instance ``"pendulum/softsac-v0"``
    :param n_episodes: new episodes to play; None: those of the replay buffer
    :param env_id: id of the environment; None: that of the run, made with the run's arguments
    :param deterministic: new episodes are played with the deterministic actions
    :raises CheckpointError: if ``path`` is damaged or has no replay buffer
    :raises ValueError: if there is such a dataset already, or the environment is not known or cannot be made, or for
        options of new episodes without them
    """
    if n_episodes is not None and n_episodes < 1:
        raise ValueError(f"n_episodes={n_episodes} must be at least 1, or None for those of the replay buffer.")
    if n_episodes is None and (env_id is not None or not deterministic):
        raise ValueError("env_id and deterministic are for new episodes: pass n_episodes, or leave them out.")
    with open_model_file(path) as file:
        state, kwargs = None, {}
        if env_id is None and (env_id := env_state.env_id(file.index.get("env"))) is not None:
            state = file.index["env"]
            with naming(f"the environment in {file.name}"):
                kwargs = _arguments(state)
        if n_episodes is None:
            with naming(f"the spaces in {file.name}"):
                data = file.archive.json("data")
                spaces = decode(data["observation_space"]), decode(data["action_space"])
            episodes = datasets.episodes(file.read_buffer(*spaces))
    if n_episodes is not None:
        if env_id is None:
            raise ValueError(f"{path} does not say which environment its run was in: pass its id, --env ID.")
        model = SoftSAC.load(path, device="cpu")
        try:
            inner = gym.make(env_id, **kwargs)
        except Exception as error:  # environments can raise anything
            raise ValueError(
                f"{env_id} cannot be made with the arguments {kwargs}: {error}. Pass another id, --env ID."
            ) from error
        env = SoftSAC._wrap_env(inner)
        spaces = model.observation_space, model.action_space
        check_for_correct_spaces(env, *spaces)
        if state is not None:
            with naming(f"the environment in {path}"):
                _warn_of_layers(state, env, env_id)
        assert model._unread is not None, "it was loaded without an environment"
        normalize = model._unread.vec_normalize(spaces[0])
        episodes = datasets.play(model, env, n_episodes, normalize, deterministic)
    known = env_id if env_id in gym.registry else None
    dataset = datasets.write(dataset_id, episodes, *spaces, env_id=known, env_kwargs=kwargs)
    _print(f"Wrote {dataset_id}: {dataset.total_steps:,} transitions in {dataset.total_episodes:,} episodes")


def _arguments(state: dict[str, Any]) -> dict[str, Any]:
    """Those of the run's environment, by name."""
    made = state["envs"][0]["layers"][-1]["made"]
    # What EzPickle has noted by position has a name, too, if it was passed to gym.make()
    return {name: decode(tree) for name, tree in made.items() if name != "id" and not name.startswith("argument ")}


def _warn_of_layers(state: dict[str, Any], env: VecEnv, env_id: str) -> None:
    """Warn of the wrappers of the run that a new environment does not have."""
    chain = chain_of(env)
    here = [[class_name(obj), arguments_of(obj)] for obj in (*chain, *chain_of(chain[-1].envs[0]))]
    missing = []
    for layer in (*state["wrappers"][:-1], *state["envs"][0]["layers"][:-1]):
        there = [layer["class"], layer["made"]]
        is_statistics = layer["class"] == env_state.VEC_NORMALIZE
        if not is_statistics and not any(are_same(there, each) for each in here):
            arguments = ", ".join(f"{name}={decode(tree)}" for name, tree in layer["made"].items())
            missing.append(f"{layer['class'].rpartition('.')[2]}({arguments})")
    if missing:
        warnings.warn(
            f"The new episodes are played without what the run had around {env_id}: {', '.join(missing)}. If that "
            "changes observations, actions, rewards or ends, register an environment that has it, and pass its id, "
            "--env ID.",
            stacklevel=3,
        )


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sb3_softsac.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("ls", "list its contents"),
        ("verify", "verify every byte"),
        ("export", "write a small model file from it, without the replay buffer"),
        ("export-dataset", "write a Minari dataset of its replay buffer, or of new episodes"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar="PATH", help="model file or folder of checkpoints; s3://... too")
        if name == "export":
            command.add_argument("-o", "--output", default="policy.zip", help="default: policy.zip")
        elif name == "export-dataset":
            command.add_argument("dataset_id", metavar="MINARI_ID", help="of the new dataset: pendulum/softsac-v0")
            command.add_argument(
                "--episodes", type=int, metavar="N", help="play N new episodes with the policy instead"
            )
            command.add_argument("--env", metavar="ID", help="id of the environment; default: that of the run")
            command.add_argument(
                "--stochastic", action="store_true", help="with random instead of deterministic actions"
            )
    args = parser.parse_args()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = atomic_files.as_path(args.path)
            if args.command == "ls":
                ls(path)
            elif args.command == "export":
                export(path, atomic_files.as_path(args.output))
            elif args.command == "export-dataset":
                export_dataset(path, args.dataset_id, args.episodes, args.env, not args.stochastic)
            elif not verify(path):
                return 1
        for warning in caught:
            _print(f"warning: {warning.message}", file=sys.stderr)
    except (ImportError, OSError, ValueError) as error:
        _print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
