"""A mistake on the command line is refused before torch and Ray are there."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from search_spaces.lookup import refuse_unknown_function
from tune_study.config import UserError
from tune_study.options import resolved

MODULES = {"--grid": "search_spaces.grids", "--space": "search_spaces.optuna_spaces"}


@pytest.mark.parametrize("option", MODULES)
def test_the_names_that_are_read_are_those_of_the_module(option: str) -> None:
    module = import_module(MODULES[option])
    names = [name for name, _ in inspect.getmembers(module, inspect.isfunction) if name[0] != "_"]
    for name in names:
        refuse_unknown_function(option, name, MODULES[option])
    with pytest.raises(UserError) as refused:
        refuse_unknown_function(option, "fulll", MODULES[option])
    assert str(refused.value) == (
        f"{option} fulll: choose one of {', '.join(names)}, or path/to/file.py:function"
    )


def test_what_must_be_there_is_looked_for(tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert resolved("--weights", file, "file or folder") == file.resolve()
    assert resolved("--output-dir", tmp_path / "new") == tmp_path.resolve() / "new"
    with pytest.raises(UserError, match=r"^--data-dir .*file: there is no such folder$"):
        resolved("--data-dir", file, "folder")
    with pytest.raises(UserError, match="it is no usable path"):
        resolved("--data-dir", tmp_path / ("x" * 300), "folder")


@pytest.mark.parametrize(
    "mistake",
    [
        ["--grid", "fulll"],
        ["--grid", "none.py:grid"],
        ["--space", "x"],
        ["--data-dir", "/nowhere"],
        ["--weights", "/nowhere"],
        ["--device", "gpu"],
        ["--name", "a/b"],
        ["--set", "epochs=3"],
        ["--keep-checkpoints", "some"],
        ["--epoch-s", "3"],
        ["--simulate", "--validate-only"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_refused_before_torch_is_imported(mistake: list[str]) -> None:
    script = (
        "import sys; from tune_study import run\n"
        "try: run.main()\n"
        "finally: assert not {'torch', 'ray.tune'} & sys.modules.keys(), 'imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *mistake], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {mistake[0]}")
    assert done.stderr.count("\n") == 1
