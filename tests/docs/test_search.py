"""The commands of docs/search.md, as they stand there, run in an empty folder."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import typer.main

from tests.tune_study.search.test_suggestions import drive
from tune_study import run
from tune_study.search.suggestions import finish
from tune_study.study import schedule

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
COMMANDS = [
    shlex.split(block)[3:]
    for block in re.findall(r"```bash\n(python -m tune_study\.run .*?)\n```", PAGE)
]
SIMULATED = [command for command in COMMANDS if "--simulate" in command]


def test_every_option_on_the_page_exists():
    known = {name for p in typer.main.get_command(run.app).params for name in p.opts}
    assert len(COMMANDS) == 5
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE):
        assert option in known, option


def without_ray(waiting, context, progress, *, search, **options):
    """The suggested trials one by one in this process, in place of ``schedule.run``."""
    search.begin(progress)
    drive(search)
    finish(search)


@pytest.mark.parametrize(
    "in_this_process",
    [
        pytest.param(True, marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param(False, marks=pytest.mark.slow),
    ],
    ids=["quick", "ray"],
)
def test_the_simulated_commands_run(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.chdir(tmp_path)
    if in_this_process:
        monkeypatch.setattr(schedule, "run", without_ray)
    space = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert space is not None
    (tmp_path / "my_space.py").write_text(space[1])
    outputs = []
    for command in SIMULATED:
        monkeypatch.setattr("sys.argv", ["tune-study", *command])
        with pytest.raises(SystemExit) as exit_:
            run.main()
        outputs.append(capsys.readouterr().out)
        assert not exit_.value.code, outputs[-1]
    assert len(outputs) == 4
    assert "all 10 trials ended well" in outputs[0]
    assert "nothing to do: all 10 trials" in outputs[1]
    folders = tmp_path / "ray_results"
    for name, planned in (("qlora-simulated", 10), ("pruned", 6), ("two_ranks-simulated", 4)):
        trials = pd.read_parquet(folders / name / "trials.parquet")
        assert len(trials) == planned
        assert (folders / name / "report" / "report.html").is_file()
        assert (folders / name / "optuna.sqlite3").is_file()
    if not in_this_process:
        assert "pruned" in set(pd.read_parquet(folders / "pruned" / "trials.parquet")["status"])
