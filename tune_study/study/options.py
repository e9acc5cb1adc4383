"""What of the command line can be judged without torch and Ray, so that it is refused at once."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

from typer import Option

from search_spaces.lookup import refuse_unknown_function
from tune_study.config import parse_assignment
from tune_study.errors import UserError
from tune_study.folder.remote import masked
from tune_study.trial.context import Keep

LONGEST_NAME = 200
"""Bytes of a study's name; file systems allow 255, and trials' files add to it."""
DEVICES = ("auto", "cpu", "mps", "cuda")
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

in_folder = partial(Option, rich_help_panel="The study's folder")
on_machine = partial(Option, rich_help_panel="The machine")
untrained = partial(Option, rich_help_panel="Without training")
in_search = partial(Option, rich_help_panel="A search instead of a grid")


def gpu_share(text: str) -> float | str:
    """``auto``, or a share of a GPU. Raises ``UserError``."""
    try:
        share = math.nan if text == "auto" else float(text)
    except ValueError:
        share = -1
    if share < 0:
        raise UserError(f"--gpus-per-trial {text}: write a share of a GPU, such as 0.5, or auto")
    return text if text == "auto" else share


def trials_at_a_time(text: str) -> int | str:
    """``auto``, or how many trials. Raises ``UserError``."""
    if text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 1024):
        raise UserError(f"--max-concurrent {text}: write how many trials, from 1 to 1,024, or auto")
    return int(text)


@dataclass(frozen=True)
class Options:
    """The command line of ``tune_study.run``: its options, in the order of ``--help``."""

    grid: Annotated[
        str | None, Option(metavar="NAME", help="demo (default), full, smoke, or FILE.py:FUNCTION")
    ] = None
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="FIELD=VALUE", help="such as training.num_train_epochs=3"),
    ] = None
    max_experiments: Annotated[
        int | None, Option(min=1, metavar="N", help="only the first N trials")
    ] = None
    data_dir: Annotated[
        Path | None, Option(metavar="DIR", help="CIFAR, by torchvision or as parquet files")
    ] = None
    leave_out_broken: Annotated[
        bool, Option("--leave-out-broken", help="train without the images that cannot be read")
    ] = False
    weights: Annotated[
        Path | None,
        Option(metavar="PATH", help="file, or folder with MODEL.safetensors; default: the hub"),
    ] = None
    adapt_weights: Annotated[
        bool, Option("--adapt-weights", help="leave out or resample what does not fit the model")
    ] = False
    train_size: Annotated[int | None, Option(metavar="IMAGES", help="stratified subset")] = None
    val_size: Annotated[int | None, Option(metavar="IMAGES", help="for validation")] = None
    test_size: Annotated[int | None, Option(metavar="IMAGES", help="stratified subset")] = None

    name: Annotated[str | None, in_folder(metavar="NAME", help="default: the grid's name")] = None
    output_dir: Annotated[Path, in_folder(metavar="DIR", help="where study folders lie")] = Path(
        "ray_results"
    )
    storage: Annotated[
        str | None, in_folder(metavar="URI", help="where studies are kept: s3://bucket/path")
    ] = None
    resume: Annotated[bool, in_folder("--resume", help="refuse to begin a new study")] = False
    retry_failed: Annotated[bool, in_folder("--retry-failed", help="repeat failed trials")] = False
    max_hours: Annotated[
        float | None, in_folder(min=0, metavar="H", help="then stop, at an epoch's end")
    ] = None
    # Read as any word: checked() refuses the wrong ones in the same words as of other options.
    keep_checkpoints: Annotated[
        Keep,
        in_folder(parser=str, metavar="WHICH", help="of ended trials: all, best (adapter), none"),
    ] = "best"
    log: Annotated[
        list[str] | None,
        in_folder(metavar="TRACKER", help="mlflow or wandb follows the trials, too"),
    ] = None

    device: Annotated[str, on_machine(metavar="NAME", help="auto, cpu, mps or cuda")] = "auto"
    address: Annotated[
        str, on_machine(metavar="WHERE", help="or a Ray cluster: auto, HOST:PORT")
    ] = "local"
    batch: Annotated[
        str | None, on_machine(metavar="auto", help="the fastest micro-batch that fits all modes")
    ] = None
    max_concurrent: Annotated[
        Any,
        on_machine(
            parser=trials_at_a_time,
            metavar="N",
            help="trials at a time, or auto; default 1, on a cluster all",
        ),
    ] = None
    cpus_per_trial: Annotated[
        int | None, on_machine(min=1, max=1024, metavar="N", help="cores and threads of a trial")
    ] = None
    gpus_per_trial: Annotated[
        Any, on_machine(parser=gpu_share, metavar="SHARE", help="of a GPU, such as 0.5, or auto")
    ] = None
    cache_dir: Annotated[
        Path | None,
        on_machine(metavar="DIR", help="decoded and downloaded images; default: the user's cache"),
    ] = None
    dashboard: Annotated[bool, on_machine("--dashboard", help="start Ray's dashboard")] = False

    dry_run: Annotated[bool, untrained("--dry-run", help="show the plan and exit")] = False
    validate_only: Annotated[
        bool, untrained("--validate-only", help="build and check every model")
    ] = False
    simulate: Annotated[bool, untrained("--simulate", help="draw the trials from a model")] = False
    effect: Annotated[
        list[str] | None,
        untrained(
            metavar="MODE=DIFFERENCE",
            help="planted by --simulate, e.g. nf4=-0.01; at one level of an axis with @FIELD=VALUE "
            "after it, e.g. nf4=-0.02@training.learning_rate=0.01",
        ),
    ] = None
    seed_sd: Annotated[
        float | None, untrained(min=0, max=1, metavar="SD", help="of --simulate; default 0.004")
    ] = None
    epoch_s: Annotated[
        float | None, untrained(min=0, metavar="S", help="of --simulate: how long an epoch lasts")
    ] = None

    search: Annotated[
        str | None, in_search(metavar="optuna", help="search a space instead of running a grid")
    ] = None
    space: Annotated[
        str | None, in_search(metavar="NAME", help="qlora (default), demo, or FILE.py:FUNCTION")
    ] = None
    num_samples: Annotated[int | None, in_search(min=1, metavar="TRIALS", help="default 40")] = None
    objective: Annotated[
        list[str] | None,
        in_search(
            metavar="COLUMN",
            help="one or two: val_accuracy, weights_bytes, peak_train_bytes, train_time_s",
        ),
    ] = None
    scheduler: Annotated[
        str | None, in_search(metavar="NAME", help="asha prunes for one objective; default fifo")
    ] = None
    search_seed: Annotated[
        int | None, in_search(min=0, metavar="N", help="of the suggestions; default 0")
    ] = None

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
    refuse_with_auto(given)
    if given.gpus_per_trial != "auto":
        refuse_not_finite("--gpus-per-trial", given.gpus_per_trial)
    refuse_not_finite("--max-hours", given.max_hours)
    refuse_not_finite("--seed-sd", given.seed_sd)
    refuse_not_finite("--epoch-s", given.epoch_s)
    if given.name is not None:
        safe_name(given.name)
    data, weights = given.data_dir, given.weights
    data = resolved("--data-dir", data, "folder") if data else None
    weights = resolved("--weights", weights, "file or folder") if weights else None
    cache = resolved("--cache-dir", given.cache_dir) if given.cache_dir else None
    if given.epoch_s is not None and not given.simulate:
        raise UserError("--epoch-s belongs to --simulate; add it, or leave it out")
    if given.simulate and given.validate_only:
        raise UserError("--simulate trains nothing: leave out --validate-only")
    return replace(given, data_dir=data, weights=weights, cache_dir=cache)


def refuse_with_auto(given: Options) -> None:
    """Raises ``UserError`` for what trials that share a GPU cannot be counted with."""
    others = {
        "--simulate": given.simulate and "trains nothing",
        "--search": given.search and "does not know its trials beforehand",
        "--batch": given.batch and "wants a GPU to itself",
    }
    counted = {
        "--address": given.address != "local" and "runs trials elsewhere, and all that fit",
        "--gpus-per-trial": given.gpus_per_trial is not None and "counts the trials of a GPU too",
    }
    for auto, asked, there, remedy in (
        ("--max-concurrent", given.max_concurrent, others | counted, "a number"),
        ("--gpus-per-trial", given.gpus_per_trial, others, "a share"),
    ):
        for option, why in there.items():
            if asked == "auto" and why:
                raise UserError(
                    f"{auto} auto: {option} {why}; leave one of the two out, or name {remedy}"
                )


def refuse_client(address: str, arguments: Sequence[str]) -> None:
    """Raises ``UserError`` for ``ray://HOST:PORT``, with the job to submit in its place."""
    if not address.startswith("ray://"):
        return
    host = re.sub(r":\d*$", "", address.removeprefix("ray://")) or "HOST"
    submit = ["ray", "job", "submit", "--address", f"http://{host}:8265", "--working-dir", "."]
    study = ["python", "-m", "tune_study.run", "--address", "auto", *without_address(arguments)]
    raise UserError(
        f"--address {address}: on a cluster that is elsewhere a study runs as a job of Ray's: "
        + masked(shlex.join([*submit, "--", *study]))
    )


def without_address(arguments: Sequence[str]) -> list[str]:
    """``arguments`` but ``--address``, however it is written."""
    given, rest = [*arguments], []
    while given:
        part = given.pop(0)
        if part == "--address":
            del given[:1]
        elif not part.startswith("--address="):
            rest.append(part)
    return rest


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
        path = path.expanduser()  # the shell leaves --option=~/folder as it is
        found = path.is_dir() or ("file" in there and path.is_file())
        path = path.resolve()
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"{option} {path}: it is no usable path (its name is not UTF-8)") from None
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, not text
        raise UserError(f"{option} {path}: it is no usable path ({error})") from None
    if there and not found:
        raise UserError(f"{option} {path}: there is no such {there}")
    return path
