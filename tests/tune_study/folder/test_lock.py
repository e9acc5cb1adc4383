"""One run per study: a lock in its folder, a lease in a store."""

import json
import os
import platform
import subprocess
import sys
import threading
import time

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


def holder(**changed):
    return {**json.loads(lock._record("another", 7)), **changed}


def test_a_record_names_its_owner_and_its_process():
    found = holder()
    assert (found["owner"], found["beat"], found["pid"]) == ("another", 7, os.getpid())
    assert len(found["machine"]) == 16
    assert platform.node() not in found["machine"]


@pytest.mark.parametrize(
    ("apart", "dead"), [(0.0, False), (1.0, False), (-1.0, False), (1.1, True), (-1.1, True)]
)
def test_a_process_that_began_at_another_time_is_another(apart, dead):
    found = holder()
    found["process_started"] += apart
    assert lock._is_dead(found) is dead
    assert not lock._is_dead({**found, "machine": "another"})


def test_a_process_that_is_gone_is_dead_and_an_unreadable_holder_is_not():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert lock._is_dead(holder(pid=child.pid))
    assert not lock._is_dead({})
    for content in (None, b"", b"{", b"[1]"):
        assert lock._holder(content) == {}


def test_who_wrote_last_of_two_that_began_at_once_holds_it(quick, place, monkeypatch):
    where = open_remote(place[0])
    settles = []

    def other_writes(seconds):
        settles.append(seconds)
        remote.write(where, lock.NAME, foreign())

    monkeypatch.setattr(lock.time, "sleep", other_writes)
    with (
        pytest.raises(UserError, match="began on this study at the same moment"),
        lock.lease(where, pytest.fail, pytest.fail),
    ):
        pytest.fail("held")
    assert settles == [lock.SETTLES_S]
    assert json.loads(remote.read(where, lock.NAME))["owner"] == "another"


def test_a_lease_beats_while_it_is_held(quick, place):
    where, beats = open_remote(place[0]), set()
    with lock.lease(where, print, pytest.fail):
        assert all(one.daemon for one in threading.enumerate() if one.name == "lease")
        until = time.monotonic() + 30
        while len(beats) < 3 and time.monotonic() < until:
            beats.add(json.loads(remote.read(where, lock.NAME))["beat"])
    assert len(beats) == 3
    assert min(beats) >= 0


def test_a_lease_that_is_given_back_is_free_at_once(quick, place, monkeypatch):
    monkeypatch.setattr(lock, "WATCHED_S", 3600)
    where, said, slept = open_remote(place[0]), [], []
    remote.write(where, lock.NAME, foreign(machine="another", time="then"))

    def given_back(seconds):
        slept.append(seconds)
        remote.delete(where, [lock.NAME] * (len(slept) == 1))

    monkeypatch.setattr(lock.time, "sleep", given_back)
    with lock.lease(where, said.append, pytest.fail):
        pass
    assert "a run from then has not given" in said[0]
    assert slept == [1.0, lock.SETTLES_S]


def test_a_lock_is_given_back_after_a_failure(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="planted"),
            lock.lock(tmp_path / "deep" / "s"),
        ):
            raise ValueError("planted")
        assert not (tmp_path / "deep" / "s" / ".run.json").exists()
    with lock.lock(tmp_path / "deep" / "s"):
        (tmp_path / "deep" / "s" / ".run.json").unlink()  # somebody tidied up
