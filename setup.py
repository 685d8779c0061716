"""Everything declarative is in setup.cfg; this file adds what it cannot say: files for the root of site-packages."""

from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build


class BuildStartup(Command):
    """
    Copies ``startup/`` beside the package, which makes the RL Zoo know SoftSAC (see ``_sb3_softsac_startup.py``).

    Editable wheels get copies as well: their ``.pth`` must keep working, or at least keep quiet, whatever happens to
    the source tree.
    """

    description = "copy the startup hook to the root of the wheel"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        # An editable wheel is made of what lies in its install folder, build_lib is thrown away
        command, option = ("install", "install_lib") if self.editable_mode else ("build_py", "build_lib")
        self.build_lib = getattr(self.get_finalized_command(command), option)

    def get_source_files(self) -> list[str]:
        return sorted(str(path) for path in Path("startup").glob("*sb3_softsac*.*") if path.is_file())

    def get_output_mapping(self) -> dict[str, str]:
        return {str(Path(self.build_lib, Path(source).name)): source for source in self.get_source_files()}

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())

    def run(self) -> None:
        self.mkpath(self.build_lib)
        for target, source in self.get_output_mapping().items():
            self.copy_file(source, target)


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_startup", None)]


setup(cmdclass={"build": Build, "build_startup": BuildStartup})
