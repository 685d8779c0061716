"""
What ``test_resume.py`` runs, and runs again in processes of their own: cases, runs that save, runs that continue.

``python tests/resume_script.py CASE FOLDER ...`` is a training script as a scheduler would start it.
"""

import argparse
import multiprocessing as mp
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_softsac import CheckpointCallback, ReplayBuffer, SoftSAC
from sb3_softsac.persistence import buffer_state
from sb3_softsac.persistence.codec import encode

EPISODE = 40  # steps of Pendulum's episodes


class Image(gym.Env[np.ndarray, np.ndarray]):
    """A dot in a picture, moved by the action and by chance; channels last, as most environments have them."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.at = np.zeros(2)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.uniform(0, 35, 2), 0
        return self._picture(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at = np.clip(self.at + 3 * action + self.np_random.normal(size=2), 0, 35)
        self.steps += 1
        return self._picture(), -float(np.abs(self.at - 17).mean()), False, self.steps >= 25, {}

    def _picture(self) -> np.ndarray:
        picture = np.zeros((36, 36, 1), dtype=np.uint8)
        picture[tuple(self.at.astype(int))] = 255
        return picture


def vec_env(env: Any, n_envs: int = 1, steps: int | None = None, vec_env_cls: Any = None) -> VecEnv:
    """Unseeded environments with a short time limit."""
    kwargs = {} if steps is None else {"max_episode_steps": steps}
    return make_vec_env(env, n_envs=n_envs, env_kwargs=kwargs, vec_env_cls=vec_env_cls)


def pendulum(n_envs: int = 1, vec_env_cls: Any = None) -> VecEnv:
    return vec_env("Pendulum-v1", n_envs, EPISODE, vec_env_cls)


def multi_obs() -> gym.Env[Any, Any]:
    state = np.random.get_state()
    np.random.seed(0)  # it draws what its observations look like
    env = SimpleMultiObsEnv(random_start=False, discrete_actions=False, channel_last=False)
    np.random.set_state(state)
    env.max_count = 12
    return env


@dataclass
class Case:
    """A run of ``steps`` environment steps that is saved at each of ``stops``."""

    make_env: Callable[[], VecEnv] = pendulum
    policy: str = "MlpPolicy"
    steps: int = 120
    stops: tuple[int, ...] = (70,)
    eval_freq: int = 0  # calls of the callback
    kwargs: dict[str, Any] = field(default_factory=dict)

    def make(self) -> SoftSAC:
        small: dict[str, Any] = {"buffer_size": 500, "learning_starts": 30, "batch_size": 16, "seed": 0}
        policy_kwargs: dict[str, Any] = {"net_arch": [16, 16], **self.kwargs.get("policy_kwargs", {})}
        kwargs = {**small, **self.kwargs, "policy_kwargs": policy_kwargs}
        return SoftSAC(cast(Any, self.policy), self.make_env(), device="cpu", **kwargs)


def noise(cls: Any, dim: int) -> Any:
    return cls(np.zeros(dim), 0.2 * np.ones(dim))


def mujoco(name: str) -> Case:
    return Case(partial(vec_env, f"{name}-v5", 1, 60), steps=110, stops=(30, 85))


# 20: before learning starts; 80: an episode ends, its log and an evaluation are due; 97: in mid-episode; 100 and 101: a
# ring of 100 rows closes
STOPS = (20, 80, 97, 100, 101)
ALL_OPTIONS: dict[str, Any] = {
    "qf_learning_rate": LinearSchedule(1e-3, 1e-4, 1.0), "ent_coef_learning_rate": 2e-3, "policy_delay": 2,
    "policy_delay_compensation": True, "target_update_interval": 3, "use_actor_target": True, "random_steps": 45,
    "ent_coef_loss": "exp", "entropy_space": "env", "max_grad_norm": 1.0,
    "policy_kwargs": {"log_std_bounding": "tanh", "log_std_bounds": (-5, 2), "weight_init": "xavier", "n_critics": 3},
}  # fmt: skip
XQC: dict[str, Any] = {
    "normalization": "batch", "normalize_input": True, "unit_norm": "all", "n_atoms": 21, "residual_expansion": 2,
}  # fmt: skip
DROQ: dict[str, Any] = {"normalization": "layer", "dropout_rate": 0.1, "unit_norm": "weights"}
HER = {"replay_buffer_class": HerReplayBuffer, "batch_size": 10}
bits = partial(vec_env, partial(BitFlippingEnv, n_bits=4, continuous=True, max_steps=6))
CASES: dict[str, Case] = {
    "plain": Case(stops=STOPS, eval_freq=30),
    "small_ring": Case(stops=STOPS, kwargs={"buffer_size": 100}),
    "crashes": Case(steps=260, eval_freq=30, kwargs={"buffer_size": 70, "n_steps": 2}),
    "smaller_ring": Case(stops=(29, 30, 58, 59, 101), kwargs={"buffer_size": 29, "n_steps": 3}),
    "HalfCheetah": mujoco("HalfCheetah"),
    "Ant": mujoco("Ant"),
    "Humanoid": mujoco("Humanoid"),
    "Hopper": mujoco("Hopper"),
    "Walker2d": mujoco("Walker2d"),
    "Swimmer": mujoco("Swimmer"),
    "InvertedPendulum": mujoco("InvertedPendulum"),
    "train_freq": Case(stops=(20, 78, 80, 97), eval_freq=20, kwargs={"train_freq": 4, "gradient_steps": 2}),
    "all_steps": Case(stops=(41, 60), kwargs={"train_freq": 5, "gradient_steps": -1}),
    "episodes": Case(stops=(20, 70, 80), kwargs={"train_freq": (1, "episode"), "gradient_steps": 10}),
    "gsde": Case(stops=(20, 80, 97), kwargs={"use_sde": True, "train_freq": 8}),
    "gsde_sampling": Case(
        stops=(20, 70, 72), kwargs={"use_sde": True, "sde_sample_freq": 4, "train_freq": 10, "learning_starts": 20}
    ),
    "gsde_warmup": Case(
        partial(pendulum, 4), steps=200, stops=(20, 72),
        kwargs={"use_sde": True, "use_sde_at_warmup": True, "use_actor_target": True},
    ),
    # In mid-rollout, with an exploration matrix for each environment
    "gsde_envs": Case(
        partial(vec_env, "Hopper-v5", 2), steps=800, stops=(602,), kwargs={"use_sde": True, "train_freq": 4}
    ),
    "gsde_sampling_envs": Case(
        partial(pendulum, 2), stops=(62, 78), kwargs={"use_sde": True, "train_freq": 2, "sde_sample_freq": 3}
    ),
    "normal_noise": Case(stops=STOPS, kwargs={"action_noise": noise(NormalActionNoise, 1)}),
    "ou_noise": Case(stops=STOPS, kwargs={"action_noise": noise(OrnsteinUhlenbeckActionNoise, 1)}),
    "vectorised_noise": Case(
        partial(pendulum, 3), stops=(30, 78, 99), kwargs={"action_noise": noise(OrnsteinUhlenbeckActionNoise, 1)}
    ),
    "n_steps": Case(stops=STOPS, kwargs={"n_steps": 3, "buffer_size": 100}),
    "her": Case(bits, "MultiInputPolicy", stops=(20, 65, 66), kwargs=HER),
    "her_infos": Case(
        partial(bits, 2), "MultiInputPolicy", stops=(60, 82, 96),
        kwargs={**HER, "buffer_size": 80, "replay_buffer_kwargs": {"copy_info_dict": True}},
    ),
    "vec_normalize": Case(lambda: VecNormalize(pendulum(2)), stops=(20, 80, 96), eval_freq=20),
    "frame_stack": Case(lambda: VecFrameStack(pendulum(2), 3), stops=(20, 80, 96)),
    "four_envs": Case(partial(pendulum, 4), steps=400, stops=(40, 160, 300), kwargs={"buffer_size": 300}),
    "subproc": Case(partial(pendulum, 2, SubprocVecEnv), stops=(20, 98)),
    "all_options": Case(stops=STOPS, kwargs={**ALL_OPTIONS, "learning_rate": LinearSchedule(1e-3, 0.0, 0.5)}),
    "fixed_ent_coef": Case(kwargs={"ent_coef": 0.2}),
    # Actions are compiled from the beginning, updates from the second one: that of step 32
    "compiled": Case(
        stops=(20, 31, 32, 80, 97),
        kwargs={"compile": True, "learning_rate": LinearSchedule(1e-3, 0.0, 0.5), "random_steps": 10},
    ),
    "compiled_gsde": Case(stops=(32, 70), kwargs={"compile": True, "use_sde": True, "train_freq": 4}),
    "compiled_delayed": Case(
        stops=(32, 70), kwargs={"compile": True, "use_sde": True, "policy_delay": 2, "train_freq": 4}
    ),
    "xqc": Case(
        lambda: pendulum(2), stops=(20, 62, 80, 96),
        kwargs={
            "joint_batch": "critic", "normalize_rewards": "bounded", "max_noise_repeat": 16, "policy_delay": 3,
            "learning_rate": "lin_1e-3_1e-4", "policy_kwargs": XQC,
        },
    ),
    # Compiled from the second update on: that of step 64
    "compiled_blocks": Case(
        lambda: pendulum(2), stops=(20, 64, 80, 96),
        kwargs={"compile": True, "joint_batch": "all", "normalize_rewards": "std", "policy_kwargs": XQC},
    ),
    "droq": Case(kwargs={"normalize_rewards": "std", "policy_kwargs": DROQ}),
    "sb3_buffer": Case(stops=(60, 97, 100), kwargs={"replay_buffer_class": SB3ReplayBuffer, "buffer_size": 100}),
    "sb3_memory": Case(
        stops=(60, 97, 100),
        kwargs={
            "replay_buffer_class": SB3ReplayBuffer, "buffer_size": 100, "optimize_memory_usage": True,
            "replay_buffer_kwargs": {"handle_timeout_termination": False},
        },
    ),
    "dict_obs": Case(partial(vec_env, multi_obs), "MultiInputPolicy", stops=(20, 60, 67), kwargs={"batch_size": 4}),
    "sb3_dict": Case(
        partial(vec_env, multi_obs, 2), "MultiInputPolicy", stops=(60, 68),
        kwargs={"batch_size": 4, "replay_buffer_class": DictReplayBuffer},
    ),
    "image": Case(partial(vec_env, Image, 2), "CnnPolicy", steps=80, stops=(50, 56), kwargs={"batch_size": 4}),
}  # fmt: skip


class Records(KVWriter):
    """A logger's output, kept."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        clock = ("time/fps", "time/time_elapsed", "time/compile_seconds")
        self.rows.append((step, {key: value for key, value in key_values.items() if key not in clock}))

    def close(self) -> None:
        pass


