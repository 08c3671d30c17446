"""Markdown with every figure of a folder of results, for the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxlab.bench.results import QUIET, Document, instruction_set_of

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


@dataclass(frozen=True)
class Grid:
    """Heads, rows of cells, and in one line what all rows have in common.

    ``marks`` says of each row whether its target was met; None where it has none.
    """

    common: str
    heads: list[str]
    rows: list[list[str]]
    marks: list[bool | None]


def grid(document: Document, hidden: Sequence[str] = ()) -> Grid:
    """Return the rows of a document: a column for each figure and each part of the case that varies."""
    rows = document["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row["case"] if key not in hidden))
    varying = [key for key in keys if len({str(row["case"].get(key)) for row in rows}) > 1]
    figures = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    common = [f"{key} {rows[0]['case'][key]}" for key in keys if key not in varying]
    heads = [*varying, "contender", "time (quartiles)", *figures, "ratio (quartiles)", "target"]
    cells = [_cells(row, varying, figures) for row in rows]
    kept = [i for i in range(len(heads)) if any(row[i] for row in cells)]
    return Grid(
        ", ".join(common),
        [heads[i] for i in kept],
        [[row[i] for i in kept] for row in cells],
        [row["target"] and row["target"]["met"] for row in rows],
    )


def time_text(seconds: float) -> str:
    """Return three digits and a unit."""
    unit, size = next(((u, s) for u, s in _UNITS if seconds >= s), _UNITS[-1])
    return f"{number_text(seconds / size)} {unit}"


def number_text(value: float) -> str:
    """Return three digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def ratio_text(value: float) -> str:
    """Return a ratio with three decimals where it is about 1, where a per mille counts, else three digits."""
    return f"{value:.3f}" if value < 2 else number_text(value)


def _cells(row: dict[str, Any], varying: Sequence[str], figures: Sequence[str]) -> list[str]:
    values = [number_text(row["figures"][name]) if name in row["figures"] else "" for name in figures]
    return [
        *(str(row["case"].get(key, "")) for key in varying),
        row["contender"],
        _with_quartiles(row["seconds"], time_text),
        *values,
        _with_quartiles(row["ratio"], ratio_text) if row["ratio"] else "",
        target_text(row["target"]),
    ]


def _with_quartiles(spread: dict[str, float], text: Any) -> str:
    low, high = text(spread["q1"]), text(spread["q3"])
    shared = f" {low.split()[-1]}" if " " in low else ""
    low = low.removesuffix(shared) if shared and high.endswith(shared) else low  # 1.20–1.30 ms
    return f"{text(spread['median'])} ({low}–{high})"


def target_text(target: dict[str, Any] | None) -> str:
    """Return ``≤ 2.5, met``, with the name of the figure where it is not the ratio."""
    if target is None:
        return ""
    sign = "≤" if target["at_most"] else "≥"
    figure = "" if target["figure"] == "ratio" else f"{target['figure']} "
    return f"{figure}{sign} {target['limit']:g}, {'met' if target['met'] else 'missed'}"


_HEAD = """# Benchmarks

Made by `mxlab bench tables` from the files in `bench/results`; do not edit. A time is the median of its samples, with
their quartiles. A ratio is to the unquantized thing in the same process: contenders take turns, and the median and the
quartiles are those of the ratios within a round. Targets are those of the project's plan, each for its own setting.
Figures of different instruction sets do not compare, ratios included: each has a part of its own.
"""
_MACHINE = ("mxlab", "commit", "torch", "transformers", "cpu", "cpu capability", "CPU kernels")


def markdown(documents: Mapping[str, Document]) -> str:
    """Return a section for each document, those of one instruction set together."""
    by_set: dict[str, list[str]] = {}
    for name, document in documents.items():
        by_set.setdefault(instruction_set_of(document), []).append(_section(name, document))
    parts = [part for found, sections in by_set.items() for part in (f"# {found[0].upper()}{found[1:]}\n", *sections)]
    return "\n".join([_HEAD, *parts])


def _section(name: str, document: Document) -> str:
    found = grid(document)
    lines = [
        f"## {document['benchmark']}, {document['measured on']}",
        "",
        f"`{document['command']}` gave `{name}.json` on {document['machine']['date'][:10]}. {_machine(document)}.",
        *_disturbance(document),
        "",
        f"All rows: {found.common}." if found.common else "",
        "",
        *_table(found),
        *(f"\nNot measured: {_cell(text)}" for text in document["failures"]),
    ]
    return "\n".join(lines) + "\n"


def _machine(document: Document) -> str:
    machine: dict[str, Any] = document["machine"]
    return ", ".join(f"{key} {machine[key]}" for key in _MACHINE if key in machine)


def _disturbance(document: Document) -> Iterator[str]:
    busy = [document["load"][f"busy cores {when}"] for when in ("before", "after")]
    if max(busy) > QUIET:
        yield f"**Not quiet:** other processes used {busy[0]} cores before and {busy[1]} after the measurement."


def _table(found: Grid) -> Iterator[str]:
    yield _line(found.heads)
    yield f"|{'|'.join(_rule(column) for column in zip(*found.rows, strict=True))}|"
    yield from map(_line, found.rows)


def _rule(column: tuple[str, ...]) -> str:
    return "--:" if all(cell == "" or _is_number(cell.split()[0]) for cell in column) else "---"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
