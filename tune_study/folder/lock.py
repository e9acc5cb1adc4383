"""One run per study: a lock in its folder, a lease in a store that has no locks.

The lease is an object that its owner writes again and again. A second run watches it. While it
changes, the study is taken. When it does not change for ``WATCHED_S``, or names a process of this
machine that is gone, the study is free.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from tune_study.errors import UserError
from tune_study.folder import remote
from tune_study.folder.files import mapping, now, read_json, write_json
from tune_study.folder.remote import Remote, RemoteError

NAME = ".lease.json"
REWRITTEN_S = 5.0
WATCHED_S = 30.0
SETTLES_S = 1.0
"""Two runs that found the study free both write; after this time both read who was last."""


def _machine() -> str:
    """The same for processes that share process ids; says nothing about the machine's name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    words = [platform.node(), boot.read_text() if boot.exists() else str(psutil.boot_time())]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def _record(owner: str, beat: int) -> bytes:
    process = psutil.Process()
    return json.dumps(
        {
            "owner": owner,
            "beat": beat,
            "time": now(),
            "machine": _machine(),
            "pid": process.pid,
            "process_started": process.create_time(),
        }
    ).encode()


def _holder(content: bytes | None) -> Mapping[str, Any]:
    """Who wrote the lease; empty when it can't be read."""
    try:
        return mapping(json.loads(content or b"null"))
    except ValueError:
        return {}


def _holds(place: Remote, owner: str) -> bool:
    return _holder(remote.read(place, NAME)).get("owner") == owner


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Whether it names a process of this machine that is not there any more."""
    if holder.get("machine") != _machine():
        return False
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except psutil.NoSuchProcess:
        return True
    return bool(abs(started - holder["process_started"]) > 1)


def _watch(place: Remote, content: bytes, say: Callable[[str], None]) -> None:
    """Returns when the owner is dead. Raises ``UserError`` when it writes."""
    holder = _holder(content)
    if _is_dead(holder):
        return
    since = holder.get("time", "some time")
    say(f"note: a run from {since} has not given this study back; looking whether it lives")
    end = time.monotonic() + WATCHED_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCHED_S))
        latest = remote.read(place, NAME)
        if latest is None:
            return
        if latest != content:
            raise UserError(
                f"--storage {remote.masked(place.uri)}: another run is working on this study; wait "
                "for it, stop it, or choose another --name"
            )


@contextmanager
def lease(place: Remote, say: Callable[[str], None], on_loss: Callable[[], None]) -> Iterator[None]:
    """Holds the study in the store. Raises ``UserError`` while another run holds it.

    ``on_loss`` is called, in a thread, when another run has taken the study over, as it may when
    this one could not write for ``WATCHED_S``.
    """
    owner = uuid.uuid4().hex
    if (content := remote.read(place, NAME)) is not None:
        _watch(place, content, say)
    remote.write(place, NAME, _record(owner, 0))
    time.sleep(SETTLES_S)
    if not _holds(place, owner):
        raise UserError(
            f"--storage {remote.masked(place.uri)}: another run began on this study at the same "
            "moment; wait for it, or choose another --name"
        )
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(REWRITTEN_S):
            count += 1
            try:
                if held := _holds(place, owner):
                    remote.write(place, NAME, _record(owner, count))
            except RemoteError:
                continue  # those who push say so; who comes back in time still holds it
            if not held and not done.is_set():
                on_loss()
                return

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        # A store that no longer answers sees the lease grow stale, and that is as good.
        with contextlib.suppress(RemoteError):
            if _holds(place, owner):
                remote.delete(place, [NAME])


@contextmanager
def lock(study_dir: Path) -> Iterator[None]:
    """Holds the study folder. Raises ``UserError`` while another run holds it.

    The system lets go of the lock when a run dies, however it dies.
    """
    held, owner = FileLock(study_dir / ".lock"), study_dir / ".run.json"
    try:
        study_dir.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        run = read_json(owner)
        who = f"process {run['pid']} since {run['since']}" if isinstance(run, dict) else "a process"
        raise UserError(
            f"--name {study_dir.name}: {who} is running this study; wait for it, stop it, or "
            "choose another --name"
        ) from None
    except OSError as error:
        raise UserError(
            f"--output-dir {study_dir.parent}: {study_dir} can't be written to ({error.strerror}); "
            "choose another --output-dir or --name"
        ) from None
    try:
        write_json(owner, {"pid": os.getpid(), "since": now()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()
