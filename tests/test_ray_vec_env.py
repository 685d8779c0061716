"""Environments in Ray actors behave as in other processes, survive the death of an actor, and go on after a load."""

import argparse
import copy
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import resume_script
from gymnasium import spaces
from resume_script import CASES, Case, differences, plain
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_softsac import SoftSAC
from sb3_softsac.persistence.envs import env_state

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sb3-softsac[ray]'")

import ray
from ray.cluster_utils import Cluster

from sb3_softsac import ray as of_package
from sb3_softsac.ray import RayVecEnv

pytestmark = [
    pytest.mark.slow,  # half a minute to start a cluster, which waits for free cores
    pytest.mark.processes,
    # Ray's own files and sockets, and its warnings to its developers
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

VECTOR = spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)
SPACES: dict[str, spaces.Space[Any]] = {
    "box": VECTOR,
    "dict": spaces.Dict({"vector": VECTOR, "picture": spaces.Box(0, 255, (12, 12, 1), dtype=np.uint8)}),
    "image": spaces.Box(0, 255, (64, 64, 3), dtype=np.uint8),
    "discrete": spaces.Discrete(50),
    "tuple": spaces.Tuple((VECTOR, spaces.Discrete(7))),
}


class Probe(gym.Env[Any, np.ndarray]):
    """
    Observations by chance, and episodes that end or are cut; it draws from the random state of the process, too.

    :param kind: one of ``SPACES``
    :param limit: of an episode, in steps
    :param global_noise: whether it draws from the random state of the process
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, kind: str = "box", limit: int = 6, global_noise: bool = False):
        self.observation_space = copy.deepcopy(SPACES[kind])
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.render_mode = "rgb_array"
        self.global_noise = global_noise
        self.limit = limit
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = (options or {}).get("steps", 0)
        return self.observation_space.sample(), {"begun": self.steps}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        action *= 0.5  # as careless environments do
        self.steps += 1
        reward = float(action.sum() + self.np_random.normal())
        if self.global_noise:
            reward += float(np.random.normal() + random.random())
        terminated = self.np_random.random() < 0.1
        return self.observation_space.sample(), reward, terminated, self.steps >= self.limit, {"steps": self.steps}

    def render(self) -> Any:
        return np.full((4, 4, 3), self.steps, dtype=np.uint8)

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def add(self, number: int, to: int = 0) -> int:
        return number + to + self.steps

    def fail(self) -> None:
        raise ZeroDivisionError("a broken robot")


def change_mark(env: Any) -> list[float]:
    env.mark += 1
    return list(map(float, env.mark))


def probes(n: int, kind: str = "box", **kwargs: Any) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [lambda: Monitor(Probe(kind, **kwargs)) for _ in range(n)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray writes a token to the home directory
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where actors find this module
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def env(cluster: Cluster) -> Iterator[RayVecEnv]:
    """Five environments in three actors."""
    env = RayVecEnv(probes(5), envs_per_actor=2)
    yield env
    env.close()


def rollout(env: VecEnv, n_steps: int = 25) -> list[Any]:
    """All that environments return, from a reset with seeds and options on."""
    rng = np.random.default_rng(0)
    env.seed(7)
    env.set_options([{"steps": i % 3} for i in range(env.num_envs)])
    returned: list[Any] = [env.reset(), list(env.reset_infos)]
    for _ in range(n_steps):
        step = env.step(rng.uniform(-1, 1, (env.num_envs, 2)).astype(np.float32))
        for info in step[3]:
            info.get("episode", {}).pop("t", None)  # a clock
        returned.append([*step[:3], list(step[3]), list(env.reset_infos)])
    return returned


def without_dtype_of_rewards(returned: list[Any]) -> Any:
    """DummyVecEnv gives rewards in float32, and keeps the infos of earlier resets in another way than others."""
    first, infos, *steps = returned
    return plain([first, infos, *([step[0], np.float32(step[1]), *step[2:]] for step in steps)])


# --- Behaviour --------------------------------------------------------------------------------------------------------


def check_equal(returned: list[Any], others: VecEnv) -> None:
    expected = rollout(others)
    if isinstance(others, DummyVecEnv):
        returned, expected = without_dtype_of_rewards(returned), without_dtype_of_rewards(expected)
    assert differences(plain(expected), plain(returned)) == []


def test_equal_to_others(env: RayVecEnv) -> None:
    returned = rollout(env)
    ends = [info for step in returned[2:] for info in step[3] if "terminal_observation" in info]
    assert {info["TimeLimit.truncated"] for info in ends} == {False, True}
    check_equal(returned, DummyVecEnv(probes(5)))


@pytest.mark.parametrize(
    ("kind", "n_envs", "envs_per_actor"), [("dict", 3, 2), ("image", 2, 2), ("discrete", 2, 2), ("tuple", 2, 5)]
)
def test_equal_with_other_observations(cluster: Cluster, kind: str, n_envs: int, envs_per_actor: int) -> None:
    fns = probes(n_envs, kind)
    in_processes = SubprocVecEnv(fns) if kind == "dict" else None
    env, in_this = RayVecEnv(fns, envs_per_actor), DummyVecEnv(fns)
    assert (env.observation_space, env.action_space) == (in_this.observation_space, in_this.action_space)
    returned = rollout(env)
    env.close()
    check_equal(returned, in_this)
    if in_processes is not None:
        check_equal(returned, in_processes)
        in_processes.close()


def test_what_is_returned_can_be_changed(env: RayVecEnv) -> None:
    for obs, rewards, dones, infos, _ in rollout(env)[2:]:
        obs += 1
        rewards += 1
        dones |= True
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] += 1


def test_attributes_and_methods(env: RayVecEnv) -> None:
    env.set_options([{"steps": i} for i in range(5)])
    env.reset()
    assert env.get_attr("steps") == [0, 1, 2, 3, 4]
    assert env.get_attr("steps", [4, 0, 4]) == [4, 0, 4]
    assert env.get_attr("steps", -1) == [4]
    assert env.env_method("add", 1, to=10) == [11, 12, 13, 14, 15]
    assert env.env_method("add", 1, indices=(3,)) == [4]
    env.set_attr("mark", np.zeros(1))
    env.set_attr("mark", np.ones(1), [1, 2])
    assert env.run_on_envs(change_mark, indices=range(4)) == [[1], [2], [2], [1]]
    assert len(set(env.env_method("pid"))) == 3
    assert env.has_attr("steps") and not env.has_attr("wheels")
    with pytest.raises(AttributeError, match="wheels"):
        env.get_attr("wheels")
    with pytest.raises(IndexError):
        env.get_attr("steps", 5)
    assert env.env_is_wrapped(Monitor) == [True] * 5
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, [0]) == [False]
    assert [image[0, 0, 0] for image in env.get_images() if image is not None] == [0, 1, 2, 3, 4]
    assert env.render() is not None and env.render_mode == "rgb_array"


def test_wrappers(env: RayVecEnv) -> None:
    in_this = DummyVecEnv(probes(5))
    returned = [rollout(VecNormalize(VecFrameStack(e, 2))) for e in (env, in_this)]
    assert returned[0][0].tobytes() == returned[1][0].tobytes()
    for ours, others in zip(returned[0][2:], returned[1][2:], strict=True):
        np.testing.assert_array_equal(ours[0], others[0])
        np.testing.assert_allclose(ours[1], others[1], rtol=1e-5)


def test_errors_of_an_environment(env: RayVecEnv) -> None:
    with pytest.raises(ZeroDivisionError, match="a broken robot") as raised:
        env.env_method("fail", indices=3)
    assert "in fail" in str(raised.value) and "environments 2 to 3" in str(raised.value)
    with pytest.raises(ValueError, match="4 actions are not valid: give one for each of 5 environments"):
        env.step(np.zeros((4, 2), dtype=np.float32))
    assert len(env.reset()) == 5


def test_arguments(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="env_fns is empty"):
        RayVecEnv([])
    with pytest.raises(ValueError, match="envs_per_actor=0 is not valid"):
        RayVecEnv(probes(1), envs_per_actor=0)
    with pytest.raises(ValueError, match="max_restarts=-1 is not valid"):
        RayVecEnv(probes(1), max_restarts=-1)
    with pytest.raises(ValueError, match="actor_options has max_task_retries"):
        RayVecEnv(probes(1), actor_options={"max_task_retries": 1})
    with pytest.raises(
        RuntimeError, match=r"no actor with environment 0, environment 1 after start_seconds=1\b.*robot"
    ):
        RayVecEnv(probes(2), actor_options={"resources": {"robot": 1}}, start_seconds=1)


def test_environments_that_cannot_be_made(cluster: Cluster) -> None:
    with pytest.raises(KeyError, match="no_such_kind"):
        RayVecEnv(probes(1, "no_such_kind"))


def test_starts_ray(env: RayVecEnv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def init() -> None:
        calls.append("init")
        raise RuntimeError("far enough")

    monkeypatch.setattr(of_package.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(of_package.ray, "init", init)
    with pytest.raises(RuntimeError, match="far enough"):
        RayVecEnv(probes(1))
    assert calls == ["init"]
    assert "ray.init() is called" in capsys.readouterr().err


def test_close(cluster: Cluster) -> None:
    env = RayVecEnv(probes(2), envs_per_actor=2)
    (pid,) = set(env.env_method("pid"))
    env.reset()
    env.step_async(np.zeros((2, 2), dtype=np.float32))
    env.close()
    env.close()
    wait_for_end(pid)
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


# --- Deaths -----------------------------------------------------------------------------------------------------------


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives")


def test_death_of_an_actor(cluster: Cluster) -> None:
    """Environments 0 and 1 die: their episodes are truncated, and those of environment 2 go on."""
    env = RayVecEnv(probes(3, "dict", limit=1000), envs_per_actor=2, max_restarts=1)
    env.set_attr("mark", 5)
    rest = DummyVecEnv(probes(3, "dict", limit=1000))
    for e in (env, rest):
        e.seed(1)
        e.reset()
    actions = np.zeros((3, 2), dtype=np.float32)
    last, theirs = env.step(actions.copy()), rest.step(actions.copy())
    os.kill(env.env_method("pid")[0], signal.SIGKILL)
    with pytest.warns(UserWarning, match=r"actor of environments 0 to 1 on node .* has died.*\(restart 1 of 1\)"):
        obs, rewards, dones, infos = env.step(actions.copy())
    theirs = rest.step(actions.copy())
    assert list(dones) == [True, True, theirs[2][2]] and list(rewards[:2]) == [0, 0] and rewards[2] != 0
    for i in range(2):
        assert infos[i]["TimeLimit.truncated"]
        before = {key: value[i] for key, value in last[0].items()}
        assert differences(plain(before), plain(infos[i]["terminal_observation"])) == []
        assert env.reset_infos[i] == {"begun": 0}
    assert differences(*(plain({key: value[2] for key, value in o.items()}) for o in (theirs[0], obs))) == []
    assert env.get_attr("mark") == [5] * 3, "what set_attr has set is gone"
    assert env.get_attr("steps") == [0, 0, 2]
    obs, rewards, dones, infos = env.step(actions.copy())
    assert rewards.all() and env.get_attr("steps", [0, 1]) == [1 - dones[0], 1 - dones[1]]

    os.kill(env.env_method("pid")[2], signal.SIGKILL)
    with pytest.warns(UserWarning, match=r"actor of environment 2 on node .*"):
        assert env.env_method("add", 1, indices=2) == [1]  # found before the next step
    (missing,) = {tree["missing"] for tree in env_state.capture(env)["envs"]}
    assert "environment 2" in missing and "replaced after the last step" in missing
    assert env.step(actions.copy())[2][2]
    assert not [tree for tree in env_state.capture(env)["envs"] if "missing" in tree]

    os.kill(env.env_method("pid")[0], signal.SIGKILL)
    assert all("has died" in tree["missing"] for tree in env_state.capture(env)["envs"])
    with pytest.raises(RuntimeError, match=r"actor of environments 0 to 1 on node .* replaced 1 time"):
        env.step(actions.copy())
    env.close()


# --- State ------------------------------------------------------------------------------------------------------------

RESUMED = Case(
    lambda: VecNormalize(RayVecEnv(probes(3, global_noise=True), envs_per_actor=2)),
    steps=99, stops=(21, 63), kwargs={"learning_starts": 30},
)  # fmt: skip


def test_exact_resume(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "ray", RESUMED)
    whole = resume_script.run(RESUMED, tmp_path)
    paths = [tmp_path / "21.zip", next(tmp_path.glob("run/step-63-*.zip"))]
    for stop, path, outcome in zip(RESUMED.stops, paths, resume_script.resume("ray", paths), strict=True):
        assert outcome.complaints == []
        assert differences(whole.state, outcome.state) == [], stop
        assert differences(plain(whole.rows[whole.logged[stop] :]), plain(outcome.rows)) == [], path
    assert whole.rows


def test_other_groups_are_said(env: RayVecEnv) -> None:
    state = env_state.capture(env)
    assert not any("missing" in tree for tree in state["envs"])
    other = RayVecEnv(probes(5), envs_per_actor=5)
    with pytest.warns(UserWarning, match=r"RayVecEnv has envs_per_actor=5 \(was 2\)"):
        assert env_state.restore(other, state, mid_episode=True) == []
    other.close()


# --- RL Zoo -----------------------------------------------------------------------------------------------------------


def test_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rl_zoo3 import train
    from rl_zoo3.exp_manager import ExperimentManager

    monkeypatch.setattr("sys.argv", ["train", "--help"])
    with pytest.raises(SystemExit):
        train.train()
    assert "{dummy,subproc,ray}" in capsys.readouterr().out
    manager = ExperimentManager(argparse.Namespace(), "softsac", "Pendulum-v1", "logs", vec_env_type="ray")
    assert manager.vec_env_class is RayVecEnv
    other = ExperimentManager(argparse.Namespace(), "softsac", "Pendulum-v1", "logs", vec_env_type="subproc")
    assert other.vec_env_class is SubprocVecEnv


# --- Last, since Ray goes on for a while to place actors on dead nodes ------------------------------------------------


def test_death_of_a_node(cluster: Cluster) -> None:
    """Two environments learn on a machine that dies, go on elsewhere, and die with that one as well."""
    nodes = [cluster.add_node(num_cpus=1, resources={"room": 1})]
    options = {"num_cpus": 0.5, "resources": {"room": 0.5}}
    env = VecNormalize(RayVecEnv(probes(2), actor_options=options, max_restarts=1))
    assert env.env_method("node") == [nodes[0].node_id] * 2
    model = SoftSAC("MlpPolicy", env, learning_starts=10, batch_size=8, policy_kwargs={"net_arch": [8]}, device="cpu")

    def kill_at_20(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if model.num_timesteps == 20:
            nodes.append(cluster.add_node(num_cpus=1, resources={"room": 1}))
            cluster.remove_node(nodes[0], allow_graceful=False)
            time.sleep(3.0)  # its actors outlive it for a moment
        return True

    with pytest.warns(UserWarning, match=f"on node .*{nodes[0].node_id}.* has died") as caught:
        model.learn(40, callback=kill_at_20)
    assert len([w for w in caught if "has died" in str(w.message)]) == 2
    assert model.num_timesteps == 40
    assert model.replay_buffer is not None
    # A node takes its actors with it within some steps, each of them once
    ends = (model.replay_buffer.timeouts[:20] == 1) & (model.replay_buffer.rewards[:20] == 0)
    assert list(ends.sum(axis=0)) == [1, 1]
    assert model.replay_buffer.dones[:20][ends].all()
    assert env.env_method("node") == [nodes[1].node_id] * 2
    cluster.remove_node(nodes[1], allow_graceful=False)
    time.sleep(3.0)
    with pytest.raises(RuntimeError, match=f"actor of environment [01] on node .*{nodes[1].node_id}"):
        model.learn(20)
    env.close()
