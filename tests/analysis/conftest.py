"""A study folder of sixteen trials, of which four did not simply complete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import synthetic
from tests.analysis.studies import CELLS, FAILURES


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "study"
    return synthetic.write_study(path, CELLS, failures=FAILURES, epochs=4)


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "study")
