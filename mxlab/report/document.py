"""What a report is made of, whatever it is written as: headings, text, tables, figures, code.

Text and cells may hold `code` between backticks; nothing else in them is markup.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """A metric and its standard error; None where lm-eval gives no error ("N/A")."""

    value: float
    stderr: float | None

    @property
    def is_nan(self) -> bool:
        """Whether the metric is not a number: there is a result, but nothing to rank or draw."""
        return math.isnan(self.value)


Cell = str | int | float | bool | Measured | None

MISSING = "—"


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Verbatim text, such as commands or an environment."""

    text: str


@dataclass(frozen=True)
class Image:
    """A drawn figure."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Column:
    """A column of a table; a measured one prints its standard error and takes two columns of a CSV file."""

    name: str
    align: str = "right"
    measured: bool = False

    @property
    def head(self) -> str:
        """The printed head."""
        return f"{self.name} (±stderr)" if self.measured else self.name


@dataclass(frozen=True)
class Table:
    """A table of raw values: printed with the report's digits, kept in ``tables/{slug}.csv`` with all of theirs."""

    slug: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


Block = Heading | Paragraph | Items | Code | Image | Table


def cell_text(cell: Cell) -> str:
    """Return a cell as printed: 6 decimals for a metric and its error, 3 for a time or a rate, a dash for none."""
    match cell:
        case None:
            return MISSING
        case bool():
            return str(cell).lower()
        case float():
            return f"{cell:.3f}"
        case Measured(value, stderr):
            return f"{value:.6f} ± {MISSING if stderr is None else f'{stderr:.6f}'}"
    return str(cell)


def write_csv(table: Table, path: Path) -> None:
    """Write the raw values: an empty field is a missing value."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(name for column in table.columns for name in _csv_names(column))
        for row in table.rows:
            cells = zip(table.columns, row, strict=True)
            writer.writerow(value for column, cell in cells for value in _csv_values(column, cell))


def _csv_names(column: Column) -> tuple[str, ...]:
    return (column.name, f"{column.name}_stderr") if column.measured else (column.name,)


def _csv_values(column: Column, cell: Cell) -> Iterator[object]:
    if not column.measured:
        yield cell_text(cell) if isinstance(cell, bool) else cell
    elif isinstance(cell, Measured):
        yield from (cell.value, cell.stderr)
    else:
        yield from (None, None)
