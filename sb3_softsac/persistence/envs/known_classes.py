"""
Tables of the classes whose attributes are known: wrappers, generators of random numbers, renderers.

``tests/test_upstream.py`` checks them against the installed versions of SB3 and Gymnasium.
"""

import functools
import logging
import random
import time
import types
from collections.abc import Callable

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import HumanRendering, NormalizeReward, RecordEpisodeStatistics, RecordVideo, RenderCollection
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    StackedObservations,
    SubprocVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_softsac import upstream


class Bookkeeping:
    """Base class of the objects that this package adds to an environment. They are not part of its state."""


# Attributes that live across episodes, and attributes of the episode (None: all others). In classes that are not
# listed, only random generators and running means live across episodes.
STATE: dict[type, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    Monitor: (
        ("total_steps", "episode_returns", "episode_lengths", "episode_times", "t_start"),
        ("rewards", "needs_reset", "current_reset_info"),
    ),
    RecordEpisodeStatistics: (("episode_count", "time_queue", "return_queue", "length_queue"), None),
    NormalizeReward: (("discounted_reward",), None),
    # The user chooses settings (training, norm_reward, clip_obs, ...) for the new environment
    VecNormalize: (("obs_rms", "ret_rms", "returns"), ("old_obs", "old_reward")),
    VecMonitor: (("episode_count", "t_start"), ("episode_returns", "episode_lengths")),
    VecFrameStack: ((), ("stacked_obs",)),
    VecCheckNan: ((), ("_user_warned", "_actions", "_observations")),
    # DummyVecEnv overwrites its buffers in each step; pending seeds and options are saved separately
    **dict.fromkeys((DummyVecEnv, SubprocVecEnv, VecTransposeImage, VecExtractDictObs), ((), ())),
    # Frames of an unfinished video are lost, but no video is written over
    RecordVideo: (("episode_id", "step_id"), ()),
    VecVideoRecorder: (("step_id",), ()),
    **dict.fromkeys((RenderCollection, HumanRendering), ((), ())),
}
ALL: tuple[tuple[str, ...], None] = ((), None)
# Settings of classes that do not record their constructor arguments. A continued run uses those of the new object and
# warns if they differ.
SETTINGS: dict[type, tuple[str, ...]] = {
    VecNormalize: (
        *("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys"),
    ),
    VecTransposeImage: ("skip",),
}
# gym.make() uses the RL Zoo's class as soon as rl_zoo3 is imported; both have the same state
SAME_CLASSES = {"rl_zoo3.gym_patches.PatchedTimeLimit": "gymnasium.wrappers.common.TimeLimit"}
# PassiveEnvChecker compares the data of the first two steps by identity, which a file cannot keep: save its checks as
# done
CHECKS_DONE = {"checked_reset": True, "checked_step": True, "checked_data_reuse": True, "_previous_data": None}
# Clocks restart in each process: save the elapsed time
CLOCKS: dict[str, tuple[Callable[[], float], tuple[type, ...]]] = {
    "t_start": (time.time, (Monitor, VecMonitor)),
    "episode_start_time": (time.perf_counter, (RecordEpisodeStatistics,)),
}
CONSTANT_NAMES = {
    *("spec", "_cached_spec", "metadata", "_metadata", "render_mode", "fullpath", "class_attributes"),
    *("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"),
}
CONSTANT_TYPES = (
    type,
    gym.Space,
    types.ModuleType,
    EnvSpec,
    logging.Logger,
    Logger,
    ResultsWriter,
    Bookkeeping,
)
FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, np.ufunc)
# Rendering only: package and first letters of the class name
RENDERERS = (
    *(("pygame", name) for name in ("Surface", "Clock", "Font")),
    *(("mujoco", name) for name in ("Mjv", "Mjr", "Renderer", "GLContext", "MjModel")),  # the model's digest is saved
    ("gymnasium", "MujocoRenderer"),
    ("matplotlib", ""),
)
RENDER_ARGUMENTS = {
    *("render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config", "max_geom"),
    "visual_options",
}
# Objects that are saved attribute by attribute and restored in place
NESTED: tuple[type, ...] = (RunningMeanStd, StackedObservations)
if (_gyms := upstream.find("gymnasium.wrappers.utils:RunningMeanStd")) is not None:  # otherwise it is unreadable
    NESTED += (_gyms,)
RANDOM_TYPES = (np.random.Generator, np.random.RandomState, random.Random)
