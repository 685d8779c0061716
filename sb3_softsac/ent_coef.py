"""The entropy coefficient (alpha, temperature), fixed or learned, behind one interface."""

import torch as th

from sb3_softsac import losses


class FixedEntCoef:
    """
    A constant entropy coefficient.

    :param value: the coefficient, >= 0
    :param device: device of the coefficient
    """

    log_ent_coef: th.Tensor | None = None
    optimizer: th.optim.Optimizer | None = None

    def __init__(self, value: float, device: th.device):
        self.tensor: th.Tensor | None = th.tensor(value, device=device)

    def value(self) -> th.Tensor:
        """
        :return: the coefficient, detached, scalar
        """
        assert self.tensor is not None
        return self.tensor

    def tensors(self) -> list[th.Tensor]:
        """
        :return: its tensors
        """
        return [self.value()]

    def optimizers(self) -> list[th.optim.Optimizer]:
        """
        :return: none
        """
        return []

    def losses(self, log_prob: th.Tensor, target_entropy: float, kind: str) -> dict[str, th.Tensor]:
        """
        :return: no losses
        """
        return {}


class LearnedEntCoef:
    """
    An entropy coefficient whose logarithm is optimised (https://arxiv.org/abs/1812.05905, section 5).

    :param init_value: initial value of the coefficient, > 0
    :param learning_rate: initial learning rate of Adam
    :param device: device of the coefficient
    """

    tensor: th.Tensor | None = None

    def __init__(self, init_value: float, learning_rate: float, device: th.device):
        self.log_ent_coef: th.Tensor | None = th.log(th.ones(1, device=device) * init_value).requires_grad_(True)
        self.optimizer: th.optim.Optimizer | None = th.optim.Adam([self.log_ent_coef], lr=learning_rate)

    def value(self) -> th.Tensor:
        """
        :return: the coefficient, detached, shape (1,)
        """
        assert self.log_ent_coef is not None
        return th.exp(self.log_ent_coef.detach())

    def tensors(self) -> list[th.Tensor]:
        """
        :return: its tensors
        """
        assert self.log_ent_coef is not None
        return [self.log_ent_coef]

    def optimizers(self) -> list[th.optim.Optimizer]:
        """
        :return: the optimiser of its logarithm
        """
        assert self.optimizer is not None
        return [self.optimizer]

    def losses(self, log_prob: th.Tensor, target_entropy: float, kind: str) -> dict[str, th.Tensor]:
        """
        :param log_prob: see :func:`losses.ent_coef_loss`
        :param target_entropy: see :func:`losses.ent_coef_loss`
        :param kind: see :func:`losses.ent_coef_loss`
        :return: loss by log key
        """
        assert self.log_ent_coef is not None
        return {"ent_coef_loss": losses.ent_coef_loss(self.log_ent_coef, log_prob, target_entropy, kind)}


EntCoef = FixedEntCoef | LearnedEntCoef


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
        return LearnedEntCoef(value, learning_rate, device)
    if not learned and 0.0 <= value < float("inf"):
        return FixedEntCoef(value, device)
    raise ValueError(
        f"ent_coef={ent_coef!r} is not valid: use a number >= 0, 'auto', or 'auto_<first value>' with a value > 0 "
        "(for instance 'auto_0.1')."
    )
