"""What a report is made of: sections of text, tables of finished strings, names of figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd

from analysis.text.wording import MISSING, listing, megabytes, number


class Table(NamedTuple):
    """A table of finished strings; the first column names the row. ``wide`` columns hold text.

    A ``sortable`` one is sorted and filtered in the browser, by the words of a row and by the
    values of the columns in ``picks``.
    """

    key: str
    caption: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""
    wide: tuple[int, ...] = ()
    sortable: bool = False
    picks: tuple[int, ...] = ()

    @property
    def cards(self) -> bool:
        """Whether a narrow screen shows each row as a list of headings and values."""
        if self.sortable:
            return False  # its headings are what one sorts by
        return bool(self.wide) or (len(self.columns) > 4 and len(self.rows) <= 8)

    def is_text(self, column: int) -> bool:
        """Whether a column holds words (aligned left) rather than numbers (aligned right)."""
        cells = [row[column] for row in self.rows if row[column] != MISSING]
        numbers = sum(cell[:1].isdigit() or cell[:1] in "+−<" for cell in cells)
        return column == 0 or column in self.wide or numbers * 2 < len(cells)


class Section(NamedTuple):
    """One chapter of the report; ``figures`` are keys of drawn figures."""

    key: str
    title: str
    paragraphs: list[str]
    tables: list[Table]
    figures: tuple[str, ...] = ()


Cell = Callable[[dict[Any, Any]], str]


def table_of(
    key: str, caption: str, frame: pd.DataFrame, cells: dict[str, Cell], **options: Any
) -> Table:
    """A table with a row per row of ``frame``; ``cells`` maps a heading to what writes its cell."""
    rows = [[cell(row) for cell in cells.values()] for row in frame.to_dict("records")]
    return Table(key, caption, tuple(cells), rows, **options)


def clean(value: str) -> str:
    """One line without control characters, which could reorder or hide what stands beside them."""
    return "".join(letter if letter.isprintable() else " " for letter in value)


def cleaned(section: Section) -> Section:
    """The section with every string of it on one line, see :func:`clean`."""
    tables = [
        table._replace(
            rows=[[clean(cell) for cell in row] for row in table.rows], note=clean(table.note)
        )
        for table in section.tables
    ]
    paragraphs = [clean(paragraph) for paragraph in section.paragraphs]
    return section._replace(paragraphs=paragraphs, tables=tables)


def text(name: str) -> Cell:
    return lambda row: MISSING if pd.isna(row.get(name)) else str(row[name]) or MISSING


def notes(frame: pd.DataFrame, key: str = "quantization") -> str:
    """The notes of a table, each once, with the rows they speak of."""
    if "note" not in frame:
        return ""
    told: dict[str, list[str]] = {}
    for row in frame.to_dict("records"):
        if isinstance(row["note"], str) and row["note"]:
            who = told.setdefault(row["note"], [])
            if str(row[key]) not in who:
                who.append(str(row[key]))
    return " ".join(f"{listing(who, 6)}: {note.rstrip('.')}." for note, who in told.items())


def size(name: str) -> Cell:
    return lambda row: megabytes(row[name])


def count(name: str) -> Cell:
    return lambda row: number(row[name], 0)
