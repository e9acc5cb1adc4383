"""The micro-batch of a trial: what was chosen, and what memory allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_study.config import TrialConfig
from tune_study.folder.files import now, read_json, write_json

OUT_OF_MEMORY_FILE = "out_of_memory.json"
CHOICE_FILE = "batch.json"


def chosen(config: TrialConfig, trial_folder: Path) -> dict[str, Any] | None:
    """What ``--batch auto`` chose for the trial (``auto_batch.choose``); ``None`` without one.

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
