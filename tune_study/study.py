"""Plan, run, restore, collect. Ray schedules; the files of ours are the truth."""

from __future__ import annotations

import datetime
import importlib.util
import inspect
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import ray
import timm
import torch
from pydantic import BaseModel, ValidationError
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.search.variant_generator import generate_variants

from analysis.folder import mapping
from analysis.load import Study, rebuild, write_tables
from search_spaces import grids
from tune_study import provenance
from tune_study.config import TrialConfig, UserError, assign, parse_trial
from tune_study.data import Dataset, load
from tune_study.estimate import refuse_what_cannot_fit
from tune_study.files import read_json, write_json
from tune_study.model import (
    file_sha256,
    hub_weights,
    load_base,
    preprocessing_of,
    refuse_unknown_model,
    weights_file,
)
from tune_study.predict import skeleton_of
from tune_study.progress import Progress
from tune_study.quantize import block_linears, check_kernel, plan_layers
from tune_study.schema import FINISHED_STATUSES, PLANNED_ENDS, STATUSES
from tune_study.space import merged, refuse_other_search
from tune_study.supervise import Deaths, EpochStopper, Gate, RayWatch, Stop, graceful_signals
from tune_study.tensorboard import TensorBoardCallback, axes_of
from tune_study.trainable import RunContext, run_trial

if TYPE_CHECKING:
    from tune_study.search import Search

FORMAT = 1
AWS_SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)
"""What Tune hands to its workers by way of a log file (seen with Ray 2.60)."""
MOST_TRIALS = 100_000
TRIAL_SLOT = "trial_slot"
"""A resource of ours that limits the trials at a time: with Tune's own limit, grid trials are
created lazily, and an interrupted study would not know of those to come."""


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


def function_of(option: str, value: str, module: ModuleType) -> tuple[str, Callable[..., Any]]:
    """(name, function) of a public one of ``module``, or of ``path/to/file.py:function``.

    Raises ``UserError``.
    """
    functions = inspect.getmembers(module, inspect.isfunction)
    built_in = [name for name, _ in functions if not name.startswith("_")]
    path, colon, name = value.rpartition(":")
    if not colon:
        if value not in built_in:
            raise UserError(
                f"{option} {value}: choose one of {', '.join(built_in)}, or "
                "path/to/file.py:function"
            )
        return value, getattr(module, value)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        raise UserError(f"{option} {value}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{option} {value}: {path} is no Python file; its name must end in .py")
    try:
        own = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own)
        return name, getattr(own, name)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"{option} {value}: {type(error).__name__}: {error}") from error


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
        variants = [spec for _, spec in generate_variants({"config": dict(param_space)})]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--grid: {error}") from None
    trials: dict[str, TrialConfig] = {}
    for variant in variants:
        values = variant["config"]
        for key, value in assignments:
            values = assign(values, key, value)
        trial = parse_trial(values)
        trials.setdefault(trial.trial_id, trial)
    seeds = list(dict.fromkeys(trial.seed for trial in trials.values()))
    groups = list(dict.fromkeys(trial.configuration for trial in trials.values()))
    return sorted(
        trials.values(), key=lambda t: (seeds.index(t.seed), groups.index(t.configuration))
    )


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


