"""What ends a trial from outside: a full disk, too little memory. And what is done about it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import torch

from tune_study.config import TrialConfig, UserError
from tune_study.files import read_json, write_json
from tune_study.provenance import now

ROOM_BYTES = 64 * 2**20
"""Less free disk than this counts as full: logs and tables of a study need it."""
STATES_PER_CHECKPOINT = 4
"""The adapter now and at its best, and AdamW's two moments: four times the adapter's bytes."""
OUT_OF_MEMORY_FILE = "out_of_memory.json"
CHOICE_FILE = "batch.json"


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's allocator refused, in the words each of them uses."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def chosen(config: TrialConfig, trial_folder: Path) -> dict[str, Any] | None:
    """What ``--batch auto`` chose for the trial (``batch.choose``); ``None`` without a whole one.

    ``micro_batch`` is an int that divides the images of a step.
    """
    choice = read_json(trial_folder / CHOICE_FILE)
    micro = choice.get("micro_batch") if isinstance(choice, dict) else None
    fits = type(micro) is int and micro > 0 and config.images_per_step % micro == 0
    return choice if fits else None


def within_memory(config: TrialConfig, trial_folder: Path) -> TrialConfig:
    """``config`` with the micro-batch that ``--batch auto`` and earlier runs of the trial left it.

    Each time that it ran out of memory halves the micro-batch and doubles the accumulation, so
    that a step sees the same images. A batch that is no power of two goes to its next smaller
    divisor. Evaluation batches shrink by the same factor.
    """
    if choice := chosen(config, trial_folder):
        config = config.with_micro_batch(choice["micro_batch"])
    whole = config.training.per_device_train_batch_size
    micro = whole
    for event in out_of_memory_events(trial_folder):
        micro = _next_smaller(whole, min(micro, int(event["micro_batch"])))
    config = config.with_micro_batch(micro)
    evaluation = max(1, config.training.per_device_eval_batch_size * micro // whole)
    training = config.training.model_copy(update={"per_device_eval_batch_size": evaluation})
    return config.model_copy(update={"training": training})


def _next_smaller(whole: int, micro: int) -> int:
    """The largest divisor of ``whole`` that is at most half of ``micro``, or 1."""
    return max((d for d in range(1, micro // 2 + 1) if whole % d == 0), default=1)


def out_of_memory_events(trial_folder: Path) -> list[dict[str, Any]]:
    """Each time that the trial ran out of memory: micro-batch, cause, time."""
    events = read_json(trial_folder / OUT_OF_MEMORY_FILE)
    return events if isinstance(events, list) else []


def note_out_of_memory(trial_folder: Path, micro_batch: int, cause: str) -> None:
    """The trial's next attempt will take a smaller micro-batch."""
    event = {"micro_batch": micro_batch, "cause": cause[:500], "time": now()}
    write_json(trial_folder / OUT_OF_MEMORY_FILE, [*out_of_memory_events(trial_folder), event])
