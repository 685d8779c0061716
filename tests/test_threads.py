"""The number of threads: the work's, the machine's, or the user's."""

import builtins
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_softsac import SoftSAC
from sb3_softsac.execution import threads

LARGE = 256 * 256 * 256  # multiplications of the default networks' largest product
SMALL = 8 * 16 * 16


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores of which none is busy, and nothing that the user has said."""
    for name in threads.CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_AT_IMPORT", 8)
    monkeypatch.setattr(threads, "_used", 8)
    monkeypatch.setattr(threads, "n_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "n_busy", lambda: 0)
    th.set_num_threads(8)


@pytest.mark.usefixtures("machine")
def test_work_decides() -> None:
    chosen = [threads.choose(work) for work in (0, SMALL, LARGE // 4, LARGE // 2, LARGE, 100 * LARGE)]
    assert chosen == [1, 1, 1, 2, 4, 8]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("n_cores", "n_busy", "expected"), [(8, 0, 8), (8, 5, 3), (8, 7, 1), (8, 8, 1), (2, 5, 1), (4, 0, 4), (1, 0, 1)]
)
def test_only_free_cores_are_used(monkeypatch: pytest.MonkeyPatch, n_cores: int, n_busy: int, expected: int) -> None:
    monkeypatch.setattr(threads, "n_cores", lambda: n_cores)
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    monkeypatch.setattr(threads, "n_busy", lambda: n_busy)
    assert threads.choose(100 * LARGE) == expected


@dataclass
class Node:
    """A simulated node, with 64 cores and others' threads."""

    affinity: int = 64
    quota: str | None = None  # of the cgroup: microseconds, and of how many
    slurm: str | None = None
    n_busy: int = 0


NODES = {
    "to itself": (Node(), 64),
    "to itself, busy": (Node(n_busy=60), 4),
    "pinned": (Node(affinity=4), 4),
    "pinned, busy": (Node(affinity=4, n_busy=40), 4),
    "pinned to one, busy": (Node(affinity=1, n_busy=64), 1),
    "quota": (Node(quota="400000 100000"), 4),
    "quota, busy": (Node(quota="400000 100000", n_busy=40), 4),
    "part of a core": (Node(quota="50000 100000", n_busy=40), 1),
    "no quota, busy": (Node(quota="max 100000", n_busy=62), 2),
    "Slurm": (Node(slurm="6"), 6),
    "Slurm, busy": (Node(slurm="6", n_busy=58), 6),
    "Slurm, pinned to fewer": (Node(slurm="6", affinity=3, n_busy=50), 3),
    "Slurm, unreadable": (Node(slurm="many", affinity=8, n_busy=50), 8),
    "Slurm, none": (Node(slurm="0", n_busy=50), 1),
    "all three": (Node(affinity=16, quota="800000 100000", slurm="12", n_busy=64), 8),
}


@pytest.mark.parametrize(("node", "expected"), NODES.values(), ids=NODES)
def test_share_of_a_node(monkeypatch: pytest.MonkeyPatch, node: Node, expected: int, tmp_path: Path) -> None:
    """Load of others does not count against cores that are ours."""
    for name in (*threads.CHOSEN_BY_USER, "SLURM_CPUS_PER_TASK", "LOKY_MAX_CPU_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if node.slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", node.slurm)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(node.affinity)), raising=False)
    monkeypatch.setattr(threads, "n_busy", lambda: node.n_busy)
    monkeypatch.setattr(threads, "_AT_IMPORT", 64)
    monkeypatch.setattr(threads, "_used", th.get_num_threads())
    quota = tmp_path / "cpu.max"
    if node.quota is not None:
        quota.write_text(node.quota)
    with_quota(monkeypatch, quota)
    assert threads.choose(1000 * LARGE) == expected


