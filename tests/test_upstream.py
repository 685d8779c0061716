"""
What SoftSAC leans on that SB3, torch, Gymnasium and the RL Zoo have not promised: a new version of theirs that changes
it fails here, with a sentence that says what depends on it and where. And, at the end, what happens without.
"""

import ast
import copy
import hashlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import types
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
import torch._dynamo
import torch._inductor
from gymnasium import spaces
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from sb3_contrib.common.torch_layers import BatchRenorm
from stable_baselines3 import SAC
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn
from torch.torch_version import TorchVersion
from twins import SMALL, assert_same, make, state, train, twins

import sb3_softsac
from sb3_softsac import gradient_step, optimizers, upstream
from sb3_softsac._rl_zoo3 import methods
from sb3_softsac.execution import inductor, watch
from sb3_softsac.execution.cpp import build
from sb3_softsac.execution.cpp import update as cpp_update
from sb3_softsac.persistence import buffer_state, callback_state, resumable
from sb3_softsac.persistence.envs import env_state, known_classes, object_state

PACKAGE = Path(sb3_softsac.__file__).parent
BASE = "stable_baselines3.common.base_class:BaseAlgorithm"
OFF_POLICY = "stable_baselines3.common.off_policy_algorithm:OffPolicyAlgorithm"
POLICIES, SAC_POLICIES = "stable_baselines3.common.policies", "stable_baselines3.sac.policies"
BUFFERS, SDE = (
    "stable_baselines3.common.buffers",
    "stable_baselines3.common.distributions:StateDependentNoiseDistribution",
)


# Names


