"""study.json: what a study plans, on what, with what; and what may continue it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from search_spaces import own_code
from tune_study.config import TrialConfig, parse_trial
from tune_study.data.names import Names, place_of
from tune_study.errors import UserError
from tune_study.folder import files
from tune_study.folder.files import mapping, read_json, write_json
from tune_study.folder.results import read_results
from tune_study.machine import provenance
from tune_study.search.settings import merged, refuse_other_search
from tune_study.study import protocol
from tune_study.trial.context import RunContext

FORMAT = 1
INPUTS = ("data", "weights", "code")
"""What the trials are made of, by name, in study.json's ``provenance``; each has a checksum."""


class Review(NamedTuple):
    """What may be written: see ``review``."""

    old: dict[str, Any] | None
    """study.json as it stands, if there is a whole one."""
    cells: dict[str, dict[str, Any]]
    """The plan by trial id: the old one, and what the command adds to it."""
    notes: list[str]
    """Sentences for the user: what differs from the session before, such as versions."""


def review(
    trials: Sequence[TrialConfig],
    context: RunContext,
    checksums: Mapping[str, Any],
    search: Mapping[str, Any] | None = None,
) -> Review:
    """Looks whether ``trials`` may join the study in its folder; writes nothing.

    A part of the old plan continues it, and a plan that contains it extends it. So does any other
    that keeps its protocol: the trials of the old plan stay, whether the command names them or not.
    Raises ``UserError`` for any other plan, for changed data or weights, and for a folder that is
    no study.
    """
    folder = context.study_dir
    old = read_manifest(folder)
    cells = {trial.trial_id: cell_of(trial) for trial in trials}
    if old is not None:
        _refuse_mixture(folder, old, context)
        refuse_other_search(folder.name, old.get("search"), search)
        _refuse_other_protocol(folder, old["plan"], trials)
        if changed := changed_inputs(old["provenance"], checksums):
            raise UserError(
                f"--name {folder.name}: {changed[0]} are not those that the study began with; "
                "choose another --name"
            )
        if changed := changed_code(old["provenance"], code_record(context)):
            raise UserError(
                f"--name {folder.name}: {changed[0]} is not what the study began with; put it back "
                "to continue (study.json has its text), or choose another --name"
            )
        before = {cell["trial_id"]: cell for cell in old["plan"]}
        return Review(old, {**before, **cells}, _differences(old, context))
    if (folder / "study.json").is_file():
        _refuse_other_data(trials, folder, checksums)
        note = "study.json is not whole: it is written anew, from this command alone"
        return Review(None, cells, [note])
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"--name {folder.name}: {folder} is not empty and holds no study.json")
    return Review(None, cells, [])


