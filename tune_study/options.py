"""What of the command line can be judged without torch and Ray, so that it is refused at once."""

from __future__ import annotations

import ast
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from tune_study.config import UserError

LONGEST_NAME = 200
"""Bytes of a study's name; file systems allow 255, and trials' files add to it."""


DEVICES = ("auto", "cpu", "mps", "cuda")


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """``value``. Raises ``UserError`` for any that is not ``allowed``."""
    if value not in allowed:
        raise UserError(f"{option} {value}: choose one of {', '.join(allowed)}")
    return value


def refuse_not_finite(option: str, value: float | None) -> None:
    """Raises ``UserError`` for NaN, which typer lets through any range, and infinity."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"{option} {value}: it must be a finite number")


def safe_name(name: str) -> str:
    """A study's name that is one folder's. Raises ``UserError``."""
    plain = name.isprintable() and name not in ("", ".", "..") and Path(name).name == name
    if not plain or len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(f"--name {name}: it must be a plain folder name; see --output-dir")
    return name


def resolved(option: str, path: Path, there: str = "") -> Path:
    """The absolute path. Raises ``UserError``, also where nothing is there though it must be.

    ``there`` is what must be: "folder", or "file or folder".
    """
    try:
        found = path.is_dir() or ("file" in there and path.is_file())
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, not text
        raise UserError(f"{option} {path}: it is no usable path ({error})") from None
    if there and not found:
        raise UserError(f"{option} {path}: there is no such {there}")
    return path


def refuse_unknown_function(option: str, value: str, module: str) -> None:
    """Raises ``UserError`` unless ``value`` is a public function of ``module``, or has a file.

    The module is read and not imported: the grids' one imports Tune.
    """
    path, colon, _ = value.rpartition(":")
    if colon:
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
            raise UserError(f"{option} {value}: there is no file {path}")
        return
    package, _, name = module.rpartition(".")
    tree = ast.parse(files(package).joinpath(f"{name}.py").read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    built_in = sorted(name for name in functions if not name.startswith("_"))
    if value not in built_in:
        choices = ", ".join(built_in)
        raise UserError(f"{option} {value}: choose one of {choices}, or path/to/file.py:function")
