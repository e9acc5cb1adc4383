"""Published vision figures beside ours, each with a verdict: is it comparable at all?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.literature import claims as lit
from analysis.statistics.cells import finished, named, units
from analysis.statistics.pairs import paired_differences

_COLUMNS = (
    "source", "table", "task", "model", "method", "value", "value_high", "unit", "our_model",
    "our_value", "our_quantity", "n_configurations", "n_trials", "verdict", "reason",
)  # fmt: skip
_WHOLE = {"cifar10": 50_000, "cifar100": 50_000}
"""Training images of a claim that names no subset."""
_ALIKE = 2
"""Training sets that differ by more than this factor are not compared."""


def vision_references(
    trials: pd.DataFrame, literature: lit.Literature | None = None
) -> pd.DataFrame:
    """Published vision figures beside our trials on the same data set.

    One row per (claim, model of ours) on a shared data set, plus one row per claim that shares
    none. ``value`` (to ``value_high``) is as printed, in ``unit``; ``our_value`` is a fraction,
    averaged over configurations: ``our_quantity`` says of what. ``verdict`` and ``reason`` as in
    ``qlora.qlora_ratios``; simulated trials get no verdict.
    """
    literature = literature or lit.load()
    simulated = bool(trials["simulated"].fillna(False).any())
    rows = []
    for claim in literature.claims:
        if claim.table.domain != "vision" or claim.value is None:
            continue
        row = {
            "source": claim.table.source,
            "table": claim.table.table or "",
            "task": claim.table.task,
            "model": claim.model,
            "method": claim.row.method,
            "value": claim.value,
            "value_high": np.nan if claim.value_high is None else claim.value_high,
            "unit": claim.table.unit,
        }
        for own in _ours(trials, claim) or [{}]:
            verdict, reason = "none given", "the study is simulated"
            if not simulated:
                verdict, reason = _verdict(claim, own)
            rows.append(row | own | {"verdict": verdict, "reason": reason})
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _ours(trials: pd.DataFrame, claim: lit.Claim) -> list[dict[str, Any]]:
    """Our value for each model on the claim's data set: an accuracy, or a loss of accuracy."""
    if claim.table.dataset is None:
        return []
    own = finished(named(trials)[trials["dataset"] == claim.table.dataset], "test_accuracy")
    if claim.table.unit == lit.RANGE:
        pairs, mode = paired_differences(own), claim.row.quantization
        pairs = pairs[pairs["quantization"] == mode]
        values = pairs.assign(value=-pairs["difference"])
        quantity = f"loss of accuracy, {mode} against none"
    else:
        base = own[own["quantization"] == "none"]
        values = base.assign(value=base["test_accuracy"])
        quantity = "accuracy, LoRA without quantization"
    order = units(own)["configuration"].tolist()
    images = own.groupby("model", observed=True)["train_images"].median()
    rows = []
    for model, group in values.groupby("model", observed=True):
        means = group.groupby("configuration")["value"].mean()
        means = means.reindex([name for name in order if name in means.index])
        rows.append(
            {
                "our_model": str(model),
                "our_value": float(means.mean()),
                "our_quantity": quantity,
                "n_configurations": len(means),
                "n_trials": len(group),
                "train_images": images.get(model, np.nan),
            }
        )
    return rows


def _verdict(claim: lit.Claim, own: dict[str, Any]) -> tuple[str, str]:
    """The verdict and why; ``own`` is empty without a trial on the claim's data set."""
    if not own:
        missing = f"this study has no finished trial to set beside {claim.table.task}"
        return "not comparable", "; ".join(filter(None, (missing, claim.note)))
    theirs = claim.table.train_images or _WHOLE.get(claim.table.dataset or "")
    ours = own["train_images"]
    if theirs is not None and (pd.isna(ours) or not 1 / _ALIKE <= ours / theirs <= _ALIKE):
        here = "an unknown number" if pd.isna(ours) else f"{ours:,.0f}"
        return "not comparable", f"{theirs:,} training images there, {here} here"
    reservations = [f"{claim.model} there, {own['our_model']} here"]
    if "LoRA" not in claim.row.method:
        reservations.append(f"{claim.row.method} there, LoRA here")
    reservations.append("image size, augmentation and length of training differ")
    if claim.note:
        reservations.append(claim.note)
    if claim.table.grade == "low":
        reservations.append("the source is weak")
    return "comparable with reservations", "; ".join(reservations)
