"""The two tables as typed frames and as files: coerced, read, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tune_study.folder import schema
from tune_study.folder.files import mapping, write_whole

Columns = tuple[schema.Column, ...]
MACHINE = schema.Column("machine", "str", "", "hardware that ran the trial, in words")
"""Not in the schema: where a trial ran is known from its results.json, and joins the table."""
_TOLD_BY_THE_PLAN = {MACHINE.name, "configuration", *(column.name for column in schema.SETTINGS)}
"""Columns that a table of an earlier study lacks: they are known without it."""
_IN_EVERY_TABLE = {"trial_id", "model", "dataset", "quantization", "seed", "status", "epoch"}
"""Without one of these a table of any version is no table."""
_LARGEST = 2.0**62


class TableError(ValueError):
    """A table's file can't be used; the message is the reason, in words that end a sentence."""


def typed(frame: pd.DataFrame, columns: Columns, table: str) -> tuple[pd.DataFrame, list[str]]:
    """``frame`` with exactly ``columns``, in the schema's types, and what was lost on the way.

    A column that ``frame`` lacks is all missing. A value that its column can't hold (text in a
    number, an accuracy outside 0..1, a negative count) becomes missing and is named.
    """
    data: dict[str, pd.Series] = {}
    problems = []
    for column in columns:
        if column.name not in frame:
            data[column.name] = pd.Series(None, index=frame.index, dtype=_dtype(column))
            continue
        given = frame[column.name]
        data[column.name] = values = _typed_column(given, column)
        lost = int((values.isna() & given.notna()).sum())
        if lost:
            example = str(given[values.isna() & given.notna()].iloc[0])[:60]
            problems.append(
                f"{table} table: {lost} value(s) of {column.name} are not {_allowed(column)}, "
                f"e.g. {example!r}, and count as missing"
            )
    # copy=False: a million rows need not be gathered into blocks.
    return pd.DataFrame(data, index=frame.index, copy=False), problems


def _dtype(column: schema.Column) -> Any:
    return schema.dtypes((column,))[column.name]


def _allowed(column: schema.Column) -> str:
    if _is_accuracy(column):
        return "fractions of 0..1"
    return {"int": "whole numbers from 0", "float": "numbers", "bool": "true or false"}.get(
        column.kind, "text"
    )


def _is_accuracy(column: schema.Column) -> bool:
    return column.unit == "fraction" and column.name.endswith("accuracy")


def _typed_column(values: pd.Series, column: schema.Column) -> pd.Series:
    if column.kind == "str":
        return values.astype("string")
    if column.kind == "bool":
        return _booleans(values)
    numbers = _numbers(values)
    if column.kind == "float":
        numbers = numbers.astype("float64")
        outside = (numbers < 0) | (numbers > 1)
        return numbers.mask(outside) if _is_accuracy(column) and outside.any() else numbers
    if pd.api.types.is_integer_dtype(numbers.dtype):
        whole = numbers.astype("Int64")
        return whole.where(whole >= 0) if bool((whole < 0).any()) else whole
    as_float = numbers.to_numpy("float64", na_value=np.nan)
    fits = (as_float == np.floor(as_float)) & (as_float >= 0) & (as_float < _LARGEST)
    return pd.Series(np.where(fits, as_float, np.nan), index=values.index).astype("Int64")


def _booleans(values: pd.Series) -> pd.Series:
    if pd.api.types.is_bool_dtype(values.dtype):
        return values.astype("boolean")
    known = {"True": True, "False": False, "true": True, "false": False}
    return values.astype("string").map(known).astype("boolean")


def _numbers(values: pd.Series) -> pd.Series:
    if pd.api.types.is_bool_dtype(values.dtype):
        return values.astype("Int64")
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values
    if values.dtype == object:
        # Lists, dicts and integers beyond 64 bits: to_numeric raises on them instead of coercing.
        values = values.map(lambda v: v if isinstance(v, int | float | str) else None)
        values = values.map(lambda v: float(str(v)) if isinstance(v, int) and abs(v) >> 62 else v)
    return pd.to_numeric(values, errors="coerce")


def curve(name: str, results: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """A trial's results.json -> one record per epoch."""
    epochs = mapping(results, "train").get("epochs")
    if not isinstance(epochs, list):
        problems.append(f"trial {name!r}: results.json has no list of epochs")
        return []
    usable = [{**epoch, "trial_id": name} for epoch in epochs if isinstance(epoch, dict)]
    if len(usable) < len(epochs):
        problems.append(f"trial {name!r}: {len(epochs) - len(usable)} epoch(s) are no records")
    return usable