NAMES = {
    "torch.optim.adam:adam": "optimizers.pure_step compiles it; without it only gradients are compiled",
    "torch.optim.optimizer:_global_optimizer_pre_hooks": "optimizers.is_plain_adam; without it no update runs in C++",
    "torch.optim.optimizer:_global_optimizer_post_hooks": "optimizers.is_plain_adam; without it no update runs in C++",
    "torch:_foreach_lerp_": "gradient_step.update_targets averages with it; without it one tensor at a time",
    "torch._dynamo.exc:TorchDynamoException": "inductor._is_of_compiler knows the compiler's errors by their module",
    "torch._dynamo:config.patch": "inductor.tracing sets trace_autograd_ops with it; without it nothing is compiled",
    "torch._inductor:list_options": "inductor.compiled leaves out unknown options; without it nothing is compiled",
    "torch._inductor.custom_graph_pass:CustomGraphPass": "graph_passes; without it compiled updates are slower",
    "torch._inductor.custom_graph_pass:get_hash_for_files": "graph_passes; without it compiled updates are slower",
    "torch.backends:mkldnn.matmul.fp32_precision": "products.exact_products_are_wanted asks it for the precision",
    "sb3_contrib.common.torch_layers:BatchRenorm": "policies.running_statistics knows the class by its name",
    "gymnasium.wrappers.utils:RunningMeanStd": "known_classes.NESTED; without it NormalizeReward has no saved state",
    "gymnasium.wrappers.common:TimeLimit": "known_classes.SAME_CLASSES: the zoo's own and this have the same state",
    f"{BASE}._wrap_env": "resumable.load wraps environments as SB3 does",
    f"{BASE}._excluded_save_params": "resumable.write leaves out what SB3 leaves out",
    f"{BASE}._get_torch_save_params": "model_file writes the members that SB3 would",
    f"{BASE}._update_learning_rate": "softsac sets and logs the actor's learning rate with it",
    f"{BASE}._setup_lr_schedule": "softsac overrides it, for NumPy's numbers",
    f"{BASE}._update_info_buffer": "rollouts._collect_rollout calls it at each step",
    f"{BASE}._update_current_progress_remaining": "rollouts._collect_rollout calls it at each step",
    f"{OFF_POLICY}._convert_train_freq": "softsac overrides it, for lists and NumPy's numbers",
    f"{OFF_POLICY}._store_transition": "rollouts._collect_rollout calls it at each step",
    f"{OFF_POLICY}._on_step": "rollouts._collect_rollout calls it at each step",
    f"{OFF_POLICY}.dump_logs": "rollouts._collect_rollout calls it when an episode is to be logged",
    f"{SAC_POLICIES}:SACPolicy._update_features_extractor": "policies.make_actor and make_critic call it",
    "stable_baselines3.her.her_replay_buffer:HerReplayBuffer.truncate_last_trajectory": "resumable, at a new episode",
    "optuna.storages._heartbeat:BaseHeartbeat": "studies.JournalStorage; without it trials end with their workers",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert upstream.find(name) is not None, f"{name} is gone. {NAMES[name]}."


MODEL = {
    "_total_timesteps": "resumable ends rollouts by it, _rl_zoo3.methods says how many steps are left",
    "_num_timesteps_at_start": "rollouts._lack_of: whether a run goes on",
    "_episode_num": "rollouts._collect_rollout counts it, callbacks.SaveBestTrainingReturnCallback reads it",
    "_n_updates": "softsac counts delays and target updates by it",
    "_last_obs": "resumable continues in mid-episode with it",
    "_custom_logger": "resumable._setup_learn keeps the logger of its own run by it",
    "_vec_normalize_env": "softsac normalises minibatches with it",
    "_current_progress_remaining": "softsac._update_learning_rates: schedules",
    "_stats_window_size": "callbacks.SaveBestTrainingReturnCallback: episodes that the mean is taken over",
    "ep_info_buffer": "callbacks.SaveBestTrainingReturnCallback reads returns there; resumable saves it",
    "ep_success_buffer": "resumable saves it",
}


@pytest.fixture(scope="module")
def sb3_model() -> SAC:
    return SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")


@pytest.mark.parametrize("name", MODEL)
def test_attributes_of_models(sb3_model: SAC, name: str) -> None:
    assert name in vars(sb3_model), f"SB3's models no longer have {name}. {MODEL[name]}."


def test_private_names_of_modules_and_optimizers() -> None:
    moved = watch.moved_names()
    assert not moved, f"{moved}: without them watch.Watch sees no changes, and nothing is done in C++."
    assert {"_modules", "training"} <= vars(nn.Module()).keys(), "policies._set_training_mode writes them itself."
    for optimizer_class in (th.optim.Adam, th.optim.AdamW):
        moved = optimizers.moved_names(optimizer_class(nn.Linear(1, 1).parameters()))
        assert not moved, f"{moved}: without them optimizers.is_plain_adam is False: no C++, no compiled steps."


def test_state_of_adam() -> None:
    parameter = nn.Parameter(th.zeros(1))
    optimizer = th.optim.Adam([parameter], amsgrad=True)
    parameter.grad = th.ones(1)
    optimizer.step()
    assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, (
        "optimizers.trained looks up Adam's state by these names, for compiled and native updates; "
        "learner.place_steps and portable move 'step'."
    )


def test_flag_of_dynamo() -> None:
    assert hasattr(torch._dynamo.config, "trace_autograd_ops"), (
        "inductor.tracing sets trace_autograd_ops, which is gone. If compiled updates still work (test_inductor.py), "
        "this test is out of date; else inductor.check_torch has to refuse this version."
    )


@pytest.mark.parametrize(
    "option", ["fallback_random", "size_asserts", "alignment_asserts", "cpp_wrapper", "post_grad_custom_post_pass"]
)
def test_options_of_inductor(option: str) -> None:
    known = torch._inductor.list_options()
    assert option in known, f"inductor.compiled sets {option}, which is no option any more: it is left out, silently."


HEADERS = re.findall(r"#include <((?:ATen|torch|c10)/.*)>", "".join(p.read_text() for p in PACKAGE.rglob("*.[ch]*")))


def test_there_are_headers() -> None:
    assert len(HEADERS) > 5


@pytest.mark.parametrize("header", sorted(set(HEADERS)))
def test_headers_of_torch(header: str) -> None:
    found = Path(th.__file__).parent / "include" / header
    assert found.is_file(), f"{header} is gone: a file in execution/cpp includes it, and are not built."


def test_buffers_of_batch_renorm() -> None:
    names = {name for name, _ in BatchRenorm(2).named_buffers()}
    assert names == {"ra_mean", "ra_var", "steps"}, "policies.running_statistics: targets copy all of its buffers."


def test_private_names_of_environments() -> None:
    assert hasattr(spaces.Box(-1, 1), "_np_random"), (
        "object_state.capture_chain reads the random states of spaces there."
    )
    names = {"_np_random", "_np_random_seed"}
    assert names <= assigned(gym.Env), (
        "episode_replay.Recorder and object_state know by them whether env was ever reset."
    )
    assert "_cached_spec" in assigned(gym.Wrapper), "known_classes.CONSTANT_NAMES: not part of a wrapper's state."
    checks = known_classes.CHECKS_DONE.keys()
    assert checks <= assigned(PassiveEnvChecker), "known_classes.CHECKS_DONE takes the place of these attributes."


@pytest.mark.parametrize("name", ["bipedal_walker", "car_racing"])
def test_worlds_of_box2d(name: str) -> None:
    source = (Path(gym.__file__).parent / "envs" / "box2d" / f"{name}.py").read_text()
    assert "def _destroy(self" in source and "self.world = Box2D.b2World(" in source, (
        f"episode_replay._renew_world gives {name} a new Box2D world, by these names."
    )


def test_vec_envs() -> None:
    assert {"_seeds", "_options"} <= assigned(SubprocVecEnv), "env_state saves and restores a pending reset's."
    names = {"remotes", "processes", "closed"}
    assert names <= assigned(SubprocVecEnv), "env_state asks by them whether the workers live, and ends them."


@pytest.mark.processes
def test_worker_of_subproc_vec_env() -> None:
    env = SubprocVecEnv([lambda: gym.make("Pendulum-v1")])
    try:
        env.reset()
        states = env_state.capture(env)["envs"]
    finally:
        env.close()
    assert "missing" not in states[0], (
        "env_state._in_worker looks for the environment among the local variables of SB3's worker function, and is "
        f"sent there with set_attr and env_method: {states[0].get('missing')}"
    )


# Signatures


SIGNATURES = {
    f"{BASE}._setup_learn": (
        "self, total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar",
        "resumable._setup_learn passes these by position",
    ),
    f"{OFF_POLICY}.__init__": (
        "self, policy, env, learning_rate, buffer_size, learning_starts, batch_size, tau, gamma, train_freq, "
        "gradient_steps, action_noise, replay_buffer_class, replay_buffer_kwargs, optimize_memory_usage, n_steps, "
        "policy_kwargs, stats_window_size, tensorboard_log, verbose, device, support_multi_env, monitor_wrapper, seed, "
        "use_sde, sde_sample_freq, use_sde_at_warmup, sde_support, supported_action_spaces",
        "softsac.SoftSAC.__init__ passes the first by position",
    ),
    f"{OFF_POLICY}.collect_rollouts": (
        "self, env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval",
        "rollouts.collect_rollouts takes its place",
    ),
    f"{OFF_POLICY}._sample_action": (
        "self, learning_starts, action_noise, n_envs",
        "rollouts._sample_action takes its place",
    ),
    f"{SAC_POLICIES}:SACPolicy.__init__": (
        "self, observation_space, action_space, lr_schedule, net_arch, activation_fn, use_sde, log_std_init, "
        "use_expln, clip_mean, features_extractor_class, features_extractor_kwargs, normalize_images, "
        "optimizer_class, optimizer_kwargs, n_critics, share_features_extractor",
        "policies.SoftSACPolicy.__init__ passes these by position",
    ),
    f"{BUFFERS}:BaseBuffer.__init__": (
        "self, buffer_size, observation_space, action_space, device, n_envs",
        "buffers.ReplayBuffer.__init__ calls it instead of that of SB3's ReplayBuffer",
    ),
    "torch.optim.adam:adam": (
        "params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, foreach, capturable, differentiable, "
        "fused, grad_scale, found_inf, has_complex, decoupled_weight_decay, amsgrad, beta1, beta2, lr, weight_decay, "
        "eps, maximize",
        "optimizers.pure_step passes the first by position",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    expected, who = SIGNATURES[name]
    found = ", ".join(inspect.signature(pkgutil.resolve_name(name)).parameters)
    assert found == expected, f"{name} has other parameters. {who}."


# What is copied, or done otherwise. The digests are of the source that ours was written after


COPIED = {
    f"{OFF_POLICY}.collect_rollouts": ("a1eead418b39", "rollouts._collect_rollout"),
    f"{OFF_POLICY}._sample_action": ("9f0a75c973e7", "rollouts._sample_action"),
    f"{OFF_POLICY}._setup_learn": ("313ea639c663", "resumable._setup_learn, which keeps noise and logger from it"),
    f"{OFF_POLICY}._setup_model": ("0c1ce31739ce", "softsac._setup_model and _setup_replay_buffer"),
    f"{BASE}._setup_learn": ("74d93718e473", "resumable._setup_learn, which keeps noise and logger from it"),
    f"{BASE}.save": ("b5f5bc736849", "resumable.write and model_file"),
    f"{BASE}.load": ("764894493d8f", "resumable.load"),
    f"{BASE}.predict": ("70c3e8d5e1e1", "rollouts._sample_action, which leaves out predict()"),
    f"{POLICIES}:BasePolicy.predict": ("caf3216753db", "rollouts._sample_action, which leaves out predict()"),
    f"{POLICIES}:BaseModel.extract_features": ("ddd3d2e8ed9b", "policies.Actor and Critic.extract_features"),
    "stable_baselines3.common.preprocessing:preprocess_obs": ("b541ad4616d8", "policies.Preprocessing"),
    f"{SAC_POLICIES}:SACPolicy._predict": ("e7c85bb70bc7", "rollouts._sample_action, which leaves out predict()"),
    f"{SAC_POLICIES}:SACPolicy._build": ("f6ec54f8e09c", "policies.SoftSACPolicy._build"),
    f"{SAC_POLICIES}:SACPolicy.make_actor": ("d98c94d3f138", "policies.SoftSACPolicy.make_actor"),
    f"{SAC_POLICIES}:SACPolicy.make_critic": ("a91a69de0468", "policies.SoftSACPolicy.make_critic"),
    f"{SAC_POLICIES}:SACPolicy.set_training_mode": ("8b926b7fdd0b", "policies.SoftSACPolicy.set_training_mode"),
    f"{SAC_POLICIES}:SACPolicy._get_constructor_parameters": ("9700ee64535d", "policies, which adds what it forgets"),
    f"{SAC_POLICIES}:Actor.get_action_dist_params": ("fb8d200a198c", "policies.Actor.get_action_dist_params"),
    f"{SAC_POLICIES}:Actor.forward": ("5949884a6ed0", "policies.Actor.forward"),
    f"{SDE}.sample_weights": ("93219e24b711", "gradient_step.draw_noise, which draws as it does"),
    f"{SDE}.get_noise": ("469fb8650750", "policies.Actor._sde_noise"),
    f"{SDE}.log_prob": ("6f62d6e2c325", "policies.Actor.sample with gSDE"),
    f"{BUFFERS}:BaseBuffer.__init__": ("ce6083758b48", "buffers.ReplayBuffer.__init__"),
    f"{BUFFERS}:ReplayBuffer.__init__": ("883ad639356c", "buffers.ReplayBuffer.__init__"),
    f"{BUFFERS}:ReplayBuffer.add": ("25e50410fa82", "buffers.ReplayBuffer.add"),
    f"{BUFFERS}:ReplayBuffer._get_samples": ("6ab0532d438a", "buffers.ReplayBuffer._get_samples"),
    f"{BUFFERS}:NStepReplayBuffer._get_samples": ("9df56edd0d4c", "buffers.ReplayBuffer._returns"),
    "stable_baselines3.sac.sac:SAC.train": ("438022091b36", "gradient_step, and the order of draws in draw_noise"),
    "stable_baselines3.sac.sac:SAC._setup_model": ("24a99015da41", "softsac._setup_model and ent_coef"),
}


def digest(function: Any) -> str:
    """Of the source, without docstring and comments."""
    source = textwrap.dedent(inspect.getsource(function))
    definition: Any = ast.parse(source).body[0]
    lines = list(map(str.strip, source.splitlines()))
    if ast.get_docstring(definition) is not None:
        del lines[definition.body[0].lineno - 1 : definition.body[0].end_lineno]
    code = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", COPIED)
def test_copied_functions(name: str) -> None:
    expected, ours = COPIED[name]
    found = digest(pkgutil.resolve_name(name))
    assert found == expected, (
        f"{name} has changed. Ours is {ours}: look at what is new, take over what is a mend, and note the digest "
        f"{found} here."
    )


def test_buffer_is_made_only_where_there_is_none() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", device="cpu", _init_setup_model=False)
    model.replay_buffer = "none yet"  # type: ignore[assignment]
    model._setup_model()
    assert model.replay_buffer == "none yet", (
        "OffPolicyAlgorithm._setup_model makes a replay buffer although there is one: softsac._setup_model keeps it "
        "from that with a placeholder."
    )


# Attributes that are state, and those that are not. What is in neither table would be lost in a resumed run


def assigned(cls: type) -> set[str]:
    """Attributes that SB3's and Gymnasium's classes assign, in any of their methods."""
    known = [base for base in cls.__mro__ if base.__module__.startswith(("stable_baselines3.", "gymnasium."))]
    return {name for base in known for name in _assigned_in(ast.parse(textwrap.dedent(inspect.getsource(base))))}


def _assigned_in(tree: ast.AST) -> set[str]:
    targets = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in targets if isinstance(node.value, ast.Name) and node.value.id == "self"}


OF_CALLBACKS = {"model", "locals", "globals", "parent", "num_timesteps", "verbose"}
CALLBACKS: dict[str, set[str]] = {
    "BaseCallback": set(),
    "EventCallback": {"callback"},
    "CallbackList": {"callbacks"},
    "CheckpointCallback": {"save_freq", "save_path", "name_prefix", "save_replay_buffer", "save_vecnormalize"},
    "ConvertCallback": {"callback"},
    "EvalCallback": {
        *("callback", "callback_on_new_best", "eval_env", "n_eval_episodes", "eval_freq", "deterministic", "render"),
        *("warn", "best_model_save_path", "log_path"),
    },
    "StopTrainingOnRewardThreshold": {"reward_threshold"},
    "EveryNTimesteps": {"callback", "n_steps"},
    "LogEveryNTimesteps": {"callback", "n_steps"},
    "StopTrainingOnMaxEpisodes": {"max_episodes", "_total_max_episodes"},
    "StopTrainingOnNoModelImprovement": {"max_no_improvement_evals", "min_evals"},
    "ProgressBarCallback": {"pbar"},
}
SB3_CALLBACKS: dict[str, type] = {
    name: cls
    for name, cls in vars(sb3_callbacks).items()
    if isinstance(cls, type) and issubclass(cls, sb3_callbacks.BaseCallback)
}


@pytest.mark.parametrize("name", sorted({*CALLBACKS, *SB3_CALLBACKS}))
def test_attributes_of_callbacks(name: str) -> None:
    assert name in CALLBACKS, f"SB3 has a new callback, {name}: does callback_state.STATE have all of its state?"
    assert name in SB3_CALLBACKS, f"SB3 no longer has {name}, which callback_state knows."
    found = assigned(SB3_CALLBACKS[name]) - set(callback_state.STATE)
    assert found == OF_CALLBACKS | CALLBACKS[name], (
        f"{name} has other attributes than callback_state knows. What changes in training belongs into its STATE, what "
        "a user passes into the table of this test."
    )


def test_state_of_callbacks_is_somewhere() -> None:
    sb3s = set().union(*map(assigned, SB3_CALLBACKS.values()))
    others = ast.parse((PACKAGE / "callbacks.py").read_text()), zoo_tree("callbacks")
    gone = set(callback_state.STATE) - sb3s.union(*map(_assigned_in, others))
    assert not gone, f"callback_state.STATE: {gone} is no attribute of a callback of SB3's, the zoo's or ours any more."


OF_WRAPPERS = {
    *("env", "_action_space", "_observation_space", "_metadata", "_cached_spec", "_saved_kwargs"),
    *("_np_random", "_np_random_seed"),
}
OF_VEC_ENVS = {
    *("num_envs", "observation_space", "action_space", "metadata", "render_mode", "reset_infos"),
    *("_seeds", "_options"),  # kept apart
}
OF_VEC_WRAPPERS = OF_VEC_ENVS | {"venv", "class_attributes"}
# Settings and what is made anew. For classes of which known_classes takes all attributes as state, all others
ATTRIBUTES: dict[type, tuple[set[str], set[str]]] = {
    known_classes.Monitor: (
        OF_WRAPPERS - {"_saved_kwargs"},
        {"allow_early_resets", "info_keywords", "reset_keywords", "results_writer"},
    ),
    known_classes.RecordEpisodeStatistics: (
        OF_WRAPPERS,
        {"_stats_key", "episode_lengths", "episode_returns", "episode_start_time"},
    ),
    known_classes.NormalizeReward: (OF_WRAPPERS, {"_update_running_mean", "epsilon", "gamma", "return_rms"}),
    known_classes.RecordVideo: (
        OF_WRAPPERS,
        {
            *("_video_name", "disable_logger", "episode_trigger", "frames_per_sec", "gc_trigger", "name_prefix"),
            *("recorded_frames", "recording", "render_history", "step_trigger", "video_folder", "video_length"),
        },
    ),
    known_classes.RenderCollection: (OF_WRAPPERS, {"frame_list", "metadata", "pop_frames", "reset_clean"}),
    known_classes.HumanRendering: (OF_WRAPPERS, {"clock", "metadata", "screen_size", "window"}),
    PassiveEnvChecker: (OF_WRAPPERS, {*known_classes.CHECKS_DONE, "checked_render", "close_called"}),
    TimeLimit: (OF_WRAPPERS, {"_elapsed_steps", "_max_episode_steps"}),
    OrderEnforcing: (OF_WRAPPERS, {"_has_reset", "_disable_render_order_enforcing"}),
    known_classes.VecNormalize: (
        OF_VEC_WRAPPERS,
        {
            *("clip_obs", "clip_reward", "epsilon", "gamma", "norm_obs", "norm_obs_keys", "norm_reward"),
            *("obs_spaces", "training"),
        },
    ),
    known_classes.VecMonitor: (OF_VEC_WRAPPERS, {"info_keywords", "results_writer"}),
    known_classes.VecFrameStack: (OF_VEC_WRAPPERS, set()),
    known_classes.VecCheckNan: (OF_VEC_WRAPPERS, {"check_inf", "raise_exception", "warn_once"}),
    known_classes.VecTransposeImage: (OF_VEC_WRAPPERS, {"image_space_keys", "skip"}),
    known_classes.VecExtractDictObs: (OF_VEC_WRAPPERS, {"key"}),
    known_classes.VecVideoRecorder: (
        OF_VEC_WRAPPERS,
        {
            *("env", "frames_per_sec", "name_prefix", "record_video_trigger", "recorded_frames", "recording"),
            *("video_folder", "video_length", "video_name", "video_path"),
        },
    ),
    known_classes.DummyVecEnv: (
        OF_VEC_ENVS,
        {"actions", "buf_dones", "buf_infos", "buf_obs", "buf_rews", "envs", "keys"},
    ),
    SubprocVecEnv: (OF_VEC_ENVS, {"closed", "processes", "remotes", "waiting", "work_remotes"}),
    known_classes.StackedObservations: (
        set(),
        {
            *("channels_first", "n_stack", "observation_space", "repeat_axis", "stack_dimension", "stacked_obs"),
            *("stacked_observation_space", "stacked_shape", "sub_stacked_observations"),
        },
    ),
    known_classes.RunningMeanStd: (set(), {"mean", "var", "count"}),
}


# Without our own, which is there if another test has imported it
THEIRS = {cls for cls in known_classes.STATE if not cls.__module__.startswith("sb3_softsac")}


@pytest.mark.parametrize("cls", sorted({*ATTRIBUTES, *THEIRS}, key=lambda cls: cls.__name__))
def test_attributes_of_wrappers(cls: type) -> None:
    assert cls in ATTRIBUTES, f"{cls.__name__} is in known_classes.STATE: its other attributes belong into this test."
    lasting, episode = known_classes.STATE.get(cls, known_classes.ALL)
    names = {*lasting, *(episode or ())}
    assert names <= assigned(cls), f"known_classes.STATE: {cls.__name__} has no {names - assigned(cls)} any more."
    assert assigned(cls) - names == set().union(*ATTRIBUTES[cls]), (
        f"{cls.__name__} has attributes that known_classes lacks. What changes with steps and resets belongs into "
        "its STATE, what is a setting into the table of this test."
    )


STATE_OF_BUFFERS: dict[type[SB3ReplayBuffer], set[str]] = {
    SB3ReplayBuffer: {"pos", "full"},
    DictReplayBuffer: {"pos", "full"},
    NStepReplayBuffer: {"pos", "full"},
    HerReplayBuffer: {"pos", "full", "_current_ep_start"},
}


def sb3_buffer(cls: type[SB3ReplayBuffer]) -> SB3ReplayBuffer:
    goal, kwargs = spaces.Box(-1.0, 1.0, (2,)), {}
    space: spaces.Space = goal
    if issubclass(cls, DictReplayBuffer):
        space = spaces.Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), goal))
    if cls is HerReplayBuffer:
        kwargs = {"env": None}
    return cls(10, space, goal, device="cpu", **kwargs)


