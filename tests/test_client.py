"""What of a command goes to the head of a cluster, and what comes back."""

import pytest

from tune_study import client
from tune_study.config import UserError


def test_the_address_stays_here_and_the_grids_file_goes(tmp_path):
    (tmp_path / "my_grid.py").write_text("def f(): ...")
    grid = f"{tmp_path / 'my_grid.py'}:f"
    arguments = ["--name", "x", "--address", "ray://h:1", f"--grid={grid}", "--set", "a=--grid"]
    rest, files = client.prepared(arguments)
    assert rest == ["--name", "x", "--grid", "my_grid.py:f", "--set", "a=--grid"]
    assert files == {"my_grid.py": "def f(): ..."}
    assert client.prepared(["--address=ray://h:1", "--grid", "demo"]) == (["--grid", "demo"], {})


def test_a_grid_that_is_not_there_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(client.ray, "init", lambda **options: pytest.fail("it was started"))
    with pytest.raises(UserError, match=r"--grid nowhere.py:f: nowhere.py can't be read"):
        client.run_on_head("ray://h:1", ["--grid", "nowhere.py:f"])


def test_nobody_answers(monkeypatch):
    def refuse(**options):
        raise ConnectionError("ray client connection timeout\nand more")

    monkeypatch.setattr(client.ray, "init", refuse)
    with pytest.raises(UserError, match=r"ray://h:1: no Ray cluster .*connection timeout\)"):
        client.run_on_head("ray://h:1", ["--grid", "demo"])