def with_quota(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """cgroup's file is another one."""

    def replaced(name: Any) -> Any:
        return str(path) if str(name) == "/sys/fs/cgroup/cpu.max" else name

    exists, original = os.path.exists, builtins.open
    monkeypatch.setattr(os.path, "exists", lambda name: exists(replaced(name)))
    monkeypatch.setattr(builtins, "open", lambda name, *args, **kwargs: original(replaced(name), *args, **kwargs))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("number", [1, 3, 16])
def test_torch_was_told(number: int) -> None:
    th.set_num_threads(number)
    assert [threads.choose(work) for work in (SMALL, 100 * LARGE)] == [number, number]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_environment_was_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """torch has read it by then: here, 8."""
    monkeypatch.setenv(name, "8")
    monkeypatch.setattr(threads, "n_busy", lambda: 6)
    assert [threads.choose(work) for work in (SMALL, LARGE)] == [8, 8]


@pytest.mark.usefixtures("machine")
def test_never_more_than_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the physical cores, where there are two threads to each."""
    monkeypatch.setattr(threads, "_AT_IMPORT", 4)
    th.set_num_threads(4)
    assert threads.choose(100 * LARGE) == 4


def loadavg(monkeypatch: pytest.MonkeyPatch, texts: list[Any]) -> None:
    """What each look at it gives; the last one from then on. An error is raised."""
    looks = iter(texts)
    last: list[Any] = [None]

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        assert str(self) == "/proc/loadavg"
        last[0] = next(looks, last[0])
        if isinstance(last[0], BaseException):
            raise last[0]
        return str(last[0])

    monkeypatch.setattr(threads.Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("running", "expected"),
    [([1], 0), ([3], 2), ([1, 1, 1, 9, 9], 0), ([4, 4, 4, 1, 1], 3), ([0], 0)],  # this process is one of them
)
def test_busy_threads_are_counted(monkeypatch: pytest.MonkeyPatch, running: list[int], expected: int) -> None:
    """The median of some looks: a moment's crowd is no load."""
    loadavg(monkeypatch, [f"0.52 0.58 0.59 {n}/467 12345\n" for n in running])
    assert threads.n_busy(samples=max(len(running), 3), interval=0.0) == expected


@pytest.mark.parametrize(
    "content",
    [FileNotFoundError("no such file"), PermissionError("denied"), "", "0.5 0.5 0.5", "0.5 0.5 0.5 many/467 1", "\0"],
)
def test_unreadable_load(monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    loadavg(monkeypatch, [content])
    assert threads.n_busy(samples=3, interval=0.0) == 0
    loadavg(monkeypatch, ["0.5 0.5 0.5 7/467 1", content])
    assert threads.n_busy(samples=3, interval=0.0) == 0


# In a run


def make(net_arch: tuple[int, ...] = (16,), **kwargs: Any) -> SoftSAC:
    options = {"learning_starts": 100, "buffer_size": 100, "device": "cpu", "compile": False, "seed": 0}
    policy_kwargs = {"net_arch": list(net_arch)}
    return SoftSAC("MlpPolicy", gym.make("Pendulum-v1"), **{**options, "policy_kwargs": policy_kwargs, **kwargs})


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("net_arch", "batch_size", "expected"), [((16,), 256, 1), ((256, 256), 256, 4), ((256, 256), 64, 1)]
)
def test_small_networks_get_one_thread(net_arch: tuple[int, ...], batch_size: int, expected: int) -> None:
    make(net_arch, batch_size=batch_size).learn(3)
    assert th.get_num_threads() == expected


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("number", [1, 2, 5])
def test_number_that_was_asked_for(number: int) -> None:
    """Whatever the work is, and what else runs; from ``learn()`` on, not before."""
    model = make(num_threads=number)
    assert th.get_num_threads() == 8
    model.learn(3)
    assert th.get_num_threads() == number
    th.set_num_threads(7)
    model.learn(3)
    assert th.get_num_threads() == number


@pytest.mark.usefixtures("machine")
def test_number_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    make(num_threads=2, verbose=1).learn(3)
    assert "Using 2 of 8 CPU cores (num_threads)" in capsys.readouterr().out.splitlines()
    make(num_threads=2, verbose=0).learn(3)
    assert not capsys.readouterr().out


@pytest.mark.usefixtures("machine")
def test_loaded_run_keeps_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums in another order would be rounded in another way."""
    monkeypatch.setattr(threads, "n_busy", lambda: 5)
    model = make((256, 256))
    model.learn(3)
    assert th.get_num_threads() == 3
    model.save(tmp_path / "model")
    th.set_num_threads(8)
    monkeypatch.setattr(threads, "n_busy", lambda: 0)
    loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu")
    loaded.learn(3)
    assert th.get_num_threads() == 3
    th.set_num_threads(8)
    SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", num_threads=6).learn(3)
    assert th.get_num_threads() == 6


@pytest.mark.usefixtures("machine")
def test_machine_with_fewer_cores_does_not_keep_the_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make((256, 256))
    model.learn(3)
    assert th.get_num_threads() == 4
    model.save(tmp_path / "model")
    th.set_num_threads(8)
    monkeypatch.setattr(threads, "n_cores", lambda: 2)
    with pytest.warns(UserWarning, match="threads of torch: 4 then, 2 now"):
        loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", force_reset=False)
    loaded.learn(3)
    assert th.get_num_threads() == 2


@pytest.mark.usefixtures("machine")
def test_second_model_of_a_process_is_not_bound_to_the_firsts_number() -> None:
    """What a model has set is not what the user has set."""
    make().learn(3)
    assert th.get_num_threads() == 1
    make((256, 256)).learn(3)
    assert th.get_num_threads() == 4


@pytest.mark.usefixtures("machine")
def test_what_the_user_says_later_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job is given one core, and continues a run that had four."""
    model = make((256, 256))
    model.learn(3)
    assert th.get_num_threads() == 4
    model.save(tmp_path / "model")
    th.set_num_threads(3)
    model.learn(3)
    assert th.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    th.set_num_threads(1)
    with pytest.warns(UserWarning, match="threads of torch: 4 then, 1 now"):
        loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", force_reset=False)
    loaded.learn(3)
    assert th.get_num_threads() == 1


@pytest.mark.usefixtures("machine")
def test_number_that_is_kept_is_no_difference(tmp_path: Path) -> None:
    model = make((256, 256))
    model.learn(3)
    model.save(tmp_path / "model")
    th.set_num_threads(8)  # a new process
    SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device="cpu", force_reset=False)
