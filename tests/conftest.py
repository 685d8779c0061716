"""
Settings and fixtures of all tests. One torch thread, since two processes with two threads each collapse on a small
machine.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores from the other tests

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.utils import seeding
from hypothesis import settings

from sb3_softsac import SoftSACPolicy
from sb3_softsac.execution import inductor
from sb3_softsac.execution.cpp import update as cpp_update
from sb3_softsac.execution.cpp.support import NotPlain

th.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    What a test leaves to chance is the same in each run, but not the same for each environment of a test: a test that
    fails once in a hundred runs would be found by nobody who could mend it.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    th.manual_seed(seed)
    numbers = itertools.count(seed)
    np_random = seeding.np_random

    def seeded(given: int | None = None) -> tuple[Any, int]:
        return np_random(next(numbers) if given is None else given)

    monkeypatch.setattr(seeding, "np_random", seeded)
    yield


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    before = th.get_num_threads()
    yield
    if th.get_num_threads() != before:
        th.set_num_threads(before)


# What is done instead of compiling


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and differentiates as Inductor's compilation does, but generates no code."""
    monkeypatch.setattr(inductor, "BACKEND", "aot_eager")


@pytest.fixture
def nothing_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves plain updates to Inductor, too."""

    def refuse(policy: SoftSACPolicy) -> None:
        raise NotPlain("a test")

    monkeypatch.setattr(cpp_update, "plain_layers", refuse)


@pytest.fixture
def only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only traces, which is what most can go wrong in; the operations are then done one by one."""
    monkeypatch.setattr(inductor, "BACKEND", "eager")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, only_traced: None) -> list[str]:
    """Names of the functions that are compiled, from now on."""
    names: list[str] = []
    original = inductor.compiled

    def spy(function: Callable[..., Any], device: th.device) -> Callable[..., Any]:
        names.append(function.__name__)
        return original(function, device)

    monkeypatch.setattr(inductor, "compiled", spy)
    return names
