"""``mxlab demo``: the whole of it on the embedded model and passages, without a network."""

from __future__ import annotations

from pathlib import Path

from mxlab.experiments.sweep import Summary, Sweep, run_sweeps
from mxlab.sources.models import EMBEDDED
from mxlab.sources.tasks import PASSAGES

_SETTINGS = {"model": EMBEDDED, "tasks": [PASSAGES], "limit": 100}  # of 261: minutes, not a quarter of an hour
_BLOCK_SIZES = {"block_size": [16, 32, 64]}

SWEEPS = (
    Sweep("baseline", "baseline", _SETTINGS),
    Sweep("ex1", "ex1", _SETTINGS, _BLOCK_SIZES),
    Sweep("ex2", "ex2", _SETTINGS, _BLOCK_SIZES),
)


def run_demo(out: Path) -> Summary:
    """Run the baseline, Ex1 and Ex2 over three block sizes into ``out``; runs that are there already are kept."""
    return run_sweeps(SWEEPS, out, "demo")
