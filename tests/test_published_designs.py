"""
One whole update of XQC and of FlashSAC, beside their formulas written down slowly, in float64 and without a module of
the package. Only the order is SB3's: critics before the actor, which FlashSAC updates first.
"""

import math
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

import sb3_softsac
from sb3_softsac import SoftSAC
from sb3_softsac.gradient_step import draw_noise

Parameters = dict[str, th.Tensor]
# Of networks, and of ent_coef. Large, so that the rounding of a gradient that is almost zero is not a whole step
ADAM_EPS = (1e-3, 1e-8)
B, N_ATOMS, V_MAX, LOG_2 = 16, 101, 5.0, math.log(2.0)


class Reference:
    """
    :param model: is read, not changed
    :param design: name of the preset
    """

    def __init__(self, model: SoftSAC, design: str):
        self.is_flash = design == "flashsac"
        self.eps = 1e-5 if self.is_flash else 1e-3
        self.tau = 0.01 if self.is_flash else 0.005
        self.parameters = {name: value.double() for name, value in model.policy.state_dict().items()}
        self.log_ent_coef = model.log_ent_coef.detach().double()  # type: ignore[union-attr]
        self.moments = {}
        for prefix, network in (("actor", model.actor), ("critic", model.critic)):
            for name, parameter in network.named_parameters():
                state = network.optimizer.state[parameter]
                self.moments[f"{prefix}.{name}"] = [state[k].double() for k in ("exp_avg", "exp_avg_sq", "step")]
        state = model.ent_coef_optimizer.state[model.log_ent_coef]  # type: ignore[union-attr, index]
        self.moments["log_ent_coef"] = [state[k].double() for k in ("exp_avg", "exp_avg_sq", "step")]
        self.rate = model.actor.optimizer.param_groups[0]["lr"]
        self.n_blocks_or_layers = 2 if self.is_flash else 4
        n_actions = model.actor.action_dist.action_dim
        # XQC: half of minus the dimension. FlashSAC: Gaussians with a standard deviation of 0.15
        gaussian = n_actions / 2 * math.log(2 * math.pi * math.e * 0.15**2)
        self.target_entropy = gaussian if self.is_flash else -n_actions / 2

    def norm(self, x: th.Tensor, p: Parameters, name: str, by_batch: bool, track: bool) -> th.Tensor:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        if by_batch:
            batch_mean = x.sum(dim=0) / len(x)
            batch_var = ((x - batch_mean) ** 2).sum(dim=0) / len(x)
            if track:
                unbiased = batch_var.detach() * len(x) / (len(x) - 1)
                p[f"{name}.running_mean"] = 0.99 * mean + 0.01 * batch_mean.detach()
                p[f"{name}.running_var"] = 0.99 * var + 0.01 * unbiased
            mean, var = batch_mean, batch_var
        return (x - mean) / (var + self.eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def trunk(self, x: th.Tensor, p: Parameters, name: str, by_batch: bool = False, track: bool = False) -> th.Tensor:
        def linear(x: th.Tensor, layer: str) -> th.Tensor:
            return x @ p[f"{name}.{layer}.weight"].T

        def norm(x: th.Tensor, layer: str) -> th.Tensor:
            return self.norm(x, p, f"{name}.{layer}", by_batch, track)

        x = norm(x, "0")
        if not self.is_flash:
            for i in range(4):
                x = norm(linear(x, f"{3 * i + 1}"), f"{3 * i + 2}").clamp(min=0.0)
            return x
        x = linear(x, "1")
        for block in ("2.layers", "3.layers"):
            inner = norm(linear(x, f"{block}.0"), f"{block}.1").clamp(min=0.0)
            x = x + norm(linear(inner, f"{block}.3"), f"{block}.4").clamp(min=0.0)
        return x / ((x**2).mean(dim=1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.4.weight"]

    def critics(self, network: str, x: th.Tensor, p: Parameters, **how: bool) -> list[th.Tensor]:
        """Logarithms of the probabilities of both."""
        last = "5" if self.is_flash else "13"
        outputs = []
        for qf in ("qf0", "qf1"):
            name = f"{network}.{qf}"
            logits = self.trunk(x, p, name, **how) @ p[f"{name}.{last}.weight"].T + p[f"{name}.{last}.bias"]
            outputs.append(logits - logits.exp().sum(dim=1, keepdim=True).log())
        return outputs

    def mean(self, log_probabilities: th.Tensor) -> th.Tensor:
        return (log_probabilities.exp() * th.linspace(-V_MAX, V_MAX, N_ATOMS, dtype=th.float64)).sum(dim=1)

    def policy(
        self, obs: th.Tensor, noise: th.Tensor, p: Parameters, n_rows: int, **how: bool
    ) -> tuple[th.Tensor, th.Tensor]:
        latent = self.trunk(obs, p, "actor.latent_pi", **how)[:n_rows]
        mean = latent @ p["actor.mu.weight"].T + p["actor.mu.bias"]
        log_std = latent @ p["actor.log_std.weight"].T + p["actor.log_std.bias"]
        log_std = -10 + 0.5 * 12 * (1 + log_std.tanh()) if self.is_flash else log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        densities = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - (1 - u.tanh() ** 2).log()
        return u.tanh(), densities.sum(dim=1)

    def target(self, rewards: th.Tensor, dones: th.Tensor, next_: list[th.Tensor], cost: th.Tensor) -> th.Tensor:
        target, width = th.zeros(len(rewards), N_ATOMS, dtype=th.float64), 2 * V_MAX / (N_ATOMS - 1)
        for row in range(len(rewards)):
            lower = min(next_, key=lambda log_p, row=row: self.mean(log_p)[row].item())
            for i in range(N_ATOMS):
                atom = -V_MAX + i * width
                moved = float(rewards[row] + 0.99 * (1 - dones[row]) * (atom - cost[row]))
                place = (min(max(moved, -V_MAX), V_MAX) + V_MAX) / width
                below = min(int(place), N_ATOMS - 2)
                target[row, below] += lower[row, i].exp() * (below + 1 - place)
                target[row, below + 1] += lower[row, i].exp() * (place - below)
        return target

    def adam(self, name: str, value: th.Tensor, gradient: th.Tensor) -> th.Tensor:
        first, second, step = self.moments[name]
        first, second, step = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2, step + 1
        return value - self.rate * (first / (1 - 0.9**step)) / (
            (second / (1 - 0.999**step)).sqrt() + ADAM_EPS[name == "log_ent_coef"]
        )

    def step(self, network: str, loss: th.Tensor, p: Parameters, leaves: Parameters) -> None:
        gradients = th.autograd.grad(loss, list(leaves.values()))
        for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
            p[name] = self.adam(name, value.detach(), gradient)
        for name in leaves:
            if p[name].ndim == 2:  # each output's weights
                p[name] = p[name] / (p[name] ** 2).sum(dim=1, keepdim=True).sqrt()
        for name in leaves:
            is_norm = name.removesuffix(".weight") + ".running_mean" in p
            if self.is_flash and name.endswith(".weight") and p[name].ndim == 1:
                bias = name.removesuffix("weight") + "bias"
                pair = [name, bias] if is_norm else [name]
                square = sum((p[each] ** 2).sum() for each in pair)
                for each in pair:
                    p[each] = p[each] / square.sqrt() * math.sqrt(len(p[name]))  # type: ignore[union-attr]

    def leaves(self, network: str) -> Parameters:
        """Parameters of a network that gradients are taken of, put in their places."""
        names = [name for name in self.parameters if name.startswith(f"{network}.") and name in self.moments]
        found = {name: self.parameters[name].clone().requires_grad_(True) for name in names}
        self.parameters.update(found)
        return found

    def update(self, batch: Any, noise: th.Tensor, next_noise: th.Tensor, divisor: float) -> None:
        p = self.parameters
        obs, actions, next_obs = (
            part.double() for part in (batch.observations, batch.actions, batch.next_observations)
        )
        rewards, dones = batch.rewards[:, 0].double() / divisor, batch.dones[:, 0].double()
        ent_coef = self.log_ent_coef.exp()

        next_actions, next_log_prob = self.policy(next_obs, next_noise, p, B)
        x = th.cat([th.cat([obs, actions], dim=1), th.cat([next_obs, next_actions], dim=1)])
        next_ = [each[B:] for each in self.critics("critic_target", x, p, by_batch=True)]
        target = self.target(rewards, dones, next_, ent_coef * next_log_prob)
        leaves = self.leaves("critic")
        current = self.critics("critic", x, p, by_batch=True, track=True)
        loss = sum(-(target * each[:B]).sum(dim=1).mean() for each in current) / 2
        self.step("critic", loss, p, leaves)  # type: ignore[arg-type]

        leaves = self.leaves("actor")
        actor_obs = th.cat([obs, next_obs]) if self.is_flash else obs
        new_actions, log_prob = self.policy(actor_obs, noise, p, B, by_batch=True, track=True)
        values = [self.mean(each) for each in self.critics("critic", th.cat([obs, new_actions], dim=1), p)]
        loss = (ent_coef * log_prob - th.minimum(*values)).mean()
        self.step("actor", loss, p, leaves)
        gradient = -ent_coef * (log_prob.detach().mean() + self.target_entropy)
        self.log_ent_coef = self.adam("log_ent_coef", self.log_ent_coef, gradient)

        for name in [name for name in p if name.startswith("critic.")]:
            kept = "critic_target." + name.removeprefix("critic.")
            if name in self.moments:
                p[kept] = p[kept] + self.tau * (p[name] - p[kept])
            elif "running" in name:
                p[kept] = p[name]


@pytest.mark.parametrize("design", ["xqc", "flashsac"])
def test_whole_update(design: str) -> None:
    options = sb3_softsac.preset(design)
    widths = {"pi": [8] * 4, "qf": [12] * 4} if design == "xqc" else {"pi": [8] * 2, "qf": [12] * 2}
    options["policy_kwargs"] |= {"net_arch": widths, "optimizer_kwargs": {"eps": ADAM_EPS[0]}}
    options |= {"learning_starts": 40, "batch_size": B, "gradient_steps": 1, "policy_delay": 1, "seed": 0}
    env = make_vec_env("Pendulum-v1", n_envs=2, env_kwargs={"max_episode_steps": 13})
    model = SoftSAC("MlpPolicy", env, **options, compile=False, device="cpu").learn(60)
    assert model.replay_buffer is not None and model._reward_scale is not None
    model.set_logger(Logger(folder=None, output_formats=[]))

    reference = Reference(model, design)
    statistics = model._reward_scale.statistics
    std = math.sqrt(statistics.var + 1e-8)
    divisor = max(std, model._reward_scale.max_return / V_MAX) if design == "flashsac" else std
    random_state = model.replay_buffer.rng.bit_generator.state  # type: ignore[attr-defined]
    batch = model.replay_buffer.sample(B)
    model.replay_buffer.rng.bit_generator.state = random_state  # type: ignore[attr-defined]
    th.manual_seed(0)
    drawn = draw_noise(model.policy, B, 1, model.device)
    model._current_progress_remaining = 0.5
    model._update_learning_rates()
    reference.rate = model.actor.optimizer.param_groups[0]["lr"]
    reference.update(batch, drawn.actions[0].double(), drawn.next_actions.double(), divisor)

    th.manual_seed(0)
    model.train(1, B)
    found = model.policy.state_dict()
    assert found.keys() == reference.parameters.keys()
    for name, value in reference.parameters.items():
        if "num_batches_tracked" not in name:
            th.testing.assert_close(
                found[name].double(), value.detach(), atol=2e-6, rtol=1e-4, msg=lambda m, n=name: n + m
            )
    assert model.log_ent_coef is not None
    th.testing.assert_close(model.log_ent_coef.detach().double(), reference.log_ent_coef, atol=1e-7, rtol=1e-6)
