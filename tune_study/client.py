"""``--address ray://HOST:10001``: the command runs on the cluster's head, and is heard here.

Through Ray's client a Tuner would run there too, without what this command keeps beside it. So the
whole command runs there, with the cluster's own address, and what it leaves lies in ``--storage``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

import tune_study
from tune_study.cluster import join
from tune_study.config import UserError

HEAD = {"node:__internal_head__": 0.001}
"""A resource that Ray gives to the head alone."""
POLL_S = 0.3


class ConnectionLost(UserError):
    """The head went away, or the network to it."""

    exit_code = 1


class Command:
    """The command as a process of the head. An actor; ``files`` are written beside it."""

    def __init__(self, arguments: Sequence[str], files: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tune-study-client-")
        for name, text in files.items():
            (Path(self._folder.name) / name).write_text(text)
        # What Ray tells its own workers is not for a command that joins the cluster anew.
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        paths = [str(Path(tune_study.__file__).parents[1]), own.get("PYTHONPATH", "")]
        address = ray.get_runtime_context().gcs_address
        # Ray's workers block SIGINT, and a child inherits that: the command would never hear it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tune_study.run", *arguments, "--address", address],
            cwd=self._folder.name,
            env={**own, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)

    def said(self) -> tuple[bytes, int | None]:
        """(what it has printed since the last call, its exit code once it has ended)."""
        code = self._process.poll()
        return self._output.read() or b"", code

    def signal(self, number: int) -> None:
        """To its whole process group, as a terminal does it."""
        os.killpg(self._process.pid, number)


def run_on_head(address: str, arguments: Sequence[str]) -> int:
    """Runs the command of ``arguments`` there, prints what it says, and returns its exit code.

    Signals are passed on. Raises ``UserError`` when no cluster answers, and ``ConnectionLost``.
    """
    arguments, files = prepared(arguments)
    join(address)
    try:
        command: Any = ray.remote(Command).options(num_cpus=0, resources=HEAD)
        return _hear(command.remote(arguments, files))
    except (RayError, ConnectionError) as error:
        raise ConnectionLost(
            f"--address {address}: the connection broke ({type(error).__name__}); the same command "
            "continues the study"
        ) from None
    finally:
        ray.shutdown()


def _hear(command: Any) -> int:
    with _passed_on() as signals:
        while True:
            while signals:
                ray.get(command.signal.remote(signals.pop(0)))
            text, code = ray.get(command.said.remote())
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
            if code is not None:
                return code if code >= 0 else 128 - code
            time.sleep(POLL_S)


@contextmanager
def _passed_on() -> Iterator[list[int]]:
    """The signals that came and are to be sent there."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: came.append(n)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def prepared(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the arguments for the head, the files that they name): no ``--address``, the grid's file.

    Raises ``UserError`` when that file can't be read.
    """
    given, rest = [*arguments], []
    files: dict[str, str] = {}
    while given:
        option, equals, value = given.pop(0).partition("=")
        if option not in ("--address", "--grid"):
            rest.append(option + equals + value)
            continue
        if not equals and given:
            value = given.pop(0)
        if option == "--grid":
            path, colon, function = value.rpartition(":")
            if colon:
                try:
                    files[Path(path).name] = Path(path).read_text()
                except (OSError, ValueError) as error:
                    detail = getattr(error, "strerror", None) or type(error).__name__
                    raise UserError(f"--grid {value}: {path} can't be read ({detail})") from None
                value = f"{Path(path).name}:{function}"
            rest += ["--grid", value]
    return rest, files
