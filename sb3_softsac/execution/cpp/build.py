"""
SoftSAC's C++: compiled where it runs, for its processor and its torch, and kept in a cache folder.

A library is loaded only if it is whole: its name holds the hash of its contents. It is written under another name,
synced and renamed, so that no kill and no power cut leaves half a library. (Torch's ``CppCodeCache`` links straight
into the final name, and takes every file of that name for a library.) One process builds; others that want the same
library wait for it.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import filelock
import torch as th

from sb3_softsac.persistence.atomic_files import atomic_file, make_folder, remove

CACHE = "SB3_SOFTSAC_CACHE_DIR"  # not TORCHINDUCTOR_CACHE_DIR, which torch itself sets when it compiles
# As Inductor compiles for the CPU: rounding as in torch's own kernels
FLAGS = (
    *("-shared", "-fPIC", "-std=c++20", "-fopenmp", "-O3", "-DNDEBUG", "-march=native"),
    *("-fno-trapping-math", "-fmath-errno", "-ffp-contract=off", "-fexcess-precision=fast", "-fno-tree-loop-vectorize"),
)


class BuildError(RuntimeError):
    """A library cannot be built or loaded; the message says why, and what to do about it."""


class NoCompiler(BuildError):
    """There is no C++ compiler."""


def suits_processor() -> bool:
    """Whether this processor has the instructions that our code is written for."""
    return th.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def load(*sources: Path) -> None:
    """
    Load a library, which is built first if the cache does not have it. That takes ten seconds or more.

    :param sources: C++ files that register something with torch, compiled as one, in this order
    :raises BuildError: if that fails in all cache folders
    """
    text = "".join(source.read_text() for source in sources)
    errors = []
    for folder in cache_folders():
        try:
            _require_own(folder)
            th.ops.load_library(str(built(text, folder)))
            return
        except OSError as error:  # read-only, full, without permission to execute
            errors.append(f"{folder}: {error}")
    raise BuildError(f"{'; '.join(errors)}. Set {CACHE} to a folder that can be written to and executed from.")


def cache_folders() -> list[Path]:
    """Where libraries are kept; the later ones are used if the first cannot be."""
    if CACHE in os.environ:
        return [Path(os.environ[CACHE])]
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    uid = os.getuid() if hasattr(os, "getuid") else "cache"  # a container's user need not have a name
    temporary = Path(tempfile.gettempdir()) / f"sb3_softsac-{uid}"
    return [of_user / "sb3_softsac", temporary] if of_user.is_absolute() else [temporary]  # relative: no home is known


def _require_own(folder: Path) -> None:
    """Others may write to the temporary folder. A folder that the user has chosen may be another's."""
    if CACHE not in os.environ and folder.is_dir() and hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise OSError("the folder belongs to another user")


def built(text: str, folder: Path) -> Path:
    """
    :param text: of the source
    :param folder: a cache folder
    :return: the library, whole
    :raises BuildError: if it cannot be compiled
    :raises OSError: if the folder cannot be used
    """
    capability = th.backends.cpu.get_cpu_capability()
    key = _hash(
        "\n".join([text, th.__version__, str(th.version.git_version), processor(), capability, *FLAGS]).encode()
    )
    if (library := _whole(folder, key)) is not None:
        return library
    make_folder(folder)
    with _locked(folder / f"{key}.lock"):
        if (library := _whole(folder, key)) is not None:  # another process was faster
            return library
        for damaged in folder.glob(f"{key}-*.so"):
            remove(damaged)
        data = _compile(text, capability)
        library = folder / f"{key}-{_hash(data)}.so"
        with atomic_file(library) as file:
            file.write(data)
    return library


def _whole(folder: Path, key: str) -> Path | None:
    for library in folder.glob(f"{key}-*.so"):
        if _hash(library.read_bytes()) == library.stem.rpartition("-")[2]:
            return library
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process. Where a network file system has no locks, two may build the same."""
    # The mere existence of a file would be the lock then, and might outlive its process
    lock = filelock.FileLock(path, fallback_to_soft=False)
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compile(text: str, capability: str) -> bytes:
    cxx, torch_folder = compiler(), Path(th.__file__).parent
    defines = [f"-DCPU_CAPABILITY_{capability}", f"-D_GLIBCXX_USE_CXX11_ABI={int(th.compiled_with_cxx11_abi())}"]
    includes = [f"-I{torch_folder / name}" for name in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(prefix="sb3_softsac-") as name:
        source, library = Path(name, "main.cpp"), Path(name, "main.so")
        source.write_text(text)
        command = [cxx, str(source), *defines, *FLAGS, *includes, "-o", str(library), *libraries]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not library.is_file():
            lines = result.stderr.splitlines()
            errors = [line for line in lines if "error" in line] or lines[-1:] or [f"exit status {result.returncode}"]
            raise BuildError(f"{cxx} fails: {errors[0].removeprefix(f'{source}:')}")
        return library.read_bytes()


def compiler() -> str:
    """Command of the C++ compiler; :class:`NoCompiler` is raised if there is none."""
    if os.name == "nt":
        raise NoCompiler("it is built on Linux and macOS only")
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if (found := shutil.which(name)) is not None:
            return found
    raise NoCompiler("there is no C++ compiler. Install g++ 11 or newer (package g++), or set CXX to another compiler")


@cache
def processor() -> str:
    """What ``-march=native`` stands for here: nodes of a cluster may share a cache folder and not be alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("vendor_id", "cpu family", "model\t", "flags")
    return "\n".join(next((line for line in lines if line.startswith(field)), "") for field in fields)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
