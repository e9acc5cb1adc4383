"""Figures from the literature: ``literature.yaml``, validated and flattened to one claim per cell.

A table of the YAML file stands as its paper prints it; :func:`load` turns each cell into a
:class:`Claim` that knows its table, row and baseline. A cell that the paper leaves empty becomes a
claim without a value. Figures graded ``recalled`` are left out, because they may not be printed as
facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEFAULT_PATH = Path(__file__).with_name("literature.yaml")
RANGE = "range of percentage points"
Name = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(ge=0)]
Range = Annotated[list[Number], Field(min_length=2, max_length=2)]


class LiteratureError(ValueError):
    """``literature.yaml`` breaks one of its own rules."""


class _Part(BaseModel):
    """A part of the file: these keys alone, with values of these types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Source(_Part):
    """A paper or page; what is unknown is ``None``."""

    authors: str
    title: str
    year: int | None = None
    arxiv: str | None = None


class Row(_Part):
    """A method of a table, and its value for each model: a number, a range, or ``None``."""

    method: str
    quantization: str
    dtype: str
    baseline: str | None = None
    values: list[Number | Range | None]
    note: str | None = None


class Table(_Part):
    """A table as its paper prints it. ``baseline`` of a row names another row of it."""

    id: str
    domain: Literal["language", "vision"]
    group: str | None = None
    chance: float | None = None
    source: Name
    table: str | None = None
    grade: Literal["checked", "low", "recalled"]
    task: Name
    dataset: str | None = None
    train_images: int | None = None
    metric: Name
    unit: Literal["percent", "perplexity", "ratio", "bytes", "bits", "range of percentage points"]
    higher_is_better: bool
    models: Annotated[list[str], Field(min_length=1)]
    note: str | None = None
    rows: Annotated[list[Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Table:
        """Raises ``ValueError`` unless the rows fit the models, the unit and each other."""
        methods = [row.method for row in self.rows]
        if len(set(methods)) != len(methods):
            raise ValueError(f"table {self.id!r} prints a method twice")
        for row in self.rows:
            if row.baseline not in (None, *methods):
                raise ValueError(f"table {self.id!r}: no row is named {row.baseline!r}")
            if row.baseline and self.unit == RANGE:
                raise ValueError(f"table {self.id!r}: a range can't be divided by a baseline")
            if len(row.values) != len(self.models):
                raise ValueError(
                    f"table {self.id!r}, row {row.method!r}: {len(row.values)} values "
                    f"for {len(self.models)} models"
                )
            for value in row.values:
                low, high = _ends(value)
                if low is not None and (high is not None) != (self.unit == RANGE):
                    raise ValueError(f"table {self.id!r}: {value!r} does not fit its unit")
                if high is not None and low is not None and high < low:
                    raise ValueError(f"table {self.id!r}: {value!r} is no range")
                if self.unit == "percent" and low is not None and low > 100:
                    raise ValueError(f"table {self.id!r}: {value!r} percent is over 100")
        return self


def _ends(value: float | list[float] | None) -> tuple[float | None, float | None]:
    """The value, or both ends of a range."""
    return (value[0], value[1]) if isinstance(value, list) else (value, None)


class Empty(_Part):
    """A cell that the source leaves empty, and must stay so."""

    source: str
    quantization: str
    why: str


class _File(_Part):
    sources: dict[str, Source]
    tables: list[Table]
    empty: list[Empty] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _File:
        """Raises ``ValueError`` for a source that is none, a table named twice, a filled cell."""
        ids = [table.id for table in self.tables]
        scores = set()
        for table in self.tables:
            if ids.count(table.id) > 1:
                raise ValueError(f"table id {table.id!r} stands twice; ids must be unique")
            if table.source not in self.sources:
                raise ValueError(f"table {table.id!r} cites {table.source!r}, which is no source")
            if table.unit not in ("bits", "bytes"):
                filled = [row for row in table.rows if any(v is not None for v in row.values)]
                scores |= {(table.source, row.quantization) for row in filled}
        for entry in self.empty or ():
            if entry.source not in self.sources:
                raise ValueError(f"an empty cell cites {entry.source!r}, which is no source")
            if (entry.source, entry.quantization) in scores:
                raise ValueError(
                    f"{entry.source} is said to print no {entry.quantization}, but a table does"
                )
        return self


class Claim(NamedTuple):
    """One cell of one table: what the paper prints for ``model`` in a row.

    ``value`` is in the table's unit (percent is 0..100), and ``None`` where the paper leaves the
    cell empty; ``value_high`` is set when the source prints a range. ``baseline_value`` is the cell
    of the row named by the row's ``baseline``, same table and model.
    """

    table: Table
    row: Row
    model: str
    value: float | None
    value_high: float | None
    baseline_value: float | None

    @property
    def note(self) -> str:
        """What is to be said of the table and of the row."""
        return "; ".join(filter(None, (self.table.note, self.row.note)))


class Literature(NamedTuple):
    """Everything in the file: sources by key, claims in the file's order, known empty cells."""

    sources: dict[str, Source]
    claims: tuple[Claim, ...]
    empty: tuple[Empty, ...]


def load(path: Path | None = None) -> Literature:
    """Read and validate the file.

    Raises:
        LiteratureError: a rule is broken, in one sentence that names the place and the value.
    """
    path = path or DEFAULT_PATH
    try:
        file = _File.model_validate(_read(path))
    except ValidationError as error:
        raise LiteratureError(f"{path.name}: {_sentence(error)}") from None
    tables = [table for table in file.tables if table.grade != "recalled"]
    claims = tuple(claim for table in tables for claim in _claims(table))
    return Literature(file.sources, claims, tuple(file.empty or ()))


def _read(path: Path) -> dict[Any, Any]:
    """The file as a mapping. Aliases and tags could unfold to gigabytes."""
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
    if not isinstance(document, dict):
        raise LiteratureError(f"{path.name} must be a mapping with sources and tables")
    return document


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong: ``tables.3.grade: input should be 'checked', not 'x'``."""
    first = error.errors(include_url=False)[0]
    kind, message, value = first["type"], first["msg"][:200], first["input"]
    place = ".".join(map(str, first["loc"]))[:100]
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in ("missing", "extra_forbidden"):
        return f"{place} is {'missing' if kind == 'missing' else 'an unknown key'}"
    known = isinstance(value, str | bool | float | None)
    shown = repr(value)[:50] if known else type(value).__name__
    return f"{place}: {message[:1].lower()}{message[1:]}, not {shown}"


def _claims(table: Table) -> Iterator[Claim]:
    """One claim per cell."""
    by_method = {row.method: row for row in table.rows}
    for row in table.rows:
        below = by_method[row.baseline].values if row.baseline else [None] * len(table.models)
        for model, value, base in zip(table.models, row.values, below, strict=True):
            yield Claim(table, row, model, *_ends(value), _ends(base)[0])


def reference_ratios(literature: Literature, *, source: str = "dettmers2023qlora") -> pd.DataFrame:
    """Score of the quantized over the unquantized adapter, per mode and group of tables.

    One row per (quantization, group): n cells that are not empty; mean, low and high (smallest and
    largest cell) and sd of their ratios, NaN where there is nothing. ``note`` says why a ratio is
    missing.
    """
    cells: dict[tuple[str, str], list[Claim]] = {}
    for claim in literature.claims:
        if claim.table.source == source and claim.table.group and claim.row.baseline:
            cells.setdefault((claim.row.quantization, claim.table.group), []).append(claim)
    rows = []
    for (mode, group), claims in cells.items():
        ratios = pd.Series(
            [c.value / c.baseline_value for c in claims if c.value and c.baseline_value],
            dtype="float64",
        )
        first = claims[0].table
        row = {
            "quantization": mode,
            "group": group,
            "table": first.table or "",
            "models": ", ".join(dict.fromkeys(c.model for c in claims)),
            "metric": first.metric,
            "n": len(ratios),
            "note": "; ".join(dict.fromkeys(c.note for c in claims if c.value is None and c.note)),
        }
        rows.append(row | ratios.agg(["mean", "min", "max", "std"]).to_dict())
    columns = {"min": "low", "max": "high", "std": "sd"}
    return pd.DataFrame(rows).rename(columns=columns)
