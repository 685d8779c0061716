"""The entropy coefficient (alpha, temperature), fixed or learned."""

import torch as th


class EntCoef:
    """
    The entropy coefficient: a constant, or learned by its logarithm (https://arxiv.org/abs/1812.05905, section 5).

    :param value: the coefficient, >= 0; if it is learned, the first one, > 0
    :param learning_rate: initial learning rate of Adam; None: it is not learned
    :param device: device of the coefficient
    """

    def __init__(self, value: float, learning_rate: float | None, device: th.device):
        self.tensor: th.Tensor | None = None
        self.log_ent_coef: th.Tensor | None = None
        self.optimizer: th.optim.Optimizer | None = None
        if learning_rate is None:
            self.tensor = th.tensor(value, device=device)
        else:
            self.log_ent_coef = th.log(th.ones(1, device=device) * value).requires_grad_(True)
            self.optimizer = th.optim.Adam([self.log_ent_coef], lr=learning_rate)

    @property
    def is_learned(self) -> bool:
        """Whether it has an optimiser, and a loss."""
        return self.log_ent_coef is not None

    def value(self) -> th.Tensor:
        """The coefficient, detached: a scalar, or (1,) if it is learned."""
        if self.log_ent_coef is not None:
            return th.exp(self.log_ent_coef.detach())
        assert self.tensor is not None
        return self.tensor

    def tensors(self) -> list[th.Tensor]:
        """What it consists of, besides the optimiser's state."""
        return [self.value() if self.log_ent_coef is None else self.log_ent_coef]

    def optimizers(self) -> list[th.optim.Optimizer]:
        """The optimiser of its logarithm, if it is learned."""
        return [] if self.optimizer is None else [self.optimizer]


def make_ent_coef(ent_coef: str | float, learning_rate: float, device: th.device) -> EntCoef:
    """
    Make the entropy coefficient from SB3's argument ``ent_coef``.

    :param ent_coef: a number (fixed), ``"auto"`` (learned, initially 1) or ``"auto_0.1"`` (learned, initially 0.1)
    :param learning_rate: initial learning rate, if it is learned
    :param device: device of the coefficient
    :return: the entropy coefficient
    :raises ValueError: if ``ent_coef`` is none of these, or out of range
    """
    text = str(ent_coef)
    learned = text == "auto" or text.startswith("auto_")
    try:
        value = 1.0 if text == "auto" else float(text.removeprefix("auto_"))
    except ValueError:
        value = float("nan")
    if learned and 0.0 < value < float("inf"):
        return EntCoef(value, learning_rate, device)
    if not learned and 0.0 <= value < float("inf"):
        return EntCoef(value, None, device)
    raise ValueError(
        f"ent_coef={ent_coef!r} is not valid: use a number >= 0, 'auto', or 'auto_<first value>' with a value > 0 "
        "(for instance 'auto_0.1')."
    )
