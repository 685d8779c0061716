"""
Private names of torch, SB3 and Gymnasium. Any version may move them; SoftSAC then works without them.

``tests/test_upstream.py`` lists everything that SoftSAC needs of these packages, public or private.
"""

import functools
import pkgutil
import warnings
from typing import Any


def find(name: str) -> Any:
    """
    :param name: private name in another package, such as ``"torch.optim.adam:adam"``
    :return: the object with this name; None if there is none
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


@functools.cache
def say_moved(name: str, consequence: str) -> None:
    """
    Warn that a private name no longer exists, once in a process.

    :param name: the name
    :param consequence: what is missing or slower without it
    """
    warnings.warn(
        f"{name.replace(':', '.')}, a private name that SoftSAC uses, is not in this version: {consequence}",
        stacklevel=3,
    )
