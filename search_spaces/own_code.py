"""A file of the user's (``--grid FILE.py:FUNCTION``, ``--space``): code that runs where trials run.

The command runs it for its functions: a grid or a space, and the images of a data set. Every worker
that has a trial runs it again for the models that it registers with timm, and for the functions
that transform images in training. It travels as text, so that no node needs the file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tune_study.errors import UserError, first_line

_PREFIX = "own_code_"


class Code(NamedTuple):
    """The file as the command read it."""

    path: str
    function: str
    text: str
    sha256: str
    """Of the file."""
    models: tuple[str, ...] = ()
    """That it registers with timm."""
    transforms: tuple[str, ...] = ()
    """Its functions that the trials transform images with (``data.augment=code:FUNCTION``)."""

    @property
    def acts_in_trials(self) -> bool:
        """Whether it does anything where trials run; else it is the command's alone."""
        return bool(self.models or self.transforms)

    @property
    def file(self) -> str:
        """Its name without its folder."""
        return Path(self.path).name

    def record(self) -> dict[str, Any]:
        """What study.json keeps of it."""
        lists = {"models": list(self.models), "transforms": list(self.transforms)}
        return {**self._asdict(), **lists, "path": self.file}


def read(path: str, function: str) -> Code:
    """The code at ``path``, run once to see what it registers.

    Raises ``UserError`` for a file that is no Python, and what the user's own code raises.
    """
    if not path.endswith(".py"):
        raise UserError(f"{path} is no Python file; its name must end in .py")
    content = Path(path).read_bytes()
    code = Code(path, function, importlib.util.decode_source(content), _sha256(content))
    return code._replace(models=tuple(getattr(module_of(code), _MODELS)))


def module_of(code: Code) -> ModuleType:
    """The module that ``code`` makes, run once in this process.

    Raises ``UserError`` where it takes the name of a model that timm has, and what the user's own
    code raises.
    """
    # A name that no import can mean. timm, dataclasses and pydantic look for it in sys.modules.
    name = f"{_PREFIX}{Path(code.path).stem}_{_sha256(f'{code.path} {code.sha256}'.encode())[:12]}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = code.path
        before = _entrypoints()
        try:
            exec(compile(code.text, code.path, "exec"), module.__dict__)
            setattr(module, _MODELS, _registered(before))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


_MODELS = "__models_registered_with_timm__"


def run_where_trials_run(code: Code | None) -> None:
    """Makes the models of ``code`` known to this worker. Raises ``UserError``."""
    if code is not None and code.acts_in_trials:
        _module_there(code)


def function_of(setting: str, name: str, code: Code | None) -> Callable[..., Any]:
    """The function ``name`` of the user's file, which ``setting`` names. Raises ``UserError``."""
    code = given(setting, code)
    function = getattr(_module_there(code), name, None)
    if not callable(function):
        raise UserError(
            f"{setting}: {code.file} has no function {name}; define it there, or name another"
        )
    return function


def given(setting: str, code: Code | None) -> Code:
    """The user's file, of which ``setting`` names a function. Raises ``UserError`` without one."""
    if code is None:
        raise UserError(
            f"{setting}: it means a function of the grid's own file, and there is none; name one "
            "with --grid FILE.py:FUNCTION (of a search, with --space)"
        )
    return code


def _module_there(code: Code) -> ModuleType:
    try:
        return module_of(code)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"{code.file} runs for the command and not where trials run "
            f"({type(error).__name__}: {first_line(error)[:300]}); what it imports and opens must "
            "be there, too"
        ) from error


def _entrypoints() -> dict[str, Callable[..., Any]]:
    import timm  # here, because options are judged without it

    return {name: timm.model_entrypoint(name) for name in timm.list_models()}


def _registered(before: Mapping[str, Callable[..., Any]]) -> list[str]:
    models = [name for name, there in _entrypoints().items() if before.get(name) is not there]
    for name in models:
        if name in before and not before[name].__module__.startswith(_PREFIX):
            raise UserError(
                f"it registers {name}, and timm has a model of that name; choose another for yours"
            )
    return models


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records may make other models of the same name, or transform otherwise.

    Comments and layout do not count, nor do the functions that the commands named: what a grid or
    a space returns is compared by itself.
    """
    if one["sha256"] == other["sha256"]:
        return False
    named = {one["function"], other["function"]}
    return _tree(one["text"], named) != _tree(other["text"], named)


def _tree(text: str, without: set[str]) -> list[str] | str:
    """The statements of a file in a form of Python's own; of one that it can't read, the text."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return text
    return [
        ast.dump(node)
        for node in statements
        if not (isinstance(node, ast.FunctionDef) and node.name in without)
    ]
