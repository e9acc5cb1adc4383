"""The chapter on accuracy: differences, checks, data sets, cells."""

from __future__ import annotations

import pandas as pd

from analysis.findings.findings import Findings
from analysis.statistics.cells import finished, modes_of, varying
from analysis.text.layout import Section, Table, count, notes, table_of, text
from analysis.text.wording import (
    between,
    known,
    listing,
    number,
    p_value,
    percent,
    plural,
    points,
    signed,
)
from tune_study.folder.names import LONG, field_in_words


def accuracy(found: Findings) -> Section:
    table = found.comparison
    paragraphs = [
        "Each quantized trial is set against the unquantized trial of the same configuration and "
        "seed. A configuration is every setting but quantization and seed; "
        f"{_configurations(found.study.trials)}. The interval is over configurations, because "
        "seeds of one share too much to count as independent. pp = percentage points of test "
        "accuracy.",
        "The verdict compares the interval with a margin that was fixed beforehand. A difference "
        "that is not significant is not called equal: only an interval inside the margin is.",
    ]
    good = finished(found.study.trials)
    paragraphs += _sampling(good) + _choice_of_epoch(good)
    tables = [
        table_of(
            "accuracy",
            "Test accuracy against the unquantized model",
            table,
            {
                "mode": text("quantization"),
                "difference": lambda r: points(r["mean_difference"]),
                "interval, pp": lambda r: between(r["ci_low"], r["ci_high"], scale=100),
                "configurations": count("n_configurations"),
                "pairs": count("n_pairs"),
                "margin": lambda r: points(r["margin"]).lstrip("+"),
                "verdict": text("verdict"),
            },
            note=notes(table),
        ),
        _checks(table),
    ]
    if len(found.by_dataset):
        tables.append(_per_dataset(found.by_dataset))
    if len(found.leave_one_out):
        tables.append(_leave_one_out(found.leave_one_out))
    if len(found.friedman):
        paragraphs.append(_friedman(found.friedman))
    tables.append(_cells(found.cells))
    figures = ("accuracy_difference", "pareto_weights", "seed_spread")
    return Section("accuracy", "Accuracy", paragraphs, tables, figures)


def _configurations(trials: pd.DataFrame) -> str:
    """``here are 6, by image size (2) and learning rate (3)``."""
    if (count := trials["configuration"].nunique()) < 2:
        return "here is one"
    axes = {name: trials[name].nunique(dropna=False) for name in varying(trials)}
    if (
        axes.get("lora_alpha")
        == axes.get("lora_r")
        == len(trials[["lora_r", "lora_alpha"]].drop_duplicates())
    ):
        del axes["lora_alpha"]
    words = [f"{field_in_words(LONG.get(name, name))} ({n})" for name, n in axes.items()]
    return f"here are {count:,}, by {listing(words, 6)}"


def _sampling(trials: pd.DataFrame) -> list[str]:
    """How far the choice of test images alone moves an accuracy, per data set (binomial)."""
    errors = _standard_errors(trials, "test", "test images")
    if not errors:
        return []
    return [
        f"Sampling of the test images ({errors}) moves every accuracy. All modes are "
        "tested on the same images, so differences move less; no interval here includes it."
    ]


def _choice_of_epoch(trials: pd.DataFrame) -> list[str]:
    """How sure the choice of the tested epoch is, and in which mode it cut training short."""
    errors = _standard_errors(trials, "val", "validation images")
    if not errors:
        return []
    early = trials["best_epoch"] < trials["epochs_completed"]
    by_mode = early.groupby(trials["quantization"], observed=True)
    per_mode = {mode: f"{mode} {own.sum()} of {len(own)}" for mode, own in by_mode}
    kept = ", ".join(per_mode[mode] for mode in modes_of(trials["quantization"]))
    return [
        "A trial is tested as it was after the epoch with its best validation accuracy "
        f"({errors}). Epochs that differ by less are told apart by chance, and an early one that "
        f"wins may lose on the test images. Trials that kept an epoch before their last: {kept}."
    ]


