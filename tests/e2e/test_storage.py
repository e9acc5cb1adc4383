"""A study in an S3 bucket: run, killed, gone on with from another folder, and reported."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tune_study.folder import remote

from . import harness, s3
from .test_exposure import holding

ROOT = Path(__file__).parents[2]
SIMULATED = ("--simulate", "--epoch-s", "1")
CANARY = "canary%2Fkey"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with s3.server(tmp_path_factory.mktemp("s3") / "log.txt") as found:
        yield found


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """(URI, the open folder). The commands find the server by the usual variables."""
    for name, value in s3.environment(endpoint).items():
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(harness.ENVIRONMENT, name, value)
    uri = f"s3://{s3.BUCKET}/study-{time.time_ns()}"
    return uri, remote.open_remote(uri)


def report(uri, *arguments):
    command = [sys.executable, "-m", "analysis.report", uri, *map(str, arguments)]
    environment = {**harness.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def kill_and_go_on(uri, place, tmp_path, name, arguments, when):
    """Kills everything when ``when()``; the same command goes on in an empty folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    process = harness.start(first, "--storage", uri, *arguments)
    harness.wait_until(process, first, when, "what it leaves in the store")
    harness.kill(process, "everything")
    process = harness.start(second, "--storage", uri, *arguments)
    code, output = harness.finish(process, second)
    assert code == 0, output
    assert "all 4 trials ended well" in output
    assert remote.read(place, f"{name}/.lease.json") is None
    there = set(remote.listing(place))
    assert not [key for key in there if "/run-" in key or "/." in key]
    return second / name, there


@pytest.mark.slow
@pytest.mark.ci
def test_a_simulated_study_is_killed_and_goes_on_elsewhere(bucket, endpoint, tmp_path):
    uri, place = bucket
    secret = uri.replace("s3://", f"s3://{CANARY}:{CANARY}@")
    name, began = "smoke-simulated", time.time()
    done = f"{name}/"

    def one_has_ended():
        keys = remote.listing(place)
        return any(key.startswith(done) and key.endswith("/results.json") for key in keys)

    folder, there = kill_and_go_on(secret, place, tmp_path, name, SIMULATED, one_has_ended)
    assert "continuing: " in (tmp_path / "second" / "output.txt").read_text()
    assert {f"{name}/study.json", f"{name}/trials.parquet", f"{name}/report/report.html"} <= there
    assert sum(key.endswith("/results.json") for key in there) == 4
    manifest = json.loads((folder / "study.json").read_text())
    assert len(manifest["sessions"]) == 2
    assert f"s3://***@{s3.BUCKET}" in manifest["command"]
    sessions = [p for p in Path("/tmp/ray").glob("session_2*") if p.stat().st_mtime >= began]
    assert [path for place_ in (tmp_path, *sessions) for path in holding(place_, "canary")] == []

    before = remote.read(place, f"{name}/report/report.html")
    remote.delete(place, [f"{name}/report/report.html"])
    done_ = report(f"{uri}/{name}")
    assert done_.returncode == 0, done_.stderr
    assert done_.stdout.strip() == f"{uri}/{name}/report/report.html"
    assert remote.read(place, f"{name}/report/report.html") == before


@pytest.mark.slow
def test_a_real_study_is_killed_and_goes_on_elsewhere(bucket, tmp_path):
    uri, place = bucket
    code, output = harness.finish(harness.start(tmp_path / "whole"), tmp_path / "whole")
    assert code == 0, output

    def first_epoch_is_kept():
        return any("checkpoints/epoch-00001/state.json" in key for key in remote.listing(place))

    folder, there = kill_and_go_on(uri, place, tmp_path, "smoke", (), first_epoch_is_kept)
    harness.compare(folder, tmp_path / "whole" / "smoke")
    harness.no_epoch_twice(folder)
    assert not [key for key in there if "/checkpoints/" in key]
    logs = [path.read_text() for path in folder.glob("*/trial.log")]
    assert sum("continues after epoch" in log for log in logs) == 1  # from what the store had
    third = tmp_path / "third"
    remote.fetch(place, third, [key for key in there if key.startswith("smoke/")])
    harness.compare(third / "smoke", tmp_path / "whole" / "smoke")
    answer = report(f"{uri}/smoke", "--to", tmp_path / "report")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "report" / "report" / "report.html").is_file()
    assert len(pd.read_parquet(folder / "trials.parquet")) == 4
