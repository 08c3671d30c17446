"""Fill docs/packed.md with what `mxlab bench` measured of packed weights.

python tools/docs/packed_page.py [--check]

The tables stand behind ``<!-- linear -->``, ``<!-- forward -->``, ``<!-- generate -->``, ``<!-- decode -->``,
``<!-- llama -->`` and ``<!-- memory -->`` (of `mxlab memory`), up to ``<!-- end -->``.
With --check nothing is written, and a page that is out of date is an error.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from formats_page import table, write_or_check

from mxlab.bench.results import instruction_set_of
from mxlab.bench.tables import grid

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "packed.md", ROOT / "bench" / "results" / "packed"
LEFT_OUT = ("target",)  # targets are those of whole models, in one setting each


def fill(page: str) -> str:
    """Return the page with its tables."""
    return re.sub(
        r"(<!-- (linear|forward|generate|decode|llama|memory) -->\n).*?(<!-- end -->)", _filled, page, flags=re.S
    )


def _filled(found: re.Match[str]) -> str:
    files = sorted(RESULTS.glob(f"{found[2]}*.json"))
    documents = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return found[1] + "\n".join(map(of_memory if found[2] == "memory" else section, documents)) + found[3]


def section(document: dict[str, Any]) -> str:
    """Return a document's table, and under it what measured it."""
    found = grid(document, hidden=("device",))
    kept = [i for i, head in enumerate(found.heads) if head not in LEFT_OUT]
    rows = [[row[i] for i in kept] for row in found.rows]
    where = f"{document['measured on']}, {instruction_set_of(document)}, {document['machine']['date'][:10]}"
    return (
        f"{table([found.heads[i] for i in kept], rows)}\n{where}; all rows: {found.common}. `{document['command']}`\n"
    )


def of_memory(document: dict[str, Any]) -> str:
    """Return the table of what `mxlab memory` measured, in megabytes."""
    heads = ["recipe", "", "theory", "stored", "resident", "peak", "why they differ"]
    rows = [
        [one["recipe"], line["part"], *(megabytes(line[head]) for head in heads[2:6]), line["reason"]]
        for one in document["recipes"]
        for line in one["lines"]
    ]
    tokens = document["recipes"][0]["tokens"]
    return f"{table(heads, rows)}\nmodel {document['model']}, dtype {document['dtype']}, {tokens} tokens.\n"


def megabytes(count: int | None) -> str:
    """Return bytes as a number of megabytes."""
    return "" if count is None else f"{count / 1e6:.2f}"


if __name__ == "__main__":
    write_or_check(PAGE, fill, sys.argv[1:])
