"""``SoftSAC``: the algorithm's arguments, its parts and their wiring."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_softsac import offline, schedules
from sb3_softsac.buffers import ReplayBuffer, samples_itself
from sb3_softsac.distributions import log_action_scale
from sb3_softsac.ent_coef import EntCoef, make_ent_coef
from sb3_softsac.execution import device_replay, learner, threads
from sb3_softsac.execution.device_replay import DeviceReplay, with_scaled_rewards
from sb3_softsac.execution.metrics import NotFinite
from sb3_softsac.execution.runner import Runner, matmul_precision
from sb3_softsac.execution.way import Minibatches
from sb3_softsac.gradient_step import UpdateOptions
from sb3_softsac.heads import CategoricalHead, head_of
from sb3_softsac.held_noise import HeldNoise
from sb3_softsac.persistence.resumable import BUFFER_SIZE_IF_WATCHED, ResumableAlgorithm
from sb3_softsac.policies import COUNTERPARTS, Actor, CnnPolicy, Critic, MlpPolicy, MultiInputPolicy, SoftSACPolicy
from sb3_softsac.reward_scale import RewardScale
from sb3_softsac.type_aliases import TorchObs
from sb3_softsac.validation import (
    check_action_space,
    check_env,
    check_networks,
    check_observation_space,
    check_options,
    is_int,
    parse_target_entropy,
)

MIN_COMPILED_UPDATES = 10_000  # Inductor takes as long as it saves in about half as many, C++ in a quarter

ROWS_AT_ONCE = 16_384  # drawn from the replay buffer


class SoftSAC(ResumableAlgorithm):
    """
    Soft Actor-Critic (https://arxiv.org/abs/1812.05905) with an exact log-probability, lean replay memory and the
    options that SAC users ask for. The positional arguments are those of SB3's ``SAC``; the defaults of the
    keyword-only ones leave plain SAC unchanged.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of ``SoftSACPolicy``
    :param env: environment (bounded ``Box`` actions), its id, or None when loading to predict
    :param learning_rate: learning rate of all optimisers: float, function of the remaining progress (1 to 0), or
        schedule by name: ``"lin_3e-4"`` (to 0), ``"lin_3e-4_3e-5"``, ``"cos_3e-4_1.5e-4"``
    :param buffer_size: capacity of the replay buffer, in transitions
    :param learning_starts: environment steps before the first gradient update
    :param batch_size: minibatch size, B
    :param tau: Polyak coefficient of the targets, in [0, 1]
    :param gamma: discount factor, in [0, 1]
    :param train_freq: steps of the vectorised environment (or ``(n, "episode")``) between updates, as in SB3
    :param gradient_steps: updates after each rollout; -1: one per collected step
    :param action_noise: noise added to the scaled actions
    :param replay_buffer_class: None: ``sb3_softsac.buffers.ReplayBuffer``
    :param replay_buffer_kwargs: keyword arguments of the replay buffer
    :param optimize_memory_usage: for other buffers; the default one already stores each observation once
    :param n_steps: length of n-step returns (default buffer only, Dict observations included)
    :param ent_coef: entropy coefficient: a number, ``"auto"`` or ``"auto_<first value>"``
    :param target_update_interval: updates between target updates, counted over the whole run: unlike in SB3's SAC, it
        works with ``gradient_steps=1`` (SB3 issue 2158)
    :param target_entropy: entropy that a learned coefficient aims for, in nats; ``"auto"``: minus the action dimension;
        ``"auto_0.5"``: half of that; ``"std_0.15"``: of Gaussians with this standard deviation
    :param use_sde: generalised state-dependent exploration (https://arxiv.org/abs/2005.05719)
    :param sde_sample_freq: steps between new exploration matrices; -1: once for each rollout
    :param use_sde_at_warmup: explore with gSDE instead of uniformly in the first ``random_steps``
    :param stats_window_size: number of episodes over which logged means are taken
    :param tensorboard_log: folder of the TensorBoard log, or None
    :param policy_kwargs: arguments of the policy, see ``SoftSACPolicy``
    :param verbose: 0 nothing, 1 information, 2 debugging
    :param seed: seed of all random states
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
    :param _init_setup_model: build networks and replay buffer immediately
    :param qf_learning_rate: learning rate of the critics; None: ``learning_rate``
    :param ent_coef_learning_rate: learning rate of the entropy coefficient; None: ``learning_rate``
    :param policy_delay: critic updates for each update of actor and entropy coefficient, counted over the whole run
    :param policy_delay_compensation: when an actor update is due, do ``policy_delay`` of them in a row (CleanRL)
    :param random_steps: environment steps with uniformly random actions; None: ``learning_starts``
    :param use_actor_target: take the next actions of the critics' target from a Polyak-averaged actor
    :param ent_coef_loss: ``"log"``: -log_ent_coef (log_prob + H); ``"exp"``: -ent_coef (log_prob + H), the paper's
    :param entropy_space: ``"normalized"``: entropy of actions scaled to [-1, 1]; ``"env"``: of actions in the
        environment's units, i.e. log_prob minus the sum of log((high - low) / 2)
    :param max_grad_norm: clip the norm of each network's gradient; None: do not
    :param joint_batch: ``"critic"``: critics see states and next states in one batch, whose statistics batch norms then
        use (CrossQ, https://arxiv.org/abs/1902.05605); ``"all"``: so does the actor (FlashSAC). Needs networks with
        batch norm, see ``SoftSACPolicy``
    :param use_critic_target: False: next values come from the critics themselves (CrossQ)
    :param normalize_rewards: ``"std"``: divide sampled rewards by the running standard deviation of discounted returns;
        ``"bounded"``: or by more, so that no discounted sum of past rewards is outside the support of categorical
        critics (returns can still be: see ``train/clipped_target_mass``)
    :param max_noise_repeat: hold the noise of an action for n <= ``max_noise_repeat`` steps, P(n) ~ n^-2 (FlashSAC)
    :param offline_data: take a part of each minibatch from this data, which new transitions do not replace (RLPD,
        https://arxiv.org/abs/2302.02948): a Minari dataset or its id, the path of a model file or checkpoint folder
        (its replay buffer), or anything else that ``ReplayBuffer.add_dataset`` takes. The run's files hold only a
        reference to it. The attribute is then a replay buffer
    :param offline_fraction: part of each minibatch that is offline data, in [0, 1]
    :param compile: compile the updates; ``"auto"``: if the run will have at least ``MIN_COMPILED_UPDATES`` of them. On
        the CPU, actors that the C++ supports then also explore in it. The result is the same up to rounding. If
        compiling fails, a warning says why; ``verbose=1`` says why updates are left to torch's compiler instead of C++
    :param matmul_precision: of the float32 matrix products of the updates, see ``torch.set_float32_matmul_precision``:
        ``"highest"``, ``"high"`` or ``"medium"`` (bfloat16 products); None: torch's setting (``"highest"`` by default)
    :param buffer_on_device: keep a copy of the replay buffer on the GPU, where the updates gather their minibatches.
        ``"auto"``: if it takes at most half of the free memory. Minibatches are the same. After writing to the buffer's
        arrays, call its ``mark_changed()``
    :param num_threads: torch's CPU threads. ``"auto"``: as many as the networks keep busy, but no more than this
        process may use and, on a machine without shares, than are free when ``learn()`` starts, unless you have set the
        number in torch or in the environment (``OMP_NUM_THREADS``, ``MKL_NUM_THREADS``)
    :raises ValueError: for action spaces that are not bounded boxes, and for invalid option values
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: SoftSACPolicy
    actor: Actor
    critic: Critic
    critic_target: Critic
    actor_target: Actor | None
    action_space: spaces.Box

    OF_PROCESS = (*ResumableAlgorithm.OF_PROCESS, "_runner", "_device_replay")
    # The networks are in the policy, and what remains of the entropy coefficient is among the parameters
    NOT_IN_FILES = (
        *ResumableAlgorithm.NOT_IN_FILES,
        *("actor", "critic", "critic_target", "actor_target", "_ent_coef", "offline_data", "_has_offline_data"),
        "_scaled_buffer",
    )

    _runner: Runner | None = None
    _device_replay: DeviceReplay | None = None
    _compiles = False  # stays with the run, also when it is continued from a file
    _threads: int | None = None  # stays with the run, too
    _reward_scale: RewardScale | None = None
    _scaled_buffer: SB3ReplayBuffer | None = None  # which the scale of rewards takes in
    _held_noise: HeldNoise | None = None
    _offline_source: offline.Source | None = None
    _has_offline_data = False  # it has been read: from then on, offline_data=None means that the user wants it no more

    def __init__(
        self,
        policy: str | type[SoftSACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[SB3ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        qf_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        policy_delay: int = 1,
        policy_delay_compensation: bool = False,
        random_steps: int | None = None,
        use_actor_target: bool = False,
        ent_coef_loss: str = "log",
        entropy_space: str = "normalized",
        max_grad_norm: float | None = None,
        joint_batch: str | None = None,
        use_critic_target: bool = True,
        normalize_rewards: str | None = None,
        max_noise_repeat: int = 1,
        offline_data: Any = None,
        offline_fraction: float = offline.DEFAULT_FRACTION,
        compile: bool | str = "auto",
        matmul_precision: str | None = None,
        buffer_on_device: bool | str = "auto",
        num_threads: int | str = "auto",
    ):
        if env is not None or _init_setup_model:
            check_env(env)
        if env is not None:
            env = maybe_make_env(env, verbose)
            check_action_space(env.action_space)
            check_observation_space(env.observation_space)
        if seed is not None and not is_int(seed, 0):
            raise ValueError(f"seed={seed!r} is not valid: it must be an integer >= 0, or None.")
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=None if seed is None else int(seed),
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.target_entropy = target_entropy
        self.qf_learning_rate = qf_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.policy_delay = policy_delay
        self.policy_delay_compensation = policy_delay_compensation
        self.random_steps = random_steps
        self.use_actor_target = use_actor_target
        self.ent_coef_loss = ent_coef_loss
        self.entropy_space = entropy_space
        self.max_grad_norm = max_grad_norm
        self.joint_batch = joint_batch
        self.use_critic_target = use_critic_target
        self.normalize_rewards = normalize_rewards
        self.max_noise_repeat = max_noise_repeat
        self.offline_data = offline_data
        self.offline_fraction = offline_fraction
        self.compile = compile
        self.matmul_precision = matmul_precision
        self.buffer_on_device = buffer_on_device
        self.num_threads = num_threads

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_options(self)
        self._adopt_sb3_classes()
        self._setup_replay_buffer()
        self._scaled_buffer = self.replay_buffer  # a file's scale takes in the rows that it gets from there
        buffer, n_steps = self.replay_buffer, self.n_steps
        assert self.replay_buffer_class is not None
        if buffer is None:
            self.replay_buffer = cast(SB3ReplayBuffer, "none yet")  # else OffPolicyAlgorithm makes one
        if issubclass(self.replay_buffer_class, ReplayBuffer):
            self.n_steps = 1  # else it would warn that no class but its own takes n_steps
        super()._setup_model()
        self.replay_buffer, self.n_steps = buffer, n_steps
        if self.use_actor_target and self.policy.actor_target is None:
            self.policy.make_actor_target()
        self.use_actor_target = self.policy.actor_target is not None
        self._create_aliases()

        self._make_ent_coef()
        check_networks(self)
        self._note_arguments()

    def _make_ent_coef(self) -> None:
        first_learning_rate = self._schedule(self.ent_coef_learning_rate)(1.0)
        self._ent_coef: EntCoef = make_ent_coef(self.ent_coef, first_learning_rate, self.device)

    def _note_arguments(self) -> None:
        """After making what is made from them."""
        self.target_entropy = parse_target_entropy(self.target_entropy, get_action_dim(self.action_space))
        names = ("n_steps", "gamma", "learning_rate", "lr_schedule", "ent_coef")
        self._made_from = {name: getattr(self, name) for name in names}

    def _take_changes(self) -> None:
        """Make anew what was made from arguments that the user has changed since."""
        changed = {name for name, value in self._made_from.items() if getattr(self, name) != value}
        self._convert_train_freq()
        buffer, kwargs = self.replay_buffer, self.replay_buffer_kwargs
        for name in changed & ({"n_steps", "gamma"} if getattr(buffer, "n_steps", 1) > 1 else {"n_steps"}):
            if buffer is not None and (not isinstance(buffer, ReplayBuffer) or name in kwargs):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect on this replay buffer (replay_buffer_class="
                    f"{type(buffer).__name__}, replay_buffer_kwargs={kwargs}): set it back to "
                    f"{self._made_from[name]}, or make a new model without these."
                )
        returns = kwargs.get("n_steps", self.n_steps), kwargs.get("gamma", self.gamma)
        # They may also be those of another model, whose buffer this one has got
        if isinstance(buffer, ReplayBuffer) and (buffer.n_steps, buffer.gamma) != returns:
            buffer.n_steps, buffer.gamma = returns
            self._runner = None
        if "learning_rate" in changed and "lr_schedule" not in changed:  # SB3's users change the schedule itself
            self._setup_lr_schedule()
        if "ent_coef" in changed:
            self._make_ent_coef()
        if self.use_actor_target != (self.policy.actor_target is not None):
            if self.use_actor_target:
                self.policy.make_actor_target()
            else:
                self.policy.actor_target = None
            self._create_aliases()
            self._runner = None
        self._note_arguments()

    def _convert_device(self) -> None:
        """A device can be assigned by its name, but the networks stay where they are."""
        self.device = th.device(self.device)
        there = self.policy.device
        indices = {self.device.index, there.index} - {None}
        if self.device.type != there.type or len(indices) > 1:
            raise ValueError(
                f"device={self.device} has no effect on networks that are on {there}: save the model, and "
                f"load it with SoftSAC.load(..., device={str(self.device)!r})."
            )

    def _convert_train_freq(self) -> None:
        """As in SB3, which refuses lists and NumPy's numbers."""
        parts: Any = self.train_freq if isinstance(self.train_freq, tuple | list) else (self.train_freq, "step")
        self.train_freq = TrainFreq(int(parts[0]), TrainFrequencyUnit(parts[1]))  # type: ignore[assignment]

    def _adopt_sb3_classes(self) -> None:
        """A model saved by SB3's ``SAC`` names SB3's policy and buffer classes: use our counterparts."""
        if self.policy_class in COUNTERPARTS:
            self.policy_class = COUNTERPARTS[self.policy_class]
            if self.replay_buffer_class in (SB3ReplayBuffer, DictReplayBuffer, NStepReplayBuffer):
                self.replay_buffer_class = None
                # Of its NStepReplayBuffer; usually the model's own n_steps and gamma, which SB3 notes here
                self.n_steps = self.replay_buffer_kwargs.pop("n_steps", self.n_steps)
                if self.replay_buffer_kwargs.get("gamma") == self.gamma:
                    del self.replay_buffer_kwargs["gamma"]
        elif not issubclass(self.policy_class, SoftSACPolicy):
            raise ValueError(
                f"policy={self.policy_class.__name__} is not a SoftSAC policy: use 'MlpPolicy', 'CnnPolicy', "
                "'MultiInputPolicy', or derive your class from sb3_softsac.SoftSACPolicy. (A file of another algorithm "
                "is loaded with that.)"
            )

    def _setup_replay_buffer(self) -> None:
        """Make the replay buffer, unless there is one or the model was loaded without an environment, to predict."""
        self.replay_buffer_kwargs = self.replay_buffer_kwargs or {}
        self.replay_buffer_class = self.replay_buffer_class or ReplayBuffer
        if issubclass(self.replay_buffer_class, ReplayBuffer):
            self.optimize_memory_usage = False  # nothing left to do, and SB3 would cut the last episode for its sake
            own: dict[str, Any] = {"n_steps": self.n_steps, "gamma": self.gamma}
            if self.n_steps == 1 and "n_steps" not in self.replay_buffer_kwargs:
                own = {}  # a user's subclass need not know n-step returns
        else:
            own = {"optimize_memory_usage": self.optimize_memory_usage}
            if issubclass(self.replay_buffer_class, HerReplayBuffer):
                own["env"] = self.env
        if self.replay_buffer is None and self.env is not None:
            self.replay_buffer = self.replay_buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                **{**own, **self.replay_buffer_kwargs},
            )
        if self.env is not None and self.buffer_size != BUFFER_SIZE_IF_WATCHED:
            offline.set_up(self)

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.actor_target = self.policy.actor_target

    @property
    def log_ent_coef(self) -> th.Tensor | None:
        """Logarithm of the learned entropy coefficient, (1,); None if it is fixed."""
        return self._ent_coef.log_ent_coef

    @log_ent_coef.setter
    def log_ent_coef(self, value: th.Tensor | None) -> None:
        self._ent_coef.log_ent_coef = value

    @property
    def ent_coef_optimizer(self) -> th.optim.Optimizer | None:
        """Optimiser of the learned entropy coefficient; None if it is fixed."""
        return self._ent_coef.optimizer

    @ent_coef_optimizer.setter
    def ent_coef_optimizer(self, value: th.optim.Optimizer | None) -> None:
        self._ent_coef.optimizer = value

    @property
    def ent_coef_tensor(self) -> th.Tensor | None:
        """The fixed entropy coefficient, scalar; None if it is learned."""
        return self._ent_coef.tensor

    @ent_coef_tensor.setter
    def ent_coef_tensor(self, value: th.Tensor | None) -> None:
        self._ent_coef.tensor = value

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed Python, NumPy, PyTorch, environments, action space and replay sampling.

        :param seed: None: leave all as they are
        """
        super().set_random_seed(seed)
        if seed is not None:
            self._held_noise = None
        if seed is not None and isinstance(self.replay_buffer, ReplayBuffer):
            self.replay_buffer.seed(seed)
        if seed is not None and self._offline_source is not None:
            offline.seed(self._offline_source, seed)

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._convert_device()
        check_options(self)  # first, since these may raise
        check_networks(self)
        self._take_changes()
        self._set_device_replay()
        self._set_reward_scale()
        total_timesteps, callback = super()._setup_learn(total_timesteps, *args, **kwargs)
        if self.device.type == "cpu":
            self._set_threads()
        compiles = self.compile
        if compiles == "auto":
            compiles = (
                self._compiles or self._n_updates + self._n_updates_ahead(total_timesteps) >= MIN_COMPILED_UPDATES
            )
        if self._runner is not None and self._runner.compiler.failed:
            compiles = False
        if compiles != self._compiles:
            self._compiles, self._runner = bool(compiles), None
        return total_timesteps, callback

    def _set_device_replay(self) -> None:
        """Decide whether minibatches are gathered on the device, from now on."""
        wanted, buffer = self.buffer_on_device, self.replay_buffer
        if buffer is None or not wanted or self.device.type not in device_replay.DEVICES:
            self._device_replay = None
            return
        obstacle = self._obstacle_to_device_replay(buffer)
        if obstacle is not None and wanted is True:
            raise ValueError(f"buffer_on_device=True is not possible: {obstacle}. Leave it out, or set it to False.")
        if self._present_device_replay() is not None or obstacle is not None:
            return
        assert isinstance(buffer, ReplayBuffer)
        try:
            if wanted is True or device_replay.fits(buffer, self.device):
                self._device_replay = DeviceReplay(buffer, self.device)
        except th.OutOfMemoryError:
            if wanted is True:
                raise
        has = "has a" if self._device_replay else "is too large for a"
        self._say(f"The replay buffer {has} copy on {self.device} (buffer_on_device)")

    def _present_device_replay(self) -> DeviceReplay | None:
        """The buffer's copy, unless the buffer has since been replaced or is now sampled differently."""
        replay, buffer = self._device_replay, self.replay_buffer
        if replay is not None and (
            replay.buffer is not buffer or self._obstacle_to_device_replay(replay.buffer) is not None
        ):
            self._device_replay = None
        return self._device_replay

    def _obstacle_to_device_replay(self, buffer: SB3ReplayBuffer) -> str | None:
        mixes = offline.share(self, self.batch_size) > 0
        return device_replay.obstacle(buffer, self._vec_normalize_env, mixes)

    def _n_updates_ahead(self, total_timesteps: int) -> int:
        """Updates until then; episodes are assumed to be as long as their time limit, or else 1,000 steps."""
        steps = max(total_timesteps - max(self.num_timesteps, self.learning_starts), 0)
        if self.gradient_steps < 0:
            return int(steps)
        assert isinstance(self.train_freq, TrainFreq) and self.env is not None
        between = self.train_freq.frequency * self.env.num_envs
        if self.train_freq.unit == TrainFrequencyUnit.EPISODE:
            envs = getattr(self.env.unwrapped, "envs", None)  # not from a worker: a spec may not survive the way
            spec = getattr(envs[0], "spec", None) if envs else None
            between *= getattr(spec, "max_episode_steps", None) or 1000
        return int(steps // between * self.gradient_steps)

    def _set_threads(self) -> None:
        self._threads = self._known_threads()
        if self._threads is None:
            layers = [layer for layer in self.policy.modules() if isinstance(layer, nn.Linear)]
            widest = max((layer.weight.numel() for layer in layers), default=0)
            self._threads = threads.choose(self.batch_size * widest)
        threads.use(self._threads)
        self._say(f"Using {self._threads} of {threads.n_cores()} CPU cores (num_threads)")

    def _known_threads(self) -> int | None:
        """Threads that this run keeps to; None: to be chosen."""
        if self.device.type != "cpu" or (self.num_threads == "auto" and threads.are_chosen()):
            return th.get_num_threads()
        if self.num_threads != "auto":
            return int(self.num_threads)
        return None if self._threads is None else min(self._threads, threads.n_cores())

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Do some updates on freshly sampled minibatches, and log the means of their metrics.

        :param gradient_steps: number of updates
        :param batch_size: minibatch size, B
        :raises ValueError: if a loss or its gradient is not finite
        """
        self._update_learning_rates()
        self._runner = self._present_runner()
        was_interrupted, self._is_interrupted = self._is_interrupted, True
        try:
            with matmul_precision(self.matmul_precision):
                replay = self._present_device_replay()
                draws = self._draws(gradient_steps, batch_size, replay)
                storage = None if replay is None else replay.update()
                n_done, means = self._runner(draws, self._update_options(), self._n_updates, storage)
        except NotFinite as error:
            self._n_updates += error.n_done
            self._is_interrupted = was_interrupted
            raise
        finally:
            self._compiles = self._runner.compiles
        self._n_updates += n_done
        self._is_interrupted = was_interrupted
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.normalize_rewards is not None:
            self.logger.record("train/reward_scale", self._reward_divisor())
        for name, mean in means.items():
            self.logger.record(f"train/{name}", mean)
        if self._runner.report.compile_seconds > 0.0:
            self.logger.record("time/compile_seconds", self._runner.report.compile_seconds, exclude="tensorboard")

    def _present_runner(self) -> Runner:
        """A new one if networks have been replaced since the last was made."""
        runner = self._runner
        if runner is None or runner.learner.policy is not self.policy or runner.learner.ent_coef is not self._ent_coef:
            return Runner(self.policy, self._ent_coef, self._compiles and self.compile is not False, self._say)
        return runner

    def _explore(self, obs: TorchObs) -> th.Tensor:
        if self.max_noise_repeat > 1:
            return self._explore_with_held_noise(obs)
        self._runner = self._present_runner()
        actions = self._runner.act(obs)
        return super()._explore(obs) if actions is None else actions

    def _explore_with_held_noise(self, obs: TorchObs) -> th.Tensor:
        if self._held_noise is None or self._held_noise.max_steps != self.max_noise_repeat:
            self._held_noise = HeldNoise(self.max_noise_repeat)
        noise = self._held_noise.next(self.n_envs, get_action_dim(self.action_space)).to(self.device)
        self.policy.set_training_mode(False)
        with th.no_grad():
            return self.actor.sample(obs, noise).actions

    def _store_transition(
        self,
        replay_buffer: SB3ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._reward_scale is not None:
            normalize = self._vec_normalize_env
            stored = reward if normalize is None else normalize.get_original_reward()
            self._reward_scale.update(stored, dones)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _reset_episodes(self) -> None:
        super()._reset_episodes()
        if self._reward_scale is not None:
            self._reward_scale.end_episodes()

    def _set_reward_scale(self) -> None:
        """Begin with what is in the replay buffer; later, take in what did not come from the environment."""
        if self.normalize_rewards is None:
            return
        buffer, source = self.replay_buffer, self._offline_source
        n_imported = getattr(buffer, "n_imported", 0)
        scale = self._reward_scale
        if scale is not None and scale.gamma is None:
            scale.gamma = self.gamma
        if scale is None or scale.gamma != self.gamma:
            self._reward_scale = scale = RewardScale(self.gamma)
            if buffer is not None:
                scale.update_from(buffer)
        elif buffer is not None and (buffer is not self._scaled_buffer or n_imported != scale.n_imported):
            scale.bound_by(buffer)
        self._scaled_buffer, scale.n_imported = buffer, n_imported
        if self.normalize_rewards == "bounded" and source is not None and self.offline_data is not None:
            if scale.bounded_by != source["sha256"]:
                scale.bound_by(self.offline_data)
                scale.bounded_by = source["sha256"]

    def _reward_divisor(self) -> float:
        """What sampled rewards are divided by."""
        if self.normalize_rewards is None:
            return 1.0
        self._set_reward_scale()
        assert self._reward_scale is not None
        head = head_of(self.critic)
        if self.normalize_rewards == "bounded" and isinstance(head, CategoricalHead):
            return self._reward_scale.divisor(head.bound)
        return self._reward_scale.divisor()

    def _draws(self, number: int, batch_size: int, replay: DeviceReplay | None) -> Iterator[Minibatches]:
        """Minibatches of B; several at once if the buffer is ours: drawing takes half the time, and C++ one call."""
        assert self.replay_buffer is not None
        source = self.replay_buffer if replay is None else replay
        # Not if a user's class or function does it: it is asked as SB3 asks it
        at_once = max(1, ROWS_AT_ONCE // batch_size) if samples_itself(self.replay_buffer) else 1
        divisor = self._reward_divisor()
        offline.set_up(self)  # of a model without an environment, or if it was exchanged
        n_offline = offline.share(self, batch_size)
        for first in range(0, number, at_once):
            n = min(at_once, number - first)
            samples: Any = source.sample(n * (batch_size - n_offline), env=self._vec_normalize_env)
            if n_offline > 0:
                others = self.offline_data.sample(n * n_offline, env=self._vec_normalize_env)
                samples = offline.mixed(samples, others, n)
            yield Minibatches(samples if divisor == 1.0 else with_scaled_rewards(samples, 1.0 / divisor), n)

    def _update_options(self) -> UpdateOptions:
        return UpdateOptions(
            gamma=self.gamma,
            tau=self.tau,
            target_update_interval=self.target_update_interval,
            policy_delay=self.policy_delay,
            policy_delay_compensation=self.policy_delay_compensation,
            target_entropy=float(self.target_entropy),
            ent_coef_loss=self.ent_coef_loss,
            log_action_scale=log_action_scale(self.action_space) if self.entropy_space == "env" else 0.0,
            max_grad_norm=self.max_grad_norm,
            joint_batch=self.joint_batch,
            use_critic_target=self.use_critic_target,
        )

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = self._schedule(None)

    def _schedule(self, learning_rate: float | Schedule | None) -> Callable[[float], float]:
        rate = self.learning_rate if learning_rate is None else learning_rate
        if isinstance(rate, str):
            return FloatSchedule(schedules.parse(rate))
        return FloatSchedule(rate if callable(rate) else float(rate))  # NumPy's numbers are not floats to FloatSchedule

    def _update_learning_rates(self) -> None:
        shared = [self.actor.optimizer]
        for name, learning_rate, optimizer in (
            ("qf_learning_rate", self.qf_learning_rate, self.critic.optimizer),
            ("ent_coef_learning_rate", self.ent_coef_learning_rate, self.ent_coef_optimizer),
        ):
            if optimizer is None:
                continue
            if learning_rate is None:
                shared.append(optimizer)
                continue
            value = self._schedule(learning_rate)(self._current_progress_remaining)
            update_learning_rate(optimizer, value)
            self.logger.record(f"train/{name}", value)
        self._update_learning_rate(shared)  # which a user's class may override

    def export(self, path: str | Path, **options: Any) -> float:
        """
        Write the policy to a file that needs neither SB3 nor this package: ``.onnx`` or ``.pt2`` (``torch.export``). It
        takes the environment's observations and returns its actions; VecNormalize's statistics are in it.

        :param path: file to write
        :param options: see :func:`sb3_softsac.export.export`, which also lists the errors
        :return: largest difference from ``predict()`` over random observations, in units of the action range
        """
        from sb3_softsac.export import export  # it imports this module

        return export(self, path, **options)

    def write(self, file: BinaryIO, *args: Any, **kwargs: Any) -> tuple[int, str]:
        """See ``ResumableAlgorithm``."""
        offline.drop_unwanted(self)
        return super().write(file, *args, **kwargs)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """
        As in SB3, and the same however the updates are run.

        :return: state dicts of policy and optimisers, by name
        """
        parameters = super().get_parameters()
        return {name: learner.portable(state) for name, state in parameters.items()}

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        if self.log_ent_coef is None:
            return state_dicts, ["ent_coef_tensor"]
        return [*state_dicts, "ent_coef_optimizer"], ["log_ent_coef"]
