"""Studies that several files of tests look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests import synthetic
from tests.analysis.pages import without_rendering
from tests.analysis.studies import CELLS, FAILURES


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen trials, of which four did not simply complete."""
    path = tmp_path_factory.mktemp("template") / "study"
    return synthetic.write_study(path, CELLS, failures=FAILURES, epochs=4)


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "study")


@pytest.fixture(scope="module")
def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    return synthetic.study_frames(effects={"nf4": -0.01}, failures={0: "early_stopped", 5: "oom"})


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rendering, for tests of everything else: it is most of a report's time."""
    without_rendering(monkeypatch)