def _standard_errors(trials: pd.DataFrame, split: str, called: str) -> str:
    """Of the accuracy on ``split``, "val" or "test", per data set; "" where none is known."""
    parts = []
    measured = trials.dropna(subset=[f"{split}_images", f"{split}_accuracy"])
    for name, own in measured.groupby("dataset", observed=True):
        images = int(own[f"{split}_images"].max())
        accuracy = float(own[f"{split}_accuracy"].mean())
        error = (accuracy * (1 - accuracy) / images) ** 0.5
        parts.append(f"{name}: {images:,} {called}, standard error {error * 100:.2f} pp")
    return "; ".join(parts)


def _checks(table: pd.DataFrame) -> Table:
    return table_of(
        "accuracy_checks",
        "The same differences by other methods",
        table,
        {
            "mode": text("quantization"),
            "bootstrap interval, pp": lambda r: between(r["bca_low"], r["bca_high"], scale=100),
            "p sign-flip": lambda r: p_value(r["p_sign_flip"]),
            "p Wilcoxon": lambda r: p_value(r["p_wilcoxon"]),
            "p t-test": lambda r: p_value(r["p_t"]),
            "p Holm": lambda r: p_value(r["p_holm"]),
            "p not inferior": lambda r: p_value(r["p_noninferior"]),
            "p equivalent": lambda r: p_value(r["p_tost"]),
            "dz": lambda r: signed(r["dz"]),
            "Cliff's delta": lambda r: signed(r["cliffs_delta"]),
            "P(better)": lambda r: number(r["p_superior"]),
        },
        note="Holm corrects over the modes. A small p under 'not inferior' or 'equivalent' speaks "
        "for that claim; a large p elsewhere proves nothing.",
    )


def _per_dataset(table: pd.DataFrame) -> Table:
    return table_of(
        "accuracy_by_dataset",
        "Per data set: fewer configurations, wider intervals",
        table,
        {
            "data set": text("dataset"),
            "mode": text("quantization"),
            "difference": lambda r: points(r["mean_difference"]),
            "interval, pp": lambda r: between(r["ci_low"], r["ci_high"], scale=100),
            "configurations": count("n_configurations"),
            "margin": lambda r: points(r["margin"]).lstrip("+"),
            "verdict": text("verdict"),
        },
    )


def _leave_one_out(table: pd.DataFrame) -> Table:
    """Range of the mean difference over all ways to leave one configuration out."""
    rows = [
        {
            "quantization": mode,
            "n": len(group),
            "low": group["mean_difference"].min(),
            "high": group["mean_difference"].max(),
            "ci_low": group["ci_low"].min(),
            "ci_high": group["ci_high"].max(),
            "changed": int(group["changed"].sum()),
        }
        for mode, group in table.groupby("quantization", observed=True, sort=False)
    ]
    return table_of(
        "leave_one_out",
        "Does one configuration carry the result? Each left out in turn",
        pd.DataFrame(rows),
        {
            "mode": text("quantization"),
            "left out in turn": count("n"),
            "difference, pp": lambda r: between(r["low"], r["high"], scale=100),
            "widest interval, pp": lambda r: between(r["ci_low"], r["ci_high"], scale=100),
            "times the verdict changes": count("changed"),
        },
    )


def _friedman(table: pd.DataFrame) -> str:
    row = table.iloc[0]
    if not known(row["p"]):
        return f"Friedman's test over all modes: {row['note']}"
    ranks = ", ".join(f"{r['quantization']} {r['mean_rank']:.2f}" for r in table.to_dict("records"))
    return (
        f"Friedman's test that all modes rank alike: p {p_value(row['p'])}, Kendall's W "
        f"{row['kendall_w']:.2f}, {plural(row['n_configurations'], 'configuration')}; mean ranks "
        f"(1 = most accurate): {ranks}."
    )


def _cells(table: pd.DataFrame) -> Table:
    shown = table.head(200)
    return table_of(
        "cells",
        "Test accuracy of every cell, over its seeds",
        shown,
        {
            "configuration": text("configuration"),
            "mode": text("quantization"),
            "seeds": count("n"),
            "mean": lambda r: percent(r["mean"], 2),
            "sd, pp": lambda r: number(r["sd"] * 100),
            "range": lambda r: f"{percent(r['min'], 2)} to {percent(r['max'], 2)}",
        },
        note="" if len(table) <= 200 else f"The first 200 of {len(table)} cells; all are in JSON.",
    )
