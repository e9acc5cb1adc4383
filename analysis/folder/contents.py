"""What lies in a study folder: its manifest, its trials' JSON, and what does not belong there.

Nothing is unpickled and no path that a file names is followed. A trial_id becomes a folder name
only when it is a plain one, and a link that leaves the study is refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from tune_study.folder.files import mapping

FORMAT = 1
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_STUDY_FILES = {
    "study.json",
    *(f"{table}.{kind}" for table in ("trials", "epochs") for kind in ("csv", "parquet")),
    "optuna.sqlite3",
    "optuna.sqlite3-journal",
    "search.json",
    "sharing.json",
    "quantization_experiments_summary.json",
    "quantization_detailed_analysis.json",
    "report",
    "tensorboard",
    "README.md",
}
_TRIAL_FILES = {
    "batch.json",
    "config.json",
    "results.json",
    "quantization_analysis.json",
    "gradients.json",
    "error.json",
    "out_of_memory.json",
    "trial.log",
    "adapter",
    "checkpoints",
}


class StudyError(ValueError):
    """The user's mistake, as one sentence that names what, the value and the remedy."""


class Contents(NamedTuple):
    """One look at a study folder."""

    results: dict[str, int]
    """trial_id -> modification time of its results.json, in nanoseconds."""
    failures: set[str]
    """trial_ids with an error.json."""
    problems: list[str]


