"""The machine a benchmark ran on: its description, its name in file names, and what else keeps it busy."""

from __future__ import annotations

import os
import re
from typing import Any

import psutil

# Cores that others may use before the timings are called into question.
QUIET = 0.25


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores other processes use, seen while this one sleeps."""
    return round(psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1), 2)


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes; empty on a system that does not keep it."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def name(machine: dict[str, Any], device: str) -> str:
    """What was measured on, of the environment's description: the GPU, or the CPU with its cores."""
    if device.startswith("cuda"):
        return machine.get(f"GPU {device.partition(':')[2] or 0}", "GPU")
    return machine["cpu"]


def slug(name: str) -> str:
    """``intel-xeon-processor-2-cores``: a machine's name as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
