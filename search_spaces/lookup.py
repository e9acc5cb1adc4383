"""A function by its name here, or in a file of the user's: what ``--grid`` and ``--space`` name."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from importlib.resources import files
from types import ModuleType
from typing import Any

from search_spaces import own_code
from search_spaces.own_code import Code
from tune_study.errors import UserError


def function_of(option: str, value: str, module: ModuleType) -> tuple[str, Callable[..., Any]]:
    """(name, function) of a public one of ``module``, or of ``path/to/file.py:function``.

    Raises ``UserError``.
    """
    refuse_unknown_function(option, value, module.__name__)
    code = code_of(option, value)
    if code is None:
        return value, getattr(module, value)
    try:
        return code.function, getattr(own_code.module_of(code), code.function)
    except AttributeError as error:
        raise UserError(f"{option} {value}: {type(error).__name__}: {error}") from error


def code_of(option: str, value: str | None) -> Code | None:
    """The file of ``path/to/file.py:function``, which is run; ``None`` for what is built in.

    Raises ``UserError``.
    """
    path, colon, name = (value or "").rpartition(":")
    if not colon:
        return None
    try:
        return own_code.read(os.path.expanduser(path), name)
    except UserError as error:
        raise UserError(f"{option} {value}: {error}") from None
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
