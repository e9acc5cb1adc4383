"""A full disk: what counts as one, and what leads to it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from tune_study.errors import UserError

ROOM_BYTES = 64 * 2**20
"""Less free disk than this counts as full: logs and tables of a study need it."""


class DiskFull(UserError):
    """The disk of the study folder. The study stops, and can be continued when there is room."""

    exit_code = 1


def refuse_full_disk(study_dir: Path, checkpoint_bytes: int = 0) -> None:
    """Raises ``DiskFull`` when a trial with such checkpoints, three at a time, can't be kept."""
    needed = ROOM_BYTES + 3 * checkpoint_bytes
    free = _free_bytes(study_dir)
    if free < needed:
        raise DiskFull(
            f"the disk of {study_dir} has {free / 1e6:,.0f} MB free and the next trial needs "
            f"{needed / 1e6:,.0f} MB; free some space and repeat the command: nothing is lost"
        )


def disk_full(error: BaseException, study_dir: Path) -> DiskFull | None:
    """``DiskFull`` when that is what ``error``, or what caused it, is about."""
    cause: BaseException | None = error
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        # torch and safetensors raise errors of their own.
        if full or isinstance(cause, DiskFull) or "No space left on device" in str(cause):
            break
        cause = cause.__cause__ or cause.__context__
    if cause is None and has_room(study_dir):
        return None
    if isinstance(cause, DiskFull):
        return cause
    free = _free_bytes(study_dir)
    return DiskFull(
        f"the disk of {study_dir} is full ({free / 1e6:,.0f} MB free): the study stopped and every "
        "finished epoch is kept; free some space and repeat the command"
    )


def has_room(study_dir: Path) -> bool:
    """Whether the disk of the study folder is not full."""
    return _free_bytes(study_dir) >= ROOM_BYTES


def _free_bytes(folder: Path) -> int:
    """Of its disk; the folder itself may not be there yet."""
    return shutil.disk_usage(folder).free if folder.exists() else _free_bytes(folder.parent)
