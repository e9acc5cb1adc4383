"""A trial's JSON -> records: one for its row of the trials table, one per epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.folder import mapping
from analysis.tables import Columns
from tune_study import schema

_METRIC_PARTS = ("training_results", "test_metrics", "model_metrics", "resource_metrics")
AXES = ("trial_id", "model", "dataset", "lora_r", "lora_alpha", "quantization", "seed")
_MEASURED = {c.name for c in schema.TRIALS} - {*AXES, "status", "simulated", "error"}


def axes(entry: Mapping[str, Any]) -> dict[str, Any]:
    lora, mode = mapping(entry, "lora"), entry.get("quantization")
    return {
        "trial_id": entry["trial_id"],
        "model": entry.get("model"),
        "dataset": entry.get("dataset"),
        "lora_r": lora.get("r"),
        "lora_alpha": lora.get("lora_alpha"),
        "quantization": mode.get("mode") if isinstance(mode, Mapping) else mode,
        "seed": entry.get("seed"),
    }


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json's columns of the trials table; the axes come from the plan alone."""
    run, train = mapping(results, "run"), mapping(results, "train")
    row: dict[str, Any] = {}
    for part in (run, *(mapping(train, name) for name in _METRIC_PARTS)):
        row |= {k: v for k, v in part.items() if k in _MEASURED and v is not None}
    return row | {key: results.get(key) for key in ("status", "simulated", "error")}


def curve(name: str, results: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    epochs = mapping(results, "train").get("epochs")
    if not isinstance(epochs, list):
        problems.append(f"trial {name!r}: results.json has no list of epochs")
        return []
    usable = [{**epoch, "trial_id": name} for epoch in epochs if isinstance(epoch, dict)]
    if len(usable) < len(epochs):
        problems.append(f"trial {name!r}: {len(epochs) - len(usable)} epoch(s) are no records")
    return usable


def frame(rows: list[dict[str, Any]], columns: Columns) -> pd.DataFrame:
    """As objects: pandas would turn an integer beside a missing value into a float."""
    names = [column.name for column in columns]
    values = {name: [row.get(name) for row in rows] for name in names}
    return pd.DataFrame(values, columns=names, dtype=object)
