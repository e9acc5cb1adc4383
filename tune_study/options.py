"""What of the command line can be judged without torch and Ray, so that it is refused at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from search_spaces.lookup import refuse_unknown_function
from tune_study.config import UserError, parse_assignment

LONGEST_NAME = 200
"""Bytes of a study's name; file systems allow 255, and trials' files add to it."""
DEVICES = ("auto", "cpu", "mps", "cuda")
Keep = Literal["all", "best", "none"]
"""What stays of the checkpoints of a trial that ended well."""
EXIT_FAILED, EXIT_USER = 1, 2
EXIT_STOPPED = {
    "storage": 1,
    "lease": 1,
    "disk": 1,
    "time": 124,
    "interrupt": 130,
    "terminate": 143,
}
"""By the reason why a study stopped early: the shell's own codes for time and signals."""


@dataclass(frozen=True)
class Options:
    """The command line of ``tune_study.run``, which says what each one means."""

    grid: str | None
    name: str | None
    output_dir: Path
    set_: list[str] | None
    data_dir: Path | None
    weights: Path | None
    device: str
    train_size: int | None
    val_size: int | None
    test_size: int | None
    max_experiments: int | None
    storage: str | None
    address: str
    batch: str | None
    max_concurrent: int | None
    cpus_per_trial: int | None
    gpus_per_trial: float | None
    dry_run: bool
    validate_only: bool
    resume: bool
    retry_failed: bool
    max_hours: float | None
    keep_checkpoints: Keep
    simulate: bool
    effect: list[str] | None
    seed_sd: float | None
    epoch_s: float | None
    search: str | None
    space: str | None
    num_samples: int | None
    objective: list[str] | None
    scheduler: str | None
    search_seed: int | None
    log: list[str] | None
    dashboard: bool

    @property
    def works(self) -> bool:
        """Whether trials run, and are not only looked at."""
        return not (self.dry_run or self.validate_only)

    @property
    def assignments(self) -> list[tuple[str, Any]]:
        """Fields of the trials and their values. Raises ``UserError``."""
        named = [parse_assignment(text) for text in self.set_ or []]
        sizes = ("train_size", "val_size", "test_size")
        given = [(f"data.{size}", getattr(self, size)) for size in sizes]
        return named + [(key, size) for key, size in given if size is not None]


def checked(given: Options) -> Options:
    """``given`` with absolute paths. Raises ``UserError`` for all that can be told so early."""
    _ = given.assignments  # refuses what --set cannot mean
    if given.grid:
        refuse_unknown_function("--grid", given.grid, "search_spaces.grids")
    if given.space:
        refuse_unknown_function("--space", given.space, "search_spaces.optuna_spaces")
    one_of("--device", given.device, DEVICES)
    one_of("--keep-checkpoints", given.keep_checkpoints, get_args(Keep))
    refuse_not_finite("--gpus-per-trial", given.gpus_per_trial)
    refuse_not_finite("--max-hours", given.max_hours)
    refuse_not_finite("--seed-sd", given.seed_sd)
    refuse_not_finite("--epoch-s", given.epoch_s)
    if given.name is not None:
        safe_name(given.name)
    data, weights = given.data_dir, given.weights
    data = resolved("--data-dir", data, "folder") if data else None
    weights = resolved("--weights", weights, "file or folder") if weights else None
    if given.epoch_s is not None and not given.simulate:
        raise UserError("--epoch-s belongs to --simulate; add it, or leave it out")
    if given.simulate and given.validate_only:
        raise UserError("--simulate trains nothing: leave out --validate-only")
    return replace(given, data_dir=data, weights=weights)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """``value``. Raises ``UserError`` for any that is not ``allowed``."""
    if value not in allowed:
        raise UserError(f"{option} {value}: choose one of {', '.join(allowed)}")
    return value


def refuse_not_finite(option: str, value: float | None) -> None:
    """Raises ``UserError`` for NaN, which typer lets through any range, and infinity."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"{option} {value}: it must be a finite number")


def safe_name(name: str) -> str:
    """A study's name that is one folder's. Raises ``UserError``."""
    plain = name.isprintable() and name not in ("", ".", "..") and Path(name).name == name
    if not plain or len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(f"--name {name}: it must be a plain folder name; see --output-dir")
    return name


def resolved(option: str, path: Path, there: str = "") -> Path:
    """The absolute path. Raises ``UserError``, also where nothing is there though it must be.

    ``there`` is what must be: "folder", or "file or folder".
    """
    try:
        found = path.is_dir() or ("file" in there and path.is_file())
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, not text
        raise UserError(f"{option} {path}: it is no usable path ({error})") from None
    if there and not found:
        raise UserError(f"{option} {path}: there is no such {there}")
    return path