def open_study(path: str | Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, its manifest (with a usable ``plan``, ``study``, ``simulated``), problems."""
    folder = Path(path)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that no folder can have
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise StudyError(f"study {folder} {what}: name the folder that holds study.json")
    try:
        manifest = read_json(folder / "study.json", folder)
    except (OSError, ValueError) as error:
        return folder, *_recovered(folder, error)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("plan"), list):
        return folder, *_recovered(folder, ValueError("it holds no plan"))
    if manifest.get("format", FORMAT) != FORMAT:
        raise StudyError(
            f"study {folder} has format {manifest['format']!r}, this version reads {FORMAT}: "
            "read it with the version that wrote it"
        )
    plan, problems = _usable_plan(manifest["plan"])
    name = manifest.get("study")
    manifest |= {"plan": plan, "study": name if isinstance(name, str) and name else folder.name}
    if not isinstance(manifest.get("simulated"), bool):
        manifest["simulated"] = None  # the trials must tell
    return folder, manifest, problems


def _usable_plan(plan: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The plan's entries that name a trial, each trial once."""
    usable: dict[str, dict[str, Any]] = {}
    problems = []
    for position, entry in enumerate(plan):
        name = entry.get("trial_id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            problems.append(f"study.json: entry {position} of the plan has no trial_id: ignored")
        elif name in usable:
            problems.append(f"study.json: trial {name!r} is planned twice: the first entry counts")
        else:
            usable[name] = entry
            if not _PLAIN_NAME.fullmatch(name):
                problems.append(
                    f"trial {name!r}: the trial_id is no plain folder name; nothing was read for it"
                )
    return list(usable.values()), problems


def _recovered(folder: Path, error: Exception) -> tuple[dict[str, Any], list[str]]:
    """A manifest made from the trials' own folders, for a study.json that is gone or broken."""
    plan = []
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    for name in names:
        if _PLAIN_NAME.fullmatch(name) and (folder / name / "results.json").exists():
            plan.append({**_config_of(folder, name), "trial_id": name})
    tables_exist = any((folder / f"trials.{kind}").exists() for kind in ("parquet", "csv"))
    if not plan and not tables_exist:
        raise StudyError(
            f"{folder} is no study, for study.json can't be used ({_reason(error)}) and there are "
            "neither tables nor trials: name the folder that holds study.json"
        ) from None
    known = f"the plan was taken from {len(plan)} trial folder(s)" if plan else "the plan is lost"
    problem = (
        f"study.json can't be used ({_reason(error)}): {known}, so trials that never began are "
        "missing"
    )
    manifest: dict[str, Any] = {
        "study": folder.name,
        "simulated": None,
        "plan": plan,
        "provenance": {},
    }
    return manifest, [problem]


def _config_of(folder: Path, name: str) -> dict[str, Any]:
    """A trial's configuration without the plan; its results.json says it as well."""
    for file, inner in (("config.json", ()), ("results.json", ("run", "config"))):
        try:
            value = read_json(folder / name / file, folder)
        except (OSError, ValueError):
            continue  # _rebuild reads the trial again and names what is broken
        config = mapping(value, *inner)
        if config:
            return dict(config)
    return {}


def read_json(path: Path, folder: Path) -> Any:
    """Raises ``OSError`` or ``ValueError``. Refuses links out of the folder, pipes and devices."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("it is a link that leaves the study folder")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, json.JSONDecodeError):
        return f"truncated or no JSON: {error}"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def survey(folder: Path, plan: list[dict[str, Any]]) -> Contents:
    """One look at the folder and its trials' folders; nothing is opened."""
    planned = {entry["trial_id"] for entry in plan}
    results: dict[str, int] = {}
    failures: set[str] = set()
    foreign: list[str] = []
    unplanned: list[str] = []
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith(".") or entry.name in _STUDY_FILES:
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name.startswith("run-"):
                continue  # Tune's own, pickles included; never read
            if entry.name not in planned or not _PLAIN_NAME.fullmatch(entry.name):
                unplanned.append(entry.name)
                continue
            _survey_trial(entry, results, failures, foreign)
        else:
            foreign.append(entry.name)
    problems = []
    if plan and unplanned:
        problems.append(f"not read, in no plan: {listed(unplanned)}")
    if foreign:
        problems.append(f"not read, foreign to a study: {listed(foreign)}")
    return Contents(results, failures, problems)


def _survey_trial(
    trial: os.DirEntry[str], results: dict[str, int], failures: set[str], foreign: list[str]
) -> None:
    with os.scandir(trial.path) as files:
        for file in files:
            if file.name == "results.json":
                results[trial.name] = file.stat(follow_symlinks=False).st_mtime_ns
            elif file.name == "error.json":
                failures.add(trial.name)
            elif file.name not in _TRIAL_FILES and not file.name.startswith("."):
                foreign.append(f"{trial.name}/{file.name}")


def listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


# ---- one trial


def read_results(
    folder: Path, name: str, simulated: bool | None, found: Contents
) -> tuple[dict[str, Any] | None, str | None]:
    """The trial's results.json, or ``None`` and why, if there is something to say."""
    if name not in found.results:
        return None, None
    try:
        results = read_json(folder / name / "results.json", folder)
    except (OSError, ValueError) as error:
        return None, f"results.json can't be used ({_reason(error)})"
    if not isinstance(results, dict) or not isinstance(results.get("train"), dict):
        return None, "results.json can't be used (it is no trial's result)"
    if results.get("trial_id") != name:
        return None, f"results.json can't be used (it is of trial {results.get('trial_id')!r:.120})"
    if simulated is not None and results.get("simulated") is not simulated:
        kind = "a simulated" if simulated else "a real"
        return None, f"results.json can't be used (its simulated flag is not that of {kind} study)"
    return results, None


def read_failure(folder: Path, name: str) -> str:
    """error.json as one sentence, for a trial that left no results.json."""
    try:
        value = read_json(folder / name / "error.json", folder)
    except (OSError, ValueError) as error:
        return f"failed, and error.json can't be used ({_reason(error)})"
    failure = mapping(value)
    return f"{failure.get('type', 'error')}: {failure.get('message', '')}"[:500]


def machine(hardware: Any) -> str | None:
    """Hardware in words, e.g. ``Apple M2, 8 cores, 16.0 GiB, gpu Apple M2 GPU``.

    ``None`` when nothing is known. Two trials ran on the same hardware when the words agree.
    """
    known = mapping(hardware)
    words = [str(known[key]) for key in ("cpu",) if known.get(key)]
    if isinstance(known.get("cores"), int):
        words.append(f"{known['cores']} cores")
    if isinstance(known.get("memory_bytes"), int | float):
        words.append(f"{known['memory_bytes'] / 2**30:.1f} GiB")
    if known.get("gpu"):
        gpu = known["gpu"]
        gpu_name = mapping(gpu).get("name", gpu)
        words.append(f"gpu {gpu_name}")
    return ", ".join(words)[:300] or None
