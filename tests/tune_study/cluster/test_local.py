"""Ray's start beside the imports: who gets preloaded workers, and what a failure says."""

import gc
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray
from ray.air._internal import usage

from tune_study.cluster import local
from tune_study.errors import UserError
from tune_study.machine.environment import spared_from_collection
from tune_study.study.schedule import run  # noqa: F401  (what the command imports)

PRELOADS = "RAY_preload_python_modules"


@pytest.mark.parametrize(
    ("devices", "alone"),
    [
        ([], True),
        (["nvidia0", "nvidiactl", "nvidia-uvm"], True),
        (["nvidia0", "nvidia1", "nvidiactl"], False),
        (["kfd"], False),
        (["dxg"], False),
    ],
)
def test_workers_preload_only_where_no_gpu_must_be_chosen_first(tmp_path, devices, alone):
    for name in devices:
        (tmp_path / name).touch()
    assert local.one_gpu_at_most(tmp_path) is alone


def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch):
    def fails(**options):
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", fails)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match=r"did not start .*\(The current node timed out during st"):
        local.start(1, dashboard=False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ray_does_not_start_twice_nor_where_the_imports_are_there(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("started"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    local.start(1, dashboard=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setitem(local.sys.modules, local.NEEDED, local)
    local.start_during_imports(1, dashboard=False)


def test_sigterm_stays_the_commands_own(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        ray, "init", lambda **options: signal.signal(signal.SIGTERM, lambda *_: None)
    )
    local.start(1, dashboard=False)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", [local.PRELOADED, local.PRELOADED_TO_SIMULATE])
def test_what_is_preloaded_exists(name):  # Ray would only log that it does not
    assert importlib.util.find_spec(name)


def test_workers_preload_all_that_a_trial_that_trains_needs():
    code = f"import sys, {local.PRELOADED}; print('tune_study.trial.execution' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_imports_are_spared_from_collection_and_what_comes_later_is_not():
    frozen = gc.get_freeze_count()
    try:
        with spared_from_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_tune_does_not_count_callbacks_which_would_import_every_tracker(monkeypatch):
    monkeypatch.setattr(usage, "_count_callbacks", lambda _: pytest.fail("counts"))
    assert not ray.tune.tune.air_usage.tag_callbacks([ray.tune.Callback()])


@pytest.mark.parametrize(("slots", "dashboard"), [(1, False), (3, True)])
def test_ray_has_a_cpu_and_a_slot_for_each_trial_at_a_time(monkeypatch, slots, dashboard):
    seen = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(options))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local, "one_gpu_at_most", lambda devices: True)
    monkeypatch.setenv(PRELOADS, "")
    monkeypatch.delenv(PRELOADS)
    local.start(slots, dashboard=dashboard)
    assert seen == [
        {
            "address": "local",
            "num_cpus": slots,
            "resources": {"trial_slot": slots},
            "include_dashboard": dashboard,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
    ]
    assert os.environ[PRELOADS] == local.PRELOADED


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("simulated", [True, False])
def test_what_workers_preload(monkeypatch, alone, simulated):
    """Those of several GPUs nothing that may load CUDA, and those of simulated trials no torch."""
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local, "one_gpu_at_most", lambda devices: alone)
    monkeypatch.delenv(PRELOADS, raising=False)
    local.start(1, dashboard=False, simulated=simulated)
    trains = local.PRELOADED if alone else None
    assert os.environ.get(PRELOADS) == (local.PRELOADED_TO_SIMULATE if simulated else trains)
    monkeypatch.delenv(PRELOADS, raising=False)


def test_ray_starts_beside_the_imports_and_waits_for_them(monkeypatch):
    began, order = threading.Event(), []

    def imports(name):
        assert name == local.NEEDED
        assert began.wait(60)
        order.append("imported")

    def start(slots, **options):
        order.append((slots, options))
        began.set()

    monkeypatch.delitem(sys.modules, local.NEEDED, raising=False)
    monkeypatch.setattr(local.importlib, "import_module", imports)
    monkeypatch.setattr(local, "start", start)
    local.start_during_imports(2, dashboard=True, simulated=True)
    assert order == [(2, {"dashboard": True, "simulated": True}), "imported"]


def test_a_folder_without_room_for_rays_sockets_is_refused_with_its_remedy(monkeypatch):
    session = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    room = (103 if sys.platform == "darwin" else 107) - len(session)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        fits = Path(short, "x" * (room - len(short) - 1))
        monkeypatch.setenv("RAY_TMPDIR", str(fits))
        local.refuse_unusable_folder()
        monkeypatch.setenv("RAY_TMPDIR", f"{fits}y")
        with pytest.raises(UserError, match=r"RAY_TMPDIR=.* is 1 bytes too long .*set RAY_TMPDIR"):
            local.refuse_unusable_folder()
        assert not Path(f"{fits}y").exists()
        monkeypatch.delenv("RAY_TMPDIR")
        monkeypatch.setenv("TMPDIR", f"{fits}y")
        if sys.platform == "linux":
            with pytest.raises(UserError, match=r"TMPDIR=.* 1 bytes too long"):
                local.refuse_unusable_folder()


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null")
    with pytest.raises(UserError, match="RAY_TMPDIR=/dev/null: Ray's files can't be written there"):
        local.refuse_unusable_folder()


def test_a_relative_folder_is_the_same_for_all_of_rays_processes(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.chdir(short)
        monkeypatch.setenv("RAY_TMPDIR", "r")
        local.refuse_unusable_folder()
        assert os.environ["RAY_TMPDIR"] == f"{short}/r"


def test_a_home_that_cannot_be_written_needs_no_token_file(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    local.lend_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/dev/null")
    local.lend_token()
    first = os.environ["RAY_AUTH_TOKEN"]
    assert len(first) == 32
    local.lend_token()
    assert os.environ["RAY_AUTH_TOKEN"] == first
    del os.environ["RAY_AUTH_TOKEN"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    local.lend_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
