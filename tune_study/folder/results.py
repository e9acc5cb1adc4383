"""results.json of a trial: its axes, and the columns that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_study.folder import names, schema
from tune_study.folder.files import mapping, read_json

_METRIC_PARTS = ("training_results", "test_metrics", "model_metrics", "resource_metrics")
AXES = ("trial_id", "model", "dataset", "lora_r", "lora_alpha", "quantization", "seed")
PLANNED = (*AXES, *(column.name for column in schema.SETTINGS))
"""The columns that the plan tells, whatever became of a trial."""
_MEASURED = {c.name for c in schema.TRIALS} - {
    *PLANNED, "configuration", "status", "simulated", "error"
}  # fmt: skip


def read_results(study_dir: Path, trial_id: str) -> dict[str, Any]:
    """The trial's results.json; empty when there is none."""
    found = read_json(study_dir / trial_id / "results.json")
    return found if isinstance(found, dict) else {}


def status_of(study_dir: Path, trial_id: str) -> str:
    """Of the schema's words; ``pending`` when the trial's results.json says none of them."""
    status = read_results(study_dir, trial_id).get("status")
    return status if status in schema.STATUSES else "pending"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested records as one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def axes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns ``PLANNED``, of a trial's configuration nested as in study.json."""
    told = names.settings(entry)
    row = {
        "trial_id": entry["trial_id"],
        "model": told.get("model"),
        "dataset": told.get("dataset"),
        "lora_r": told.get("lora.r"),
        "lora_alpha": told.get("lora.lora_alpha"),
        "quantization": names.treatment(entry),
        "seed": told.get("seed"),
    }
    return row | {column.name: told.get(column.name) for column in schema.SETTINGS}


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json's columns of the trials table; the axes come from the plan alone."""
    run, train = mapping(results, "run"), mapping(results, "train")
    row: dict[str, Any] = {}
    for part in (run, *(mapping(train, name) for name in _METRIC_PARTS)):
        row |= {k: v for k, v in part.items() if k in _MEASURED and v is not None}
    return row | {key: results.get(key) for key in ("status", "simulated", "error")}
