"""
Runs with options drawn at random, saved, continued in a new process and compared with themselves uninterrupted.

``python tests/mixes.py FIRST LAST`` tries the mixes of these seeds and says what it has found: all that differs without
a warning. A mix is made of its seed alone, so that a failure can be repeated by its number.
"""

import argparse
import copy
import json
import random
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import resume_script
import torch as th
from gymnasium import spaces
from gymnasium import wrappers as gym_wrappers
from resume_script import HER, Image, Records, SaveAt, bits, close, differences, multi_obs, new_process, plain
from rl_zoo3 import wrappers as zoo_wrappers
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from torch import nn
from twins import NormExtractor

from sb3_softsac import CheckpointCallback, SaveBestTrainingReturnCallback, SoftSAC
from sb3_softsac.buffers import map_obs

UNREADABLE = "unreadable"
"""A kind of environment whose state cannot be saved: its runs may differ, but have to say so."""


class Odd(gym.Env[Any, np.ndarray]):
    """Bounds, shapes and endings such as no tutorial has; attributes of many kinds."""

    def __init__(self, observation: str = "matrix", is_readable: bool = True):
        self.observation_space: spaces.Space[Any] = {
            "matrix": spaces.Box(-np.inf, np.inf, (2, 3), dtype=np.float64),
            "discrete": spaces.Discrete(5),
            "binary": spaces.MultiBinary(4),
        }[observation]
        self.action_space = spaces.Box(np.array([[-3.0, 0.0]]), np.array([[0.5, 4.0]]), dtype=np.float64)
        self.observation = observation
        self.position = np.zeros((2, 3))
        self.history: list[float] = []
        self.counts = {"episodes": 0, "steps": 0}
        self.queue: Iterator[int] | None = None if is_readable else iter(range(10**9))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=(2, 3))
        self.history, self.counts["episodes"] = [], self.counts["episodes"] + 1
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position += 0.1 * float(action.sum()) + 0.1 * self.np_random.normal(size=(2, 3))
        if self.queue is not None:
            self.position += 0.01 * (next(self.queue) % 7)
        self.history.append(float(self.position.mean()))
        self.counts["steps"] += 1
        terminated = bool(self.np_random.random() < 0.05)
        return self._observe(), self.history[-1] - 0.1 * len(self.history), terminated, False, {}

    def _observe(self) -> Any:
        if self.observation == "discrete":
            return int(abs(self.position[0, 0]) * 3) % 5
        if self.observation == "binary":
            return (self.position.ravel()[:4] > 0).astype(np.int8)
        return self.position.copy()


class Counting(BaseCallback):
    """A callback of the user's with a state that it gives and takes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def _on_step(self) -> bool:
        self.total += float(np.sum(self.locals["rewards"]))
        return True

    def get_state(self) -> Any:
        return {"total": self.total}

    def set_state(self, state: Any) -> None:
        self.total = state["total"]


class UnusedParameters(NormExtractor):
    """With a layer that no loss depends on: its parameters have no gradient, and no state in an optimiser."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.unused = nn.Linear(3, 3)


@dataclass
class Mix:
    """
    A run with options drawn at random.

    :param choices: what was drawn, in words
    :param make_env: makes the environments, with all wrappers
    :param policy: its name
    :param kwargs: of ``SoftSAC``
    :param steps: of the run
    :param stops: steps at which it is saved; the first in a model file, the second in a run folder
    :param callbacks: names, see :func:`make_callbacks`
    """

    choices: dict[str, Any]
    make_env: Callable[[], VecEnv]
    policy: str
    kwargs: dict[str, Any]
    steps: int
    stops: tuple[int, int]
    callbacks: tuple[str, ...] = ()
    make_eval_env: Callable[[], VecEnv] = field(default=resume_script.pendulum)


