"""Fill docs/published_tools.md from the outputs that record_published_tools.py kept.

python tools/docs/published_tools_page.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``. With --check nothing is written, and a page out of date
is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from formats_page import SECTION, table, write_or_check
from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.numerics import quantize

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "published_tools.md"
GOLDEN = ROOT / "tests" / "golden"
OCP = "fp4_e2m1@32,rounding=even"  # the specification's


class Recorded(NamedTuple):
    """What a tool made of the tensor, and the format in which mxlab makes the same of it."""

    tool: str
    version: str
    call: str
    fmt: MXFormat
    numerics: Any
    output: Tensor

    @property
    def text(self) -> str:
        """The format as mxlab spells it."""
        return f"`{self.fmt}`" + (", numerics `microxcaling`" if self.numerics != "exact" else "")


def recorded() -> tuple[Tensor, list[Recorded]]:
    """Return the tensor, bfloat16, and what each tool made of it."""
    arrays = np.load(GOLDEN / "published_tools.npz")
    rows = json.loads((GOLDEN / "published_tools.json").read_text(encoding="utf-8"))
    tensors = {name: torch.from_numpy(arrays[name]).view(torch.bfloat16) for name in arrays.files}
    return tensors["input"], [
        Recorded(r["tool"], r["version"], r["call"], MXFormat.parse(r["format"]), r["numerics"], tensors[r["output"]])
        for r in rows
    ]


def fill(page: str) -> str:
    """``page`` with every table as the recorded outputs have it."""
    tables = {"tools": _tools, "ties": _ties}
    return SECTION.sub(lambda m: m[1] + tables[m["name"]]() + m[3], page)


def _tools() -> str:
    x, tools = recorded()
    ocp = quantize(x, OCP)
    heads = ["tool", "version", "what ran", "rule", "rounding", "the same in mxlab", "#differ from OCP", "#error"]
    rows = [["OCP v1.0", "", "", "`floor`", "`even`", f"`{MXFormat.parse(OCP)}`", "0 %", _error(x, ocp)]]
    for r in tools:
        rules = f"`{r.fmt.scale_rule}`", f"`{r.fmt.rounding}`", r.text
        differ = (r.output != ocp).double().mean().item() * 100
        rows.append([r.tool, r.version, r.call, *rules, f"{differ:.1f} %", _error(x, r.output)])
    return table(heads, rows)


def _error(x: Tensor, y: Tensor) -> str:
    """Return the squared error of a block relative to its square, the mean over blocks, in percent."""
    blocks, noise = (t.double().unflatten(-1, (-1, 32)).square().sum(-1) for t in (x, x.double() - y))
    return f"{(noise / blocks).mean().item() * 100:.2f} %"


def _ties() -> str:
    """Return what becomes of the first eight numbers of the tensor, which are ties under most scales."""
    x, tools = recorded()
    rows = {"OCP v1.0": quantize(x, OCP)} | {f"{r.tool}, {r.call}": r.output for r in tools}
    return table(["", *(f"#{value:g}" for value in _first(x))], ([name, *_printed(y)] for name, y in rows.items()))


def _first(x: Tensor) -> list[float]:
    return x[0, :8].tolist()


def _printed(y: Tensor) -> Iterator[str]:
    return (f"{value:.4g}" for value in _first(y))


def main(*arguments: str) -> None:
    """Fill the page, or check it."""
    write_or_check(PAGE, fill, arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
