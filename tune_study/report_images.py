"""The report's figures in TensorBoard's Images tab."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto.summary_pb2 import Summary

from tune_study.event_files import replace_run

_RGBA = 4
"""TensorBoard's number for the colours of an image."""


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
