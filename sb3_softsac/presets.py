"""Configurations by name: the files in ``hyperparams/``."""

from pathlib import Path
from typing import Any

import yaml

PRESETS = ("compact", "flashsac", "xqc")
OF_ZOO = ("n_timesteps", "policy")  # keys that are not arguments of the constructor, or given apart


def hyperparams_folder() -> Path:
    """The folder of the files: inside the package, or, in an editable install, beside it."""
    package = Path(__file__).parent
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def preset(name: str) -> dict[str, Any]:
    """
    Arguments of a configuration for any environment: ``SoftSAC("MlpPolicy", env, **preset("compact"))``.

    :param name: one of ``PRESETS``, each described in its file in ``hyperparams/``
    :return: keyword arguments of ``SoftSAC``, to be changed at will
    :raises ValueError: if there is none of this name
    """
    if name not in PRESETS:
        raise ValueError(f"name={name!r} is not a preset: use one of {PRESETS}.")
    entry = yaml.safe_load((hyperparams_folder() / f"{name}.yml").read_text())["default"]
    return {key: value for key, value in entry.items() if key not in OF_ZOO}
