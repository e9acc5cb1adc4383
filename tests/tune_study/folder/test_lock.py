"""One run per study: a lock in its folder, a lease in a store."""

import json
import os
import subprocess
import sys
import threading

import pytest

from tune_study.errors import UserError
from tune_study.folder import lock, remote
from tune_study.folder.remote import open_remote

HOLD = """
import sys, time
from pathlib import Path
from tune_study.folder.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path):
    """(the URI of a study's folder in a store, what lies there)."""
    folder = tmp_path / "store" / "my study"
    return remote.join((tmp_path / "store").as_uri(), "my%20study"), folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "REWRITTEN_S", 0.05)
    monkeypatch.setattr(lock, "WATCHED_S", 0.5)
    monkeypatch.setattr(lock, "SETTLES_S", 0.0)


def test_a_second_run_is_refused_while_the_first_lives(quick, place):
    where = open_remote(place[0])
    with (
        lock.lease(where, print, pytest.fail),
        pytest.raises(UserError, match="another run is working on this study"),
        lock.lease(where, print, pytest.fail),
    ):
        pass
    assert remote.read(where, lock.NAME) is None  # given back
    with lock.lease(where, print, pytest.fail):
        pass


def foreign(**fields):
    found = json.loads(lock._record("another", 7))
    return json.dumps({**found, **fields}).encode()


def test_a_lease_that_does_not_change_is_taken_over(quick, place):
    where = open_remote(place[0])
    remote.write(where, lock.NAME, foreign(machine="another"))
    said = []
    with lock.lease(where, said.append, pytest.fail):
        assert json.loads(remote.read(where, lock.NAME))["owner"] != "another"
    assert "looking whether it lives" in said[0]


def test_a_dead_process_of_this_machine_is_not_watched(quick, place, monkeypatch):
    monkeypatch.setattr(lock, "WATCHED_S", 3600)
    where = open_remote(place[0])
    remote.write(where, lock.NAME, foreign(process_started=0.0, pid=os.getpid()))
    with lock.lease(where, pytest.fail, pytest.fail):
        pass


def test_a_run_whose_lease_was_taken_is_told(quick, place):
    where, lost = open_remote(place[0]), threading.Event()
    with lock.lease(where, print, lost.set):
        remote.write(where, lock.NAME, foreign())
        assert lost.wait(10)
    assert json.loads(remote.read(where, lock.NAME))["owner"] == "another"  # it stays theirs


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} since .* is running this study"):
        lock.lock(tmp_path / "s").__enter__()
    holder.kill()
    holder.wait()
    with lock.lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s" / ".run.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "s" / ".run.json").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written to"):
        lock.lock(tmp_path / "file" / "s").__enter__()
