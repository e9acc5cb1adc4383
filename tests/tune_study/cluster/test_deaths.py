"""Dead workers and a dead Ray: tests/e2e plays them for real."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import ray

from tune_study.cluster.deaths import Deaths, RayWatch, _lives, own_raylet
from tune_study.cluster.stop import Stop
from tune_study.folder.files import write_json
from tune_study.trial.micro_batch import out_of_memory_events, within_memory


@pytest.fixture(autouse=True)
def _reset():
    yield
    Stop.reset()


def dead(config, detail="ActorDiedError: killed", error_file=None):
    return SimpleNamespace(
        trial_id="t",
        config={"trial_id": config.trial_id, "trial": config.model_dump(mode="json")},
        get_error=lambda: detail,
        error_file=error_file,
    )


def failed(deaths, trial):
    deaths.on_trial_error(1, [], trial)


def test_a_dead_node_is_told_and_its_trial_continued(tiny, tmp_path):
    config, said = tiny("none"), []
    (tmp_path / config.trial_id).mkdir()
    (tmp_path / "error.txt").write_text("The actor died because its node has died. Node Id: 1")
    deaths = Deaths(tmp_path, said.append)
    failed(deaths, dead(config, error_file=str(tmp_path / "error.txt")))
    assert deaths.to_continue([config]) == [config]
    assert said == [f"{config.trial_id}: its worker process died (its node died)"]


def test_a_lost_store_stops_the_study_and_fails_no_trial(tiny, tmp_path):
    config, said = tiny("none"), []
    Stop.reset()
    deaths = Deaths(tmp_path, said.append)
    failed(deaths, dead(config, "RayTaskError(RemoteError): s3://b: writing x failed"))
    assert Stop.reason == "storage"
    assert deaths.to_continue([config]) == []
    assert not (tmp_path / config.trial_id).exists()
    Stop.reset()


def test_a_dead_worker_is_continued_twice_and_then_an_error(tiny, tmp_path):
    config, said = tiny("none"), []
    folder = tmp_path / config.trial_id
    folder.mkdir()
    (folder / "trial.log").write_text("epoch 1\n")
    deaths = Deaths(tmp_path, said.append)
    for _ in range(2):
        failed(deaths, dead(config))
        assert deaths.to_continue([config]) == [config]
    failed(deaths, dead(config))
    assert deaths.to_continue([config]) == []
    assert said == [f"{config.trial_id}: its worker process died (it was killed)"] * 3
    error = json.loads((folder / "error.json").read_text())
    assert error["type"] == "WorkerDied"
    assert error["log_tail"] == ["epoch 1"]
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "error"
    assert "killed 3 times" in results["error"]


def test_a_node_that_cannot_begin_a_trial_says_why(tiny, tmp_path):
    config, said = tiny("none"), []
    (tmp_path / config.trial_id).mkdir()
    raised = "Traceback\n  File x\ntune_study.errors.UserError: --cache-dir: no room\n"
    (tmp_path / "error.txt").write_text(raised)
    deaths = Deaths(tmp_path, said.append)
    for again in ([config], [config], []):
        failed(deaths, dead(config, error_file=str(tmp_path / "error.txt")))
        assert deaths.to_continue([config]) == again
    assert said == [f"{config.trial_id}: its node could not begin it (--cache-dir: no room)"] * 3
    results = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert results["error"] == "UserError: --cache-dir: no room"
    error = json.loads((tmp_path / config.trial_id / "error.json").read_text())
    assert error["type"] == "UserError"


def test_an_exception_is_told_apart_from_a_dead_worker(tiny, tmp_path):
    config, said = tiny("none"), []
    (tmp_path / config.trial_id).mkdir()
    write_json(tmp_path / config.trial_id / "results.json", {"status": "error"})
    deaths = Deaths(tmp_path, said.append)
    failed(deaths, dead(config, "ValueError: planted"))
    assert deaths.to_continue([config]) == []
    assert said == []


def test_a_full_disk_stops_the_study(tiny, tmp_path):
    Stop.reset()
    config = tiny("none")
    deaths = Deaths(tmp_path, print)
    failed(deaths, dead(config, "tune_study.machine.disk.DiskFull: the disk of ..."))
    assert Stop.reason == "disk"
    assert deaths.to_continue([config]) == []


def test_a_worker_killed_for_memory_continues_with_half_the_batch(tiny, tmp_path, monkeypatch):
    config, said = tiny("none"), []
    folder = tmp_path / config.trial_id
    folder.mkdir()
    kills = [0]
    monkeypatch.setattr("tune_study.cluster.deaths.out_of_memory_kills", lambda: kills[0])
    deaths = Deaths(tmp_path, said.append)
    kills[0] = 1
    failed(deaths, dead(config))
    assert said == [
        f"{config.trial_id}: its worker process died (the system killed it for lack of memory)"
    ]
    assert within_memory(config, folder).training.per_device_train_batch_size == 10
    failed(deaths, dead(config))  # another death, not for memory
    assert len(out_of_memory_events(folder)) == 1


def test_the_death_of_rays_own_process_is_noticed():
    program = "import sys, time; print('up', flush=True); time.sleep(600)"
    child = subprocess.Popen(
        ["bash", "-c", f'exec -a raylet {sys.executable} -c "{program}"'],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    died = []
    watch = RayWatch(died.append)
    with watch:
        watch._processes = [("raylet", psutil.Process(child.pid))]
        child.kill()
        deadline = time.monotonic() + 60
        while not died and time.monotonic() < deadline:
            time.sleep(0.05)
    assert died == ["raylet"]
    child.wait()


def test_only_the_raylet_of_the_own_node_is_watched(monkeypatch):
    """On one machine, the sockets of further raylets are named as the first one's and a suffix."""
    found = [
        SimpleNamespace(info={"name": name, "cmdline": command})
        for name, command in (
            ("raylet", ["raylet", "--raylet_socket_name=/s/raylet", "--x"]),
            ("raylet", ["raylet", "--raylet_socket_name=/s/raylet.1"]),
            ("raylet", None),  # another user's
            ("python", ["python", "--raylet_socket_name=/s/raylet"]),
        )
    ]
    monkeypatch.setattr(psutil, "process_iter", lambda names: found)
    node = SimpleNamespace(raylet_socket_name="/s/raylet")
    monkeypatch.setattr(ray._private.worker.global_worker, "node", node)
    assert own_raylet() == [("raylet", found[0])]