@pytest.mark.parametrize("cls", STATE_OF_BUFFERS)
def test_attributes_of_buffers(cls: type[SB3ReplayBuffer]) -> None:
    found = buffer_state._rest(sb3_buffer(cls))
    assert found == STATE_OF_BUFFERS[cls], (
        f"{cls.__name__} has other attributes besides its arrays. buffer_state saves all but its SETTINGS: what the "
        "constructor is given belongs there, and state into the table of this test."
    )


def test_settings_of_buffers() -> None:
    gone = buffer_state.SETTINGS.difference(*(vars(sb3_buffer(cls)) for cls in STATE_OF_BUFFERS))
    assert not gone, f"buffer_state.SETTINGS: {gone} is no attribute of SB3's buffers any more."


def test_attributes_of_loggers() -> None:
    settings = {"dir", "level", "output_formats"}
    assert vars(Logger(None, [])).keys() == settings | set(resumable.LOGGER_STATE), (
        "resumable.LOGGER_STATE: what was recorded since the last dump is saved with the model, attribute by attribute."
    )


# The zoo: read, not imported, since that changes Gymnasium for the whole process


def zoo_tree(name: str) -> ast.Module:
    spec = find_spec("rl_zoo3")
    assert spec is not None and spec.submodule_search_locations is not None
    return ast.parse((Path(spec.submodule_search_locations[0]) / f"{name}.py").read_text())


