"""A study on a real cluster of three raylets, one of which is killed."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pandas as pd
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


def until(process, folder, enough):
    """Until ``enough(output)``."""
    while True:
        said = (folder / "output.txt").read_text()
        if enough(said):
            return
        assert process.poll() is None, said
        time.sleep(0.2)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def object_stores(pid):
    """The shared memory that a process has of Ray's object stores: of its own node alone."""
    return set(re.findall(r"/dev/shm/plasma\w+", Path(f"/proc/{pid}/maps").read_text()))


def kill_a_node(cluster, process, folder):
    """A raylet, and with it its workers, by SIGKILL: neither the head nor the command's own."""
    own = object_stores(process.pid)
    assert own
    others = [pid for pid in cluster["raylets"][1:] if not own & object_stores(pid)]
    os.kill(others[0], signal.SIGKILL)
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
        until(process, folder, lambda said: said.count(": epoch 1/4") == 3)
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
        until(process, folder, lambda said: said.count(": epoch 1/4") == 3)
        kill_a_node(cluster, process, folder)
    harness.compare(folder / "smoke", tmp_path / "one" / "smoke")
    harness.no_epoch_twice(folder / "smoke")
    logs = [path.read_text() for path in folder.glob("smoke/*/trial.log")]
    assert sum("continues after epoch" in log for log in logs) >= 1


@pytest.mark.slow
def test_through_rays_client_the_command_runs_on_the_head(tmp_path):
    """It is interrupted there, and continued."""
    port = free_port()
    with nodes.cluster(1, client_port=port):
        places = ("--address", f"ray://127.0.0.1:{port}", "--cpus-per-trial", 1)
        places += ("--storage", (tmp_path / "store").as_uri())
        arguments = (*places, *SIMULATED, "--epoch-s", 2)
        process = harness.start_anywhere(tmp_path, *arguments)
        until(process, tmp_path, lambda said: ": epoch 1/4" in said)
        harness.interrupt(process)
        code, output = harness.finish(process, tmp_path)
        assert code == 130, output
        assert "interrupted; continue with" in output
        code, output = harness.finish(harness.start_anywhere(tmp_path, *arguments), tmp_path)
    assert code == 0, output
    assert "all 4 trials ended well" in output
    there = tmp_path / "store" / "smoke-simulated"
    assert len(pd.read_parquet(there / "epochs.parquet")) == 16
    assert not (tmp_path / "ray_results").exists()