def test_a_full_disk_is_noticed_where_it_left_no_message(tiny, tmp_path, monkeypatch):
    Stop.reset()
    config, said = tiny("none"), []
    watcher = Deaths(tmp_path, said.append)
    monkeypatch.setattr("tune_study.cluster.deaths.has_room", lambda folder: False)
    failed(watcher, dead(config, "ActorDiedError: killed"))
    assert Stop.reason == "disk"
    assert said == []  # no death is counted
    assert watcher.to_continue([config]) == []


def test_running_trials_are_known_by_tunes_name(tiny, tmp_path):
    Stop.reset()
    deaths, one = Deaths(tmp_path, print), dead(tiny("none"))
    two = dead(tiny("nf4"))
    two.trial_id = "u"
    for trial in (one, two):
        deaths.on_trial_start(0, [], trial)
    assert Stop.running == {"t", "u"}
    deaths.on_trial_complete(0, [], one)
    assert Stop.running == {"u"}
    Stop.request("interrupt")
    deaths.on_trial_start(0, [], one)  # in the worker of one that ended
    assert Stop.running == {"u"}
    deaths.on_trial_error(0, [], two)
    assert Stop.running == set()
    Stop.reset()


def test_a_trial_that_is_given_up_keeps_what_it_had(tiny, tmp_path):
    config, other = tiny("none"), tiny("nf4")
    folder = tmp_path / config.trial_id
    folder.mkdir()
    had = {"status": "interrupted", "simulated": True, "train": {"epochs": [{"epoch": 1}] * 3}}
    write_json(folder / "results.json", had)
    deaths = Deaths(tmp_path, lambda line: None)
    for _ in range(3):
        failed(deaths, dead(config))
    assert deaths.to_continue([other, config]) == []
    results = json.loads((folder / "results.json").read_text())
    assert results["train"] == had["train"]
    assert results["simulated"] is True
    assert json.loads((folder / "error.json").read_text())["last_epoch"] == 3
    failed(deaths, dead(other))
    assert deaths.to_continue([config, other]) == [other]
    assert deaths.to_continue([config, other]) == []  # once a death


def test_one_that_left_nothing_is_an_error_without_epochs(tiny, tmp_path):
    config = tiny("nf4")
    (tmp_path / config.trial_id).mkdir()
    deaths = Deaths(tmp_path, lambda line: None)
    for _ in range(3):
        failed(deaths, dead(config))
    deaths.to_continue([config])
    results = json.loads((tmp_path / config.trial_id / "results.json").read_text())
    assert results["simulated"] is False
    assert results["train"] == {"epochs": []}
    assert results["run"]["config"]["quantization"]["mode"] == "nf4"


def test_what_is_watched_are_rays_processes_and_the_others(monkeypatch):
    child = SimpleNamespace(name=lambda: "gcs_server", is_running=lambda: True, status=lambda: "s")
    stranger = SimpleNamespace(name=lambda: "bash")
    me = SimpleNamespace(children=lambda recursive: [child, stranger] if recursive else [])
    monkeypatch.setattr(psutil, "Process", lambda: me)
    with RayWatch(print, [("raylet", child)]) as watch:
        assert watch._processes == [("gcs_server", child), ("raylet", child)]


@pytest.mark.parametrize(
    ("running", "status", "lives"),
    [(True, psutil.STATUS_SLEEPING, True), (True, psutil.STATUS_ZOMBIE, False), (False, "", False)],
)
def test_a_zombie_does_not_live(running, status, lives):
    process = SimpleNamespace(is_running=lambda: running, status=lambda: status)
    assert _lives(process) is lives
