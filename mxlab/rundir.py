"""The run directory: its files, its schema, its metrics, and folders that are published whole or not at all. No torch.

A folder is filled under a hidden name beside its place and renamed when it is whole, so that a process that is killed,
or for which the disk is too small, leaves nothing that looks like a result.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1  # of run.json
COMMAND = "command.txt"
ENVIRONMENT = "env.json"
ENVIRONMENT_TEXT = "env.txt"
RECIPE = "recipe.toml"
INVENTORY = "inventory.json"
LOG = "output.log"
RECORD = "run.json"
METRICS = "metrics_*.json"
FAILURES = "failures.jsonl"  # of a stage: the runs that could not be finished

# Whether a process is alive can be told of this machine's only; others may share the folder.
_PREFIX = f".partial-{platform.node()}-"
_being_filled: set[Path] = set()  # by this process: another one may have had its number before, and left folders


def metrics_files(folder: Path) -> list[Path]:
    """Return the metrics files of a run directory, the oldest first."""
    return sorted(folder.glob(METRICS))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; nothing where it cannot be read, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Metric:
    """A metric of a task, as lm-eval wrote it; ``stderr`` is None where it gives none."""

    task: str
    name: str
    value: float
    stderr: float | None

    @property
    def value_text(self) -> str:
        """The value in six digits."""
        return f"{self.value:.6g}"

    @property
    def stderr_text(self) -> str:
        """The standard error in three digits, ``-`` where there is none."""
        return "-" if self.stderr is None else f"{self.stderr:.3g}"


def metrics(folder: Path) -> list[Metric]:
    """Return the metrics in the newest file of a run directory."""
    return [
        Metric(task, name.partition(",")[0], value, _stderr(values, name))
        for task, values in read_json(metrics_files(folder)[-1])["results"].items()
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    ]


def rows(folder: Path) -> dict[str, int]:
    """Return how many rows, or windows, of each task were evaluated; none of those that say nothing of it."""
    counts = read_json(metrics_files(folder)[-1]).get("n-samples") or {}
    return {task: count["effective"] for task, count in counts.items() if isinstance(count, dict)}


def seconds(folder: Path) -> float | None:
    """Return the whole time of a run's evaluation, loading included; None where it was not recorded."""
    found = read_json(metrics_files(folder)[-1]).get("total_evaluation_time_seconds")
    return None if found is None else float(found)  # lm-eval writes it as a text


def _stderr(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name.replace(",", "_stderr,", 1))
    return float(value) if isinstance(value, int | float) else None


@contextlib.contextmanager
def partial(parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder in ``parent``, to be filled; it is gone afterwards, unless it was renamed.

    So are the folders that had to be made for it, where nothing else is in them. What killed processes of this machine
    left in ``parent`` is removed. Raises OSError where it cannot be written.
    """
    missing = [place for place in (parent, *parent.parents) if not place.exists()]
    _remove_leftovers(parent)
    folder = parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    _being_filled.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _being_filled.discard(folder)
        with contextlib.suppress(OSError):  # one that is not empty stays, and those above it
            for place in missing:
                place.rmdir()


def publish(folder: Path, parent: Path, label: str) -> Path:
    """Rename a whole ``folder`` to ``<date>_<time>_<label>`` in ``parent``; a name that is taken waits a second."""
    now = datetime.datetime.now()
    while True:
        target = parent / f"{now:%Y%m%d_%H%M%S}_{label}"
        try:
            return folder.rename(target)
        except OSError:
            if not target.exists():
                raise
        now += datetime.timedelta(seconds=1)


def _remove_leftovers(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if folder not in _being_filled and not _is_of_another_process(pid):
            shutil.rmtree(folder, ignore_errors=True)


def _is_of_another_process(pid: str) -> bool:
    """Return whether a process of that number, and not this one, is alive."""
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
