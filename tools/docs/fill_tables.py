"""Writes the tables of a Markdown page anew from the CSV files that its comments name: no figure is typed by hand.

python tools/docs/fill_tables.py docs/results.md [--check]

A table stands between ``<!-- table FILE: COLUMN ... -->`` and ``<!-- end -->``; FILE is relative to the repository.
A column with a standard error prints it behind its value. With --check nothing is written, and a page out of date is
an error.
"""

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"(<!-- table (?P<file>[^:]+): (?P<columns>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """``page`` with every table as its file has it."""
    return TABLE.sub(lambda m: m[1] + table(ROOT / m["file"], m["columns"].split()) + m[4], page)


def table(file: Path, columns: list[str]) -> str:
    """A Markdown table of some columns of a CSV file, a line for each of its rows."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    heads = [f"{name} (±stderr)" if f"{name}_stderr" in rows[0] else name for name in columns]
    body = [[cell(row, name) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, ["--:"] * len(columns), *body])


def cell(row: dict[str, str], name: str) -> str:
    """A value with the digits its size deserves: 0.1327 ± 0.0095, 268.3 ± 22.9."""
    if not (error := row.get(f"{name}_stderr")):
        return row[name] if len(row[name]) < 8 else _shortened(row[name])
    digits = 4 if float(row[name]) < 1 else 1
    return f"{float(row[name]):.{digits}f} ± {float(error):.{digits}f}"


def _shortened(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def main(path: str, *options: str) -> None:
    """Fill one page, or check it."""
    file = Path(path)
    page = file.read_text(encoding="utf-8")
    filled = fill(page)
    if "--check" in options and filled != page:
        sys.exit(f"{path} is out of date: run `make figs`")
    file.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
