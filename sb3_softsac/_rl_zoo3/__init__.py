"""
Everything the RL Zoo needs to know of SoftSAC. Never imported unless ``rl_zoo3`` is: see ``_sb3_softsac_startup``.

:func:`patch` changes what a module of the zoo has defined, :func:`edited_code` what it is about to run. Other
algorithms are left alone, except where the zoo is broken for all of them.
"""

import ast
from collections.abc import Callable
from functools import wraps
from importlib.abc import ExecutionLoader
from types import CodeType, ModuleType
from typing import Any

from sb3_softsac._rl_zoo3 import methods, model_card, search
from sb3_softsac._rl_zoo3.methods import ALGO, RAY
from sb3_softsac.softsac import SoftSAC


def patch(module: ModuleType) -> None:
    """
    Add SoftSAC to a module of the zoo, in place: the modules hold references to each other's objects. A second
    call changes nothing.
    """
    if module.__name__ == "rl_zoo3.utils":
        module.ALGOS[ALGO] = SoftSAC
        _replace_method(module.StoreDict, "__call__", methods.store_dict)
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        module.HYPERPARAMS_SAMPLER[ALGO] = search.sample_softsac_params
        module.HYPERPARAMS_CONVERTER[ALGO] = search.convert_softsac_params
    elif module.__name__ == "rl_zoo3.exp_manager":
        for name, method in methods.OF_MANAGER.items():
            _replace_method(module.ExperimentManager, name, method)


def _replace_method(cls: Any, name: str, method: Callable[..., Any]) -> None:
    """:param method: takes what it replaces, then the object and the arguments"""
    original = getattr(cls, name)
    if hasattr(original, "_knows_softsac"):
        return

    @wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(original, self, *args, **kwargs)

    vars(replacement)["_knows_softsac"] = True
    setattr(cls, name, replacement)


def edited_code(loader: ExecutionLoader, name: str) -> CodeType | None:
    """
    :param loader: loader of a module of the zoo
    :param name: name of the module
    :return: the module's code with SoftSAC in it; as it is, if the source is not there
    """
    source = loader.get_source(name)
    if source is None:
        return loader.get_code(name)
    tree = _Editor().visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), loader.get_filename(name), "exec", dont_inherit=True)


class _Editor(ast.NodeTransformer):
    """
    Adds SoftSAC to the lists that SAC is in, and replaces two imports.

    - ``off_policy_algos`` in enjoy, record_video, push_to_hub (and a nameless one in benchmark): for an algorithm that
      is not in it, the whole replay buffer is allocated when a model is only watched.
    - the classes that ``callbacks.ParallelTrainCallback`` supports.

    ``train`` gets another choice for ``--vec-env``, of which ``methods`` makes a ``RayVecEnv``.
    """

    IMPORTS = {  # noqa: RUF012
        # huggingface_hub no longer uses requests: for a model without VecNormalize, load_from_hub waits for the error
        # of a missing file, which never comes
        ("requests.exceptions", "HTTPError"): ("huggingface_hub.errors", "EntryNotFoundError"),
        # sb3-team-hf-integration 3.2 no longer has it: push_to_hub fails for every algorithm
        ("huggingface_sb3.push_to_hub", "generate_metadata"): (model_card.__name__, "generate_metadata"),
        # push_to_hub: the last that is done to a model card
        ("huggingface_hub.repocard", "metadata_save"): (model_card.__name__, "metadata_save"),
    }

    def visit_List(self, node: ast.List | ast.Tuple) -> ast.List | ast.Tuple:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        elements = node.elts
        names = [ast.unparse(element) for element in elements]
        if names == ["'dummy'", "'subproc'"]:
            elements.append(ast.Constant(RAY))
        elif "'sac'" in names:
            elements.append(ast.Constant(ALGO))
        elif "SAC" in names:
            elements.append(
                ast.parse(f"__import__({SoftSAC.__module__!r}, fromlist=['SoftSAC']).SoftSAC", mode="eval").body
            )
        return node

    visit_Tuple = visit_List

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        statements = []
        for alias in node.names:
            module, name = self.IMPORTS.get((node.module or "", alias.name), (node.module, alias.name))
            asname = alias.asname or (alias.name if name != alias.name else None)
            statements.append(ast.ImportFrom(module, [ast.alias(name, asname)], node.level))
            ast.copy_location(statements[-1], node)
        return statements