METHODS = {
    "create_log_folder": "self",
    "create_callbacks": "self",
    "setup_experiment": "self",
    "_load_pretrained_agent": "self, hyperparams, env",
    "learn": "self, model",
    "_save_config": "self, saved_hyperparams",
    "save_trained_model": "self, model",
    "objective": "self, trial",
    "hyperparameters_optimization": "self",
    "read_hyperparameters": "self",
    "_preprocess_schedules": "hyperparams",
}


def zoo_method(name: str) -> ast.FunctionDef:
    classes = [node for node in zoo_tree("exp_manager").body if isinstance(node, ast.ClassDef)]
    (manager,) = [node for node in classes if node.name == "ExperimentManager"]
    methods = [node for node in manager.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert methods, f"ExperimentManager has no {name} any more: _rl_zoo3.patch puts another in its place."
    return methods[0]


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_zoo(name: str) -> None:
    found = ", ".join(arg.arg for arg in zoo_method(name).args.args)
    assert found == METHODS[name], f"ExperimentManager.{name} has other parameters. _rl_zoo3 puts another in its place."


def test_manager_of_the_zoo() -> None:
    assert methods.OF_MANAGER.keys() == METHODS.keys() | {"__init__"}
    names = {arg.arg for arg in zoo_method("__init__").args.args}
    assert {"config", "hyperparams", "n_timesteps", "log_folder", "vec_env_type"} <= names, (
        "_rl_zoo3.methods looks for these arguments by name."
    )
    used = {
        *("algo", "config", "save_freq", "callbacks", "save_path", "optimize_hyperparameters", "specified_callbacks"),
        *("save_replay_buffer", "trained_agent", "device", "tensorboard_log", "verbose", "truncate_last_trajectory"),
        *("continue_training", "n_timesteps", "_hyperparams", "args", "params_path", "env_name"),
        *("eval_env_kwargs", "_eval_env_kwargs_args"),
        *("storage", "log_path", "n_envs", "n_jobs", "max_total_trials"),
    }
    gone = used - _assigned_in(zoo_tree("exp_manager"))
    assert not gone, f"ExperimentManager has no {gone} any more, which _rl_zoo3's methods read or set."


@pytest.mark.parametrize("module", ["enjoy", "record_video", "push_to_hub", "benchmark", "callbacks"])
def test_lists_of_the_zoo(module: str) -> None:
    lists = [node for node in ast.walk(zoo_tree(module)) if isinstance(node, ast.List | ast.Tuple)]
    names = [{ast.unparse(element) for element in node.elts} for node in lists]
    assert any({"SAC", "TQC"} <= some if module == "callbacks" else {"'sac'", "'tqc'"} <= some for some in names), (
        f"rl_zoo3.{module} has no list with SAC any more: _rl_zoo3._Editor adds SoftSAC to it."
    )


def test_time_limit_of_the_zoo() -> None:
    classes = {node.name for node in ast.walk(zoo_tree("gym_patches")) if isinstance(node, ast.ClassDef)}
    assert "PatchedTimeLimit" in classes, "known_classes.SAME_CLASSES takes it for Gymnasium's TimeLimit."


# What happens without


PRIVATE = (
    *("torch.optim.adam:adam", "torch:_foreach_lerp_", "gymnasium.wrappers.utils:RunningMeanStd"),
    *("stable_baselines3.common.vec_env.subproc_vec_env:_worker", "torch._dynamo.exc:TorchDynamoException"),
    "torch._inductor.custom_graph_pass:CustomGraphPass",
    "torch._ops:OpOverload",
)
# Others need what is deleted: it is gone only while ours is imported
IMPORT = """
import pkgutil, sys
import gymnasium.wrappers.utils, sb3_contrib, stable_baselines3, torch
import torch._dynamo, torch._inductor.custom_graph_pass
for name in sys.argv[1:]:
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    owner = pkgutil.resolve_name(":".join([module, ".".join(owners)]) if owners else module)
    if hasattr(owner, attribute):
        delattr(owner, attribute)
sys.modules.update({"torch.utils._pytree": None, "torch.fx.node": None})
import sb3_softsac
print(sb3_softsac.__file__)
"""


@pytest.mark.processes
def test_import_without_private_names() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-W", "error:a private name", "-c", IMPORT, *PRIVATE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "a private name" not in result.stderr  # it is said where something is slower for it
    assert Path(result.stdout.strip()).parent == PACKAGE


@pytest.fixture(autouse=True)
def _not_yet_said() -> None:
    upstream.say_moved.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that are compiled, quickly."""
    names: list[str] = []
    original = inductor.compiled

    def spy(function: Any, device: th.device) -> Any:
        names.append(function.__name__)
        return original(function, device)

    monkeypatch.setattr(inductor, "BACKEND", "eager")
    monkeypatch.setattr(inductor, "compiled", spy)
    return names


def assert_compiles_gradients_only(compilations: list[str]) -> None:
    eager, compiled = twins("fixed_ent_coef")
    for i in range(3):
        for model in (eager, compiled):
            train(model, 2, seed=i)
    assert_same(state(eager), state(compiled), atol=3e-5)
    assert set(compilations) == {"critic_gradients", "actor_gradients"}
    assert compiled._compiles


@pytest.mark.compiler
def test_without_functional_adam(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    monkeypatch.setattr(optimizers, "adam", None)
    with pytest.warns(UserWarning, match="torch.optim.adam.adam, a private name .*steps are not compiled") as warned:
        assert_compiles_gradients_only(compilations)
    assert len(warned) == 1


def test_cpp_without_functional_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own, and needs no state but Adam's."""
    monkeypatch.setattr(optimizers, "adam", None)
    model = make("defaults", compile=True).learn(SMALL["learning_starts"] + 3)
    if cpp_update.error_of_build() is not None or model._runner.cpp is None:
        pytest.skip("no C++ here")
    assert model._runner.last_way is model._runner.cpp and not model._runner.compiler.compiled


@pytest.mark.compiler
def test_without_hooks_of_optimizers(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    """Where a user's hooks would be is not known: they may have some."""
    monkeypatch.setattr(optimizers, "STEP_HOOKS", ("_moved",))
    with pytest.warns(UserWarning, match="torch.optim.Optimizer._moved, a private name .*steps are not compiled"):
        assert_compiles_gradients_only(compilations)


@pytest.mark.compiler
def test_without_an_option_of_adam(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    monkeypatch.setattr(optimizers, "_ADAM_KEYS", {*optimizers.ADAM_OPTIONS, "new"})
    with pytest.warns(UserWarning, match="Adam's option new, a private name .*steps are not compiled"):
        assert_compiles_gradients_only(compilations)


def test_without_foreach_lerp(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make("defaults").policy
    for parameter in policy.critic.parameters():
        parameter.data.normal_()
    other = copy.deepcopy(policy)
    gradient_step.update_targets(policy, 0.3, th.tensor(True))
    monkeypatch.delattr(th, "_foreach_lerp_")
    with pytest.warns(UserWarning, match="torch._foreach_lerp_, a private name .*slower"):
        gradient_step.update_targets(other, 0.3, th.tensor(True))
    for expected, found in zip(policy.critic_target.parameters(), other.critic_target.parameters(), strict=True):
        assert th.equal(found, expected)


def test_without_hooks_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HOOKS", (*watch.HOOKS, "_moved"))
    monkeypatch.setattr(build, "suits_processor", lambda: True)
    with pytest.warns(UserWarning, match="_moved, a private name .*C\\+\\+"):
        model = make("defaults", compile=True, random_steps=0).learn(5)
    assert model._runner.cpp is model._runner.cpp_actor is None


def test_without_graph_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: options.update(kwargs["options"]))
    monkeypatch.delitem(sys.modules, "sb3_softsac.execution.graph_passes", raising=False)
    monkeypatch.delattr("torch._inductor.custom_graph_pass.CustomGraphPass")
    with pytest.warns(UserWarning, match="CustomGraphPass, a private name .*left as it is, which is slower"):
        inductor.compiled(test_without_graph_passes, th.device("cpu"))
    assert options["fallback_random"] and "post_grad_custom_post_pass" not in options


def test_without_modules_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(nn.ReLU):
        """As if torch kept what is in a module elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            del vars(self)["_modules"]

        def named_children(self) -> Any:
            return iter(())

    policy = make("defaults").policy
    policy.actor.latent_pi[1] = moved = Moved()
    policy.set_training_mode(True)
    assert moved.training and policy.actor.latent_pi[0].training
    policy.set_training_mode(False)
    assert not moved.training


def worker(simulator: Any, other: Any) -> Any:
    return env_state._in_worker("capture")


def test_worker_with_other_names() -> None:
    """A function of SB3's module that has one environment among its variables, whatever either is called."""
    env, other = gym.make("Pendulum-v1"), gym.make("Pendulum-v1")
    env.reset()
    in_sb3 = types.FunctionType(worker.__code__, {**globals(), "__name__": SubprocVecEnv.__module__})
    assert "missing" not in in_sb3(env, None)
    for captured in (in_sb3(None, None), in_sb3(env, other), worker(env, None)):
        assert "cannot find the environment in the workers" in captured["missing"]


class Flagless(types.SimpleNamespace):
    """Dynamo's configuration, in a version that has no such flag."""


@pytest.mark.parametrize(("version", "is_refused"), [("2.8.0", True), ("2.10.1+cpu", True), ("2.11.0", False)])
def test_torch_without_the_flag(monkeypatch: pytest.MonkeyPatch, version: str, is_refused: bool) -> None:
    monkeypatch.setattr(torch._dynamo, "config", Flagless())
    monkeypatch.setattr(th, "__version__", TorchVersion(version))
    if is_refused:
        with pytest.raises(RuntimeError, match=f"torch {re.escape(version)} cannot compile gradients, 2.11 and newer"):
            inductor.check_torch()
    else:
        inductor.check_torch()
        with inductor.tracing():
            pass


def test_torch_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "__version__", TorchVersion("2.10.0"))
    inductor.check_torch()
    with inductor.tracing():
        assert torch._dynamo.config.trace_autograd_ops
    assert not torch._dynamo.config.trace_autograd_ops


def test_errors_of_the_compiler() -> None:
    class Derived(torch._dynamo.exc.TorchDynamoException):
        pass

    assert inductor._is_of_compiler(Derived()) and inductor._is_of_compiler(torch._dynamo.exc.FailOnRecompileLimitHit())
    assert not inductor._is_of_compiler(RuntimeError()) and not inductor._is_of_compiler(th.OutOfMemoryError())


def test_without_running_means_of_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.wrappers.NormalizeReward(gym.make("Pendulum-v1"))
    env.reset()
    monkeypatch.setattr(object_state, "NESTED", object_state.NESTED[:-1])
    states = env_state._capture_env(env)
    assert "return_rms" in states["missing"] and "RunningMeanStd" in states["missing"]


def test_it_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            upstream.say_moved("package:name", "all is slower.")
    assert len(said) == 1
    assert upstream.find("torch:nothing") is None and upstream.find("no_such_package.module:name") is None
    assert upstream.find("torch.optim.adam:adam") is not None
