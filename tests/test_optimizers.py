"""Which optimisers' steps can be done for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sb3_softsac import optimizers


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers(register: Callable[..., Any]) -> None:
    """They are called in the optimiser's own step only."""
    optimizer = th.optim.Adam([th.zeros(1, requires_grad=True)])
    assert optimizers.is_plain_adam(optimizer)
    handle = register(lambda *_: None)
    try:
        assert not optimizers.is_plain_adam(optimizer)
    finally:
        handle.remove()
    assert optimizers.is_plain_adam(optimizer)


def test_without_hooks_of_all_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a user's hooks would be is not known: they may have some."""
    monkeypatch.setattr(optimizers, "GLOBAL_STEP_HOOKS", {"_moved": None})
    optimizer = th.optim.Adam([th.zeros(1, requires_grad=True)])
    assert not optimizers.is_plain_adam(optimizer)
    assert optimizers.moved_names(optimizer) == ["torch.optim.optimizer._moved"]
