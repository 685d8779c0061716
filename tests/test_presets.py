"""Configurations by name."""

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env

import sb3_softsac
from sb3_softsac import SoftSAC, presets
from sb3_softsac.heads import CategoricalHead


@pytest.mark.parametrize("name", presets.PRESETS)
def test_each_trains(name: str) -> None:
    options = sb3_softsac.preset(name)
    assert not options.keys() & {"policy", "n_timesteps"}
    options |= {"learning_starts": 6, "batch_size": 8, "compile": False, "device": "cpu"}
    model = SoftSAC("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=2), **options).learn(12)
    assert model._n_updates > 0 and isinstance(model.critic.head, CategoricalHead)
    assert model.policy.unit_norm is not None and model.policy.architecture.has_batch_norm


def test_sizes_are_the_published_ones() -> None:
    """Numbers of parameters without biases below batch norms, counted from the papers' descriptions."""
    env = gym.make("Pendulum-v1")
    n_obs, n_actions, n_atoms = 3, 1, 101

    def size(name: str) -> tuple[int, int]:
        model = SoftSAC("MlpPolicy", env, **sb3_softsac.preset(name), buffer_size=10)
        critic = sum(p.numel() for p in model.critic.q_networks[0].parameters())
        return critic, sum(p.numel() for p in model.actor.parameters())

    def mlp(inputs: int, width: int, outputs: int) -> int:
        return 2 * inputs + inputs * width + 3 * width * width + 4 * 2 * width + (width + 1) * outputs

    def residual(inputs: int, width: int, outputs: int) -> int:
        block = 2 * 4 * width * width + 2 * 4 * width + 2 * width
        return 2 * inputs + inputs * width + 2 * block + width + (width + 1) * outputs

    assert size("xqc") == (mlp(n_obs + n_actions, 512, n_atoms), mlp(n_obs, 256, 2 * n_actions))
    assert size("flashsac") == (residual(n_obs + n_actions, 256, n_atoms), residual(n_obs, 128, 2 * n_actions))


def test_hyperparameters_are_the_published_ones() -> None:
    """XQC's and FlashSAC's tables."""
    xqc, flashsac = sb3_softsac.preset("xqc"), sb3_softsac.preset("flashsac")
    assert (xqc["batch_size"], xqc["gradient_steps"], xqc["policy_delay"]) == (256, 2, 3)
    assert (flashsac["batch_size"], flashsac.get("gradient_steps", 1), flashsac["policy_delay"]) == (512, 1, 2)
    assert (xqc["learning_rate"], flashsac["learning_rate"]) == ("lin_3e-4_3e-5", "cos_3e-4_1.5e-4")
    assert (xqc.get("tau", 0.005), flashsac["tau"]) == (0.005, 0.01)
    assert (xqc["learning_starts"], flashsac["learning_starts"]) == (5000, 10000)
    assert (xqc.get("max_noise_repeat", 1), flashsac["max_noise_repeat"]) == (1, 16)
    assert (xqc["joint_batch"], flashsac["joint_batch"]) == ("critic", "all")
    assert (xqc["target_entropy"], flashsac["target_entropy"]) == ("auto_0.5", "std_0.15")
    assert {xqc["ent_coef"], flashsac["ent_coef"]} == {"auto_0.01"}


def test_a_preset_can_be_changed() -> None:
    sb3_softsac.preset("compact")["policy_kwargs"]["net_arch"] = [8]
    assert sb3_softsac.preset("compact")["policy_kwargs"]["net_arch"] != [8]


def test_unknown() -> None:
    with pytest.raises(ValueError, match=r"name='xcq' is not a preset: use one of \('compact', 'flashsac', 'xqc'\)"):
        sb3_softsac.preset("xcq")
