"""Locks, stopping, dead workers: without Ray, whose part tests/e2e plays for real."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from tune_study import supervise
from tune_study.config import UserError
from tune_study.files import write_json
from tune_study.limits import out_of_memory_events, within_memory
from tune_study.supervise import Deaths, EpochStopper, Gate, RayWatch, Stop

HOLD = """
import sys, time
from pathlib import Path
from tune_study.supervise import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} since .* is running this study"):
        supervise.lock(tmp_path / "s").__enter__()
    holder.kill()
    holder.wait()
    with supervise.lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s" / ".run.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "s" / ".run.json").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written to"):
        supervise.lock(tmp_path / "file" / "s").__enter__()


@pytest.fixture(autouse=True)
def _reset():
    yield
    Stop.reset()


class FakeTrial:
    """Tune's, which counts how often it is looked at."""

    def __init__(self, status):
        self.now, self.looked_at = status, 0

    @property
    def status(self):
        self.looked_at += 1
        return self.now

    def is_finished(self):
        return self.status in ("TERMINATED", "ERROR")


def controller_of(trials):
    return SimpleNamespace(get_trials=lambda: trials)


def test_trials_start_in_their_order_and_ended_ones_are_not_looked_at_again():
    gate, trials = Gate(), [FakeTrial("PENDING") for _ in range(4)]
    controller = controller_of(trials)
    assert gate.choose_trial_to_run(controller) is trials[0]
    trials[0].now, trials[1].now = "RUNNING", "ERROR"
    assert gate.choose_trial_to_run(controller) is trials[2]
    trials[0].now = "TERMINATED"
    assert gate.choose_trial_to_run(controller) is trials[2]
    looks = [trial.looked_at for trial in trials[:2]]
    trials.append(FakeTrial("PENDING"))
    assert gate.choose_trial_to_run(controller) is trials[2]
    assert [trial.looked_at for trial in trials[:2]] == looks
    for trial in trials:
        trial.now = "TERMINATED"
    assert gate.choose_trial_to_run(controller) is None


def test_a_stop_waits_for_the_running_trials_and_starts_no_other():
    Stop.reset()
    stopper, gate = EpochStopper(), Gate()
    controller = controller_of([FakeTrial("PENDING")])
    Stop.running.add("t")
    assert not stopper("t", {})
    Stop.request("interrupt")
    assert stopper("t", {})
    assert not stopper.stop_all()
    assert gate.choose_trial_to_run(controller) is None
    Stop.running.clear()
    assert stopper.stop_all()
    Stop.request("disk")
    assert Stop.reason == "interrupt"  # the first reason counts


def test_the_time_limit_is_a_reason_to_stop(monkeypatch):
    Stop.reset(max_hours=1)
    assert not Stop.requested()
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert Stop.requested()
    assert Stop.reason == "time"


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate")]
)
def test_the_first_signal_asks_and_the_second_stops_now(number, reason):
    Stop.reset()
    said = []
    before = signal.getsignal(number)
    with supervise.graceful_signals(said.append):
        signal.raise_signal(number)
        assert Stop.reason == reason
        assert said == ["stopping after this epoch; Ctrl-C again stops now"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


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
    failed(deaths, dead(config, "tune_study.limits.DiskFull: the disk of ..."))
    assert Stop.reason == "disk"
    assert deaths.to_continue([config]) == []


def test_a_worker_killed_for_memory_continues_with_half_the_batch(tiny, tmp_path, monkeypatch):
    config, said = tiny("none"), []
    folder = tmp_path / config.trial_id
    folder.mkdir()
    kills = [0]
    monkeypatch.setattr(supervise, "out_of_memory_kills", lambda: kills[0])
    deaths = Deaths(tmp_path, said.append)
    kills[0] = 1
    failed(deaths, dead(config))
    assert said == [
        f"{config.trial_id}: its worker process died (the system killed it for lack of memory)"
    ]
    assert within_memory(config, folder).training.per_device_train_batch_size == 10
    failed(deaths, dead(config))  # another death, not for memory
    assert len(out_of_memory_events(folder)) == 1


@pytest.mark.parametrize(
    ("batch", "steps"), [(32, [16, 8, 4, 2, 1, 1]), (20, [10, 5, 2, 1]), (31, [1]), (1, [1])]
)
def test_micro_batches_shrink_and_keep_the_images_of_a_step(tiny, tmp_path, batch, steps):
    training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 3}
    config = tiny("none", training=training)
    for expected in steps:
        micro = within_memory(config, tmp_path).training.per_device_train_batch_size
        supervise.note_out_of_memory(tmp_path, micro, "planted")
        smaller = within_memory(config, tmp_path).training
        assert smaller.per_device_train_batch_size == expected
        assert smaller.gradient_accumulation_steps * expected == 3 * batch


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
