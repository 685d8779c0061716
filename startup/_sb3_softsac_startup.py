"""
Makes the RL Zoo know SoftSAC as soon as any part of it is imported.

``sb3_softsac.pth`` runs :func:`install` at every interpreter start, also in programs that have nothing to do with
reinforcement learning. Hence the two rules of this file: import nothing but ``sys``, and never let a fault of ours
stop somebody else's interpreter. The knowledge itself is in ``sb3_softsac._rl_zoo3``, loaded together with the zoo.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

# Modules of the zoo whose objects are changed after they have run
PATCHED = frozenset(f"rl_zoo3.{name}" for name in ("utils", "hyperparams_opt", "exp_manager"))
# Modules of the zoo whose source is changed before they run: what matters there is local to a function,
# or run as ``__main__``, where no module is left to patch
EDITED = frozenset(
    f"rl_zoo3.{name}"
    for name in ("benchmark", "callbacks", "enjoy", "load_from_hub", "push_to_hub", "record_video", "train")
)


_reported: "set[str]" = set()


def _report(error: BaseException) -> None:
    message = f"sb3_softsac: the RL Zoo runs without SoftSAC: {type(error).__name__}: {error}"
    # Several modules fail for the same reason. Under pythonw there is no stderr.
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
    The module's own loader, except that SoftSAC is added to what it loads.

    :param loader: the loader found for a module in ``PATCHED`` or ``EDITED``
    """

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # not there yet: this object is being copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def get_code(self, name: str) -> "CodeType | None":
        """What ``python -m`` executes: it asks for the code and never calls :meth:`exec_module`."""
        if name in EDITED:
            try:
                from sb3_softsac._rl_zoo3 import edited_code

                return edited_code(self._loader, name)
            except Exception as error:
                _report(error)
        code: CodeType | None = self._loader.get_code(name)
        return code

    def exec_module(self, module: "ModuleType") -> None:
        # From here on nobody needs to see this class
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


# Modules being looked for, so that a second finder of this kind cannot send us in circles
_searching: "set[str]" = set()


class _Finder:
    """Lets the other finders find the modules of the zoo and wraps the loader that they return."""

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
    """Watch for the zoo, and change what is already loaded of it. Calling it again does no harm."""
    try:
        if _Finder not in sys.meta_path:
            sys.meta_path.insert(0, _Finder)
        for name in PATCHED:
            module = sys.modules.get(name)
            # A module that is still being loaded is patched by its loader
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                _patch(module)
    except Exception as error:
        _report(error)
