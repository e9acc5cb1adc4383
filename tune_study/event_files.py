"""TensorBoard event files that are written at once, and replaced as a whole."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter


def replace_run(folder: Path, summaries: Iterable[tuple[int, Summary]]) -> None:
    """``folder`` becomes a run of these (step, summary) pairs, and of nothing else.

    A TensorBoard that is open follows: it forgets the points of before at the mark of a new
    session, and reads the new file because its name is new, down to the nanosecond (two writers of
    one second would share tensorboardX's own names).
    """
    now = time.time_ns()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.tmp"
    writer = RecordWriter(str(temporary))
    try:
        for event in (
            Event(wall_time=now / 1e9, file_version="brain.Event:2"),
            Event(wall_time=now / 1e9, session_log=SessionLog(status=SessionLog.START)),
            *(Event(wall_time=now / 1e9, step=step, summary=s) for step, s in summaries),
        ):
            writer.write(event.SerializeToString())
        writer.flush()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    for old in folder.iterdir():
        old.unlink()
    name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
    os.replace(temporary, folder / name)


def scalar(tag: str, value: float) -> Summary:
    """One point; unlike tensorboardX's, it keeps the tag as it is."""
    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])