MUJOCO = ("Hopper-v5", "InvertedPendulum-v5", "HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "InvertedDoublePendulum-v5")
TASKS = {name: name for name in ("Pendulum-v1", "MountainCarContinuous-v0", *MUJOCO)}
OWN: dict[str, Any] = {
    "odd matrix": Odd,
    "odd discrete": partial(Odd, "discrete"),
    "odd binary": partial(Odd, "binary"),
    UNREADABLE: partial(Odd, "matrix", False),
}
# Functions, so that each environment has wrappers of its own
GYM_WRAPPERS: dict[str, Callable[[gym.Env], gym.Env]] = {
    "none": lambda env: env,
    "NormalizeObservation": gym_wrappers.NormalizeObservation,
    "NormalizeReward": gym_wrappers.NormalizeReward,
    "TimeAware": gym_wrappers.TimeAwareObservation,
    "RescaleAction": lambda env: gym_wrappers.RescaleAction(env, -1.0, 1.0),
    "StickyAction": lambda env: gym_wrappers.StickyAction(env, 0.3),
    "DelayObservation": lambda env: gym_wrappers.DelayObservation(env, 2),
    "Statistics": gym_wrappers.RecordEpisodeStatistics,
    "FrameStack": lambda env: gym_wrappers.FrameStackObservation(env, 2),
    "zoo history": lambda env: zoo_wrappers.HistoryWrapper(env, 2),
    "zoo noise": lambda env: zoo_wrappers.ActionNoiseWrapper(env, 0.1),
    "zoo smoothing": zoo_wrappers.ActionSmoothingWrapper,
    "zoo delayed reward": lambda env: zoo_wrappers.DelayedRewardWrapper(env, 3),
    "contrib time feature": lambda env: TimeFeatureWrapper(env, 40),
}
FOR_VECTORS_ONLY = ("NormalizeObservation", "TimeAware", "FrameStack", "zoo history", "contrib time feature")
VEC_WRAPPERS: dict[str, Callable[[VecEnv, float], VecEnv]] = {
    "normalize": lambda env, gamma: VecNormalize(env, gamma=gamma),
    "normalize rewards": lambda env, gamma: VecNormalize(env, norm_obs=False, clip_reward=5.0),
    "normalize observations": lambda env, gamma: VecNormalize(env, norm_reward=False, clip_obs=3.0),
    "frame stack": lambda env, gamma: VecFrameStack(env, 2),
    "monitor": lambda env, gamma: VecMonitor(env),
    "check nan": lambda env, gamma: VecCheckNan(env, raise_exception=True),
}
CALLBACKS: dict[str, Callable[[Mix, Path], BaseCallback]] = {
    "evaluation": lambda mix, folder: EvalCallback(
        seeded(mix.make_eval_env()), eval_freq=11, n_eval_episodes=1, log_path=str(folder), verbose=0, warn=False,
        callback_after_eval=StopTrainingOnNoModelImprovement(100),
    ),
    "max episodes": lambda mix, folder: StopTrainingOnMaxEpisodes(1000),
    "every n": lambda mix, folder: EveryNTimesteps(17, Counting()),
    "own": lambda mix, folder: Counting(),
    "best return": lambda mix, folder: SaveBestTrainingReturnCallback(save_path=str(folder), min_episodes=1),
}  # fmt: skip


def seeded(env: VecEnv) -> VecEnv:
    env.seed(5)
    return env


def make_env(
    made_by: Any, n_envs: int, limit: int, wrapper: str, vec_wrappers: list[str], subproc: bool, gamma: float
) -> VecEnv:
    def wrapped() -> gym.Env:
        inner = gym.make(made_by).unwrapped if isinstance(made_by, str) else made_by()  # with our time limit only
        return GYM_WRAPPERS[wrapper](gym_wrappers.TimeLimit(inner, limit))

    made = make_vec_env(wrapped, n_envs=n_envs, vec_env_cls=SubprocVecEnv if subproc else DummyVecEnv)
    for name in vec_wrappers:
        made = VEC_WRAPPERS[name](made, gamma)
    return made


def draw(seed: int) -> Mix:
    """
    :param seed: of all choices
    :return: the mix of this number
    """
    rng = random.Random(seed)
    kind = rng.choices(["task", "own", "image", "dict", "her"], [10, 4, 1, 1, 1])[0]
    n_envs = rng.choice([1, 1, 2, 3])
    gamma = rng.choice([0.9, 0.99])
    env = draw_env(rng, kind, n_envs)
    options = {
        "batch_size": 4 if kind in ("image", "dict") else rng.choice([4, 7, 16]),
        "gamma": gamma,
        "seed": rng.choice([None, 0, 3]),
        **draw_buffer(rng, kind, n_envs),
        **draw_updates(rng, n_envs),
        **draw_networks(rng, kind),
    }
    # What our C++ does not take would be compiled by Inductor, which takes half a minute for each form of an update
    networks = options["policy_kwargs"]
    is_plain = kind in ("task", "own") and env["name"] not in ("odd discrete", "odd binary")
    is_plain &= not (options["use_sde"] or options["use_actor_target"] or networks.get("separate_log_std_net"))
    is_plain &= networks.get("optimizer_class") is th.optim.Adam and "features_extractor_class" not in networks
    is_newer = not options["use_critic_target"] or bool(networks.keys() & NEWER_NETWORKS)
    options["compile"] = is_plain and not is_newer and rng.random() < 0.5

    # Drawn apart, so that mixes of older numbers stay what they were otherwise
    newer = random.Random(f"compiled newer networks {seed}")
    if is_plain and is_newer and networks.get("normalization") != "layer" and not networks.get("dropout_rate"):
        options["compile"] = newer.random() < 0.7
    offline = random.Random(f"offline data {seed}")
    if offline.random() < 0.2:
        options["offline_fraction"] = offline.choice([0.25, 0.5, 1.0])
    if any(name.startswith("normalize") and name != "normalize observations" for name in env["vec_wrappers"]):
        options.pop("normalize_rewards", None)

    steps = rng.randint(60, 110)
    stops = sorted(rng.sample(range(5, steps), 2))
    callbacks = tuple(each for each in CALLBACKS if rng.random() < 0.25)
    make = partial(
        make_env, env["made_by"], limit=env["limit"], wrapper=env["wrapper"], vec_wrappers=env["vec_wrappers"]
    )
    return Mix(
        choices={**env, "callbacks": callbacks, "n_envs": n_envs, **options},
        make_env=partial(make, n_envs=n_envs, subproc=env["subproc"], gamma=gamma),
        make_eval_env=partial(make, n_envs=1, subproc=False, gamma=gamma),
        policy={"image": "CnnPolicy", "dict": "MultiInputPolicy", "her": "MultiInputPolicy"}.get(kind, "MlpPolicy"),
        kwargs=options,
        steps=steps * n_envs,
        stops=(stops[0] * n_envs, stops[1] * n_envs),
        callbacks=callbacks,
    )


def draw_env(rng: random.Random, kind: str, n_envs: int) -> dict[str, Any]:
    """
    :return: name; made_by: id or function; limit: of steps; wrapper: of Gymnasium or the zoo; vec_wrappers, from the
        inside; subproc: whether in processes of their own
    """
    env = {"limit": rng.randint(8, 40), "wrapper": "none", "vec_wrappers": [], "subproc": False}
    if n_envs > 1:
        env["subproc"] = rng.random() < 0.1
    if kind not in ("task", "own"):
        of_kind: dict[str, Any] = {"image": Image, "dict": multi_obs, "her": bits.args[0]}
        return {**env, "name": kind, "made_by": of_kind[kind], "limit": 6 if kind == "her" else env["limit"]}
    table = TASKS if kind == "task" else OWN
    name = rng.choice(list(table))
    if rng.random() < 0.5:
        not_here = () if kind == "task" else FOR_VECTORS_ONLY
        env["wrapper"] = rng.choice([each for each in GYM_WRAPPERS if each not in not_here])
    wrappers = [each for each in VEC_WRAPPERS if rng.random() < 0.2]
    rng.shuffle(wrappers)
    if kind == "own":  # some of their spaces can be neither normalised nor stacked
        wrappers = [each for each in wrappers if each in ("monitor", "check nan", "normalize rewards")]
    # One VecNormalize, which has to be the outermost
    normalizing = [each for each in wrappers if each.startswith("normalize")]
    env["vec_wrappers"] = [each for each in wrappers if each not in normalizing] + normalizing[:1]
    return {**env, "name": name, "made_by": table[name]}


def draw_buffer(rng: random.Random, kind: str, n_envs: int) -> dict[str, Any]:
    rows, learning_starts = rng.choice([40, 100, 1000]), rng.choice([0, 10, 30])
    if kind == "her":
        settings = rng.choice([{}, {"copy_info_dict": True}, {"n_sampled_goal": 2}])
        return {**HER, "buffer_size": 1000 * n_envs, "learning_starts": 12 * n_envs, "replay_buffer_kwargs": settings}
    sizes = {"buffer_size": rows * n_envs, "learning_starts": learning_starts}
    buffer = rng.choice(["own"] * 4 + ["sb3", "sb3 lean"] * (kind in ("task", "own")))
    if buffer == "own":
        return {**sizes, "n_steps": rng.choice([1, 1, 2, 3])}
    lean = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    return {**sizes, "replay_buffer_class": SB3ReplayBuffer, **(lean if buffer == "sb3 lean" else {})}


def draw_updates(rng: random.Random, n_envs: int) -> dict[str, Any]:
    in_episodes = n_envs == 1 and rng.random() < 0.2
    options = {
        "train_freq": (rng.randint(1, 2), "episode") if in_episodes else rng.randint(1, 6),
        "gradient_steps": rng.choice([-1, 1, 1, 2, 3]),
        "policy_delay": rng.choice([1, 1, 2, 3]),
        "policy_delay_compensation": rng.random() < 0.3,
        "target_update_interval": rng.choice([1, 1, 2, 5]),
        "use_actor_target": rng.random() < 0.2,
        "random_steps": rng.choice([None, None, 0, 25]),
        "ent_coef": rng.choice(["auto", "auto", "auto_0.1", 0.2]),
        "entropy_space": rng.choice(["normalized", "env"]),
        "max_grad_norm": rng.choice([None, None, 0.5]),
        "learning_rate": rng.choice([3e-4, 1e-3, LinearSchedule(1e-3, 0.0, 0.5)]),
        "qf_learning_rate": rng.choice([None, None, 2e-3]),
        "use_critic_target": rng.random() < 0.9,
    }
    if isinstance(options["ent_coef"], str):
        options["ent_coef_loss"] = rng.choice(["log", "log", "exp"])
        options["ent_coef_learning_rate"] = rng.choice([None, 1e-3, LinearSchedule(1e-3, 1e-4, 0.8)])
    if rng.random() < 0.25:
        noises = rng.choice([NormalActionNoise, OrnsteinUhlenbeckActionNoise])
        options["action_noise"] = (noises, rng.uniform(0.05, 0.3))
    return options


def draw_networks(rng: random.Random, kind: str) -> dict[str, Any]:
    networks: dict[str, Any] = {
        "net_arch": rng.choice([[8], [16, 16], {"pi": [8], "qf": [16, 8]}]),
        "n_critics": rng.choice([1, 2, 2, 3]),
        "weight_init": rng.choice([None, None, "xavier", "orthogonal"]),
        "share_features_extractor": rng.random() < 0.15,
    }
    optimizer = rng.choice(["Adam"] * 4 + ["AdamW", "amsgrad", "SGD", "RMSprop"])
    if optimizer == "amsgrad":
        networks["optimizer_kwargs"] = {"amsgrad": True}
    else:
        networks["optimizer_class"] = getattr(th.optim, optimizer)
    if kind in ("task", "own") and rng.random() < 0.2:
        networks["features_extractor_class"] = rng.choice([NormExtractor, UnusedParameters])
    options = {"use_sde": rng.random() < 0.3, "policy_kwargs": networks}
    if rng.random() < 0.3:
        options |= draw_newer_networks(rng, networks)
    if options["use_sde"]:
        networks |= {"use_expln": rng.random() < 0.3, "log_std_init": rng.choice([-3.0, -1.0])}
        options["sde_sample_freq"] = rng.choice([-1, 1, 2, 3, 5])
        options["use_sde_at_warmup"] = rng.random() < 0.3
        options.pop("max_noise_repeat", None)
    elif rng.random() < 0.4:
        networks |= {"log_std_bounding": "tanh", "log_std_bounds": (-5, 2)}
        networks["separate_log_std_net"] = rng.random() < 0.5
    return options


NEWER_NETWORKS = {"normalization", "normalize_input", "residual_expansion", "unit_norm", "dropout_rate", "n_atoms"}


def draw_newer_networks(rng: random.Random, networks: dict[str, Any]) -> dict[str, Any]:
    """
    :param networks: arguments of the policy; some are added
    :return: options that go with them
    """
    networks["normalization"] = rng.choice([None, "batch", "batch", "layer"])
    networks["normalize_input"] = rng.random() < 0.5
    if not isinstance(networks["net_arch"], dict):
        networks["residual_expansion"] = rng.choice([None, 1, 3])
    networks["unit_norm"] = rng.choice([None, "weights"])
    networks["dropout_rate"] = rng.choice([0.0, 0.0, 0.2])
    networks["n_atoms"] = rng.choice([None, 11])
    options = {"max_noise_repeat": rng.choice([1, 5])}
    options["normalize_rewards"] = rng.choice([None, "std", "bounded" if networks["n_atoms"] else "std"])
    if networks["normalization"] == "batch" or networks["normalize_input"]:
        networks["unit_norm"] = rng.choice([networks["unit_norm"], "all"])
        options["joint_batch"] = rng.choice([None, "critic", "all"])
    return options


def make_model(mix: Mix) -> SoftSAC:
    kwargs, env = dict(mix.kwargs), mix.make_env()
    if "action_noise" in kwargs:
        cls, sigma = kwargs["action_noise"]
        mean = np.zeros(env.action_space.shape or ())
        kwargs["action_noise"] = cls(mean, sigma + mean)
    kwargs |= offline_data(mix, env)
    return SoftSAC(cast(Any, mix.policy), env, device="cpu", **kwargs)


def offline_data(mix: Mix, env: VecEnv) -> dict[str, Any]:
    """
    :return: random episodes, if the mix wants some; they are in no file, so a continued run is given them again
    """
    if "offline_fraction" not in mix.kwargs:
        return {}
    spaces = copy.deepcopy([env.observation_space, env.action_space])
    for number, space in enumerate(spaces):
        space.seed(number)

    def draw(space: Any, n: int) -> Any:
        return map_obs(lambda *parts: np.stack(parts), *(space.sample() for _ in range(n)))

    episodes = [
        {
            "observations": draw(spaces[0], n_steps + 1),
            "actions": draw(spaces[1], n_steps),
            "rewards": np.linspace(-1.0, 1.0, n_steps),
            "terminations": np.arange(n_steps) == (n_steps - 1 if n_steps % 2 else -1),
            "truncations": np.arange(n_steps) == n_steps - 1,
        }
        for n_steps in (6, 11, 1, 8)
    ]
    return {"offline_data": episodes}


def learn(mix: Mix, model: SoftSAC, folder: Path, saves: SaveAt | None = None) -> tuple[dict[str, Any], list[Any]]:
    """
    Train to the end of the run.

    :return: all that it consists of then, and what was logged; plain data
    """
    records = Records()
    callbacks: list[BaseCallback] = [CALLBACKS[name](mix, folder) for name in mix.callbacks]
    if saves is not None:
        saves.records = records
    model.set_logger(Logger(folder=None, output_formats=[records]))
    every = [*callbacks, *([saves] if saves is not None else [])]
    model.learn(mix.steps - model.num_timesteps, CallbackList(every), log_interval=1)
    state = resume_script.snapshot(model)
    state["callbacks"] = plain([callback_numbers(each) for each in callbacks])
    close(model)
    return state, [plain([step, row]) for step, row in records.rows]


def callback_numbers(callback: BaseCallback) -> dict[str, Any]:
    kinds = (bool, int, float, list)
    numbers = {name: value for name, value in vars(callback).items() if isinstance(value, kinds)}
    del numbers["num_timesteps"]  # of the last call, or of the last start of training, and that of the model then
    inner = getattr(callback, "callback", None)
    return {**numbers, **({"inner": callback_numbers(inner)} if isinstance(inner, BaseCallback) else {})}


def run(seed: int, folder: Path) -> tuple[dict[str, Any], list[Any], dict[int, int]]:
    """
    The whole run of a mix, saving at its stops.

    :return: what :func:`learn` returns, and how much had been logged at each stop
    """
    begin()
    mix = draw(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_model(mix)
        checkpoints = CheckpointCallback(0, folder / "run", keep_last=100, on_signal=False)
        checkpoints.init_callback(model)
        saves = SaveAt(mix.stops, folder, checkpoints, Records())
        return *learn(mix, model, folder, saves), saves.logged


def resume(seed: int, paths: list[Path]) -> list[tuple[dict[str, Any], list[Any], list[str]]]:
    """
    :return: for each path, what :func:`learn` returns of the continued run, and the warnings that it gave
    """
    return [resume_one(seed, path, paths[0].parent) for path in paths]


def resume_one(seed: int, path: Path, folder: Path) -> tuple[dict[str, Any], list[Any], list[str]]:
    begin()
    mix = draw(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A features extractor of the tests' own has no name that a file could be trusted with
        env = mix.make_env()
        again = offline_data(mix, env)
        model = SoftSAC.load(path, env, device="cpu", force_reset=False, allow_pickle=True, **again)
        state, rows = learn(mix, model, folder)  # in another one, there would be other best models
    ours = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return state, rows, [text for text in ours if "continu" in text or "not saved" in text or "lost" in text]


def begin() -> None:
    """Nothing may come from what the process began with."""
    random.seed(12345)
    np.random.seed(12345)
    th.manual_seed(12345)
    th.set_num_threads(1)


@dataclass
class Finding:
    """What came of one stop of a mix."""

    seed: int
    stop: int
    differs: list[str]
    announced: list[str]

    @property
    def is_fault(self) -> bool:
        return bool(self.differs) and not self.announced


def try_mixes(seeds: Iterable[int]) -> Iterator[tuple[int, list[Finding] | str]]:
    """
    :param seeds: numbers of mixes
    :return: each with a finding for each stop, or with the error that it has raised
    """
    # One process runs them, another continues them
    with new_process() as runs, new_process() as continues, tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            folder = Path(name, str(seed))
            folder.mkdir()
            try:
                yield seed, _try_mix(seed, folder, runs, continues)
            except Exception:
                yield seed, traceback.format_exc(limit=-3)
            shutil.rmtree(folder)


def _try_mix(seed: int, folder: Path, runs: Executor, continues: Executor) -> list[Finding]:
    mix = draw(seed)
    whole, rows, logged = runs.submit(run, seed, folder).result()
    paths = [folder / f"{mix.stops[0]}.zip", next(folder.glob(f"run/step-{mix.stops[1]}-*.zip"))]
    found = []
    for stop, resumed in zip(mix.stops, continues.submit(resume, seed, paths).result(), strict=True):
        state, later_rows, announced = resumed
        differs = differences(whole, state, "state") + differences(
            plain(rows[logged[stop] :]), plain(later_rows), "log"
        )
        found.append(Finding(seed, stop, differs, announced))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, help="one past the last")
    parser.add_argument("--show", action="store_true", help="print what each mix consists of")
    args = parser.parse_args()
    counts = dict.fromkeys(("exact", "announced", "faults"), 0)
    for seed, found in try_mixes(range(args.first, args.last)):
        choices = json.dumps(draw(seed).choices, default=str)
        if args.show:
            print(seed, choices)
        if isinstance(found, str):
            counts["faults"] += 1
            print(f"{seed}: {choices}\n{found}", flush=True)
            continue
        for finding in found:
            kind = "faults" if finding.is_fault else "announced" if finding.announced else "exact"
            counts[kind] += 1
            if finding.is_fault:
                print(
                    f"{seed} at {finding.stop}: {finding.differs[:6]} of {len(finding.differs)}\n  {choices}",
                    flush=True,
                )
            elif finding.announced:
                what = "differs" if finding.differs else "is exact"
                print(f"{seed} at {finding.stop} {what}: {finding.announced[0][:300]}", flush=True)
    print(f"{args.last - args.first} mixes, continuations: {counts}")


if __name__ == "__main__":
    import mixes  # the functions that other processes run must not be those of __main__

    mixes.main()
