"""
Adds SoftSAC to the RL Zoo when a module of the zoo is imported.

``sb3_softsac.pth`` runs :func:`install` whenever Python starts, including in programs that have nothing to do with
reinforcement learning. This file therefore imports nothing but ``sys``, and none of its errors may reach the program.
The changes themselves are in ``sb3_softsac._rl_zoo3``, which is imported together with the zoo.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

# Modules of the zoo that are patched after they are executed
PATCHED = frozenset(f"rl_zoo3.{name}" for name in ("utils", "hyperparams_opt", "exp_manager"))
# Modules of the zoo whose source is edited before they are executed: they run as ``__main__``, or what has to change is
# local to a function, so that they cannot be patched afterwards
EDITED = frozenset(
    f"rl_zoo3.{name}"
    for name in ("benchmark", "callbacks", "enjoy", "load_from_hub", "push_to_hub", "record_video", "train")
)


_reported: "set[str]" = set()


def _report(error: BaseException) -> None:
    message = f"sb3_softsac: the RL Zoo runs without SoftSAC: {type(error).__name__}: {error}"
    # Only once, since several modules may fail for the same reason. pythonw has no stderr
    if message not in _reported and sys.stderr is not None:
        print(message, file=sys.stderr)
    _reported.add(message)


def _patch(module: "ModuleType") -> None:
    try:
        from sb3_softsac._rl_zoo3 import patch

        patch(module)
    except Exception as error:
        _report(error)


class _Loader:
    """
    Loader that adds SoftSAC to a module of the zoo.

    :param loader: the original loader of a module in ``PATCHED`` or ``EDITED``
    """

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # missing while this object is copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def get_code(self, name: str) -> "CodeType | None":
        """Code for ``python -m``, which does not call :meth:`exec_module`."""
        if name in EDITED:
            try:
                from sb3_softsac._rl_zoo3 import edited_code

                return edited_code(self._loader, name)
            except Exception as error:
                _report(error)
        code: CodeType | None = self._loader.get_code(name)
        return code

    def exec_module(self, module: "ModuleType") -> None:
        # The module shows its original loader
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if module.__name__ in EDITED:
            code = self.get_code(module.__name__)
            assert code is not None
            exec(code, module.__dict__)
        else:
            self._loader.exec_module(module)
            _patch(module)


# Modules that are being searched for, so that other finders of this kind cannot cause infinite recursion
_searching: "set[str]" = set()


class _Finder:
    """Finds modules of the zoo with the other finders, and wraps their loaders."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if (name not in PATCHED and name not in EDITED) or name in _searching:
            return None
        _searching.add(name)
        try:
            for finder in sys.meta_path:
                if finder is cls or not hasattr(finder, "find_spec"):
                    continue
                spec: ModuleSpec | None = finder.find_spec(name, path, target)
                if spec is not None:
                    loader: Any = spec.loader and _Loader(spec.loader)
                    spec.loader = loader
                    return spec
        except Exception as error:
            _report(error)
        finally:
            _searching.discard(name)
        return None


def install() -> None:
    """Patch the zoo when it is imported, and its modules that already are. A second call has no effect."""
    try:
        if _Finder not in sys.meta_path:
            sys.meta_path.insert(0, _Finder)
        for name in PATCHED:
            module = sys.modules.get(name)
            # Modules that are still being imported are patched by their loaders
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                _patch(module)
    except Exception as error:
        _report(error)
