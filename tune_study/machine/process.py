"""A function in a process of its own: what it takes of a device is free again when it has ended."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Died(Exception):
    """There is no answer, as a clause that says why."""


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, which can be pickled as its answer can. Raises ``Died``.

    Ctrl-C is answered here, and ends the process without a word of its own.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_answer, args=(theirs, function, arguments))
    on_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, on_sigint)
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise Died(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))