def open_study(
    trials: Sequence[TrialConfig],
    context: RunContext,
    checksums: Mapping[str, Any],
    *,
    grid: str,
    command: str,
    search: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes ``study.json`` as ``review`` allows it, and returns its notes for the user.

    ``search`` is the record of a search (``settings.Settings``), whose plan grows as it goes on.
    Raises ``UserError`` as ``review``.
    """
    folder = context.study_dir
    old, cells, notes = review(trials, context, checksums, search)
    manifest = {
        "format": FORMAT,
        "study": folder.name,
        "simulated": context.simulation is not None,
        "simulation": context.simulation and context.simulation.model_dump(mode="json"),
        "created": old["created"] if old else files.now(),
        "written": files.now(),
        "command": command,
        "grid": grid,
        "device": context.device,
        **({"search": merged((old or {}).get("search"), search)} if search else {}),
        **({"merged": old["merged"]} if old and "merged" in old else {}),
        "plan": list(cells.values()),
        "folders": {**(old or {}).get("folders", {}), **_folders(cells.values(), folder)},
        "provenance": {**_session(context), **_merged(old, checksums, context)},
        "sessions": [
            *(old or {}).get("sessions", []),
            {"started": files.now(), "command": command, **_session(context)},
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", manifest)
    return notes


def cell_of(trial: TrialConfig) -> dict[str, Any]:
    """A trial as the plan of study.json holds it."""
    return {"trial_id": trial.trial_id, **trial.model_dump(mode="json")}


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
        results = read_results(folder, trial.trial_id)
        then = mapping(results, "train", "model_metrics").get("data_sha256")
        now = checksums["data"].get(trial.data_name, {})
        if then is not None and now and then != now["sha256"]:
            raise UserError(
                f"--name {folder.name}: its trials saw another {trial.dataset} (sha256 "
                f"{str(then)[:12]}, now {now['sha256'][:12]}); choose another --name"
            )


class _Named(BaseModel):
    trial_id: str


class _Input(BaseModel):
    sha256: str | None


class _Code(BaseModel):
    function: str
    text: str
    sha256: str
    models: list[str]
    transforms: list[str] = []


class _Provenance(BaseModel):
    data: dict[str, _Input]
    weights: dict[str, _Input]
    code: dict[str, _Code] = {}


class _Manifest(BaseModel):
    """What must be right in a study.json for it to be continued."""

    format: Literal[1]
    created: str
    plan: list[_Named]
    provenance: _Provenance
    sessions: list[dict[str, Any]] = []


def read_manifest(folder: Path) -> dict[str, Any] | None:
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


def plan_of(study_dir: Path) -> list[dict[str, Any]]:
    """The plan of the study in that folder; empty where there is no study yet."""
    return (read_manifest(study_dir) or {"plan": []})["plan"]


def planned_ids(study_dir: Path) -> set[str]:
    """The trial ids of that plan."""
    return {cell["trial_id"] for cell in plan_of(study_dir)}


def _folders(cells: Iterable[Mapping[str, Any]], study_dir: Path) -> dict[str, str]:
    """Where the folders of images lie, as seen from the study's folder, by their names.

    A relative name counts from where a command was typed, and the next may be typed elsewhere.
    """
    found = {}
    for name in dict.fromkeys(cell["dataset"] for cell in cells):
        place = place_of(name)
        if place is not None and place.is_dir():
            found[name] = os.path.relpath(place.resolve(), study_dir.resolve())
    return found


def names_in(study_dir: Path) -> Names:
    """What the study there calls its folders of images; none where there is no study yet."""
    manifest = read_manifest(study_dir) or {"plan": []}
    searched = mapping(manifest, "search", "set").get("dataset")
    names = [cell.get("dataset") for cell in manifest["plan"]] + [searched]
    places = {n: study_dir / str(way) for n, way in mapping(manifest, "folders").items()}
    there = {name: place for name, place in places.items() if place.is_dir()}
    return Names([name for name in dict.fromkeys(names) if isinstance(name, str)], there)


def _merged(
    old: Mapping[str, Any] | None, checksums: Mapping[str, Any], context: RunContext
) -> dict[str, Any]:
    return joined(old["provenance"] if old else {}, {**checksums, **code_record(context)})


def joined(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ``INPUTS`` of two ``provenance``; of what both have, those of ``now``.

    But of a file that ``now`` has no transforms of, and ``before`` some: they are what must stay.
    """
    inputs = {kind: {**before.get(kind, {}), **now.get(kind, {})} for kind in INPUTS}
    for file, then in before.get("code", {}).items():
        if transforms := then.get("transforms"):
            entry = inputs["code"][file] if inputs["code"][file].get("transforms") else then
            used = sorted({*transforms, *entry["transforms"]})
            inputs["code"][file] = {**entry, "transforms": used}
    return inputs


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


def _refuse_other_protocol(
    folder: Path, plan: Sequence[Mapping[str, Any]], trials: Sequence[TrialConfig]
) -> None:
    """A plan that holds the whole old one may add what it likes: its grid names it all."""
    before = {cell["trial_id"] for cell in plan}
    if before <= {trial.trial_id for trial in trials}:
        return
    added = [trial for trial in trials if trial.trial_id not in before]
    if added and (changes := protocol.difference(planned(folder.name, plan), added)):
        raise UserError(
            f"--name {folder.name}: that study has another protocol ({listed_changes(changes)}), "
            "so the new trials could not be compared with its own; give the same --set options to "
            "extend it, or choose another --name"
        )


def planned(study: str, plan: Sequence[Mapping[str, Any]]) -> list[TrialConfig]:
    """The configurations of a study.json's plan.

    Raises ``UserError`` unless each has the trial id under which it stands there: ids are folder
    names, and those of another version may mean something else.
    """
    trials = []
    for cell in plan:
        try:
            trial = parse_trial({k: v for k, v in cell.items() if k != "trial_id"})
        except UserError as error:
            raise UserError(f"study {study}: its plan is of another version ({error})") from None
        if trial.trial_id != cell["trial_id"]:
            raise UserError(
                f"study {study}: its plan is of another version ({cell['trial_id']!r:.120} would "
                f"be {trial.trial_id} now); use the version that wrote it"
            )
        trials.append(trial)
    return trials


def listed_changes(changes: Sequence[str], most: int = 4) -> str:
    """``changes``, and how many more there are."""
    more = f"; and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(changes[:most]) + more


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The data and weights whose checksums differ: ``the data of cifar10 (sha256 ..., then ...)``.

    Both are the ``provenance`` of a study.json, or what ``preflight`` found. A checksum that an
    earlier version did not take says nothing.
    """
    return [
        f"the {kind} of {name} (sha256 {str(entry['sha256'])[:12]}, then {str(then)[:12]})"
        for kind in ("data", "weights")
        for name, entry in now[kind].items()
        if name in before[kind]
        and (then := before[kind][name]["sha256"]) != entry["sha256"]
        and not (then is None and before[kind][name].get("pretrained"))
    ]


def code_record(context: RunContext) -> dict[str, Any]:
    """The user's own file as the ``provenance`` of a study.json has it."""
    code = context.code
    return {"code": {code.file: code.record()}} if code else {}


def changed_code(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The user's own models and transforms whose code differs: ``the code of leaf_vit in
    my_model.py (...)``.

    A file without them does nothing where trials run: its plan is compared, and no more. Transforms
    are compared wherever a file has been used for some, also where ``now`` has no trial of them:
    one text stands for all. Both are the ``provenance`` of a study.json; one of an earlier version
    has no code, or no transforms.
    """
    return [
        f"the code of {name} in {file} (sha256 {entry['sha256'][:12]}, then {then['sha256'][:12]})"
        for file, entry in now.get("code", {}).items()
        for then_file, then in before.get("code", {}).items()
        for name in [
            *(model for model in entry["models"] if model in then["models"]),
            *(
                transform
                for transform in then.get("transforms", [])
                if file == then_file or transform in entry.get("transforms", [])
            ),
        ]
        if own_code.differ(then, entry)
    ]


def settled_compute_dtype(study_dir: Path) -> str | None:
    """What all planned trials of the study there compute in; ``None`` without one such type."""
    found = {mapping(cell, "training").get("compute_dtype") for cell in plan_of(study_dir)}
    return found.pop() if len(found) == 1 else None
