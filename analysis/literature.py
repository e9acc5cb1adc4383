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
_TABLE_KEYS = {
    "id", "domain", "group", "chance", "source", "table", "grade", "task", "dataset",
    "train_images", "metric", "unit", "higher_is_better", "models", "note", "rows",
}  # fmt: skip
_ROW_KEYS = {"method", "quantization", "dtype", "baseline", "values", "note"}


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

    def cite(self, key: str) -> str:
        """Short citation for a reader, such as ``Dettmers, ... (2023), arXiv 2305.14314``."""
        source = self.sources[key]
        year = f" ({source.year})" if source.year else ""
        arxiv = f", arXiv {source.arxiv}" if source.arxiv else ""
        return f"{source.authors}{year}: {source.title}{arxiv}"


def load(path: Path | None = None, *, recalled: bool = False) -> Literature:
    """Read and validate the file; figures graded ``recalled`` only when asked for.

    Raises:
        LiteratureError: a rule is broken, in one sentence that names the table and the value.
    """
    path = path or DEFAULT_PATH
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LiteratureError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(document, dict) or not {"sources", "tables"} <= document.keys():
        raise LiteratureError(f"{path.name} needs the keys 'sources' and 'tables'")
    sources = {key: _source(key, entry) for key, entry in document["sources"].items()}
    claims: list[Claim] = []
    seen: set[str] = set()
    for table in document["tables"]:
        name = str(table.get("id"))
        if name in seen:
            raise LiteratureError(f"table id {name!r} stands twice; ids must be unique")
        seen.add(name)
        _check_table(name, table, sources)
        claims += _claims(name, table)
    empty = tuple(dict(entry) for entry in document.get("empty") or ())
    _check_empty(empty, sources, claims)
    kept = tuple(claim for claim in claims if recalled or claim.grade != "recalled")
    return Literature(sources, kept, empty)


def _source(key: str, entry: Mapping[str, Any]) -> Source:
    if not isinstance(entry, dict) or set(entry) != {"authors", "title", "year", "arxiv"}:
        raise LiteratureError(f"source {key!r} needs authors, title, year and arxiv (or null)")
    return Source(key, entry["authors"], entry["title"], entry["year"], entry["arxiv"])


def _check_table(name: str, table: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    """Raise unless the table names its source, scope and unit, and its rows fit its models."""
    unknown = set(table) - _TABLE_KEYS
    if unknown:
        raise LiteratureError(f"table {name!r} has unknown keys {sorted(unknown)}")
    required = ("source", "grade", "task", "metric", "unit", "higher_is_better", "models", "rows")
    for key in (*required, "domain"):
        if table.get(key) in (None, "", []):
            raise LiteratureError(f"table {name!r} lacks {key!r}")
    if table["source"] not in sources:
        raise LiteratureError(f"table {name!r} cites {table['source']!r}, which is not a source")
    for key, allowed in (("grade", GRADES), ("unit", UNITS), ("domain", ("language", "vision"))):
        if table[key] not in allowed:
            raise LiteratureError(f"table {name!r}: {key} {table[key]!r} is none of {allowed}")
    methods = [row.get("method") for row in table["rows"]]
    if len(set(methods)) != len(methods):
        raise LiteratureError(f"table {name!r} prints a method twice")
    for row in table["rows"]:
        unknown = set(row) - _ROW_KEYS
        if unknown or not {"method", "quantization", "dtype", "values"} <= row.keys():
            raise LiteratureError(f"table {name!r}, row {row.get('method')!r}: keys are wrong")
        if row.get("baseline") not in (None, *methods):
            raise LiteratureError(f"table {name!r}: no row is named {row['baseline']!r}")
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
    if any(not math.isfinite(end) or end < 0 for end in ends):
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
        if set(entry) != {"source", "quantization", "why"} or entry["source"] not in sources:
            raise LiteratureError(f"empty cell {dict(entry)!r} needs source, quantization and why")
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
        errors = [(100 - value) / (100 - base) for value, base, _ in full] if accuracy else []
        row |= _spread("error_", errors)
        above = [(v - c.chance) / (b - c.chance) for v, b, c in full if accuracy and c.chance]
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
