from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from search_spaces.lookup import refuse_unknown_function
from tune_study.errors import UserError

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
