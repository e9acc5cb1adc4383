"""The model cards of a study's adapters, once it is known what other seeds get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune_study.folder.files import mapping
from tune_study.folder.results import read_results
from tune_study.folder.schema import GOOD_STATUSES
from tune_study.study.manifest import read_manifest
from tune_study.trial.card import write_card


def write_cards(study_dir: Path) -> None:
    """Writes README.md of every adapter in the study anew, with the interval over its seeds."""
    manifest = read_manifest(study_dir) or {"plan": []}
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in manifest["plan"]:
        results = read_results(study_dir, cell["trial_id"])
        if results.get("status") in GOOD_STATUSES and not results.get("simulated"):
            but_seed = {k: v for k, v in cell.items() if k not in ("trial_id", "seed")}
            found.setdefault(json.dumps(but_seed, sort_keys=True), []).append(results)
    for trials in found.values():
        accuracies = [mapping(t, "train", "test_metrics").get("test_accuracy") for t in trials]
        known = [float(value) for value in accuracies if value is not None]
        for results in trials:
            adapter = study_dir / results["trial_id"] / "adapter"
            if (adapter / "adapter_config.json").is_file():
                write_card(adapter, results, manifest.get("command"), known)
