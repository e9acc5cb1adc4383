"""The commands of docs/cluster.md as they stand there, simulated, against a real S3 server."""

import re
import shlex
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import typer.main
from ray.dashboard.modules.job.cli import job_cli_group

from analysis import compare, report
from tests.e2e import s3
from tune_study import run
from tune_study.cluster.trainable import at_work
from tune_study.folder import remote
from tune_study.study import schedule
from tune_study.trial import simulate

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
LINES = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
JOBS = [line[2:] for line in LINES if line[:2] == ["ray", "job"]]
COMMANDS = [line for line in LINES if line[0] != "ray"]
COMMANDS += [job[job.index("--") + 1 :] for job in JOBS if job[0] == "submit"]
MODULES = {"tune_study.run": run, "analysis.report": report, "analysis.compare": compare}


def without_ray(waiting, context, progress, **options):
    """The trials one by one in this process, in place of ``schedule.run``."""
    here = context.model_copy(update={"on_cluster": False})
    for trial in waiting:
        with at_work(trial, here, None, lambda row: None) as (where, told):
            simulate.execute(trial, where.simulation, where.study_dir, told)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with s3.server(tmp_path / "log.txt") as endpoint:
        for name, value in s3.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        request = urllib.request.Request(f"{endpoint}/my-bucket", method="PUT")
        with urllib.request.urlopen(request):
            yield remote.open_remote("s3://my-bucket/studies")


def test_every_option_on_the_page_exists():
    known = {name for p in typer.main.get_command(run.app).params for name in p.opts}
    elsewhere = {"--to", "--head", "--submission-id", "--working-dir", "--no-wait", "--follow"}
    assert len(COMMANDS) == 7
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE):
        assert option in known | elsewhere, option


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job[0])
def test_ray_takes_what_the_page_says_of_jobs(job):
    verb = job_cli_group.commands[job[0]]
    assert verb.make_context(job[0], job[1:]).params["address"] == "http://localhost:8265"


def test_the_refusal_of_rays_client_can_be_pasted(monkeypatch, capsys):
    given = ["--grid", "my grid.py:f", "--address=ray://head:10001", "--name", "it's"]
    line = refusal(monkeypatch, capsys, *given, "--storage", "s3://KEY:SECRET@bucket/path")
    said, submit = line.split("a job of Ray's: ")
    assert said.startswith("error: --address ray://head:10001: ")
    assert "SECRET" not in line
    assert shlex.split(submit) == [
        *("ray", "job", "submit", "--address", "http://head:8265", "--working-dir", ".", "--"),
        *("python", "-m", "tune_study.run", "--address", "auto", "--grid", "my grid.py:f"),
        *("--name", "it's", "--storage", "s3://***@bucket/path"),
    ]


@pytest.mark.slow
@pytest.mark.ci
def test_the_commands_run(bucket, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(schedule, "run", without_ray)
    for command in COMMANDS:
        module, arguments = MODULES[command[2]], command[3:]
        if module is not run:
            code = module.main(arguments)
        else:
            named = [] if "--name" in arguments else ["--name", "demo"]
            monkeypatch.setattr("sys.argv", ["tune-study", *arguments, *named, "--simulate"])
            with pytest.raises(SystemExit) as exit_:
                run.main()
            code = exit_.value.code
        said = capsys.readouterr()
        assert not code, f"{command}: {said.out}{said.err}"
        if "another_folder" in command:
            assert "nothing to do: all 24 trials" in said.out
    there = remote.listing(bucket)
    for name in ("demo", "on_cluster", "as_job"):
        assert f"{name}/report/report.html" in there
        assert sum(bool(re.match(f"{name}/[^/]+/results.json", key)) for key in there) == 24
    for folder in ("ray_results/demo", "another_folder/demo", "demo_report"):
        assert len(pd.read_parquet(work / folder / "trials.parquet")) == 24


def refusal(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["tune-study", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run.main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "ray://head:10001"], ["ray job submit --address http://head:8265"]),
        (["--address", "ray://[::1]:1"], ["'http://[::1]:8265'"]),
        (["--address", "ray://", "--search", "optuna"], ["http://HOST:8265", "--search optuna"]),
        (["--address", "somewhere"], ["somewhere", "HOST:PORT"]),
        (["--address", "auto"], ["--address auto", "--storage"]),
        (["--storage", "some/folder"], ["some/folder", "--output-dir"]),
        (["--storage", "nonsense://K:SECRET@x/y"], ["nonsense://***@x/y"]),
        (["--epoch-s", "1"], ["--epoch-s", "--simulate"]),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = refusal(monkeypatch, capsys, *arguments)
    for word in words:
        assert word in line
    assert "SECRET" not in line
