"""
Environments in Ray actors, on one machine or many.

It needs the extra ``ray`` (``pip install 'sb3-softsac[ray]'``), with the same versions on all machines of the cluster.
"""

import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from sb3_softsac.persistence.envs.episode_replay import prepare_env
from sb3_softsac.persistence.envs.known_classes import SETTINGS, STATE

try:
    import ray
    from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
except ImportError as error:
    raise ImportError("RayVecEnv needs Ray: pip install 'sb3-softsac[ray]'") from error

CLOSE_SECONDS = 5.0  # that environments get to close
ENDS = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)  # of an actor
REFUSED_OPTIONS = {"max_restarts", "max_task_retries"}


class RayVecEnv(VecEnv):
    """
    Environments in Ray actors, on one machine or many; otherwise they behave as in a ``SubprocVecEnv``. In each step,
    an actor gets one call for all of its environments.

    Ray is started (``ray.init()``) if the program has not done so. ``close()`` ends the actors, not Ray.

    :param env_fns: functions that make the environments. They run in the actors.
    :param envs_per_actor: how many environments share an actor, and so a process. Sharing saves calls, which pays if a
        step takes about a millisecond or less.
    :param actor_options: for ``.options()`` of all actors: resources and placement, such as
        ``{"num_cpus": 1, "scheduling_strategy": "SPREAD"}``
    :param max_restarts: how often an actor that has died is replaced. Its environments are then newly made, with the
        attributes that ``set_attr`` gave the old ones, and a warning says so. The old episodes end as at a time limit:
        with ``TimeLimit.truncated`` and the last known observation. 0: a death is an error.
    :param start_seconds: how long Ray may take to place an actor and make its environments
    :raises ValueError: if an argument is not valid
    :raises RuntimeError: if an actor cannot be placed; later, if one has died
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        envs_per_actor: int = 1,
        actor_options: dict[str, Any] | None = None,
        max_restarts: int = 0,
        start_seconds: float = 300.0,
    ):
        self.envs_per_actor = envs_per_actor
        self.actor_options = {} if actor_options is None else dict(actor_options)
        self.max_restarts = max_restarts
        self.start_seconds = start_seconds
        self.num_envs = len(env_fns)
        self._check_arguments()
        self.waiting = False
        self.closed = False
        if not ray.is_initialized():
            print("RayVecEnv: Ray is not initialised, so ray.init() is called.", file=sys.stderr)
            ray.init()
        self._actor_class = ray.remote(_Actor).options(**self.actor_options)
        parts = [env_fns[first : first + envs_per_actor] for first in range(0, self.num_envs, envs_per_actor)]
        self._groups = [
            _Group(i * envs_per_actor, len(part), cloudpickle.dumps(list(part))) for i, part in enumerate(parts)
        ]
        self._step_results: list[Any] = []  # references; None for new environments
        try:
            self._start_actors()
            observation_space, action_space = self._each(attrgetter("observation_space", "action_space"), indices=0)[0]
            super().__init__(self.num_envs, observation_space, action_space)
        except BaseException:
            self.close()
            raise

    def _check_arguments(self) -> None:
        if self.num_envs == 0:
            raise ValueError("env_fns is empty: give a function for each environment.")
        for name, least in (("envs_per_actor", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not valid: it must be an integer of at least {least}.")
        if refused := sorted(self.actor_options.keys() & REFUSED_OPTIONS):
            raise ValueError(
                f"actor_options has {', '.join(refused)}: Ray would restart actors without their environments. Use "
                "RayVecEnv's own max_restarts."
            )

    def step_async(self, actions: np.ndarray) -> None:
        if len(actions) != self.num_envs:
            raise ValueError(
                f"{len(actions)} actions are not valid: give one for each of {self.num_envs} environments."
            )
        self._check_open()
        # New environments are not stepped: the episodes before them have yet to end
        self._step_results = [
            None if group.begun is not None else group.actor.step.remote(cloudpickle.dumps(actions[group.slice]))
            for group in self._groups
        ]
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        self.waiting = False
        stepped = iter(_results_of([reference for reference in self._step_results if reference is not None]))
        results: list[Any] = [None if reference is None else next(stepped) for reference in self._step_results]
        for i, group in enumerate(self._groups):
            if isinstance(results[i], ENDS):
                self._replace(group, results[i], self.max_restarts)
            if group.begun is not None:
                results[i] = group.end_of_episodes(self.observation_space)
            group.last_obs = results[i][0]
        obs, rewards, dones, packed = zip(*results, strict=True)
        infos, reset_infos = zip(*map(pickle.loads, packed), strict=True)
        self.reset_infos = list(chain.from_iterable(reset_infos))
        joined = _join(np.concatenate, obs, self.observation_space)
        return joined, np.concatenate(rewards), np.concatenate(dones), list(chain.from_iterable(infos))

    def reset(self) -> VecEnvObs:
        arguments = [
            cloudpickle.dumps((self._seeds[group.slice], self._options[group.slice])) for group in self._groups
        ]
        results = self._call("reset", dict(zip(self._groups, arguments, strict=True)), self.max_restarts)
        for group, (obs, _) in zip(self._groups, results, strict=True):
            group.begun, group.last_obs = None, obs
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = list(chain.from_iterable(pickle.loads(packed) for _, packed in results))
        return _join(np.concatenate, [obs for obs, _ in results], self.observation_space)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        actors = [group.actor for group in self._groups if group.actor is not None]
        if actors and ray.is_initialized():
            ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=CLOSE_SECONDS)
            for actor in actors:
                ray.kill(actor)

    def get_images(self) -> Sequence[np.ndarray | None]:
        if self.render_mode != "rgb_array":
            warnings.warn(f"The render mode is {self.render_mode}, but images need `rgb_array`.", stacklevel=2)
            return [None] * self.num_envs
        return self._each(methodcaller("render"))

    def has_attr(self, attr_name: str) -> bool:
        return all(self._each(methodcaller("has_wrapper_attr", attr_name)))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._each(methodcaller("get_wrapper_attr", attr_name), indices=indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._each(setattr, attr_name, value, indices=indices)
        for i in self._get_indices(indices):
            group, k = self._place_of(i)
            group.attributes[k, attr_name] = value

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        def call(env: gym.Env) -> Any:
            return env.get_wrapper_attr(method_name)(*method_args, **method_kwargs)

        return self._each(call, indices=indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._each(is_wrapped, wrapper_class, indices=indices)

    def run_on_envs(self, function: Callable[..., Any], *args: Any, indices: VecEnvIndices = None) -> list[Any]:
        """
        Run a function where the environments are. No actor is replaced during it.

        :param function: takes an environment with its wrappers, and ``args``
        :param args: for the function
        :param indices: of environments; None: all
        :return: its results
        :raises RuntimeError: if an actor has died
        """
        for group in self._groups:
            if group.begun is not None:
                raise RuntimeError(f"The actor of {group} was replaced after the last step: step or reset first.")
        return self._each(function, *args, indices=indices, max_restarts=0)

    def _each(
        self, function: Callable[..., Any], *args: Any, indices: VecEnvIndices = None, max_restarts: int | None = None
    ) -> list[Any]:
        places = [self._place_of(i) for i in self._get_indices(indices)]
        chosen: dict[_Group, list[int]] = {}
        for group, k in places:
            chosen.setdefault(group, []).append(k)
        arguments = {group: cloudpickle.dumps((function, args, chosen[group])) for group in chosen}
        packed = self._call("each", arguments, self.max_restarts if max_restarts is None else max_restarts)
        results = {group: iter(pickle.loads(part)) for group, part in zip(chosen, packed, strict=True)}
        return [next(results[group]) for group, _ in places]

    def _place_of(self, index: int) -> "tuple[_Group, int]":
        """:return: the group of an environment, and its place there"""
        i, k = divmod(range(self.num_envs)[index], self.envs_per_actor)
        return self._groups[i], k

    # --- actors -------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("The RayVecEnv is closed: make a new one.")

    def _call(self, method: str, arguments: "dict[_Group, bytes]", max_restarts: int) -> list[Any]:
        """Call a method of several actors at the same time, and again for those that had to be replaced."""
        self._check_open()
        results = _results_of([getattr(group.actor, method).remote(packed) for group, packed in arguments.items()])
        for i, (group, packed) in enumerate(arguments.items()):
            while isinstance(results[i], ENDS):
                self._replace(group, results[i], max_restarts)
                results[i : i + 1] = _results_of([getattr(group.actor, method).remote(packed)])
        return results

    def _start_actors(self) -> None:
        made = [self._make(group) for group in self._groups]
        self._wait_for(made, self._groups)
        for group, result in zip(self._groups, _results_of(made), strict=True):
            if isinstance(result, ENDS):
                self._replace(group, result, self.max_restarts)
            else:
                group.node = result

    def _make(self, group: "_Group", is_restart: bool = False) -> Any:
        """:return: reference to the name of the node, when it has made the environments"""
        group.node = "a node that is not known yet"
        group.actor = self._actor_class.remote(str(group))
        return group.actor.make.remote(group.env_fns, is_restart)

    def _wait_for(self, made: list[Any], groups: "list[_Group]") -> None:
        late = ray.wait(made, num_returns=len(made), timeout=self.start_seconds)[1]
        if late:
            names = ", ".join(str(group) for group, reference in zip(groups, made, strict=True) if reference in late)
            raise RuntimeError(
                f"There is no actor with {names} after start_seconds={self.start_seconds}. Either Ray has no room for "
                f"actors with actor_options={self.actor_options} (free now: {ray.available_resources()}), or the "
                "environments take long to make."
            )

    def _replace(self, group: "_Group", end: Exception, max_restarts: int) -> None:
        """
        :param group: its actor has died
        :param end: what Ray says about it
        :raises RuntimeError: if it has been replaced often enough
        """
        while True:
            text = f"The actor of {group} on {group.node} has died: {' '.join(str(end).split())}"
            if group.n_restarts >= max_restarts:
                raise RuntimeError(
                    f"{text} It has been replaced {group.n_restarts} times. RayVecEnv(max_restarts=...) sets how often "
                    "that may happen."
                ) from end
            group.n_restarts += 1
            warnings.warn(
                f"{text} New environments are made, and the episodes of the old ones are truncated (restart "
                f"{group.n_restarts} of {max_restarts}).",
                stacklevel=4,
            )
            ray.kill(group.actor)
            try:
                self._begin_anew(group)
                return
            except ENDS as another:
                if isinstance(another, RayTaskError):
                    raise
                end = another

    def _begin_anew(self, group: "_Group") -> None:
        made = self._make(group, is_restart=True)
        self._wait_for([made], [group])
        group.node = ray.get(made)
        for (k, name), value in group.attributes.items():
            ray.get(group.actor.each.remote(cloudpickle.dumps((setattr, (name, value), [k]))))
        if group.last_obs is not None:
            group.begun = ray.get(group.actor.reset.remote(cloudpickle.dumps(([None] * group.n, [{}] * group.n))))


# RayVecEnv has no state of its own. Only environments of one actor share the random states of a process.
STATE[RayVecEnv] = ((), ())
SETTINGS[RayVecEnv] = ("envs_per_actor",)


@dataclass(eq=False)
class _Group:
    """
    Environments that share an actor.

    :param first: index of the first
    :param n: number of environments
    :param env_fns: pickled functions that make them
    """

    first: int
    n: int
    env_fns: bytes
    actor: Any = None
    node: str = ""
    n_restarts: int = 0
    attributes: dict[tuple[int, str], Any] = field(default_factory=dict)  # set by set_attr, by place and name
    last_obs: Any = None  # None before the first reset
    begun: tuple[Any, bytes] | None = None  # observations and packed infos of a reset that the caller does not know of

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.n)

    def __str__(self) -> str:
        last = self.first + self.n - 1
        return f"environment {last}" if self.n == 1 else f"environments {self.first} to {last}"

    def end_of_episodes(self, space: spaces.Space[Any]) -> tuple[Any, np.ndarray, np.ndarray, bytes]:
        """
        :param space: of observations
        :return: what a step of the actor returns, in which all episodes are truncated
        """
        assert self.begun is not None
        obs, packed = self.begun
        self.begun = None

        def row(k: int) -> Any:
            return _join(lambda arrays: arrays[0][k].copy(), [self.last_obs], space)

        infos = [{"TimeLimit.truncated": True, "terminal_observation": row(k)} for k in range(self.n)]
        return obs, np.zeros(self.n), np.ones(self.n, dtype=bool), cloudpickle.dumps((infos, pickle.loads(packed)))


class _Actor:
    """
    What runs in a Ray actor. Only stacked observations are left to Ray, which hands them over without a copy but
    read-only; everything else is pickled here, since what environments take and return may be changed in place.

    :param name: of its environments, which Ray puts in front of tracebacks and output
    """

    def __init__(self, name: str):
        self.name = name
        self.envs: list[gym.Env] = []
        self.reset_infos: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return self.name

    def make(self, env_fns: bytes, is_restart: bool) -> str:
        """:return: name of the node"""
        self.envs = [_patch_env(env_fn()) for env_fn in pickle.loads(env_fns)]
        self.reset_infos = [{} for _ in self.envs]
        for env in self.envs if is_restart else ():
            prepare_env(env)
        address, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
        return f"node {socket.gethostname()} ({address}, {node})"

    def step(self, packed: bytes) -> tuple[Any, np.ndarray, np.ndarray, bytes]:
        rows = []
        for i, (env, action) in enumerate(zip(self.envs, pickle.loads(packed), strict=True)):
            obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = obs
                obs, self.reset_infos[i] = env.reset()
            rows.append((obs, reward, done, info))
        all_obs, rewards, dones, infos = zip(*rows, strict=True)
        return self._stack(all_obs), np.stack(rewards), np.stack(dones), cloudpickle.dumps((infos, self.reset_infos))

    def reset(self, packed: bytes) -> tuple[Any, bytes]:
        obs = []
        for i, (env, seed, options) in enumerate(zip(self.envs, *pickle.loads(packed), strict=True)):
            one, self.reset_infos[i] = env.reset(seed=seed, **({"options": options} if options else {}))
            obs.append(one)
        return self._stack(obs), cloudpickle.dumps(self.reset_infos)

    def each(self, packed: bytes) -> bytes:
        function, args, places = pickle.loads(packed)
        return cloudpickle.dumps([function(self.envs[k], *args) for k in places])

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def _stack(self, obs: Sequence[Any]) -> Any:
        return _join(np.stack, obs, self.envs[0].observation_space)


def _join(join: Callable[[list[Any]], Any], obs: Sequence[Any], space: spaces.Space[Any]) -> Any:
    """
    :param join: makes one array of several
    :param obs: observations
    :param space: of observations
    :return: one observation, in which each array is joined
    """
    if isinstance(space, spaces.Dict):
        return {key: join([each[key] for each in obs]) for key in space.spaces}
    if isinstance(space, spaces.Tuple):
        return tuple(join([each[i] for each in obs]) for i in range(len(space.spaces)))
    return join(list(obs))


def _results_of(references: list[Any]) -> list[Any]:
    """:return: results of actors; what Ray says about the end of an actor, if it has died"""
    try:
        return ray.get(references)
    except ENDS:
        return [_result_or_end(reference) for reference in references]


def _result_or_end(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ENDS as end:
        if isinstance(end, RayTaskError):  # an environment's error can be of any class
            raise
        return end
