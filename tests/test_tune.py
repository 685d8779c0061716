"""Trials of Ray Tune: paused, moved and cloned, they do what a run does that nothing of it happens to."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from resume_script import differences, snapshot
from stable_baselines3.common.env_util import make_vec_env

from sb3_softsac import SoftSAC

pytest.importorskip("ray.tune", reason="Ray Tune is not installed: pip install 'sb3-softsac[tune]'")

from sb3_softsac.tune import SoftSACTrainable

pytestmark = [
    pytest.mark.slow,  # it takes long to import
    pytest.mark.processes,
    # Ray's own files and sockets, and its warnings to its developers
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TOTAL = 240
CONFIG: dict[str, Any] = {
    **{"env": "Pendulum-v1", "total_timesteps": TOTAL, "steps_per_iteration": 70, "seed": 3, "device": "cpu"},
    **{"learning_starts": 50, "buffer_size": 200, "batch_size": 8, "policy_kwargs": {"net_arch": [16]}},
    **{"learning_rate": "lin_1e-3", "ent_coef": "auto_0.5", "train_freq": 4, "compile": False, "num_threads": 1},
}
NOT_SOFTSACS = ("env", "total_timesteps", "steps_per_iteration")


def two_pendulums() -> Any:
    return make_vec_env("Pendulum-v1", n_envs=2)


def trained(trial: SoftSACTrainable) -> SoftSAC:
    while not trial.step()["done"]:
        pass
    return trial.model


def make(**changes: Any) -> SoftSACTrainable:
    return SoftSACTrainable({**CONFIG, **changes})


@pytest.mark.parametrize("env", ["Pendulum-v1", two_pendulums])
def test_pauses_do_not_matter(env: Any) -> None:
    """Whatever the iterations, it is one run, with one schedule."""
    trial = trained(make(env=env))
    arguments = {name: value for name, value in CONFIG.items() if name not in NOT_SOFTSACS}
    whole = SoftSAC("MlpPolicy", env if isinstance(env, str) else env(), **arguments).learn(TOTAL)
    assert trial.num_timesteps == TOTAL
    assert differences(snapshot(whole), snapshot(trial)) == []


@pytest.mark.parametrize("n_before", [1, 2])
def test_clone_goes_on_like_the_original(tmp_path: Path, n_before: int) -> None:
    original, clone = make(), make()
    for _ in range(n_before):
        original.step()
    original.save(str(tmp_path))
    expected = snapshot(trained(original))
    clone.step()  # a trial that has been somewhere else
    clone.restore(str(tmp_path))
    assert clone.model.num_timesteps == 70 * n_before
    assert differences(expected, snapshot(trained(clone))) == []


def test_clone_with_other_hyperparameters(tmp_path: Path) -> None:
    """Only what was mutated is changed: it goes on like the original to which the same is done."""
    original, clone = make(), make(batch_size=16, gamma=0.9)
    original.step()
    original.save(str(tmp_path))
    original.model.batch_size, original.model.gamma = 16, 0.9
    expected = snapshot(trained(original))
    clone.restore(str(tmp_path))
    assert (clone.model.batch_size, clone.model.gamma) == (16, 0.9)
    assert differences(expected, snapshot(trained(clone))) == []


def test_other_seed_restarts_the_random_states(tmp_path: Path) -> None:
    original, clone = make(), make(seed=4)
    original.step()
    original.save(str(tmp_path))
    expected = snapshot(original.model)
    clone.restore(str(tmp_path))
    found = differences(expected, snapshot(clone.model))
    assert any(name.startswith(".random") for name in found)
    assert not any(name.startswith((".parameters", ".counters")) for name in found)


def test_incomplete_configuration() -> None:
    with pytest.raises(ValueError, match="config has no env, steps_per_iteration: "):
        SoftSACTrainable({"total_timesteps": 100})


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A population of four, in which the better ones replace the others."""
    if not EXAMPLES.is_dir():
        pytest.skip("needs the source tree")
    import ray

    arguments = ["--env", "Pendulum-v1", "--steps", "600", "--interval", "200", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["population_based_training.py", *arguments])
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)  # whatever this machine has: trials side by side
    try:
        runpy.run_path(str(EXAMPLES / "population_based_training.py"), run_name="__main__")
    finally:
        ray.shutdown()
    output = capsys.readouterr().out
    (best,) = re.findall(r"SoftSAC\.load\('(.+)'\)", output)
    assert SoftSAC.load(best).num_timesteps == 600
    # At least one run has taken the place of another
    assert list(tmp_path.glob("pbt/pbt_policy_*.txt"))
