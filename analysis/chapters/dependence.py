"""The chapter on what the cost depends on: a sentence per axis, its tests, its levels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from analysis.findings.findings import Findings
from analysis.statistics.cells import modes_of
from analysis.text.layout import Cell, Section, Table, count, notes, table_of, text
from analysis.text.wording import (
    MISSING,
    between,
    known,
    listing,
    p_value,
    plural,
    points,
    signed,
)

Row = dict[Any, Any]
_MOST_MODES = 4
"""Modes whose numbers fit a sentence, and the columns of a table."""


def dependence(found: Findings) -> list[Section]:
    """One chapter; none where no axis varies beside mode and seed."""
    tests = found.axes.tests
    if tests.empty:
        return []
    by_axis = tests.groupby("axis", sort=False)
    paragraphs = [sentence(str(axis), own) for axis, own in by_axis]
    paragraphs.append(_explained(tests))
    tables = [_tests(tests), _levels(found.axes.levels)]
    return [Section("axes", "What the cost depends on", paragraphs, tables, ("axes",))]


def sentence(axis: str, tests: pd.DataFrame) -> str:
    """What the tests of one axis say: a sentence per verdict, with its modes; findings first."""
    ways = {"depends": _depends, "within the margin": _alike, "undecided": _open}
    ways["cannot be inferred"] = _unknown
    rows = tests.to_dict("records")
    said: list[str] = []
    for verdict, way in ways.items():
        if own := [row for row in rows if row["verdict"] == verdict]:
            said.append(way("it" if said else f"the {axis}", own))
    return " ".join(said)


def _depends(axis: str, rows: list[Row]) -> str:
    return f"{_what(rows)} depends on {axis}{_estimates(rows)}."


def _alike(axis: str, rows: list[Row]) -> str:
    return f"{_what(rows)} does not seem to depend on {axis}{_estimates(rows)}."


def _open(axis: str, rows: list[Row]) -> str:
    return f"Whether w{_what(rows)[1:]} depends on {axis} is open{_estimates(rows)}."


def _unknown(axis: str, rows: list[Row]) -> str:
    why = " ".join(dict.fromkeys(str(row["note"]) for row in rows))
    return f"Whether w{_what(rows)[1:]} depends on {axis} cannot be told. {why}"


def _what(rows: list[Row]) -> str:
    modes = [str(row["quantization"]) for row in rows]
    return f"What {listing(modes)} {'costs' if len(modes) == 1 else 'cost'}"


def _estimates(rows: list[Row]) -> str:
    """``: −0.20 pp per tenfold (−0.90 to +0.50)``; of several modes, what is said once is."""
    if len(rows) > _MOST_MODES:
        return ": see the table"
    if len(rows) == 1:
        return f": {_amount(rows[0])} {_per(rows[0])} {_rest(rows[0])}"
    if len({_per(row) for row in rows}) == 1:
        told = [f"{row['quantization']} {_amount(row)} {_rest(row)}" for row in rows]
        return f" ({_per(rows[0]).removeprefix('for ')}): {', '.join(told)}"
    told = [f"{row['quantization']} {_amount(row)} {_per(row)} {_rest(row)}" for row in rows]
    return f": {', '.join(told)}"


def _amount(row: Row) -> str:
    return points(row["estimate"])


def _per(row: Row) -> str:
    return str(row["unit"]) or f"for {row['highest']} against {row['lowest']}"


def _rest(row: Row) -> str:
    """The interval, and the ends of a bend that the line misses."""
    shown = f"({between(row['ci_low'], row['ci_high'], scale=100)})"
    if row["verdict"] == "depends" and row["p_bend_holm"] <= 1 - row["confidence"]:
        shown += f", but not along a line: most accurate at {row['highest']}, least at "
        shown += f"{row['lowest']}, {points(row['gap']).lstrip('+')} apart"
    return shown


def _explained(tests: pd.DataFrame) -> str:
    said = (
        "A cost is a difference of test accuracy to the unquantized model; where it depends with a "
        "minus, a mode loses more at the first level named, or at higher values. Configurations "
        "that share every other setting are set against each other, and how differently these "
        "matched sets turn out is what a dependence must stand out from, beside the noise of the "
        "seeds. All of it speaks of the settings tried here."
    )
    tested = tests[["p", "p_bend"]].notna().sum(axis=1).groupby(tests["quantization"]).sum().max()
    if not tested:
        return said
    said += (
        f" It depends where p is 0.05 or less, corrected by Holm over the {plural(tested, 'test')} "
        "of a mode; what is merely not significant is open."
    )
    margin = tests["margin"].dropna()
    if len(margin):
        said += (
            " It does not seem to depend where no two levels differ by the margin of "
            f"{points(margin.iloc[0]).lstrip('+')}, by the 95 % interval of the widest gap."
        )
    return said


def _tests(tests: pd.DataFrame) -> Table:
    cells: dict[str, Cell] = {
        "axis": text("axis"),
        "mode": text("quantization"),
        "dependence": lambda r: f"{_amount(r)} {_per(r)}" if known(r["estimate"]) else MISSING,
        "interval, pp": lambda r: between(r["ci_low"], r["ci_high"], scale=100),
        "p, Holm": lambda r: p_value(r["p_holm"]),
        "p of a bend, Holm": lambda r: p_value(r["p_bend_holm"]),
        "verdict": text("verdict"),
        "widest gap, pp": lambda r: between(r["gap_low"], r["gap_high"], scale=100),
        "matched sets": count("n_sets"),
        "configurations": count("n_configurations"),
    }
    if tests["p_bend"].isna().all():
        cells = {name: cell for name, cell in cells.items() if "bend" not in name}
    return table_of(
        "axes", "Does the cost depend on it?", tests, cells, note=notes(_by_axis(tests), "who")
    )


def _by_axis(tests: pd.DataFrame) -> pd.DataFrame:
    return tests.assign(who=tests["axis"] + ", " + tests["quantization"])


def _levels(levels: pd.DataFrame) -> Table:
    """A row per level, a column per mode; of many modes a row per level and mode."""
    modes = modes_of(levels["quantization"])
    cells: dict[str, Cell] = {"axis": text("axis"), "level": text("level")}
    rows = levels
    if len(modes) > _MOST_MODES:
        cells |= {"mode": text("quantization"), "difference, pp": _cost}
        cells["configurations"] = count("n_configurations")
    else:
        told = {(r["axis"], r["place"], r["quantization"]): r for r in levels.to_dict("records")}
        rows = levels.drop_duplicates(["axis", "place"])
        for mode in modes:
            cells[f"{mode}, pp"] = partial(_cost_of, mode, told)
    return table_of(
        "axis_levels",
        "The cost at every level",
        rows,
        cells,
        note="Means over the matched sets, with 95 % intervals whose error is that of the "
        "comparison of levels: what moves all levels of a set alike is not in it.",
    )


def _cost(row: Row) -> str:
    interval = between(row["ci_low"], row["ci_high"], scale=100)
    return signed(row["difference"] * 100) + (f" ({interval})" if interval != MISSING else "")


def _cost_of(mode: str, told: dict[Any, Row], row: Row) -> str:
    return _cost(told[row["axis"], row["place"], mode])
