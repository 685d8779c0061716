"""Shared settings: one torch thread, since two processes with two threads each collapse on a small machine."""

import torch as th
from hypothesis import settings

th.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")
