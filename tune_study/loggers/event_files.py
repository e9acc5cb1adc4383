"""TensorBoard runs that are written anew as a whole, for readers that may be open."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

_RGBA = 4
"""TensorBoard's number for the colours of an image."""


class RunFile:
    """The newest event file of a run.

    A TensorBoard that is open forgets what came before the mark of a new session, and goes on to a
    new file because of its later name. It would wait forever for a file that was deleted, so the
    files of earlier starts are emptied instead.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._earlier = list(folder.iterdir())
        # To the nanosecond: tensorboardX's own names are the same for two files of one second.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._writer = RecordWriter(str(folder / name))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def replace(self, summaries: Iterable[tuple[int, Summary]]) -> None:
        """The run becomes these (step, summary) pairs, and nothing else."""
        now = time.time()
        self._write(Event(wall_time=now, session_log=SessionLog(status=SessionLog.START)))
        for step, summary in summaries:
            self._write(Event(wall_time=now, step=step, summary=summary))
        self._writer.flush()
        while self._earlier:
            self._earlier.pop().write_bytes(b"")

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())


def replace_run(folder: Path, summaries: Iterable[tuple[int, Summary]]) -> None:
    """For a run that is written once a start."""
    file = RunFile(folder)
    try:
        file.replace(summaries)
    finally:
        file.close()


def scalar(tag: str, value: float) -> Summary:
    """One point; unlike tensorboardX's, it keeps the tag as it is."""
    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def show_figures(study_dir: Path) -> None:
    """The run ``tensorboard/report`` becomes the PNG files of the report, under their names.

    A second report replaces the figures of the first.
    """
    paths = sorted((study_dir / "report" / "figures").glob("*.png"))
    images = [(0, _image(path.stem, path.read_bytes())) for path in paths]
    replace_run(study_dir / "tensorboard" / "report", images)


def _image(name: str, png: bytes) -> Summary:
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
    image = Summary.Image(height=height, width=width, colorspace=_RGBA, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=f"report/{name}", image=image)])
