"""A grid or a space becomes trials, which compute in what the device and the study allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search.variant_generator import generate_variants
from rich.console import Console

from search_spaces import grids
from search_spaces.lookup import function_of
from tune_study.config import TrialConfig, assign, parse_trial
from tune_study.data.names import Names
from tune_study.errors import UserError
from tune_study.search import settings as spaces
from tune_study.search.settings import Settings
from tune_study.study import manifest
from tune_study.study.compute_dtype import settle_compute_dtype
from tune_study.study.options import Options
from tune_study.trial.context import RunContext

MOST_TRIALS = 100_000


def trials_of(given: Options) -> tuple[Settings | None, str, list[TrialConfig]]:
    """(what a search draws, or ``None`` for a grid; the grid's or space's name; the trials).

    Of a search the trials are the largest that it can draw. Raises ``UserError``.
    """
    assignments = given.assignments
    settings = spaces.settings(
        search=given.search,
        space=given.space,
        num_samples=given.num_samples,
        objectives=given.objective,
        scheduler=given.scheduler,
        seed=given.search_seed,
        assignments=assignments,
    )
    if settings:
        spaces.refuse_grid_options(
            settings, given.grid, given.max_experiments, given.dry_run, given.simulate
        )
        return settings, settings.name, spaces.largest(spaces.probes(settings))
    name, param_space = load_grid(given.grid or "demo")
    return None, name, plan(param_space, assignments)[: given.max_experiments]


def with_one_name(trials: Iterable[TrialConfig], names: Names) -> list[TrialConfig]:
    """Each data set under its one name; trials that become equal are one."""
    renamed = [trial.on(names.of(trial.dataset)) for trial in trials]
    return list({trial.trial_id: trial for trial in renamed}.values())


def with_compute_dtype(
    console: Console, trials: Sequence[TrialConfig], context: RunContext
) -> list[TrialConfig]:
    """``settle_compute_dtype`` for the study in its folder, and a note where that mattered."""
    folder = context.study_dir
    settled, reason = settle_compute_dtype(
        trials, context.device, manifest.planned_ids(folder), manifest.settled_compute_dtype(folder)
    )
    if reason:
        fp32 = any(trial.training.compute_dtype == "fp32" for trial in settled)
        so = "so the trials compute in fp32; --set training.compute_dtype=bf16 overrides"
        as_begun = "and the study in this folder computes in bf16; another --name would not"
        console.print(f"note: {reason}, {so if fp32 else as_begun}")
    return settled


def load_grid(grid: str) -> tuple[str, dict[str, Any]]:
    """(name, param_space) of a built-in grid, or of ``path/to/file.py:function``.

    Raises ``UserError``.
    """
    name, function = function_of("--grid", grid, grids)
    try:
        space = function()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"--grid {grid}: {type(error).__name__}: {error}") from error
    if not isinstance(space, dict):
        raise UserError(f"--grid {grid}: it returned {type(space).__name__}, not a param_space")
    return name, space


def plan(
    param_space: Mapping[str, Any], assignments: Sequence[tuple[str, Any]] = ()
) -> list[TrialConfig]:
    """The trials of a grid: seed by seed, and within a configuration mode by mode.

    So a study that stops early has compared all modes on what it has seen. ``assignments`` replace
    single fields, and with them the axes of the grid that they name; cells that become equal are
    one trial. Raises ``UserError`` for a field or value that is not allowed.
    """
    try:
        if (count := _cells(param_space)) > MOST_TRIALS:
            raise UserError(f"--grid: it has {count:,} cells, {MOST_TRIALS:,} are allowed")
        variants = [spec for _, spec in generate_variants({"config": _uncopied(param_space)})]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--grid: {error}") from None
    trials: dict[str, TrialConfig] = {}
    for variant in variants:
        values = variant["config"]
        for key, value in assignments:
            values = assign(values, key, value)
        trial = parse_trial(values)
        trials.setdefault(trial.trial_id, trial)
    seeds = _ranks(trial.seed for trial in trials.values())
    units = {name: trial.configuration for name, trial in trials.items()}
    groups = _ranks(units.values())
    order = sorted(trials, key=lambda name: (seeds[trials[name].seed], groups[units[name]]))
    return [trials[name] for name in order]


class _Uncopied(list[Any]):
    """A grid's values. Tune copies the whole grid for each of its cells: the more values there are,
    the longer each cell would take.
    """

    def __deepcopy__(self, memo: object) -> _Uncopied:
        return self


def _uncopied(space: Any) -> Any:
    if _is_alone(space, "grid_search"):
        return {"grid_search": _Uncopied(map(_uncopied, space["grid_search"]))}
    if isinstance(space, Mapping):
        return {key: _uncopied(value) for key, value in space.items()}
    return [_uncopied(value) for value in space] if isinstance(space, list) else space


def _ranks(values: Iterable[Any]) -> dict[Any, int]:
    """Where each value comes first, among the different ones."""
    return {value: rank for rank, value in enumerate(dict.fromkeys(values))}


def _cells(space: Any) -> int:
    """How many cells a grid has. Raises ``UserError`` for what Tune would draw or stumble over."""
    if isinstance(space, tune.search.sample.Domain) or _is_alone(space, "eval"):
        raise UserError(
            "--grid: it draws values (tune.choice, tune.uniform, ...); a grid names them, with "
            "tune.grid_search"
        )
    if _is_alone(space, "grid_search"):
        values = space["grid_search"]
        if not isinstance(values, list) or not values:
            raise UserError("--grid: tune.grid_search wants a list with at least one value")
        return sum(_cells(value) for value in values)
    if isinstance(space, Mapping):
        if not all(isinstance(key, str) for key in space):
            raise UserError("--grid: the names in a param_space must be text")
        space = list(space.values())
    return math.prod(_cells(value) for value in space) if isinstance(space, list | tuple) else 1


def _is_alone(space: Any, key: str) -> bool:
    return isinstance(space, Mapping) and list(space) == [key]
