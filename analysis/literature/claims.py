"""Figures from the literature: ``literature.yaml``, validated and flattened to one claim per cell.

A table of the YAML file stands as its paper prints it; :func:`load` turns each cell into a
:class:`Claim` that knows its citation key, table, scope and baseline. A cell that the paper leaves
empty becomes a claim without a value. Figures graded ``recalled`` are left out unless asked for,
because they may not be printed as facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

DEFAULT_PATH = Path(__file__).with_name("literature.yaml")
GRADES = ("checked", "low", "recalled")
UNITS = ("percent", "perplexity", "ratio", "bytes", "bits", "range of percentage points")
_SOURCE = {"authors": str, "title": str, "year": int | None, "arxiv": str | None}
_TABLE = {
    "id": str, "domain": str, "group": str | None, "chance": float | int | None, "source": str,
    "table": str | None, "grade": str, "task": str, "dataset": str | None,
    "train_images": int | None, "metric": str, "unit": str, "higher_is_better": bool,
    "models": list, "note": str | None, "rows": list,
}  # fmt: skip
_ROW = {
    "method": str, "quantization": str, "dtype": str, "baseline": str | None, "values": list,
    "note": str | None,
}  # fmt: skip
_EMPTY = {"source": str, "quantization": str, "why": str}
"""What stands under each key; a key may be left out where ``None`` may stand."""


class LiteratureError(ValueError):
    """``literature.yaml`` breaks one of its own rules."""


class Source(NamedTuple):
    """A paper or page: ``key`` is its citation key; what is unknown is ``None``."""

    key: str
    authors: str
    title: str
    year: int | None
    arxiv: str | None


class Claim(NamedTuple):
    """One cell of one table. ``value`` is ``None`` where the paper leaves the cell empty.

    ``value`` is in ``unit`` (percent is 0..100); ``value_high`` is set when the source prints a
    range. ``baseline_value`` is the cell of the row named by ``baseline``, same table and model.
    """

    table_id: str
    domain: str
    group: str | None
    source: str
    table: str | None
    grade: str
    task: str
    dataset: str | None
    train_images: int | None
    chance: float | None
    model: str
    method: str
    quantization: str
    dtype: str
    metric: str
    unit: str
    higher_is_better: bool
    value: float | None
    value_high: float | None
    baseline: str | None
    baseline_value: float | None
    baseline_dtype: str | None
    note: str


class Literature(NamedTuple):
    """Everything in the file: sources by key, claims in the file's order, known empty cells."""

    sources: dict[str, Source]
    claims: tuple[Claim, ...]
    empty: tuple[dict[str, str], ...]


def load(path: Path | None = None, *, recalled: bool = False) -> Literature:
    """Read and validate the file; figures graded ``recalled`` only when asked for.

    Raises:
        LiteratureError: a rule is broken, in one sentence that names the table and the value.
    """
    document = _read(path or DEFAULT_PATH)
    sources: dict[str, Source] = {}
    for key, entry in document["sources"].items():
        _require(f"source {key!r}", entry, _SOURCE)
        sources[key] = Source(key, *(entry.get(name) for name in _SOURCE))
    claims: list[Claim] = []
    seen: set[str] = set()
    for position, table in enumerate(document["tables"]):
        _require(f"table {position}", table, _TABLE)
        name = table["id"]
        if name in seen:
            raise LiteratureError(f"table id {name!r} stands twice; ids must be unique")
        seen.add(name)
        _check_table(name, table, sources)
        claims += _claims(name, table)
    empty = tuple(document.get("empty") or ())
    _check_empty(empty, sources, claims)
    kept = tuple(claim for claim in claims if recalled or claim.grade != "recalled")
    return Literature(sources, kept, empty)


