"""SoftSAC's C++: built where it runs, for the processor and the torch that are there."""

from pathlib import Path

import torch as th


def load(*sources: Path) -> None:
    """
    Build a library of some files, one behind the other, and load it. Inductor's builder does it, and keeps what it has
    built: it takes seconds once.

    :param sources: C++ files that register something with torch
    :raises Exception: of many kinds, where they cannot be built or loaded
    """
    # Takes two seconds, which most uses of the package need not wait
    from torch._inductor.codecache import CppCodeCache

    # What is built against one version of torch is not for another, and the text is the cache's key
    texts = [f"// torch {th.__version__} {th.version.git_version}\n", *(source.read_text() for source in sources)]
    CppCodeCache.load("".join(texts))


def suits_processor() -> bool:
    """
    :return: whether this processor has the instructions that our code is written for
    """
    return th.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
