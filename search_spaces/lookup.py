"""A function by its name here, or in a file of the user's: what ``--grid`` and ``--space`` name."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from tune_study.errors import UserError


def function_of(option: str, value: str, module: ModuleType) -> tuple[str, Callable[..., Any]]:
    """(name, function) of a public one of ``module``, or of ``path/to/file.py:function``.

    Raises ``UserError``.
    """
    refuse_unknown_function(option, value, module.__name__)
    path, colon, name = value.rpartition(":")
    if not colon:
        return value, getattr(module, value)
    path = os.path.expanduser(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{option} {value}: {path} is no Python file; its name must end in .py")
    try:
        own = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own)
        return name, getattr(own, name)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"{option} {value}: {type(error).__name__}: {error}") from error


def refuse_unknown_function(option: str, value: str, module: str) -> None:
    """Raises ``UserError`` unless ``value`` is a public function of ``module``, or has a file.

    The module is read and not imported: the grids' one imports Tune.
    """
    path, colon, _ = value.rpartition(":")
    if colon:
        # Unlike Path.is_file, False for a name that no file can have.
        if not os.path.isfile(os.path.expanduser(path)):
            raise UserError(f"{option} {value}: there is no file {path}")
        return
    package, _, name = module.rpartition(".")
    tree = ast.parse(files(package).joinpath(f"{name}.py").read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    built_in = sorted(name for name in functions if not name.startswith("_"))
    if value not in built_in:
        choices = ", ".join(built_in)
        raise UserError(f"{option} {value}: choose one of {choices}, or path/to/file.py:function")
