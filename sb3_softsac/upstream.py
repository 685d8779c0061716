"""
Names of torch, SB3 and Gymnasium that are not public: any version may move them, and then we do without.

All that we lean on, public or not, is listed in ``tests/test_upstream.py``.
"""

import functools
import pkgutil
import warnings
from typing import Any


def find(name: str) -> Any:
    """
    :param name: of something that another package has not promised to keep, such as ``"torch.optim.adam:adam"``
    :return: the object of this name; None if there is none
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


@functools.cache
def say_moved(name: str, consequence: str) -> None:
    """
    Warn, once in a process.

    :param name: of what is no longer there
    :param consequence: what is lost or slower without it
    """
    warnings.warn(
        f"{name.replace(':', '.')}, a private name that SoftSAC uses, is not in this version: {consequence}",
        stacklevel=3,
    )
