"""The two JSON files of a study: a summary for machines, and every table of the report.

Each block is filled, or is ``{"unavailable": "why"}``. Missing numbers are null, never NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from analysis.findings.findings import Findings
from analysis.measures.memory import why_no_peak
from tune_study.folder import schema

SUMMARY_FILE = "quantization_experiments_summary.json"
DETAILS_FILE = "quantization_detailed_analysis.json"
_NO_AXIS = "nothing varies beside mode and seed"


def plain(value: Any) -> Any:
    """A JSON value: missing and non-finite numbers are null, numpy scalars are Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) else str(value)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as a list of objects."""
    return [plain(row) for row in frame.to_dict("records")]


def block(frame: pd.DataFrame, why: str) -> Any:
    """The table's records, or why there are none."""
    return records(frame) if len(frame) else {"unavailable": why}


def progress(trials: pd.DataFrame) -> dict[str, Any]:
    """How many trials were planned, ended, ended well; and per status."""
    statuses = trials["status"].value_counts()
    done = int(trials["status"].isin(schema.FINISHED_STATUSES).sum())
    good = int(trials["status"].isin(schema.GOOD_STATUSES).sum())
    return {
        "planned": len(trials),
        "finished": done,
        "good": good,
        "success_rate": good / done if done else None,
        "by_status": {name: int(statuses.get(name, 0)) for name in schema.STATUSES},
        "complete": done == len(trials),
    }


def experiments_summary(found: Findings) -> dict[str, Any]:
    """What the study found, block by block."""
    trials = found.study.trials
    no_pairs = "no quantized mode has a finished pair with the unquantized baseline"
    significance = [
        "quantization", "n_configurations", "n_pairs", "p_sign_flip", "p_wilcoxon", "p_t", "p_holm",
        "p_noninferior", "p_tost", "margin", "verdict", "note",
    ]  # fmt: skip
    accuracy = [
        "quantization", "baseline", "n_configurations", "n_pairs", "mean_difference", "ci_low",
        "ci_high", "confidence", "margin", "verdict", "note",
    ]  # fmt: skip
    paired = found.comparison[found.comparison["mean_difference"].notna()]
    if found.simulated:
        literature: Any = {"unavailable": "the study is simulated: no literature verdict is given"}
    else:
        literature = {
            "qlora": block(found.qlora, no_pairs),
            "vision": block(found.vision, "no published figure applies"),
        }
    return plain(
        {
            "format": 1,
            "study": found.study.manifest.get("study"),
            "simulated": found.simulated,
            "progress": progress(trials),
            "by_mode": _by_mode(found),
            "memory": {
                "base_weights": block(found.memory, "no trial recorded its weights"),
                "peak_against_baseline": block(found.peaks, why_no_peak(found.ledger)),
            },
            "accuracy": block(paired[accuracy], no_pairs),
            "dependence_on_axes": block(found.axes.tests, _NO_AXIS),
            "convergence": _convergence(found),
            "gradient_flow": _gradients(found),
            "statistical_significance": block(paired[significance], no_pairs),
            "literature_comparison": literature,
            "recommendations": [line._asdict() for line in found.decisions],
            "problems": found.problems,
        }
    )


def _convergence(found: Findings) -> Any:
    shifts = found.convergence_comparison
    shifts = shifts[shifts["mean_difference"].notna()]
    if not found.convergence["epochs_seen"].any():
        return {"unavailable": "no trial has finished an epoch"}
    return {
        "shifts": block(shifts, "no pair has finished an epoch"),
        "early_stopping": records(found.early_stopping),
    }


def _by_mode(found: Findings) -> list[dict[str, Any]]:
    good = found.gradients.set_index("quantization")["n"]
    rows = []
    for mode, row in found.counts.iterrows():
        cells = found.cells[found.cells["quantization"] == mode]
        rows.append(
            {
                "quantization": mode,
                "planned": row["planned"],
                "good": good.get(mode, 0),
                "by_status": row.drop("planned").to_dict(),
                "mean_test_accuracy": cells["mean"].mean() if len(cells) else None,
                "configurations": len(cells),
            }
        )
    return rows


def _gradients(found: Findings) -> Any:
    metrics = found.gradients.drop(columns=["quantization", "n"])
    if metrics.isna().all(axis=None):
        return {"unavailable": "no trial that ended well recorded its gradients"}
    return {
        "means": records(found.gradients),
        "shifts": block(found.gradient_comparison, "no pair recorded its gradient norms"),
    }


def detailed_analysis(found: Findings) -> dict[str, Any]:
    """Every table behind the report, each a list of records or the reason why it is empty."""
    names = {
        "comparison": "no quantized mode was planned",
        "differences": "no pair has finished",
        "by_dataset": "the study has one data set",
        "cells": "no trial ended well",
        "seed_sds": "no cell has two finished seeds",
        "friedman": "Friedman's test was not run",
        "leave_one_out": "no group can be left out",
        "memory": "no trial recorded its weights",
        "ledger": "no trial recorded its memory",
        "peaks": "no peak was measured beside an unquantized one",
        "speed": "no quantized mode was planned",
        "energy": "no quantized mode was planned",
        "convergence": "no trial has finished an epoch",
        "convergence_comparison": "no pair has finished an epoch",
        "early_stopping": "no quantized mode was planned",
        "gradients": "no trial was planned",
        "gradient_comparison": "no pair recorded its gradient norms",
        "ours": "no quantized mode was planned",
    }
    tables = {name: block(getattr(found, name), why) for name, why in names.items()}
    tables["axis_tests"] = block(found.axes.tests, _NO_AXIS)
    tables["axis_levels"] = block(found.axes.levels, _NO_AXIS)
    if found.simulated:
        tables["ours"] = {"unavailable": "the study is simulated"}
    return {
        "format": 1,
        "study": plain(found.study.manifest.get("study")),
        "simulated": found.simulated,
        **tables,
    }
