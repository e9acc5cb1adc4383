"""study.json: what a study plans, on what, with what; and what may continue it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from analysis.folder import mapping
from tune_study import provenance
from tune_study.config import TrialConfig, UserError
from tune_study.files import read_json, write_json
from tune_study.space import merged, refuse_other_search
from tune_study.trainable import RunContext

FORMAT = 1


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
    broken = old is None and (folder / "study.json").is_file()
    if broken:
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
        not broken
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