def _read(path: Path) -> dict[str, Any]:
    """The file, with its three parts in place. Aliases and tags could unfold to gigabytes."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(t, yaml.TagToken | yaml.AliasToken) for t in yaml.scan(text)):
            raise LiteratureError(f"{path.name} must do without YAML's tags and aliases")
        document = yaml.safe_load(text)
    except OSError as error:
        raise LiteratureError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, LiteratureError):
            raise
        raise LiteratureError(f"{path.name} is not valid YAML: {str(error)[:500]}") from error
    _require(path.name, document, {"sources": dict, "tables": list, "empty": list | None})
    return document


def _require(what: str, entry: Any, kinds: Mapping[str, Any]) -> None:
    """Raise unless ``entry`` has these keys alone, with values of these kinds."""
    if not isinstance(entry, dict):
        raise LiteratureError(f"{what} must be a mapping with the keys {', '.join(kinds)}")
    unknown = [str(key)[:50] for key in entry if key not in kinds]
    if unknown:
        raise LiteratureError(f"{what} has unknown keys {unknown[:5]}")
    for key, kind in kinds.items():
        value = entry.get(key)
        # To Python, true is an integer.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise LiteratureError(f"{what} lacks {key!r}, or it is {str(value)[:50]!r}")


def _check_table(name: str, table: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    """Raise unless the table names its source, scope and unit, and its rows fit its models."""
    for key in ("source", "grade", "task", "metric", "unit", "models", "rows", "domain"):
        if not table[key]:
            raise LiteratureError(f"table {name!r} lacks {key!r}")
    for model in table["models"]:
        if not isinstance(model, str):
            raise LiteratureError(f"table {name!r}: model {str(model)[:50]!r} is no name")
    for row in table["rows"]:
        _require(f"table {name!r}, a row", row, _ROW)
    if table["source"] not in sources:
        raise LiteratureError(f"table {name!r} cites {table['source']!r}, which is not a source")
    for key, allowed in (("grade", GRADES), ("unit", UNITS), ("domain", ("language", "vision"))):
        if table[key] not in allowed:
            raise LiteratureError(f"table {name!r}: {key} {table[key]!r} is none of {allowed}")
    methods = [row["method"] for row in table["rows"]]
    if len(set(methods)) != len(methods):
        raise LiteratureError(f"table {name!r} prints a method twice")
    for row in table["rows"]:
        if row.get("baseline") not in (None, *methods):
            raise LiteratureError(f"table {name!r}: no row is named {row['baseline']!r}")
        if row.get("baseline") and table["unit"] == "range of percentage points":
            raise LiteratureError(f"table {name!r}: a range can't be divided by a baseline")
        if len(row["values"]) != len(table["models"]):
            raise LiteratureError(
                f"table {name!r}, row {row['method']!r}: {len(row['values'])} values "
                f"for {len(table['models'])} models"
            )
        for value in row["values"]:
            _check_value(name, table["unit"], value)


def _check_value(name: str, unit: str, value: Any) -> None:
    if value is None:
        return
    ends = value if isinstance(value, list) else [value]
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise LiteratureError(f"table {name!r}: {value!r} is not a number")
    if not all(0 <= end < math.inf for end in ends):
        raise LiteratureError(f"table {name!r}: {value!r} is negative or not finite")
    if unit == "percent" and any(end > 100 for end in ends):
        raise LiteratureError(f"table {name!r}: {value!r} percent is over 100")
    if (unit == "range of percentage points") != (len(ends) == 2) or ends != sorted(ends):
        raise LiteratureError(f"table {name!r}: {value!r} does not fit the unit {unit!r}")


def _check_empty(
    empty: Iterable[Mapping[str, str]], sources: Mapping[str, Source], claims: Iterable[Claim]
) -> None:
    """Raise when a cell that is listed as printed by nobody has a figure after all."""
    scores = {
        (claim.source, claim.quantization)
        for claim in claims
        if claim.value is not None and claim.unit not in ("bits", "bytes")
    }
    for entry in empty:
        _require("an empty cell", entry, _EMPTY)
        if entry["source"] not in sources:
            raise LiteratureError(f"an empty cell cites {entry['source']!r}, which is no source")
        if (entry["source"], entry["quantization"]) in scores:
            raise LiteratureError(
                f"{entry['source']} is said to print no {entry['quantization']}, but a table does"
            )


def _claims(name: str, table: Mapping[str, Any]) -> list[Claim]:
    """One claim per cell of a validated table."""
    by_method = {row["method"]: row for row in table["rows"]}
    claims = []
    for row in table["rows"]:
        base = by_method.get(row.get("baseline"))
        notes = [note for note in (table.get("note"), row.get("note")) if note]
        for column, (model, value) in enumerate(zip(table["models"], row["values"], strict=True)):
            low, high = value if isinstance(value, list) else (value, None)
            claims.append(
                Claim(
                    table_id=name,
                    domain=table["domain"],
                    group=table.get("group"),
                    source=table["source"],
                    table=table.get("table"),
                    grade=table["grade"],
                    task=table["task"],
                    dataset=table.get("dataset"),
                    train_images=table.get("train_images"),
                    chance=table.get("chance"),
                    model=model,
                    method=row["method"],
                    quantization=row["quantization"],
                    dtype=row["dtype"],
                    metric=table["metric"],
                    unit=table["unit"],
                    higher_is_better=table["higher_is_better"],
                    value=None if low is None else float(low),
                    value_high=None if high is None else float(high),
                    baseline=row.get("baseline"),
                    baseline_value=None if base is None else base["values"][column],
                    baseline_dtype=None if base is None else base["dtype"],
                    note="; ".join(notes),
                )
            )
    return claims


def reference_ratios(literature: Literature, *, source: str = "dettmers2023qlora") -> pd.DataFrame:
    """Score of the quantized over the unquantized adapter, per mode and group of tables.

    One row per (quantization, group): n cells, n_empty, mean, low and high (smallest and largest
    cell), sd (NaN for one cell), and the same for the ratio of error rates and the
    chance-corrected ratio where the metric is an accuracy with known chance. ``note`` says why a
    ratio is missing.
    """
    rows = []
    cells: dict[tuple[str, str], list[Claim]] = {}
    for claim in literature.claims:
        if claim.source == source and claim.group and claim.baseline:
            cells.setdefault((claim.quantization, claim.group), []).append(claim)
    for (mode, group), claims in cells.items():
        full = [(c.value, c.baseline_value, c) for c in claims if c.value and c.baseline_value]
        first = claims[0]
        row: dict[str, Any] = {
            "quantization": mode,
            "group": group,
            "source": source,
            "table": first.table,
            "models": ", ".join(dict.fromkeys(c.model for c in claims)),
            "metric": first.metric,
            "baseline": first.baseline,
            "baseline_dtype": first.baseline_dtype,
            "n": len(full),
            "n_empty": len(claims) - len(full),
            "note": "; ".join(dict.fromkeys(c.note for c in claims if c.value is None and c.note)),
        }
        row |= _spread("", [value / base for value, base, _ in full])
        accuracy = "accuracy" in first.metric
        errors = [(100 - v) / (100 - b) for v, b, _ in full if accuracy and b != 100]
        row |= _spread("error_", errors)
        above = [
            (v - c.chance) / (b - c.chance)
            for v, b, c in full
            if accuracy and c.chance and c.chance != b
        ]
        row |= _spread("chance_", above)
        rows.append(row)
    return pd.DataFrame(rows)


def _spread(prefix: str, values: list[float]) -> dict[str, float]:
    """Mean, smallest, largest and sample standard deviation; NaN where there is nothing."""
    series = pd.Series(values, dtype="float64")
    return {
        f"{prefix}mean": float(series.mean()),
        f"{prefix}low": float(series.min()),
        f"{prefix}high": float(series.max()),
        f"{prefix}sd": float(series.std(ddof=1)),
    }
