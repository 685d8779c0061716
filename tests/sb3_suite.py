"""
Stable-Baselines3's own tests with ``SoftSAC`` in the place of its ``SAC``, or ``RayVecEnv`` in that of its
``SubprocVecEnv``::

    python tests/sb3_suite.py SAC PATH_OF_ITS_SOURCE [arguments of pytest]
    python tests/sb3_suite.py SubprocVecEnv PATH_OF_ITS_SOURCE [arguments of pytest]

A test that fails and is not in ``DIFFERENCES`` is a fault of ours. docs/migration.md ("From SAC to
SoftSAC") says why those of SAC fail that are.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.common import vec_env
from stable_baselines3.sac import sac

DIFFERENCES = {
    "test_n_step_replay.py::test_run[SoftSAC]": "n-step returns come from ReplayBuffer, not from NStepReplayBuffer",
    "test_n_step_replay.py::test_n_steps_with_dict_obs[None]": "n-step returns work for Dict observations, too",
    "test_save_load.py::test_warn_buffer[True-SoftSAC]": "optimize_memory_usage=True has nothing left to do or warn of",
    "test_spaces.py::test_action_spaces": "an action space that does not fit is a ValueError, not an AssertionError",
    "test_tensorboard.py::test_tensorboard[sac]": "the run's folder is called SoftSAC_1, not SAC_1",
    "test_gae.py::test_infinite_horizon[True-SoftSAC]": "learns from other samples under the same seed",
    "test_vec_envs.py::test_subproc_start_method": "Ray starts processes in its own way only",
}
"""Beginnings of the tests' names, and why they fail."""


class Sorter:
    """Plugin of pytest: sorts failures into differences and faults."""

    def __init__(self) -> None:
        self.differences: list[str] = []
        self.faults: list[str] = []
        self.n_passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.removeprefix("tests/")
        if report.failed:
            known = any(name.startswith(start) for start in DIFFERENCES)
            (self.differences if known else self.faults).append(name)
        self.n_passed += report.when == "call" and report.passed

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.faults.append(f"{report.nodeid} cannot be read:\n{report.longrepr}")


def replace_sac(_folder: Path) -> None:
    from sb3_softsac import SoftSAC

    stable_baselines3.SAC = sac.SAC = stable_baselines3.sac.SAC = SoftSAC  # type: ignore[misc]


def replace_subproc_vec_env(folder: Path) -> None:
    import ray

    from sb3_softsac.ray import RayVecEnv

    class InItsPlace(RayVecEnv):
        def __init__(self, env_fns: Any, start_method: str | None = None):
            super().__init__(env_fns)

    # Actors import the tests' environments
    path = os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])
    ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    vec_env.SubprocVecEnv = vec_env.subproc_vec_env.SubprocVecEnv = InItsPlace  # type: ignore[misc]


REPLACED = {"SAC": replace_sac, "SubprocVecEnv": replace_subproc_vec_env}


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2]) / "tests"
    names = sorted(path.name for path in folder.glob("test_*.py") if what in path.read_text())
    REPLACED[what](folder)
    found = Sorter()
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--rootdir",
        str(folder.parent),
        *sys.argv[3:],
    ]
    pytest.main([*arguments, *(str(folder / name) for name in names)], plugins=[found])
    print(f"\n{found.n_passed} passed; {len(found.differences)} known differences, {len(found.faults)} faults")
    for name in found.faults:
        print(f"fault: {name}")
    return len(found.faults) > 0


if __name__ == "__main__":
    sys.exit(main())
