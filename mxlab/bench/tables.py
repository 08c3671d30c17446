"""Markdown with every figure of a folder of results, for the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mxlab.bench.grid import Grid, grid
from mxlab.bench.machine import QUIET
from mxlab.bench.results import Document

_HEAD = """# Benchmarks

Made by `mxlab bench tables` from the files in `bench/results`; do not edit. A time is the median of its samples, with
their quartiles. A ratio is to the unquantized twin in the same process: twins take turns, and the median and the
quartiles are those of the ratios within a round. Targets are those of the project's plan, each for its own setting.
"""
_MACHINE = ("mxlab", "commit", "torch", "transformers", "cpu", "cpu capability", "CPU kernels")


def markdown(documents: Mapping[str, Document]) -> str:
    """A section for each document."""
    return "\n".join([_HEAD, *(_section(name, document) for name, document in documents.items())])


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
