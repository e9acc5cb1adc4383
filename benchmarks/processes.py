"""A function in a process of its own: what it does to that process, the others survive.

The other end is ``python -m benchmarks.processes MODULE:FUNCTION SETTINGS``, which writes each row
that the function yields as a line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
TAIL_BYTES = 4000


class Row(NamedTuple):
    """One line of a table."""

    name: str
    ok: bool | None
    """``None``: only told, neither right nor wrong."""
    found: str
    figures: dict[str, Any] = {}  # noqa: RUF012  (never written to)


class Outcome(NamedTuple):
    """What a process yielded; its end is a row too when it was not a good one."""

    rows: list[Row]
    took_s: float
    tail: str
    """The end of what it printed, where a row is red."""


def run(
    function: str, settings: dict[str, Any], limit_s: float, tell: Callable[[Row], object]
) -> Outcome:
    """The rows of ``function`` (``module:name``), called with ``settings`` in a new process.

    Each goes to ``tell`` as it comes. A process that raises, is killed, says nothing or takes
    longer than ``limit_s`` seconds ends with a red row with the last line that it printed.
    """
    command = [sys.executable, "-m", "benchmarks.processes", function, json.dumps(settings)]
    rows: list[Row] = []
    overran = threading.Event()

    def take(row: Row) -> None:
        rows.append(row)
        tell(row)

    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, cwd=ROOT, start_new_session=True
        )

        def stop() -> None:
            overran.set()
            _kill(process)

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.endswith(b"\n"):  # the last line of a killed process may be half
                    take(Row(*json.loads(line)))
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
        tail = _tail(said)
    last = f"; last line: {tail.splitlines()[-1]}" if tail else ""
    if overran.is_set():
        take(Row("its process", False, f"stopped at its limit of {limit_s:.0f} s{last}"))
    elif code < 0:
        take(Row("its process", False, f"killed by {signal.Signals(-code).name}{last}"))
    elif code:
        take(Row("its process", False, f"ended with exit code {code}{last}"))
    elif not rows:
        take(Row("its process", False, f"ended without a row{last}"))
    red = any(row.ok is False for row in rows)
    return Outcome(rows, time.monotonic() - begun, tail if red else "")


def _kill(process: subprocess.Popen) -> None:
    """The process, all below it, and what they left in its group."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(said: BinaryIO) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - TAIL_BYTES))
    return said.read().decode(errors="replace").strip()


def attempt(work: Callable[..., Row], name: str, *arguments: Any) -> Row:
    """``work(name, *arguments)``, or a red row: the next one may be sound in spite of it."""
    try:
        return work(name, *arguments)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is what was found)
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        return Row(name, False, f"{type(error).__name__}: {first}")


def serve(function: str, settings: dict[str, Any]) -> None:
    """The other end of :func:`run`."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    from tune_study.machine import environment

    environment.prepare()
    module, _, name = function.partition(":")
    for row in getattr(importlib.import_module(module), name)(settings):
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