def choose_device(device: str) -> str:
    """``auto`` is CUDA, else MPS, else the CPU. Raises ``UserError`` for one that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, found in there.items() if found)
    if device not in there:
        raise UserError(f"--device {device}: choose one of auto, cpu, mps, cuda")
    if not there[device]:
        raise UserError(f"--device {device}: this machine has none that torch can use; try auto")
    return device


class Checked(NamedTuple):
    """What ``preflight`` found out about the inputs of the planned trials."""

    data: dict[str, Dataset]
    """By trial id; trials that see the same images share one."""
    checksums: dict[str, Any]


def preflight(trials: Sequence[TrialConfig], context: RunContext) -> Checked:
    """Looks at every input before anything is written: data, models, weights, kernels.

    Raises ``UserError`` for the first that is missing or does not fit.
    """
    if context.simulation is not None:
        for trial in trials:
            skeleton_of(trial.model, 10, trial.data.image_size)
        return Checked({}, {"data": {}, "weights": {}})
    data: dict[str, Dataset] = {}
    seen: dict[str, Dataset] = {}
    sha256: dict[str, Any] = {"data": {}, "weights": {}}
    models: set[str] = set()
    bases: set[str] = set()
    for trial in trials:
        key = f"{trial.dataset} {trial.data.model_dump_json()}"
        if key not in seen:
            seen[key] = load(trial.dataset, context.data_dir, trial.data)
            sha256["data"][trial.dataset] = {"sha256": seen[key].sha256}
        data[trial.trial_id] = seen[key]
        classes = len(seen[key].class_names)
        key = f"{trial.model} {classes} {trial.data.image_size} {trial.quantization} {trial.lora}"
        if key not in models:
            models.add(key)
            _check_model(trial, classes, context)
        key = f"{trial.model} {classes} {trial.data.image_size} {trial.pretrained}"
        if key not in bases:
            bases.add(key)
            load_base(trial, classes, context.weights)  # the weights are there, and fit
        refuse_what_cannot_fit(trial, classes, torch.device(context.device))
        if trial.model not in sha256["weights"]:  # a large file is read once, not once a trial
            sha256["weights"][trial.model] = _weights_sha256(trial, context)
    return Checked(data, sha256)


def _check_model(trial: TrialConfig, num_classes: int, context: RunContext) -> None:
    refuse_unknown_model(trial.model)
    skeleton = skeleton_of(trial.model, num_classes, trial.data.image_size)
    preprocessing_of(skeleton, trial)
    linears = block_linears(skeleton)
    for name, mode in plan_layers(skeleton, trial.quantization).items():
        check_kernel(mode, linears[name].in_features, context.device)


def _weights_sha256(trial: TrialConfig, context: RunContext) -> dict[str, Any]:
    if not trial.pretrained:
        return {"pretrained": False, "sha256": None}
    if context.weights is not None:
        path: Path | None = weights_file(trial.model, context.weights)
    else:
        path = hub_weights(trial.model)
        shipped = timm.get_pretrained_cfg(trial.model)
        if path is None and shipped is not None and shipped.file:
            path = Path(shipped.file)
    return {
        "pretrained": True,
        "file": path.name if path else None,
        "sha256": file_sha256(path) if path else None,
    }


def validate(trials: Sequence[TrialConfig], checked: Checked, context: RunContext) -> None:
    """Builds every distinct model of the plan, with all the proofs. Raises ``UserError``."""
    from tune_study.model import build_model

    seen: set[str] = set()
    for trial in trials:
        classes = len(checked.data[trial.trial_id].class_names)
        key = f"{trial.model} {classes} {trial.lora} {trial.quantization} {trial.data.image_size}"
        if key not in seen:
            seen.add(key)
            build_model(trial, classes, weights=context.weights, device=context.device)


def open_study(
    trials: Sequence[TrialConfig],
    context: RunContext,
    checksums: Mapping[str, Any],
    *,
    grid: str,
    command: str,
    search: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes ``study.json``, or checks that the one there plans the same study.

    ``search`` is the record of a search (``space.Settings``), whose plan grows as it goes on.

    A plan that contains the old one extends it; one that the old one contains is a part of it.
    Returns sentences for the user: what differs from the session before, such as versions.
    Raises ``UserError`` for any other plan, and for changed data or weights.
    """
    folder = context.study_dir
    old = _manifest(folder)
    notes = []
    if old is None and (folder / "study.json").is_file():
        notes.append("study.json is not whole: it is written anew, from this command alone")
        _refuse_other_data(trials, folder, checksums)
    cells = {t.trial_id: {"trial_id": t.trial_id, **t.model_dump(mode="json")} for t in trials}
    created = provenance.now()
    if old is not None:
        _refuse_mixture(folder, old, context)
        refuse_other_search(folder.name, old.get("search"), search)
        before = {cell["trial_id"]: cell for cell in old["plan"]}
        _refuse_other_study(folder, before, cells, old["provenance"], checksums)
        cells = {**before, **cells}
        created = old["created"]
        notes += _differences(old, context)
    elif (
        not notes
        and folder.is_dir()
        and any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise UserError(f"--name {folder.name}: {folder} is not empty and holds no study.json")
    manifest = {
        "format": FORMAT,
        "study": folder.name,
        "simulated": context.simulation is not None,
        "simulation": context.simulation and context.simulation.model_dump(mode="json"),
        "created": created,
        "written": provenance.now(),
        "command": command,
        "grid": grid,
        "device": context.device,
        **({"search": merged((old or {}).get("search"), search)} if search else {}),
        "plan": list(cells.values()),
        "provenance": {**_session(context), **_merged(old, checksums)},
        "sessions": [
            *(old or {}).get("sessions", []),
            {"started": provenance.now(), "command": command, **_session(context)},
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", manifest)
    return notes


def _session(context: RunContext) -> dict[str, Any]:
    """What computes: recorded for every start of the study."""
    return {
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "device": context.device,
        "num_threads": context.num_threads,
    }


def _differences(old: Mapping[str, Any], context: RunContext) -> list[str]:
    """One sentence when the study is continued with something else than it was run with so far."""
    before = mapping(old["sessions"][-1] if old.get("sessions") else old["provenance"])
    now = _session(context)
    found = []
    for kind in ("versions", "hardware"):
        for name, value in now[kind].items():
            if (then := mapping(before, kind).get(name)) != value:
                found.append(f"{name} was {then} and is {value}")
    for name in ("commit", "device", "num_threads"):
        if name in before and before[name] != now[name]:
            found.append(f"{name} was {before[name]} and is {now[name]}")
    if not found:
        return []
    return [
        f"this study is continued with something else ({'; '.join(found)}): trials from before "
        "and after may differ by more than their mode; study.json records both under sessions"
    ]


def _refuse_other_data(
    trials: Sequence[TrialConfig], folder: Path, checksums: Mapping[str, Any]
) -> None:
    """Against what the trials saw. Raises ``UserError``."""
    for trial in trials:
        results = read_json(folder / trial.trial_id / "results.json")
        then = mapping(results, "train", "model_metrics").get("data_sha256")
        now = checksums["data"].get(trial.dataset, {})
        if then is not None and now and then != now["sha256"]:
            raise UserError(
                f"--name {folder.name}: its trials saw another {trial.dataset} (sha256 "
                f"{str(then)[:12]}, now {now['sha256'][:12]}); choose another --name"
            )


class _Named(BaseModel):
    trial_id: str


class _Input(BaseModel):
    sha256: str | None


class _Provenance(BaseModel):
    data: dict[str, _Input]
    weights: dict[str, _Input]


class _Manifest(BaseModel):
    """What must be right in a study.json for it to be continued."""

    format: Literal[1]
    created: str
    plan: list[_Named]
    provenance: _Provenance
    sessions: list[dict[str, Any]] = []


def _manifest(folder: Path) -> dict[str, Any] | None:
    """study.json, or ``None`` when there is no whole one. Raises ``UserError`` for another's."""
    found = read_json(folder / "study.json")
    if found is not None:
        try:
            _Manifest.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:100]
            raise UserError(
                f"--name {folder.name}: its study.json is not of this version of tune-study "
                f"({where or 'the whole'}: {first['msg']}); choose another --name"
            ) from None
    return found


def planned_ids(study_dir: Path) -> set[str]:
    """The trial ids of the study in that folder; none where there is no study yet."""
    manifest = _manifest(study_dir) or {"plan": []}
    return {cell["trial_id"] for cell in manifest["plan"]}


def _merged(old: Mapping[str, Any] | None, checksums: Mapping[str, Any]) -> dict[str, Any]:
    before = old["provenance"] if old else {}
    return {kind: {**before.get(kind, {}), **checksums[kind]} for kind in ("data", "weights")}


def _refuse_mixture(folder: Path, old: Mapping[str, Any], context: RunContext) -> None:
    """A study is simulated, with one set of planted effects, or it is real."""
    now = context.simulation and context.simulation.model_dump(mode="json")
    if old.get("simulation") != now:
        kinds = [
            f"simulated with {kind}" if kind else "real" for kind in (old.get("simulation"), now)
        ]
        raise UserError(
            f"--name {folder.name}: that study is {kinds[0]} and this one would be {kinds[1]}; "
            "choose another --name"
        )


def _refuse_other_study(
    folder: Path,
    before: Mapping[str, Any],
    cells: Mapping[str, Any],
    provenance_before: Mapping[str, Any],
    checksums: Mapping[str, Any],
) -> None:
    if not (before.keys() <= cells.keys() or cells.keys() <= before.keys()):
        difference = first_difference(next(iter(before.values())), next(iter(cells.values())))
        raise UserError(
            f"--name {folder.name}: that study was planned differently ({difference}); repeat its "
            "command to continue it, or choose another --name"
        )
    for kind in ("data", "weights"):
        for name, now in checksums[kind].items():
            then = provenance_before[kind].get(name)
            if then is not None and then["sha256"] != now["sha256"]:
                raise UserError(
                    f"--name {folder.name}: the {kind} of {name} are not those that the study "
                    f"began with (sha256 {str(now['sha256'])[:12]}, then "
                    f"{str(then['sha256'])[:12]}); choose another --name"
                )


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> str:
    """The first field in which two nested records differ, in words; the id does not count."""
    for name in a:
        if name == "trial_id" or a[name] == b.get(name):
            continue
        if isinstance(a[name], Mapping) and isinstance(b.get(name), Mapping):
            return first_difference(a[name], b[name], f"{prefix}{name}.")
        return f"{prefix}{name} was {a[name]!r} and is {b.get(name)!r}"
    return "other trials"


def statuses(trials: Iterable[TrialConfig], study_dir: Path) -> dict[str, str]:
    """{trial_id: status}, by our own files alone."""
    found = {}
    for trial in trials:
        result = read_json(study_dir / trial.trial_id / "results.json")
        status = result.get("status") if isinstance(result, dict) else None
        found[trial.trial_id] = status if status in STATUSES else "pending"
    return found


def todo(
    trials: Sequence[TrialConfig], study_dir: Path, *, retry_failed: bool = False
) -> list[TrialConfig]:
    """The trials that are still to be run, or to be continued."""
    done = PLANNED_ENDS if retry_failed else FINISHED_STATUSES
    found = statuses(trials, study_dir)
    return [trial for trial in trials if found[trial.trial_id] not in done]


def forget(trials: Iterable[TrialConfig], study_dir: Path) -> None:
    """Removes what failed trials left, so that they start from the beginning."""
    found = statuses(trials, study_dir)
    for trial_id, status in found.items():
        if status in FINISHED_STATUSES and status not in PLANNED_ENDS:
            for folder in [study_dir / trial_id, *study_dir.glob(f"run-*/{trial_id}")]:
                shutil.rmtree(folder, ignore_errors=True)


def run(
    trials: Sequence[TrialConfig],
    context: RunContext,
    progress: Progress,
    *,
    on_dead_ray: Callable[[str], None],
    max_concurrent: int = 1,
    gpus_per_trial: float | None = None,
    dashboard: bool = False,
    search: Search | None = None,
) -> None:
    """Runs ``trials`` with Ray Tune, and continues those whose worker died.

    A ``search`` is asked for the trials instead, until it has no more.

    Each trial continues from its own newest checkpoint, so nothing of an earlier run's Tune state
    is needed, and nothing of it is unpickled.
    """
    gpus = 1 if context.device == "cuda" and gpus_per_trial is None else gpus_per_trial or 0
    resources = {"CPU": context.num_threads, TRIAL_SLOT: 1, "GPU": gpus}
    ray.init(
        address="local",
        num_cpus=max(provenance.cores(), context.num_threads * max_concurrent),
        resources={TRIAL_SLOT: max_concurrent},
        include_dashboard=dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # Ray would write them into a log that everyone may read; local workers inherit them anyway.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(AWS_SECRETS)
    # What a trial died of stands in its error.json, and we say so: no traceback beside it.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    deaths = Deaths(context.study_dir, progress.say)
    try:
        with graceful_signals(progress.say), RayWatch(on_dead_ray):
            if search:
                search.begin(progress)
            waiting = list(trials)
            while (waiting or search) and not Stop.requested():
                _fit(waiting, context, [progress, deaths], resources, search, max_concurrent)
                waiting = deaths.to_continue(search.trials if search else waiting)
                if not waiting:
                    break
            if search:
                search.finish()
    finally:
        ray.shutdown()


def _fit(
    trials: Sequence[TrialConfig],
    context: RunContext,
    callbacks: Sequence[tune.Callback],
    resources: dict[str, float],
    search: Search | None,
    max_concurrent: int,
) -> None:
    """One Tuner, in a new run folder of the study."""
    cells = {trial.trial_id: trial.model_dump(mode="json") for trial in trials}
    grid = {
        "trial_id": tune.grid_search(list(cells)),
        "trial": tune.sample_from(lambda spec: cells[spec["config"]["trial_id"]]),
    }
    trainable = tune.with_parameters(run_trial, context=context.model_dump(mode="json"))
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([resources])),
        param_space={} if search else grid,
        tune_config=tune.TuneConfig(
            **(search.tune_config(max_concurrent) if search else {"scheduler": Gate()}),
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=_new_run(context.study_dir),
            storage_path=str(context.study_dir),
            stop=EpochStopper(),
            callbacks=[
                TensorBoardCallback(
                    context.study_dir, axes_of(search.drawn() if search else _plan_of(context))
                ),
                *callbacks,
            ],
            verbose=0,
        ),
    )
    tuner.fit()


def _plan_of(context: RunContext) -> list[dict[str, Any]]:
    """The whole plan, of which this run may be a part."""
    return json.loads((context.study_dir / "study.json").read_text())["plan"]


def _new_run(study_dir: Path) -> str:
    stamp = datetime.datetime.now().strftime("run-%Y%m%d-%H%M%S")
    name, count = stamp, 1
    while (study_dir / name).exists():
        count += 1
        name = f"{stamp}-{count}"
    return name


def collect(study_dir: Path) -> Study:
    """The tables of the study, from the trials' own files, written beside them."""
    study = rebuild(study_dir)
    write_tables(study, study_dir)
    return study
