"""A study on a real cluster of three raylets, one of which is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest

from . import harness, nodes

EPOCHS = ("--set", "training.num_train_epochs=4")
SIMULATED = ("--simulate", *EPOCHS)
REAL = (*EPOCHS, "--train-size", 320)
"""A worker outlives its killed raylet by about ten seconds: its trial must not end in them."""


def start(tmp_path, cluster, *arguments):
    """The study on the cluster; what its trials leave goes to a folder as to any store."""
    places = ("--address", cluster["address"], "--cpus-per-trial", 1)
    places += ("--storage", (tmp_path / "store").as_uri())
    return harness.start(tmp_path / "cluster", *places, *arguments)


def object_stores(pid):
    """The shared memory that a process has of Ray's object stores: of its own node alone."""
    return set(re.findall(r"/dev/shm/plasma\w+", mapped(pid)))


def mapped(pid):
    """What a process has mapped, as Linux tells it."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not tell what a process has mapped (no /proc)")
    return Path(f"/proc/{pid}/maps").read_text()


def with_torch(cluster):
    """The nodes' workers that run trials and have loaded torch's library."""
    nodes_ = [psutil.Process(pid) for pid in cluster["raylets"]]
    workers = [worker.pid for node in nodes_ for worker in node.children() if trains(worker)]
    assert workers
    return [pid for pid in workers if "libtorch" in mapped(pid)]


def trains(worker):
    return harness.name_of(worker).startswith("ray::ImplicitFunc")


def kill_another_node(cluster, process):
    """A raylet, and with it its workers, by SIGKILL: neither the head nor the command's own."""
    own = object_stores(process.pid)
    assert own
    others = [pid for pid in cluster["raylets"][1:] if not own & object_stores(pid)]
    os.kill(others[0], signal.SIGKILL)


def kill_a_node(cluster, process, folder):
    """The study goes on without it, to its end."""
    kill_another_node(cluster, process)
    code, output = harness.finish(process, folder)
    assert code == 0, output
    assert "its worker process died (its node died)" in output
    assert "all 4 trials ended well" in output
    return output


@pytest.mark.slow
@pytest.mark.ci
def test_simulated_trials_survive_a_node_and_equal_those_of_one(tmp_path):
    code, output = harness.finish(harness.start(tmp_path / "one", *SIMULATED), tmp_path / "one")
    assert code == 0, output
    with nodes.cluster(3) as cluster:
        process = start(tmp_path, cluster, *SIMULATED, "--epoch-s", 10)
        folder = tmp_path / "cluster"
        # Three run at a time, so that every node has one; so long that the first is far from its
        # end when the last has begun, however busy the machine is.
        harness.wait_for(process, folder, ": epoch 1/4", times=3)
        assert not with_torch(cluster)
        kill_a_node(cluster, process, folder)
    name = "smoke-simulated"
    for table in ("trials", "epochs"):
        ours, theirs = (
            pd.read_parquet(tmp_path / place / name / f"{table}.parquet")
            for place in ("cluster", "one")
        )
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    there = tmp_path / "store" / name
    assert (there / "trials.csv").read_bytes() == (folder / name / "trials.csv").read_bytes()
    manifest = json.loads((there / "study.json").read_text())
    assert len(list(there.glob("*/results.json"))) == len(manifest["plan"]) == 4


@pytest.mark.slow
def test_real_trials_survive_a_node_and_equal_those_of_one(tmp_path):
    code, output = harness.finish(
        harness.start(tmp_path / "one", "--cpus-per-trial", 1, *REAL), tmp_path / "one"
    )
    assert code == 0, output
    with nodes.cluster(3) as cluster:
        process = start(tmp_path, cluster, *REAL)
        folder = tmp_path / "cluster"
        harness.wait_for(process, folder, ": epoch 1/4", times=3)
        kill_a_node(cluster, process, folder)
    harness.compare(folder / "smoke", tmp_path / "one" / "smoke")
    harness.no_epoch_twice(folder / "smoke")
    logs = [path.read_text() for path in folder.glob("smoke/*/trial.log")]
    assert sum("continues after epoch" in log for log in logs) >= 1


GRID = """
import timm
from ray import tune
@timm.models.register_model
def my_vit(**options):
    return timm.create_model("vit_glyphs_patch4_32", **options)
def two():
    modes = tune.grid_search(["none", "nf4"])
    return {"model": "my_vit", "dataset": "digits", "quantization": modes}
"""


