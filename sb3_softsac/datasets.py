"""
Episodes into and out of replay buffers: Minari datasets (https://minari.farama.org), and anything with the same fields.
"""

import dataclasses
import inspect
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_softsac.buffers import Obs, ReplayBuffer, Stream, map_obs, named, rows_by_age

FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")
ROUNDING = 1e-6  # of the range of actions: further beyond it is not the rounding of float32


class Episode(NamedTuple):
    """An episode of T steps, or a part of one, with the fields that Minari's episodes have."""

    observations: Obs  # (T + 1, ...), or a dict of them
    actions: np.ndarray  # in the environment's units, (T, ...)
    rewards: np.ndarray  # (T,)
    terminations: np.ndarray  # (T,)
    truncations: np.ndarray  # (T,)


def read(dataset: Any, buffer: ReplayBuffer) -> Stream:
    """
    Read all episodes of a dataset, and check them. The value after the last step of an episode without an end is
    bootstrapped.

    :param dataset: see :meth:`ReplayBuffer.add_dataset`
    :param buffer: replay buffer that they have to fit
    :return: transitions as the buffer holds them
    :raises ValueError: naming the episode and the field that do not fit
    """
    space = buffer.action_space
    dataset = load(dataset) if isinstance(dataset, str) else dataset
    _compare_actions(getattr(dataset, "action_space", None), space)
    parts, n_beyond, furthest = [], 0, 0.0
    for number, episode in enumerate(_episodes(dataset)):
        part = _checked(episode, f"episode {number}", buffer)
        beyond = np.abs(part.actions) - 1.0
        n_beyond += int((beyond > ROUNDING).sum())
        furthest = max(furthest, float(beyond.max(initial=0.0)))
        parts.append(part._replace(actions=np.clip(part.actions, -1.0, 1.0).astype(np.float32)))
    if sum(len(part.rewards) for part in parts) == 0:
        raise ValueError("The dataset has no transitions: pass at least one episode with one action.")
    if n_beyond:
        warnings.warn(
            f"{n_beyond} action component(s) of the dataset are outside the bounds of the action space, by up to "
            f"{furthest / 2:.1%} of its range, and are clipped. If that is a lot, they may be in different units.",
            stacklevel=3,
        )
    starts = np.cumsum([0, *(len(part.rewards) for part in parts[:-1])])
    shifted = [part._replace(ends=part.ends + start) for part, start in zip(parts, starts, strict=True)]
    return Stream(
        *(map_obs(lambda *arrays: np.concatenate(arrays), *columns) for columns in zip(*shifted, strict=True))
    )


def check_buffer(theirs: SB3ReplayBuffer, buffer: ReplayBuffer) -> None:
    """
    :param theirs: another replay buffer, SB3's or ours
    :param buffer: replay buffer that its transitions have to fit
    :raises ValueError: naming what does not fit
    """
    there, here = ({**named("observations", each.observations), "actions": each.actions, "rewards": each.rewards}
                   for each in (theirs, buffer))  # fmt: skip
    for name, storage in here.items():
        if name not in there:
            raise ValueError(f"The other replay buffer has no {name}, only {_names(there)}.")
        rows, what = there[name][: theirs.size()], f"{name} of the other replay buffer"
        _require_shape(rows, (len(rows), theirs.n_envs, *storage.shape[2:]), what)
        if rows.dtype.kind == "f" and not (is_finite := np.isfinite(rows)).all():
            raise ValueError(f"{what} has values that are not finite, in row {np.argwhere(~is_finite)[0][0]}.")


def load(dataset_id: str) -> Any:
    """
    :param dataset_id: id of a dataset on this machine
    :return: ``minari.MinariDataset``
    :raises ValueError: if there is no such dataset, or if the id is not valid
    """
    minari = _minari()
    _check_id(dataset_id)
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError:
        folder = minari.storage.datasets_root_dir.get_dataset_path()
        raise ValueError(
            f"There is no Minari dataset {dataset_id!r} in {folder}: get it with `minari download {dataset_id}`, or "
            "set MINARI_DATASETS_PATH to the folder that has it."
        ) from None