class SaveAt(BaseCallback):
    """
    Save model files, and checkpoints in a run folder, at given steps.

    :param stops: environment steps
    :param folder: of ``<step>.zip``
    :param checkpoints: told to save a checkpoint too
    :param records: how many rows had been logged is kept in ``logged``, by step
    """

    def __init__(self, stops: tuple[int, ...], folder: Path, checkpoints: CheckpointCallback, records: Records):
        super().__init__()
        self.stops = stops
        self.folder = folder
        self.checkpoints = checkpoints
        self.records = records
        self.logged: dict[int, int] = {}

    def _on_step(self) -> bool:
        if self.num_timesteps in self.stops:
            self.logged[self.num_timesteps] = len(self.records.rows)
            self.model.save(self.folder / f"{self.num_timesteps}.zip")
            self.checkpoints.save()
        return True


@dataclass
class Outcome:
    """What a run comes to, and all it has logged; plain data."""

    state: dict[str, Any]
    rows: list[tuple[int, dict[str, Any]]]
    complaints: list[str] = field(default_factory=list)
    logged: dict[int, int] = field(default_factory=dict)


def eval_callback(case: Case, folder: Path) -> EvalCallback | None:
    if case.eval_freq == 0:
        return None
    env: VecEnv = pendulum(vec_env_cls=DummyVecEnv)
    if case.make_env is CASES["vec_normalize"].make_env:
        env = VecNormalize(env, training=False, norm_reward=False)
    env.seed(5)
    return EvalCallback(env, n_eval_episodes=2, eval_freq=case.eval_freq, log_path=str(folder), verbose=0, warn=False)


