"""
Builds the package in every way, installs it into throwaway environments and looks at it from elsewhere.

Nothing is downloaded: the environments see the dependencies of the running interpreter through a folder of links,
from which this project itself is left out, however it is installed there.
"""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import sb3_softsac

ROOT = Path(__file__).resolve().parents[1]
STARTUP_FILES = {"_sb3_softsac_startup.py", "sb3_softsac.pth", "sb3_softsac.start"}
SDIST_FILES = {
    *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"),
}
PACKAGE_FOLDERS = {"sb3_softsac", "hyperparams", "sb3_softsac.egg-info"}
PIP_INSTALL = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
]


def run(*args: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(arg) for arg in args],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


class Environment:
    """
    A virtual environment with the dependencies, without this project.

    :param folder: where to create it
    """

    def __init__(self, folder: Path):
        self.outside = folder / "elsewhere"
        self.outside.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
        self.python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site_packages = Path(run(self.python, "-c", code, cwd=self.outside).strip())

        links = folder / "dependencies"
        links.mkdir()
        for site_packages in map(Path, sys.path):
            if site_packages.name in ("site-packages", "dist-packages") and site_packages.is_dir():
                for entry in site_packages.iterdir():
                    if "sb3_softsac" not in entry.name and not (links / entry.name).is_symlink():
                        (links / entry.name).symlink_to(entry)
        (self.site_packages / "dependencies.pth").write_text(f"{links}\n")

    def pip(self, *args: str | Path, cwd: Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *args, cwd=cwd)

    def files(self) -> set[str]:
        """
        :return: the installed files, bytecode left out
        """
        paths = (path.relative_to(self.site_packages) for path in self.site_packages.rglob("*.*") if path.is_file())
        return {str(path) for path in paths if path.suffix != ".pyc"}

    def check(self, location: Path) -> None:
        """
        :param location: folder below which the package is expected
        """
        starting = "import sys; assert not {'torch', 'numpy', 'sb3_softsac', 'typing'} & {*sys.modules}"
        run(self.python, "-c", f"{starting}; assert '_sb3_softsac_startup' in sys.modules", cwd=self.outside)
        # The order matters: the zoo first
        using = """
            import rl_zoo3.utils
            assert "softsac" in rl_zoo3.utils.ALGOS
            import sb3_softsac
            from sb3_softsac._rl_zoo3 import methods
            print(sb3_softsac.__file__)
            print(methods.own_config(None))
        """
        code = "\n".join(line.strip() for line in using.splitlines())
        package, yml = map(Path, run(self.python, "-c", code, cwd=self.outside).splitlines())
        assert location in package.parents and package.is_file()
        assert yml.is_file()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """
    :return: a copy of the source tree, because builds leave traces
    """
    ignored = ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "logs")
    return Path(copytree(ROOT, tmp_path / "source", ignore=ignored))


def build_wheel(source: Path, folder: Path) -> Path:
    arguments = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *arguments, "--wheel-dir", folder, source, cwd=source.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(source: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source, tmp_path / "wheels")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"sb3_softsac-{sb3_softsac.__version__}-py3-none-any.whl"
    assert not [name for name in names if name.startswith(("trained_agents", "benchmarks", "docs", "tests"))]
    suffixes = (".py", ".typed", ".cpp", ".h")
    files = (path for path in (source / "sb3_softsac").rglob("*") if path.suffix in suffixes)
    own = {path.relative_to(source).as_posix() for path in files}
    yml = {f"sb3_softsac/{path.relative_to(source)}" for path in (source / "hyperparams").rglob("*.yml")}
    assert {name for name in names if ".dist-info/" not in name} == STARTUP_FILES | own | yml

    environment = Environment(tmp_path)
    before = environment.files()
    environment.pip(*PIP_INSTALL, wheel, cwd=tmp_path)
    environment.check(environment.site_packages)
    environment.pip("uninstall", "--yes", "--quiet", "sb3-softsac", cwd=tmp_path)
    assert environment.files() == before


def test_wheel(source: Path, tmp_path: Path) -> None:
    check_wheel(source, tmp_path)


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable(source: Path, tmp_path: Path, mode: str) -> None:
    environment = Environment(tmp_path)
    before = environment.files()
    environment.pip(*PIP_INSTALL, "--config-settings", f"editable_mode={mode}", "--editable", source, cwd=tmp_path)
    assert STARTUP_FILES <= environment.files()
    environment.check(source)
    environment.pip("uninstall", "--yes", "--quiet", "sb3-softsac", cwd=tmp_path)
    assert environment.files() == before


def test_sdist(source: Path, tmp_path: Path) -> None:
    """A wheel built from the source distribution is the wheel built from the source tree."""
    code = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path / "sdist", cwd=source)
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    run(sys.executable, "-m", "tarfile", "--extract", archive, tmp_path / "unpacked", cwd=tmp_path)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    files = (path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file())
    beside_packages = {path.as_posix() for path in files if path.parts[0] not in PACKAGE_FOLDERS}
    assert beside_packages == SDIST_FILES | {f"startup/{name}" for name in STARTUP_FILES}
    check_wheel(unpacked, tmp_path)
    with zipfile.ZipFile(next((tmp_path / "wheels").glob("*.whl"))) as from_sdist:
        with zipfile.ZipFile(build_wheel(source, tmp_path / "from_tree")) as from_tree:
            assert sorted(from_sdist.namelist()) == sorted(from_tree.namelist())


def test_version_is_the_same_everywhere() -> None:
    """The metadata takes it from the package (setup.cfg)."""
    version = sb3_softsac.__version__
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_oldest_versions_are_the_lower_bounds() -> None:
    required = (ROOT / "setup.cfg").read_text().partition("install_requires =")[2].partition("\n\n")[0]
    bounds = re.findall(r"^ +([\w-]+)(?:\[\w+\])?>=([\d.]+)", required, re.MULTILINE)
    oldest = (ROOT / "constraints-oldest.txt").read_text()
    assert bounds == re.findall(r"^([\w-]+)==([\d.]+)$", oldest, re.MULTILINE)


def test_startup_module_is_the_one_of_this_tree() -> None:
    """Editable installs hold a copy of the startup module: say so when it is out of date."""
    startup = pytest.importorskip("_sb3_softsac_startup")
    if Path(sb3_softsac.__file__).parents[1] != ROOT:
        pytest.skip("not an editable install of this tree")
    installed = Path(startup.__file__).read_text()
    assert installed == (ROOT / "startup" / "_sb3_softsac_startup.py").read_text(), "run pip install -e . again"
