"""Shared settings: one torch thread, since two processes with two threads each collapse on a small machine."""

import itertools
import os
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.utils import seeding
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
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
