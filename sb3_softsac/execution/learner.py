"""What updates read and change in place, however they are run: networks, optimisers and the entropy coefficient."""

from typing import Any

import torch as th
from torch.optim import Optimizer

from sb3_softsac.ent_coef import EntCoef
from sb3_softsac.gradient_step import Due, LearningRates
from sb3_softsac.optimizers import NOTHING, Optimizers, is_plain_adam, trainable, trained, use_of
from sb3_softsac.policies import SoftSACPolicy

ALL = Due(1, True)


class Learner:
    """
    :param policy: networks and their optimisers
    :param ent_coef: entropy coefficient and its optimiser
    """

    def __init__(self, policy: SoftSACPolicy, ent_coef: EntCoef):
        self.policy = policy
        self.ent_coef = ent_coef
        self.device = policy.device
        self.learning_rates = LearningRates(*(th.zeros((), device=self.device) for _ in LearningRates._fields))
        self.rates = [0.0] * len(self.learning_rates)  # the same as numbers
        self.n_trainings = 0  # calls of train()
        self._is_in_training_mode = False
        self._trained: Optimizers | None = None
        self._trained_key: Any = None
        self._states: list[Any] = []  # that are looked up, kept so that no other has their identity

    def begin(self) -> None:
        """To be called before the updates of a ``train()``: what the user may have changed since the last one."""
        self.n_trainings += 1
        self._is_in_training_mode = False
        ent_coef = self.ent_coef.optimizers()
        for i, optimizers in enumerate(([self.policy.critic.optimizer], ent_coef, [self.policy.actor.optimizer])):
            value = float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
            if value != self.rates[i]:
                self.rates[i] = value
                self.learning_rates[i].fill_(value)

    def set_training_mode(self) -> None:
        """Of all modules. Slow, and without effect on our own networks, but for dropout: so not for C++."""
        if not self._is_in_training_mode:
            self.policy.set_training_mode(True)
            self._is_in_training_mode = True

    def involved(self, what: Due = ALL) -> list[Optimizer]:
        """
        :param what: what an update consists of
        :return: the optimisers that take a step in it
        """
        if not what.actor_updates:
            return [self.policy.critic.optimizer]
        return [self.policy.critic.optimizer, self.policy.actor.optimizer, *self.ent_coef.optimizers()]

    def optimizers(self) -> Optimizers:
        """What the optimisers train, looked up anew if a state, option or hook is new, or a parameter was frozen."""
        optimizers = self.involved()
        key = [(id(each.state), list(map(id, each.state.values())), use_of(each)) for each in optimizers]
        if self._trained is None or key != self._trained_key:
            critic, actor, *ent_coef = map(trained, optimizers)
            self._trained = Optimizers(critic, ent_coef[0] if ent_coef else NOTHING, actor)
            self._trained_key = key
            self._states = [[optimizer.state, *optimizer.state.values()] for optimizer in optimizers]
        return self._trained

    def has_state(self) -> bool:
        """
        Optimisers make their state in a step of their own. What has no entry in it then was frozen in all steps. This
        is read from the optimisers alone, so that a run that is continued compiles the same updates.

        :return: whether the optimisers of all networks have taken a step
        """
        return all(
            not is_plain_adam(optimizer) or all(parameter in optimizer.state for parameter in trainable(optimizer))
            for optimizer in self.involved()
        )

    def mark_state(self, what: Due) -> None:
        """
        After a step, give each parameter an entry in its optimiser's state: an empty one if it had no gradient, which
        tells it from one that was frozen.

        :param what: what the update consisted of
        """
        for optimizer in filter(is_plain_adam, self.involved(what)):
            for parameter in trainable(optimizer):
                _ = optimizer.state[parameter]

    def place_steps(self) -> None:
        """Adam counts its steps on the CPU; a CUDA graph needs them where the parameters are."""
        for optimizer in self.involved():
            for state in optimizer.state.values():
                if isinstance(state.get("step"), th.Tensor):
                    state["step"] = state["step"].to(self.device)
        self._trained = None

    def tensors(self) -> list[th.Tensor]:
        """All that an update reads or changes, besides its inputs."""
        states = [state for optimizer in self.involved() for state in optimizer.state.values()]
        of_optimizers = [value for state in states for value in state.values() if isinstance(value, th.Tensor)]
        return [*self.policy.parameters(), *self.policy.buffers(), *self.ent_coef.tensors(), *of_optimizers]


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """
    :param state: state dict of a module or an optimiser
    :return: the same, with the steps that :meth:`Learner.place_steps` has moved back on the CPU, where the optimiser
        expects them
    """
    groups = state.get("param_groups")
    if not groups or any(group.get("capturable") or group.get("fused") for group in groups):
        return state

    def on_cpu(name: str, value: Any) -> Any:
        return value.cpu() if name == "step" and isinstance(value, th.Tensor) else value

    per_parameter = {key: {n: on_cpu(n, v) for n, v in values.items()} for key, values in state["state"].items()}
    return {**state, "state": per_parameter}
