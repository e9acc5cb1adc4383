"""A search killed by SIGKILL, with its workers, and continued by the same command."""

import json
import random
import shutil
import signal
import time

import optuna
import pandas as pd
import pytest

from tests.e2e import harness, nodes, s3, test_cluster
from tune_study.folder import remote

SEARCH = ["--search", "optuna", "--space", "qlora", "--num-samples", "16", "--simulate"]
SEARCH += ["--set", "training.num_train_epochs=2", "--name", "s"]
EPOCH_S = 0.3
"""Of the searches that are killed: their trials must not end before the kill."""
LASTING = ["--epoch-s", EPOCH_S]
BUCKET = f"s3://{s3.BUCKET}/searches"


def start(folder, *options):
    return harness.start(folder, *SEARCH, *options, grid=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, output = harness.finish(start(folder), folder)
    assert code == 0, output
    assert "all 16 trials ended well" in output
    return folder / "s"


def read(study_dir):
    """(plan, what Optuna learned from, trials table)."""
    plan = [cell["trial_id"] for cell in json.loads((study_dir / "study.json").read_text())["plan"]]
    storage = f"sqlite:///{study_dir / 'optuna.sqlite3'}"
    trials = optuna.load_study(study_name="search", storage=storage).trials
    assert not [t for t in trials if t.state == optuna.trial.TrialState.RUNNING]
    learned = [(t.params, t.values) for t in trials if t.values is not None]
    return plan, learned, pd.read_parquet(study_dir / "trials.parquet")


def same(study_dir, expected):
    ours, theirs = read(study_dir), read(expected)
    assert ours[:2] == theirs[:2]
    pd.testing.assert_frame_equal(ours[2], theirs[2], check_exact=True)


@pytest.mark.slow
def test_killed_moved_and_continued_it_is_the_same_search(whole, tmp_path):
    folder, rng = tmp_path / "first", random.Random(1)
    for moment in ("[3/16]", "[9/16]", "[13/16]"):
        process = start(folder, *LASTING)
        harness.wait_for(process, folder, moment)
        time.sleep(EPOCH_S * rng.random())  # anywhere in the epoch that runs
        harness.kill(process, "everything")
        moved = tmp_path / moment[1:-1].partition("/")[0]
        shutil.move(folder, moved)
        folder = moved
    code, output = harness.finish(start(folder), folder)
    assert code == 0, output
    assert "of 16 trials have ended" in output
    same(folder / "s", whole)


@pytest.mark.slow
def test_killed_in_a_store_it_goes_on_from_an_empty_folder(whole, tmp_path):
    stored = ("--storage", (tmp_path / "store").as_uri())
    first, second = tmp_path / "first", tmp_path / "second"
    process = start(first, *stored, *LASTING)
    harness.wait_for(process, first, "[5/16]")
    harness.kill(process, "everything")
    code, output = harness.finish(start(second, *stored), second)
    assert code == 0, output
    assert "of 16 trials have ended" in output
    same(second / "s", whole)
    same(tmp_path / "store" / "s", whole)


@pytest.mark.slow
def test_ctrl_c_leaves_a_search_that_goes_on(whole, tmp_path):
    process = start(tmp_path, *LASTING)
    harness.wait_for(process, tmp_path, "[5/16]")
    process.send_signal(signal.SIGINT)
    code, output = harness.finish(process, tmp_path)
    assert code == 130, output
    assert "continue with: python -m tune_study.run" in output.replace("\n", " ")
    code, output = harness.finish(start(tmp_path), tmp_path)
    assert code == 0, output
    same(tmp_path / "s", whole)


def on_cluster(folder, cluster, *options):
    places = ("--address", cluster["address"], "--cpus-per-trial", 1)
    places += ("--storage", (folder.parent / "store").as_uri())
    return start(folder, *places, *options)


@pytest.mark.slow
def test_on_a_cluster_a_killed_command_goes_on_from_an_empty_folder(whole, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    one = ("--max-concurrent", 1)
    with nodes.cluster(3) as cluster:
        process = on_cluster(first, cluster, *one, *LASTING)
        harness.wait_for(process, first, "[5/16]")
        harness.kill(process, "driver")
        code, output = harness.finish(on_cluster(second, cluster, *one), second)
    assert code == 0, output
    assert "of 16 trials have ended" in output
    same(second / "s", whole)
    same(tmp_path / "store" / "s", whole)


@pytest.mark.slow
def test_on_a_cluster_several_run_at_a_time_and_survive_a_node(tmp_path):
    options = ("--num-samples", 6, "--set", "training.num_train_epochs=4", "--epoch-s", 10)
    folder = tmp_path / "c"
    with nodes.cluster(3) as cluster:
        process = on_cluster(folder, cluster, *options)
        harness.wait_for(process, folder, ": epoch 1/4", times=3)
        test_cluster.kill_another_node(cluster, process)
        code, output = harness.finish(process, folder)
    assert code == 0, output
    assert "its worker process died (its node died)" in output
    assert "all 6 trials ended well" in output
    plan, learned, trials = read(folder / "s")
    assert len(plan) == len(learned) == len(trials) == 6


@pytest.fixture
def asha(tmp_path, monkeypatch):
    """Starts a search with ASHA on three nodes, whose trials a bucket keeps."""
    with s3.server(tmp_path / "s3.txt") as endpoint:
        for name, value in s3.environment(endpoint).items():  # the nodes' own, and the commands'
            monkeypatch.setenv(name, value)
            monkeypatch.setitem(harness.ENVIRONMENT, name, value)
        with nodes.cluster(3) as cluster:
            places = ("--address", cluster["address"], "--storage", BUCKET, "--cpus-per-trial", 1)
            wanted = ("--objective", "val_accuracy", "--scheduler", "asha")
            wanted += ("--set", "training.num_train_epochs=4")
            yield lambda folder, *options: start(folder, *places, *wanted, *options)


def pruned_alike(study_dir, count):
    """The trials that are pruned are so in Optuna, in the study's folder and in the bucket.

    Some are, whatever ends first: number 3 has the least accuracy of the first six and begins when
    another has ended; numbers 4 and 5 have the most.
    """
    plan, _, trials = read(study_dir)
    assert len(plan) == count
    pruned = trials[trials["status"] == "pruned"]
    assert plan[3] in set(pruned["trial_id"])
    assert len(pruned) < count
    assert pruned["epochs_completed"].between(1, 3).all()
    assert set(trials["status"]) <= {"completed", "pruned"}
    status = dict(zip(trials["trial_id"], trials["status"], strict=True))
    bucket = remote.open_remote(f"{BUCKET}/{study_dir.name}")
    there = {trial: json.loads(remote.read(bucket, f"{trial}/results.json")) for trial in plan}
    assert {trial: results["status"] for trial, results in there.items()} == status
    storage = f"sqlite:///{study_dir / 'optuna.sqlite3'}"
    asked = optuna.load_study(study_name="search", storage=storage).trials
    told = {t.user_attrs["trial_id"]: t.state.name for t in asked if t.state.name != "FAIL"}
    ends = {"completed": "COMPLETE", "pruned": "PRUNED"}
    assert told == {trial: ends[end] for trial, end in status.items()}


@pytest.mark.slow
@pytest.mark.ci
def test_asha_prunes_on_a_cluster_with_a_bucket(asha, tmp_path):
    """The short form of the test below, in which nobody is killed."""
    code, output = harness.finish(asha(tmp_path, "--num-samples", 5), tmp_path)
    assert code == 0, output
    pruned_alike(tmp_path / "s", 5)


@pytest.mark.slow
def test_asha_on_a_cluster_with_a_bucket_goes_on_after_a_kill(asha, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--num-samples", 9, "--epoch-s", 2)
    process = asha(first, *options)
    harness.wait_for(process, first, "[3/9]")
    harness.kill(process, "driver")
    code, output = harness.finish(asha(second, *options), second)
    assert code == 0, output
    assert "of 9 trials have ended" in output
    pruned_alike(second / "s", 9)
