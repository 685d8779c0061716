"""What an eager update costs, counted: a busy machine does not change it."""

from typing import Any

from stable_baselines3 import SAC
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from twins import cheetah

from sb3_softsac import SoftSAC


def flops(model: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model.train(gradient_steps=1, batch_size=256)
    return counter.get_total_flops()


def test_arithmetic_of_an_update() -> None:
    """
    Multiply-adds for each row of the batch. The actor (17 inputs, 256, 256, 2 times 6 outputs) has 72,960 weights and
    is run twice; a critic (23 inputs, 256, 256, 1 output) has 71,680, and there are two of them, run three times each:
    as targets, with the batch's actions and with the policy's own.
    """
    actor, critic, batch = 17 * 256 + 256 * 256 + 256 * 12, 23 * 256 + 256 * 256 + 256, 256
    assert (actor, critic) == (72_960, 71_680)
    forward = 2 * actor + 6 * critic
    # One product for the weights, and one for the inputs of each layer but the first
    backward_of_critics = 2 * (critic + critic - 23 * 256)
    # Through the critics to the actions: no weights of theirs
    backward_of_actor = 2 * critic + (actor + actor - 17 * 256)
    expected = 2 * batch * (forward + backward_of_critics + backward_of_actor)
    assert expected == 581_566_464

    counted = flops(cheetah(SoftSAC, compile=False))
    assert counted == expected
    assert counted < flops(cheetah(SAC))


class Operators(TorchDispatchMode):
    """Counts calls of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_eager_update_calls_fewer_operators_than_sb3s() -> None:
    counts = {}
    for algorithm, kwargs in ((SAC, {}), (SoftSAC, {"compile": False})):
        model = cheetah(algorithm, policy_kwargs={"net_arch": [16]}, **kwargs)
        with Operators() as operators:
            model.train(gradient_steps=1, batch_size=256)
        counts[algorithm] = operators.n
    assert counts[SoftSAC] < counts[SAC]
