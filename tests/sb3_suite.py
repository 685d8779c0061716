"""
Stable-Baselines3's own tests with ``SoftSAC`` in the place of its ``SAC``::

    python tests/sb3_suite.py PATH_OF_ITS_REPOSITORY [arguments of pytest]

A test that fails and is not in ``DIFFERENCES`` is a fault of ours. docs/migration.md ("From SAC to
SoftSAC") says why those fail that are.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.sac import sac

from sb3_softsac import SoftSAC

DIFFERENCES = {
    "test_n_step_replay.py::test_run[SoftSAC]": "n-step returns come from ReplayBuffer, not from NStepReplayBuffer",
    "test_n_step_replay.py::test_n_steps_with_dict_obs[None]": "n-step returns work for Dict observations, too",
    "test_save_load.py::test_warn_buffer[True-SoftSAC]": "optimize_memory_usage=True has nothing left to do or warn of",
    "test_spaces.py::test_action_spaces": "an action space that does not fit is a ValueError, not an AssertionError",
    "test_tensorboard.py::test_tensorboard[sac]": "the run's folder is called SoftSAC_1, not SAC_1",
    "test_gae.py::test_infinite_horizon[True-SoftSAC]": "learns from other samples under the same seed",
}
"""Beginnings of the tests' names, and why they fail."""


class InItsPlace:
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


def main() -> int:
    folder = Path(sys.argv[1]) / "tests"
    names = sorted(path.name for path in folder.glob("test_*.py") if "SAC" in path.read_text())
    stable_baselines3.SAC = sac.SAC = stable_baselines3.sac.SAC = SoftSAC  # type: ignore[misc]
    found = InItsPlace()
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder.parent), *sys.argv[2:]]
    pytest.main([*arguments, *(str(folder / name) for name in names)], plugins=[found])
    print(f"\n{found.n_passed} passed; {len(found.differences)} known differences, {len(found.faults)} faults")
    for name in found.faults:
        print(f"fault: {name}")
    return len(found.faults) > 0


if __name__ == "__main__":
    sys.exit(main())