class Jobs:
    """Ray's own commands for jobs, to a head at ``port``; ``store`` is where their studies lie."""

    def __init__(self, tmp_path, port):
        self._folder, self._address = tmp_path, ["--address", f"http://127.0.0.1:{port}"]
        self.store = tmp_path / "store"
        self.work = tmp_path / "work"
        self.work.mkdir()
        (self.work / "my_grid.py").write_text(GRID)

    def _ray(self, verb):
        return [sys.executable, "-m", "ray.scripts.scripts", "job", verb, *self._address]

    def submit(self, name, grid, *study):
        """What it prints goes to the file that ``harness`` reads in ``folder(name)``."""
        self.folder(name).mkdir()
        given = ["--address", "auto", "--storage", self.store.as_uri(), "--device", "cpu"]
        command = [*self._ray("submit"), "--submission-id", name, "--working-dir", self.work, "--"]
        command += ["python", "-m", "tune_study.run", *given, "--grid", grid, *study]
        with (self.folder(name) / "output.txt").open("w") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=harness.ENVIRONMENT
            )

    def folder(self, name):
        return self._folder / name

    def told(self, verb, name):
        done = subprocess.run([*self._ray(verb), name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def finish(self, name, grid, *study):
        """(exit code, output) of a job."""
        return harness.finish(self.submit(name, grid, *study), self.folder(name))

    def stop(self, name, process):
        """What a running job had printed when it was stopped."""
        self.told("stop", name)
        _, output = harness.finish(process, self.folder(name))
        assert f"Job '{name}' was stopped" in output
        assert f"Job '{name}' was stopped" in self.told("status", name)
        return output


@pytest.mark.slow
def test_a_simulated_job_is_stopped_and_continued(tmp_path):
    """The short form of the test below, in which workers train."""
    port, mine = nodes.free_port(), ("--cpus-per-trial", "1", "--simulate", *EPOCHS)
    jobs = Jobs(tmp_path, port)
    with nodes.cluster(1, jobs_port=port):
        process = jobs.submit("first", "my_grid.py:two", *mine, "--epoch-s", "5")
        harness.wait_for(process, jobs.folder("first"), ": epoch 1/4")
        assert "[2/2]" not in jobs.stop("first", process)
        (jobs.work / "more.txt").write_text(
            "another package for Ray: the job finds an empty folder"
        )
        code, output = jobs.finish("second", "my_grid.py:two", *mine)
    assert code == 0, output
    assert "all 2 trials ended well" in output
    manifest = json.loads((jobs.store / "two-simulated" / "study.json").read_text())
    assert len(manifest["sessions"]) == 2
    trials = pd.read_csv(jobs.store / "two-simulated" / "trials.csv")
    assert list(trials["status"]) == ["completed"] * 2
    assert set(trials["model"]) == {"my_vit"}


@pytest.mark.slow
def test_a_study_submitted_as_a_job_is_stopped_and_continued(tmp_path):
    """The file of its grid goes along, with a model that workers learn of.

    Three seconds after the stop Ray kills what is left of the job, in the middle of an epoch.
    """
    port, mine = nodes.free_port(), ["--cpus-per-trial", "1", "--set", "pretrained=false", *EPOCHS]
    jobs = Jobs(tmp_path, port)
    with nodes.cluster(1, jobs_port=port):
        process = jobs.submit("first", "my_grid.py:two", *mine)
        harness.wait_for(process, jobs.folder("first"), ": epoch 2/4")
        output = jobs.stop("first", process)
        assert output.count(": epoch ") < 8
        assert ": epoch 2/4" in jobs.told("logs", "first")
        code, output = jobs.finish("second", "my_grid.py:two", *mine)
        assert code == 0, output
        assert "all 2 trials ended well" in output
        code, output = jobs.finish("third", "nowhere", *mine)
        assert code == 1
        assert "error: --grid nowhere: choose one of " in output
        assert "Job 'third' failed" in jobs.told("status", "third")
    logs = [path.read_text() for path in (jobs.store / "two").glob("*/trial.log")]
    assert sum("continues after epoch" in log for log in logs) == 1
    for log in logs:  # no epoch was computed twice, that of the kill excepted, which is not there
        assert re.findall(r"epoch (\d): validation accuracy", log) == ["1", "2", "3", "4"]
    one = tmp_path / "one"
    whole = harness.start(one, *mine, grid=f"{jobs.work / 'my_grid.py'}:two")
    code, output = harness.finish(whole, one)
    assert code == 0, output
    harness.compare(jobs.store / "two", one / "two")