def learn(
    model: SoftSAC, case: Case, total: int, folder: Path, saves: BaseCallback | None = None, **kwargs: Any
) -> Outcome:
    """Learn until ``total`` steps."""
    records = Records()
    if isinstance(saves, SaveAt):
        saves.records = records
    model.set_logger(Logger(folder=None, output_formats=[records]))
    evaluation = eval_callback(case, folder)
    callbacks = [each for each in (evaluation, saves) if each is not None]
    model.learn(total - model.num_timesteps, callbacks, log_interval=1, **kwargs)
    return Outcome(snapshot(model, evaluation), records.rows)


def run(case: Case, folder: Path, **kwargs: Any) -> Outcome:
    """The whole run, saving at all stops, in ``<step>.zip`` and ``run/``."""
    model = case.make()
    checkpoints = CheckpointCallback(0, folder / "run", keep_last=100, on_signal=False)
    checkpoints.init_callback(model)
    saves = SaveAt(case.stops, folder, checkpoints, Records())
    outcome = learn(model, case, case.steps, folder, saves, **kwargs)
    outcome.logged = saves.logged
    close(model)
    return outcome


def resume(name: str, paths: list[Path], total: int | None = None, checkpoint_at: int | None = None) -> list[Outcome]:
    """Load what another process has saved, each in turn, and learn until ``total`` steps (None: those of the case)."""
    case = CASES[name]
    outcomes = []
    for path in paths:
        # Nothing may come from what this process began with
        random.seed(12345)
        np.random.seed(12345)
        th.manual_seed(12345)
        th.set_num_threads(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = SoftSAC.load(path, case.make_env(), device="cpu", force_reset=False)
            saves = None if checkpoint_at is None else CheckpointCallback(checkpoint_at, path, keep_last=2)
            outcome = learn(model, case, total or case.steps, path.parent / "resumed", saves)
        close(model)
        outcome.complaints = [
            str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)
        ]
        outcomes.append(outcome)
    return outcomes


