"""The chapter that sets ours beside published figures."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.findings.findings import Findings
from analysis.literature import claims as lit
from analysis.literature.qlora import resolved
from analysis.text.layout import Section, Table, count, notes, table_of, text
from analysis.text.wording import (
    MISSING,
    known,
    listing,
    number,
    percent,
    plural,
    points,
    significant,
    span,
)
from tune_study.folder import schema

_CARRIED = {
    "inside their range": "confirmed",
    "overlaps their range": "open",
    "below their range": "refuted (worse here)",
    "above their range": "refuted (better here)",
}
"""Whether QLoRA's finding carries over, by where our interval lies."""


def literature(found: Findings) -> Section:
    if found.simulated:
        why = "This study is simulated, so it is not compared with any published figure."
        return Section("literature", "Literature", [why], [])
    paragraphs = [
        "QLoRA's ratio is the score with quantized base weights over the score of the same "
        "adapter in 16 bit, per cell of its tables. Its cells carry no intervals and differ "
        "among themselves by about 2 %, so smaller differences from it can't be resolved. "
        "Near 100 % accuracy a ratio hardly moves: the error ratio and the chance-corrected "
        "ratio stand beside it.",
    ]
    if clauses := carried_over(found.qlora):
        paragraphs.append(
            f"Whether its finding carries over: {'; '.join(clauses)}. Confirmed: our interval lies "
            "within the range of its cells; refuted: outside of it, and our ratio is 2 % or more "
            "from their mean; open: all else."
        )
    tables = [_ours(found.ours), _qlora(found.qlora), _vision(found.vision, found.literature)]
    return Section("literature", "Literature", paragraphs, tables, ("qlora_ratios",))


def carried_over(table: pd.DataFrame) -> list[str]:
    """Whether what QLoRA found holds here: of ``qlora_ratios`` a clause per mode."""
    by_treatment = {str(name): rows for name, rows in table.groupby("quantization", sort=False)}
    clauses = [_carried(n, rows) for n, rows in by_treatment.items() if n in schema.MODES]
    if mixed := len(by_treatment) - len(clauses):
        verb = "is" if mixed == 1 else "are"
        clauses.append(
            f"{plural(mixed, 'treatment')} with settings for some layers {verb} not comparable "
            "(QLoRA prints no figure for such)"
        )
    return clauses


def _carried(mode: str, rows: pd.DataFrame) -> str:
    beside: dict[str, list[str]] = {}
    for row in rows.to_dict("records"):
        if str(row["verdict"]).startswith("comparable"):
            theirs = f"{row['group']} ({span(row['their_low'], row['their_high'])})"
            beside.setdefault(_word(row), []).append(theirs)
    last = rows.sort_values("n_reference", kind="stable").iloc[-1]
    if not beside:
        return f"{mode} is not comparable ({last['reason']})"
    found = [f"{word} beside {listing(groups)}" for word, groups in beside.items()]
    ours = f"{number(last['ratio'], 3)} ({span(last['ci_low'], last['ci_high'])})"
    return f"{mode}, {ours}, is {listing(found)}"


def _word(row: dict[Any, Any]) -> str:
    """Confirmed, refuted or open; their cells cannot resolve a difference below 2 %."""
    word = _CARRIED[row["position"]]
    return "open" if word != "confirmed" and not resolved(row["ratio_of_ratios"]) else word


def _ours(table: pd.DataFrame) -> Table:
    return table_of(
        "our_ratios",
        "Our ratios, quantized over unquantized",
        table,
        {
            "mode": text("quantization"),
            "ratio of": lambda r: str(r["quantity"]).removesuffix(" ratio"),
            "ratio": lambda r: number(r["ratio"], 4),
            "interval": lambda r: span(r["ci_low"], r["ci_high"], 4),
            "configurations": count("n_configurations"),
            "pairs": count("n_pairs"),
        },
        note=notes(table),
    )


def _qlora(table: pd.DataFrame) -> Table:
    def theirs(row: dict[Any, Any]) -> str:
        if not row["n_reference"]:
            return MISSING
        return f"{number(row['their_mean'], 4)} ({span(row['their_low'], row['their_high'], 4)})"

    return table_of(
        "qlora",
        "Against QLoRA (Dettmers and others, 2023)",
        table,
        {
            "mode": text("quantization"),
            "QLoRA's task": lambda r: (
                ", ".join(filter(None, (str(r["group"]), str(r["table"])))) or MISSING
            ),
            "theirs (range)": theirs,
            "cells": lambda r: str(r["n_reference"]),
            "ours (interval)": lambda r: (
                f"{number(r['ratio'], 4)} ({span(r['ci_low'], r['ci_high'], 4)})"
            ),
            "ours over theirs": lambda r: number(r["ratio_of_ratios"], 4),
            "position": text("position"),
            "verdict": lambda r: f"{r['verdict']}: {r['reason']}",
        },
        wide=(6, 7),
    )


def _vision(table: pd.DataFrame, published: lit.Literature) -> Table:
    """Figures beside ours first; those of other data sets in one row per paper and task."""
    beside = table[table["our_value"].notna()]
    rows = [
        [
            str(row["task"]),
            f"{row['model']}, {row['method']}",
            _printed(row),
            _ours_beside(row),
            f"{row['verdict']}: {row['reason']}",
            _cited(row, published),
        ]
        for row in beside.sort_values("verdict", kind="stable").to_dict("records")
    ]
    alone = table[table["our_value"].isna()]
    for (_, task), group in alone.groupby(["source", "task"], sort=False):
        first = group.to_dict("records")
        theirs = "; ".join(f"{row['model']} {row['method']} {_printed(row)}" for row in first)
        verdict = f"{first[0]['verdict']}: {first[0]['reason']}"
        rows.append([str(task), theirs, MISSING, MISSING, verdict, _cited(first[0], published)])
    columns = ("task", "their model and method", "theirs", "ours", "verdict", "source")
    return Table("vision", "Published vision figures", columns, rows, "", (1, 3, 4))


def _printed(row: dict[Any, Any]) -> str:
    """A published value as its paper prints it."""
    high = f" to {significant(row['value_high'], 4)}" if known(row["value_high"]) else ""
    unit = {"percent": " %", "range of percentage points": " pp"}.get(row["unit"], "")
    return f"{significant(row['value'], 4)}{high}{unit}"


def _ours_beside(row: dict[Any, Any]) -> str:
    loss = row["unit"] == "range of percentage points"
    value = points(row["our_value"]) if loss else percent(row["our_value"], 2)
    sample = plural(row["n_configurations"], "configuration")
    return f"{value} ({row['our_model']}, {row['our_quantity']}, {sample})"


def _cited(row: dict[Any, Any], published: lit.Literature) -> str:
    source = published.sources[row["source"]]
    year = f" {source.year}" if source.year else ""
    first = source.authors.replace(" and ", ", ").split(",")[0]
    return f"{first}{year}" + (f", {row['table']}" if row["table"] else "")
