"""What is said to the user about the way in which updates are run."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Report:
    """
    :param say: prints, if the user wants to read it
    """

    def __init__(self, say: Callable[[str], None]):
        self.compile_seconds = 0.0  # spent until now
        self._say = say
        self._told: set[str] = set()

    def once(self, text: str) -> None:
        """Say a text unless it has been said before."""
        if self._is_new(text):
            self._say(text)

    def warn_once(self, text: str) -> None:
        """Warn with a text unless that has been done before."""
        if self._is_new(text):
            warnings.warn(text, stacklevel=2)

    def _is_new(self, text: str) -> bool:
        is_new = text not in self._told
        self._told.add(text)
        return is_new

    @contextmanager
    def compilation(self, what: str, duration: str) -> Iterator[None]:
        """Announce a compilation and its usual ``duration`` ("minutes, seconds"), and count its time if it succeeds."""
        self.once(f"Compiling {what}: {duration} if it has been done before ...")
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        self._say(f"Compiled in {seconds:.1f} s")


def reason_of(error: Exception) -> str:
    """First lines of a compiler's error, up to one that is a sentence."""
    said: list[str] = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        said.append(line)
        if not line.endswith(":"):
            break
    return " ".join(said) or type(error).__name__