def close(model: SoftSAC) -> None:
    assert model.env is not None
    model.env.close()


def new_process() -> ProcessPoolExecutor:
    """A process that has done nothing before."""
    context = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["resume_script", "mixes"])
    return ProcessPoolExecutor(1, context)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of the tests' modules returns in a process that has done nothing before."""
    with new_process() as pool:
        return pool.submit(function, *args).result()


def snapshot(model: SoftSAC, evaluation: EvalCallback | None = None) -> dict[str, Any]:
    """All that a run consists of, by name; and what its environments do next."""
    assert model.env is not None and model.replay_buffer is not None and model.ep_info_buffer is not None
    numpy_state = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "parameters": model.get_parameters(),
        "ent_coef": [model.log_ent_coef, model.ent_coef_tensor],
        "random": [random.getstate(), numpy_state, th.get_rng_state()],
        "replay_buffer": buffer_contents(model.replay_buffer),
        "last": [model._last_obs, model._last_original_obs, model._last_episode_starts],
        "counters": [
            model.num_timesteps, model._episode_num, model._n_updates, model._total_timesteps,
            model._current_progress_remaining, model._rollout,
        ],
        "ep_info_buffer": list(model.ep_info_buffer),
        "ep_success_buffer": list(model.ep_success_buffer or ()),
        "exploration": model._exploration_state(),
        "action_noise": encode(model.action_noise),
        "action_space": encode(model.action_space),
    }  # fmt: skip
    for name in ("_reward_scale", "_held_noise"):  # old runs have none
        if getattr(model, name) is not None:
            state[name] = encode(getattr(model, name))
    if model._offline_source is not None:
        state["offline"] = encode(model._offline_source)
    if evaluation is not None:
        state["evaluations"] = [
            evaluation.evaluations_timesteps, evaluation.evaluations_results, evaluation.evaluations_length,
            evaluation.n_calls, evaluation.best_mean_reward, evaluation.last_mean_reward,
        ]  # fmt: skip
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        of_obs = vars(normalize).get("obs_rms", {})  # missing with norm_obs=False
        statistics = [normalize.ret_rms, *(of_obs.values() if isinstance(of_obs, dict) else [of_obs])]
        state["normalize"] = [[vars(rms) for rms in statistics], normalize.returns]
    # Fixed actions, through the end of an episode and past it
    random_actions = np.random.default_rng(0)
    low, high = (
        np.broadcast_to(b, (model.n_envs, *model.action_space.shape))
        for b in (model.action_space.low, model.action_space.high)
    )
    state["next"] = [model.env.step(random_actions.uniform(low, high).astype(np.float32)) for _ in range(EPISODE + 5)]
    return cast(dict[str, Any], plain(state))


