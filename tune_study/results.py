"""results.json of a trial as columns of the trials table. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_study import schema
from tune_study.files import mapping

_METRIC_PARTS = ("training_results", "test_metrics", "model_metrics", "resource_metrics")
AXES = ("trial_id", "model", "dataset", "lora_r", "lora_alpha", "quantization", "seed")
_MEASURED = {c.name for c in schema.TRIALS} - {*AXES, "status", "simulated", "error"}


def axes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a trial's configuration, nested as in study.json, tells."""
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