def frame(rows: list[dict[str, Any]], columns: Columns) -> pd.DataFrame:
    """As objects: pandas would turn an integer beside a missing value into a float."""
    names = [column.name for column in columns]
    values = {name: [row.get(name) for row in rows] for name in names}
    return pd.DataFrame(values, columns=names, dtype=object)


def read_parquet(
    path: Path, columns: Columns, table: str, *, alone: bool
) -> tuple[pd.DataFrame, list[str]]:
    """The columns of ``path`` in the schema's types, and what is lost. Raises ``TableError``.

    A table that stands ``alone`` may be of an earlier version, which had fewer columns. Where the
    trials' files are there, they tell more than it does, and it is refused.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            held = file.schema_arrow
            lacking = _lacking(columns, held.names, table, alone)
            wanted = [column.name for column in columns if column.name in held.names]
            for name in wanted:
                _require_plain(held.field(name))
            read = file.read(columns=wanted)
            read.validate(full=True)  # or a flipped bit in a name fails where the name is used
            frame = read.to_pandas(ignore_metadata=True, types_mapper=_pandas_dtype)
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"is truncated or no parquet file ({_first_line(error)})") from None
    frame, lost = typed(frame, columns, table)
    return frame, lacking + lost


def read_csv(
    path: Path, columns: Columns, table: str, *, alone: bool
) -> tuple[pd.DataFrame, list[str]]:
    """The same from a .csv. Raises ``TableError``."""
    try:
        # Only an empty field is missing: the words "None" and "NA" can be names.
        frame = pd.read_csv(path, dtype="string", keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise TableError(f"is no readable CSV file ({_first_line(error)})") from None
    lacking = _lacking(columns, list(frame.columns), table, alone)
    frame, lost = typed(frame, columns, table)
    return frame, lacking + lost


def _lacking(columns: Columns, held: list[str], table: str, alone: bool) -> list[str]:
    """What is to be said of the columns that are not there. Raises ``TableError``."""
    missing = [c.name for c in columns if c.name not in held and c.name not in _TOLD_BY_THE_PLAN]
    if not missing:
        return []
    if not alone or not _IN_EVERY_TABLE.isdisjoint(missing):
        raise TableError(f"lacks {len(missing)} column(s) of the schema, e.g. {missing[0]}")
    return [f"{table} table: of an earlier version, without {', '.join(missing)}"]


def _require_plain(field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    checks: tuple[Callable[[Any], bool], ...] = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_null,
    )
    if not any(check(kind) for check in checks):
        raise TableError(f"holds {field.type} in column {field.name}, not numbers or text")


def _pandas_dtype(kind: pa.DataType) -> Any:
    """Nullable types, so that an integer beside a missing value is not turned into a float."""
    if pa.types.is_signed_integer(kind):
        return pd.Int64Dtype()
    if pa.types.is_boolean(kind):
        return pd.BooleanDtype()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pd.StringDtype()
    return None


def write_frame(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """``name.csv`` and ``name.parquet`` under ``folder``, each whole or not at all."""
    write_whole(folder / f"{name}.csv", lambda path: frame.to_csv(path, index=False))
    write_whole(folder / f"{name}.parquet", lambda path: frame.to_parquet(path, index=False))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