def _minari() -> Any:
    try:
        import h5py  # noqa: F401  # Minari imports it when it opens a file
        import minari
    except ImportError as error:
        raise ImportError(f"Minari datasets need more packages ({error}): pip install 'sb3-softsac[minari]'") from error
    return minari


def _check_id(dataset_id: str) -> str | None:
    """Minari itself looks for a dataset of any name, and makes a folder of any name. Returns the namespace."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        return parse_dataset_id(dataset_id)[0]
    except (TypeError, ValueError):
        raise ValueError(f"{dataset_id!r} is not a Minari id, such as 'pendulum/softsac-v0'.") from None


def _compare_actions(theirs: Any, ours: spaces.Box) -> None:
    """Actions with other bounds are probably those of the environment without its wrappers."""
    if isinstance(theirs, spaces.Box) and theirs.shape == ours.shape:
        if not (np.allclose(theirs.low, ours.low) and np.allclose(theirs.high, ours.high)):
            warnings.warn(
                f"The dataset's actions have the bounds {theirs}, the environment's {ours}: they are assumed to be in "
                "the environment's units. If a wrapper rescales actions, rescale the dataset's actions as well.",
                stacklevel=4,
            )


def _episodes(dataset: Any) -> Iterator[Any]:
    what = (
        "pass a Minari dataset or its id, a replay buffer, or a list of episodes, each an object or a dict with "
        f"{', '.join(FIELDS)}."
    )
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset is a dict with the keys {_names(dataset)}, not a list of episodes: {what}")
    try:
        return iter(dataset)
    except TypeError:
        raise ValueError(f"dataset={dataset!r} cannot be iterated over: {what}") from None


def _checked(episode: Any, where: str, buffer: ReplayBuffer) -> Stream:
    """Transitions of an episode; actions are scaled, but not clipped."""
    action_space = buffer.action_space
    fields = {name: _field(episode, name, where) for name in FIELDS}
    rewards = _array(fields["rewards"], "rewards", where, np.dtype(np.float32))
    n_steps = rewards.size
    _require_shape(rewards, (n_steps,), f"rewards of {where}")
    terminated, truncated = (_array(fields[name], name, where, np.dtype(bool)) for name in FIELDS[3:])
    actions = _array(fields["actions"], "actions", where, np.dtype(np.float64))
    for array, name, shape in (
        (terminated, "terminations", ()),
        (truncated, "truncations", ()),
        (actions, "actions", action_space.shape),
    ):
        _require_shape(array, (n_steps, *shape), f"{name} of {where}", f" ({n_steps} rewards)")
    low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
    obs = _observations(fields["observations"], where, n_steps, buffer)
    dones = terminated | truncated
    ends = np.union1d(np.flatnonzero(dones), np.arange(n_steps)[-1:])
    return Stream(
        observations=map_obs(lambda array: array[:-1], obs),
        actions=(2.0 * (actions - low) / (high - low) - 1.0).reshape(n_steps, buffer.action_dim),
        rewards=rewards,
        dones=dones,
        timeouts=truncated & ~terminated,
        ends=ends,
        end_observations=map_obs(lambda array: array[ends + 1], obs),
    )


def _field(episode: Any, name: str, where: str) -> Any:
    if isinstance(episode, Mapping):
        if name not in episode:
            raise ValueError(f"{where} has no {name!r}, only {_names(episode)}. Each needs {', '.join(FIELDS)}.")
        return episode[name]
    if not hasattr(episode, name):
        kind = type(episode).__name__
        raise ValueError(f"{where} is of type {kind}, which has no {name!r}. Each needs {', '.join(FIELDS)}.")
    return getattr(episode, name)


def _observations(values: Any, where: str, n_steps: int, buffer: ReplayBuffer) -> Any:
    space, storage = buffer.observation_space, buffer.observations
    name = "observations"
    if not isinstance(storage, dict):
        if isinstance(values, Mapping):
            raise ValueError(f"{name} of {where} is a dict with the keys {_names(values)}, expected an array: {space}.")
        return _obs_array(values, name, where, n_steps, space, storage)
    assert isinstance(space, spaces.Dict)
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} of {where} is of type {type(values).__name__}, expected a dict: {space}.")
    missing = sorted(storage.keys() - values.keys())
    if missing:
        raise ValueError(
            f"{name} of {where} has no {missing[0]!r}, only {_names(values)}. The observation space has "
            f"{_names(storage)}."
        )
    return {
        key: _obs_array(values[key], f"{name}[{key!r}]", where, n_steps, space[key], storage[key]) for key in storage
    }


def _obs_array(
    values: Any, name: str, where: str, n_steps: int, space: spaces.Space[Any], storage: np.ndarray
) -> np.ndarray:
    array = _array(values, name, where, storage.dtype)
    shape = space.shape or ()
    is_image = isinstance(space, spaces.Box) and is_image_space(space) and is_image_space_channels_first(space)
    if is_image and array.shape[1:] == (*shape[1:], shape[0]):
        array = np.moveaxis(array, -1, 1)  # as VecTransposeImage does with those of the environment
    _require_shape(array, (n_steps + 1, *shape), f"{name} of {where}", f" ({n_steps} rewards)")
    if isinstance(space, spaces.Discrete) and not np.all((array >= space.start) & (array < space.start + space.n)):
        raise ValueError(f"{name} of {where} has values from {array.min()} to {array.max()}, expected {space}.")
    return array.reshape(n_steps + 1, *storage.shape[2:])


def _array(values: Any, name: str, where: str, dtype: np.dtype) -> np.ndarray:
    """:raises ValueError: unless the values are finite numbers that the dtype can hold, but for rounding"""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    found = array.dtype
    is_flag = dtype.kind == "b" and found.kind in "iu" and np.isin(array, (0, 1)).all()
    if found.kind not in "biuf" or not (np.can_cast(found, dtype, "same_kind") or is_flag):
        raise ValueError(f"{name} of {where} has the dtype {found}, expected {dtype} or one that can be cast to it.")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    is_lost = ~np.isfinite(cast) if dtype.kind == "f" else cast != array
    for is_wrong, what in ((~np.isfinite(array), "are not finite"), (is_lost, f"{dtype} cannot hold")):
        if is_wrong.any():
            row = np.argwhere(np.atleast_1d(is_wrong))[0][0]
            raise ValueError(f"{name} of {where} has values that {what}, in row {row}.")
    return cast


def _require_shape(array: np.ndarray, expected: tuple[int, ...], what: str, why: str = "") -> None:
    if array.shape != expected:
        raise ValueError(f"{what} has the shape {array.shape}, expected {expected}{why}.")


def _names(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))


def episodes(buffer: ReplayBuffer) -> Iterator[Episode]:
    """
    The episodes of a replay buffer, one environment after the other, oldest first. Each environment's first may lack
    its beginning, and its last its end: that one is truncated. So are those that were cut short by a reset.

    :param buffer: replay buffer
    :return: episodes; actions are in the environment's units
    """
    space = buffer.action_space
    order = rows_by_age(buffer)
    for env_index in range(buffer.n_envs):
        for rows in np.split(order, np.flatnonzero(buffer.ends[order, env_index]) + 1):
            if len(rows) == 0:
                continue
            last_obs = buffer.get_next_obs(rows[-1:] * buffer.n_envs + env_index)
            obs = map_obs(
                lambda storage, last, at=(rows, env_index): np.concatenate((storage[at], last)),
                buffer.observations,
                last_obs,
            )
            terminated = bool(buffer.dones[rows[-1], env_index]) and not buffer.timeouts[rows[-1], env_index]
            yield Episode(
                _in_shape_of_space(obs, buffer.observation_space),
                _in_units_of_env(buffer.actions[rows, env_index], space),
                buffer.rewards[rows, env_index],
                *_flags(len(rows), terminated),
            )


def play(
    model: BaseAlgorithm,
    env: VecEnv,
    n_episodes: int,
    normalize: VecNormalize | None = None,
    deterministic: bool = True,
) -> Iterator[Episode]:
    """
    Run episodes with a policy.

    :param model: the policy
    :param env: one environment, without ``VecNormalize``
    :param n_episodes: number of episodes
    :param normalize: normalises what the policy sees; None: no normalisation
    :param deterministic: take deterministic actions instead of sampled ones
    :return: the episodes
    """
    for _ in range(n_episodes):
        if model.use_sde and not deterministic:
            model.policy.reset_noise()  # type: ignore[operator]
        obs: Any = env.reset()
        observations, actions, rewards, is_over = [obs], [], [], False
        while not is_over:
            seen = obs if normalize is None else normalize.normalize_obs(obs)
            action, _ = model.predict(seen, deterministic=deterministic)
            obs, reward, dones, infos = env.step(action)
            is_over = bool(dones[0])
            # Of an episode that is over, obs is the next one's; its own last one may be an int
            last_obs = infos[0].get("terminal_observation")
            observations.append(map_obs(lambda value: np.asarray(value)[np.newaxis], last_obs) if is_over else obs)
            actions.append(action[0])
            rewards.append(float(reward[0]))
        yield Episode(
            map_obs(lambda *arrays: np.concatenate(arrays), *observations),
            np.array(actions),
            np.array(rewards),
            *_flags(len(rewards), not infos[0].get("TimeLimit.truncated", False)),
        )


def write(
    dataset_id: str,
    episodes: Iterable[Episode],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """
    Write episodes as a Minari dataset.

    :param dataset_id: its id, such as ``"pendulum/softsac-v0"``
    :param episodes: the episodes
    :param observation_space: of their observations
    :param action_space: of their actions
    :param env_id: of the environment, which the dataset can then recreate if its spec fits into JSON; None: it cannot
    :param env_kwargs: arguments that it was made with
    :return: ``minari.MinariDataset``
    :raises ValueError: if the dataset exists already, or if its id is not valid
    """
    minari = _minari()
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace

    namespace = _check_id(dataset_id)
    folder = minari.storage.datasets_root_dir.get_dataset_path(dataset_id)
    refusal = f"There is a dataset in {folder} already: choose another id, or `minari delete {dataset_id}`."
    if folder.exists():
        raise ValueError(refusal)
    spec = None if env_id is None else _spec(env_id, env_kwargs or {})
    buffers = [EpisodeBuffer(**episode._asdict(), infos={}) for episode in episodes]
    if namespace is not None:
        with suppress(ValueError):  # it exists
            create_namespace(namespace)
    # Playing the episodes took a while: only the process that makes the folder may fill it, and remove it. Minari's own
    # create_dataset_from_buffers() does not say whether it has made the folder
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(refusal) from None
    # Images as they are: 0.5.3 has no such argument
    has_jpeg = "jpeg_encoding" in inspect.signature(MinariStorage.new).parameters
    exact: dict[str, Any] = {"jpeg_encoding": False} if has_jpeg else {}
    try:
        storage = MinariStorage.new(
            folder / "data",
            observation_space=observation_space,
            action_space=action_space,
            env_spec=spec,
            **exact,
        )
        about = {"dataset_id": dataset_id, "algorithm_name": "SoftSAC", "minari_version": minari.__version__}
        storage.update_metadata(about)
        storage.update_episodes(buffers)
        return minari.MinariDataset(storage)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half a dataset would not even be listed
        raise


def _spec(env_id: str, env_kwargs: Mapping[str, Any]) -> Any:
    spec = gym.spec(env_id)
    spec = dataclasses.replace(spec, kwargs={**spec.kwargs, **env_kwargs})
    try:
        spec.to_json()
    except (TypeError, ValueError):  # an array, or a class that was registered without a name
        return None
    return spec


def _flags(n_steps: int, terminated: bool) -> tuple[np.ndarray, np.ndarray]:
    """Terminations and truncations of an episode that ends in one or the other."""
    is_last = np.arange(n_steps) == n_steps - 1
    return is_last & terminated, is_last & (not terminated)


def _in_units_of_env(scaled: np.ndarray, space: spaces.Box) -> np.ndarray:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    actions = low + 0.5 * (scaled.reshape(-1, *space.shape).astype(np.float64) + 1.0) * (high - low)
    return np.clip(actions, low, high).astype(space.dtype)


def _in_shape_of_space(obs: Any, space: spaces.Space[Any]) -> Any:
    """Without the axis that the replay buffer gives to Discrete observations."""
    if isinstance(space, spaces.Dict):
        return {key: _in_shape_of_space(array, space[key]) for key, array in obs.items()}
    return obs.reshape(len(obs), *(space.shape or ())).astype(space.dtype, copy=False)