def buffer_contents(buffer: SB3ReplayBuffer) -> dict[str, Any]:
    if isinstance(buffer, ReplayBuffer):
        names = ["observations", "next_observations", "actions", "rewards", "dones", "timeouts"]
        rows: dict[str, Any] = {name: getattr(buffer, name) for name in names}
        rows = {
            name: {k: a[: buffer.size()] for k, a in (part.items() if isinstance(part, dict) else [("", part)])}
            for name, part in rows.items()
        }
        return {**rows, "at": [buffer.pos, buffer.full], "rng": buffer.rng.bit_generator.state}
    return {
        name: value
        for name, value in vars(buffer).items()
        if name not in ("env", "device", "observation_space", "action_space")
    }


def plain(value: Any) -> Any:
    """Tensors as arrays, containers as dicts; what can be sent from one process to another and compared."""
    if isinstance(value, dict):
        # "t" is Monitor's clock
        return {str(key): plain(item) for key, item in value.items() if key != "t"}
    if isinstance(value, list | tuple):
        return {str(i): plain(item) for i, item in enumerate(value)}
    if isinstance(value, th.Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return plain(value.tolist())
    return np.array(value) if isinstance(value, np.ndarray | np.generic) else value


def differences(expected: Any, actual: Any, name: str = "") -> list[str]:
    """Names of what is not the same, to the last bit; NaN equals itself."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        missing = [f"{name}.{key}" for key in expected.keys() ^ actual.keys()]
        both = [key for key in expected if key in actual]
        return missing + [text for key in both for text in differences(expected[key], actual[key], f"{name}.{key}")]
    if isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray):
        same = (expected.dtype, expected.shape) == (
            actual.dtype,
            actual.shape,
        ) and expected.tobytes() == actual.tobytes()
    else:
        same = type(expected) is type(actual) and (expected == actual or repr(expected) == repr(actual) == "nan")
    return [] if same else [name]


def crash(name: str, folder: Path, at: int, save_freq: int) -> None:
    """Start a run, or continue that of a folder, with a checkpoint every ``save_freq`` steps; die at a given one."""
    th.set_num_threads(1)
    buffer_state.SMALL = buffer_state.LARGE = 1  # many segments
    case = CASES[name]
    model = SoftSAC.load(folder, case.make_env(), "cpu", force_reset=False) if folder.exists() else case.make()
    checkpoints = CheckpointCallback(save_freq, folder)

    def die(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if model.num_timesteps >= at:
            os._exit(9)
        return True

    learn(model, case, case.steps, folder, CallbackList([checkpoints, ConvertCallback(die)]))


def main() -> None:
    """Train with checkpoints on signals; say "ready" at a given step, when learning and when it is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ready-at", type=int)
    parser.add_argument("--late", action="store_true", help="be ready when the checkpoints have seen the step")
    parser.add_argument("--own-handler", action="store_true", help="survive SIGTERM")
    args = parser.parse_args()
    th.set_num_threads(1)
    handled: list[int] = []
    if args.own_handler:
        signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    case = CASES[args.case]
    model = case.make()

    checkpoints = CheckpointCallback(0, args.folder)

    def wait(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if model.num_timesteps == args.ready_at:
            print("ready", flush=True)
            wait_until(lambda: checkpoints._signal is not None)
        return True

    callbacks: list[BaseCallback] = [ConvertCallback(wait), checkpoints]
    learn(model, case, case.steps, args.folder, CallbackList(callbacks[:: -1 if args.late else 1]))
    print("ready", flush=True)
    wait_until(lambda: bool(handled))
    print("the end", flush=True)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
