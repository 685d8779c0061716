"""
``sb3_softsac.execution.cpp.build``: what it loads is whole, whatever has happened to the cache before.

Most tests have a compiler of their own: a script that copies the library, as fast as that, and counts its calls.
"""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch as th
from crash_tools import OPERATIONS, Killer, Shim
from twins import SMALL, make

from sb3_softsac.execution.cpp import build, matmul
from sb3_softsac.execution.cpp import update as cpp_update
from sb3_softsac.persistence import atomic_files

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(not build.suits_processor(), reason="the code is for processors with AVX2 or AVX-512"),
]
ROOT = Path(__file__).resolve().parents[1]
TEXT = "// not looked at by the fake compiler"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real one, of the operator of products."""
    text = matmul.HEADER.read_text() + matmul.SOURCE.read_text()
    return build.built(text, tmp_path_factory.mktemp("real")).read_bytes()


@pytest.fixture
def calls(library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A fast compiler; how often it has been called."""
    (tmp_path / "library.so").write_bytes(library)
    script = tmp_path / "compiler"
    script.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        echo called >> "{tmp_path}/calls"
        [ -n "$SLOW" ] && sleep $SLOW
        while [ "$1" != "-o" ]; do shift; done
        cp "{tmp_path}/library.so" "$2"
        """)
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    log = tmp_path / "calls"
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


def is_whole(path: Path, library: bytes) -> bool:
    return path.read_bytes() == library


def test_is_built_once(calls: Callable[[], int], library: bytes, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    paths = [build.built(TEXT, cache) for _ in range(3)]
    assert calls() == 1 and len(set(paths)) == 1 and is_whole(paths[0], library)
    assert build.built(f"{TEXT} either", cache) != paths[0] and calls() == 2


def test_other_processors_and_torches_have_their_own(
    calls: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that are not alike may share the cache."""
    cache = tmp_path / "cache"
    paths = {build.built(TEXT, cache)}
    with monkeypatch.context() as patch:
        patch.setattr(build, "processor", lambda: "flags: sse2")
        paths.add(build.built(TEXT, cache))
    with monkeypatch.context() as patch:
        patch.setattr(th, "__version__", "99.0")
        paths.add(build.built(TEXT, cache))
    assert len(paths) == 3 == calls()
    assert build.built(TEXT, cache) in paths and calls() == 3


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_file_systems_without_locks(
    code: int, calls: Callable[[], int], library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert is_whole(build.built(TEXT, tmp_path / "cache"), library) and calls() == 1


def test_file_that_was_cut_is_built_again(calls: Callable[[], int], library: bytes, tmp_path: Path) -> None:
    """As by a power cut, or a full disk."""
    cache = tmp_path / "cache"
    sizes = range(0, len(library), 4096)
    for n, size in enumerate(sizes):
        path = build.built(TEXT, cache)
        os.truncate(path, size)
        assert is_whole(build.built(TEXT, cache), library), size
        assert calls() == n + 2


def test_damaged_file_is_built_again(calls: Callable[[], int], library: bytes, tmp_path: Path) -> None:
    path = build.built(TEXT, tmp_path / "cache")
    rng = np.random.default_rng(0)
    for n in range(20):
        data = bytearray(library)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        assert is_whole(build.built(TEXT, tmp_path / "cache"), library)
        assert calls() == n + 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kill_at_each_operation(operation: str, calls: Callable[[], int], library: bytes, tmp_path: Path) -> None:
    """Whatever was written before: the next process has a whole library, and is not kept waiting by a lock."""
    n_kills = 0
    for n in range(100):
        cache = tmp_path / f"{operation}{n}"
        child = os.fork()
        if child == 0:
            atomic_files.os = Shim(Killer(n, operation=operation))  # type: ignore[assignment]
            build.built(TEXT, cache)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert is_whole(build.built(TEXT, cache), library)
        if os.WIFEXITED(status):
            break
        n_kills += 1
    assert n_kills >= (1 if operation in ("open", "write", "fsync", "close", "replace", "mkdir") else 0)


def test_kill_while_the_compiler_works(
    calls: Callable[[], int], library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW", "30")
    process = in_other_process(tmp_path / "cache")
    while calls() == 0:
        assert process.poll() is None
    process.kill()
    process.communicate()
    monkeypatch.delenv("SLOW")
    assert is_whole(build.built(TEXT, tmp_path / "cache"), library) and calls() == 2


def test_eight_processes_build_once(
    calls: Callable[[], int], library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW", "1")
    with multiprocessing.get_context("fork").Pool(8, maxtasksperchild=1) as pool:
        results = [pool.apply_async(build.built, (TEXT, tmp_path / "cache")) for _ in range(8)]
        paths = {result.get(timeout=120) for result in results}
    assert calls() == 1 and len(paths) == 1
    assert is_whole(paths.pop(), library)


def in_other_process(cache: Path) -> "subprocess.Popen[str]":
    code = f"from sb3_softsac.execution.cpp.build import Path, built; print(built({TEXT!r}, Path({str(cache)!r})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_cache_that_cannot_be_used(calls: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second folder takes its place; if that is the user's own choice, there is none."""
    sources = [tmp_path / "source.cpp"]
    sources[0].write_text(TEXT)
    loaded: list[str] = []
    monkeypatch.setattr(th.ops, "load_library", loaded.append)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(build.CACHE, raising=False)
    build.load(*sources)
    assert len(loaded) == 1 and Path(loaded[0]).is_relative_to(tmp_path / f"sb3_softsac-{os.getuid()}")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=rf"/file: .*Set {build.CACHE} to a folder"):
        build.load(*sources)


def test_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run with a number instead of a user."""
    for name in (build.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert build.cache_folders() == [tmp_path / f"sb3_softsac-{os.getuid()}"]


def test_folder_of_another_user_is_not_trusted(
    calls: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.cpp"
    source.write_text(TEXT)
    monkeypatch.delenv(build.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(th.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    for folder in build.cache_folders():
        folder.mkdir()
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build.load(source)
    assert calls() == 0


def test_library_without_permission_to_execute(
    calls: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that is mounted so."""
    source = tmp_path / "source.cpp"
    source.write_text(TEXT)

    def load_library(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(th.ops, "load_library", load_library)
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    with pytest.raises(build.BuildError, match=r"failed to map segment .* executed from"):
        build.load(source)


def test_error_of_the_compiler(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"fails: .*error: .*not_a_type"):
        build.built("not_a_type x;", tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_no_compiler_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without one is eager, and right."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(matmul, "ours_are_faster", lambda: True)
    for cached in (cpp_update.error_of_build, matmul.operator_of_products):
        cached.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with th._inductor.config.patch(force_disable_caches=True):
                model = make("defaults", compile=True).learn(SMALL["learning_starts"] + 5)
    finally:
        for cached in (cpp_update.error_of_build, matmul.operator_of_products):
            cached.cache_clear()
    (text,) = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert text.startswith("The update cannot be compiled and runs eagerly, which is slower: ")
    assert "SoftSAC's C++ cannot be built: there is no C++ compiler. Install g++" in text
    assert model._runner is not None and not model._runner.compiles and model._n_updates == 5


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 200_000, 300_000])
def test_run_after_a_cut_is_native(size: int, tmp_path: Path) -> None:
    """With the compiler, and a library that was damaged as a kill or a power cut does."""
    code = textwrap.dedent("""\
        from sb3_softsac import SoftSAC
        model = SoftSAC("MlpPolicy", "Pendulum-v1", compile=True, device="cpu", learning_starts=10).learn(15)
        print(model._runner.last_way is model._runner.cpp)
        """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), build.CACHE: str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code]
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0 and result.stdout.strip() == "True", result.stderr
        (library,) = tmp_path.glob("*.so")
        os.truncate(library, size)
