"""What a running study shows to others: no open port, and no secret in any file."""

import time
from pathlib import Path

import psutil
import pytest

from . import harness

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@pytest.mark.slow
@pytest.mark.ci
def test_nothing_listens_beyond_loopback_and_no_secret_reaches_a_file(tmp_path, monkeypatch):
    canary = f"canary-{time.time_ns()}"
    for name in SECRETS:
        monkeypatch.setitem(harness.ENVIRONMENT, name, canary)
    began = time.time()
    process = harness.start(tmp_path, "--simulate")
    listening: set[tuple[str, str]] = set()
    while process.poll() is None:
        for found in [psutil.Process(process.pid), *harness.descendants(process)]:
            listening |= _listening(found)
        time.sleep(0.1)
    code, output = harness.finish(process, tmp_path)
    assert code == 0, output
    assert {name for name, _ in listening} & {"raylet", "gcs_server"}  # it was looked at in time
    addresses = {address.removeprefix("::ffff:") for _, address in listening}
    assert addresses <= {"127.0.0.1", "::1"}, listening
    sessions = [p for p in Path("/tmp/ray").glob("session_2*") if p.stat().st_mtime >= began]
    assert sessions
    told = [path for folder in (tmp_path, *sessions) for path in holding(folder, canary)]
    assert told == []


def _listening(process: psutil.Process) -> set[tuple[str, str]]:
    """(process name, address) of every socket that waits for connections."""
    try:
        return {
            (process.name(), connection.laddr.ip)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return set()  # it ended meanwhile


def holding(folder: Path, canary: str) -> list[Path]:
    """The files that hold ``canary``."""
    return [path for path in folder.rglob("*") if path.is_file() and _has(path, canary)]


def _has(path: Path, canary: str) -> bool:
    try:
        return canary.encode() in path.read_bytes()
    except FileNotFoundError:
        return False  # another study's, which ended meanwhile
