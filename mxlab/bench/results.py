"""Hold rows of results, and write and read the JSON files they are kept in."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mxlab.bench import targets
from mxlab.bench.targets import Target
from mxlab.errors import SourceError

# Cores that others may use before the timings are called into question.
QUIET = 0.25


def busy_cores(seconds: float = 0.5) -> float:
    """Return how many cores other processes use, seen while this one sleeps."""
    return round(psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1), 2)


def load_average() -> list[float]:
    """Return the load of the last 1, 5 and 15 minutes; empty on a system that does not keep it."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def name(machine: dict[str, Any], device: str) -> str:
    """Return what was measured on, of the environment's description: the GPU, or the CPU with its cores."""
    if device.startswith("cuda"):
        return machine.get(f"GPU {device.partition(':')[2] or 0}", "GPU")
    return machine["cpu"]


def instruction_set(machine: dict[str, Any], device: str) -> str:
    """Return what the timings depend on besides the processor's name, of the environment's description.

    On a CPU: the instruction sets of mxlab's kernels and of torch, and whether there are bfloat16 units; a result that
    did not record a part says so. On a GPU: its name.
    """
    if device.startswith("cuda"):
        return name(machine, device)
    kernels, torchs = (machine.get(key, "not recorded") for key in ("CPU kernels", "cpu capability"))
    return f"kernels {kernels}, torch {torchs}, bfloat16 units {machine.get('bfloat16 units', 'not recorded')}"


def slug(name: str) -> str:
    """Return a machine's name as a part of a file name: ``intel-xeon-processor-2-cores``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


@dataclass(frozen=True)
class Spread:
    """The median of some samples, the quartiles around it, and how many they were."""

    median: float
    q1: float
    q3: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    """Return the quartiles of at least one sample; between two samples they are interpolated.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples: nothing was measured")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, q1, q3, len(samples))


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return each sample over the reference's of the same round; a series that stopped early has fewer."""
    return [a / b for a, b in zip(samples, reference, strict=False)]


BASELINE = "unquantized"  # the contender that quantized ones are compared with

Document = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One contender in one case: its seconds, its other figures, and where it has a reference, the ratio to that.

    The ratio is that of each sample to the reference's of the same round; its median is what counts.
    """

    case: dict[str, Any]
    contender: str
    samples: Sequence[float]
    reference: str | None = None
    reference_samples: Sequence[float] = ()
    figures: dict[str, float] = field(default_factory=dict)
    target: Target | None = None

    @property
    def seconds(self) -> Spread:
        """The seconds of the samples."""
        return spread(self.samples)

    @property
    def ratio(self) -> Spread | None:
        """The pairwise ratios, or None for what is itself a reference."""
        return spread(ratios(self.samples, self.reference_samples)) if self.reference else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, samples included."""
        ratio = self.ratio
        return {
            "case": self.case,
            "contender": self.contender,
            "seconds": _plain(self.seconds),
            "samples": [_rounded(s) for s in self.samples],
            "reference": self.reference,
            "ratio": ratio and _plain(ratio),
            "figures": {name: _rounded(value) for name, value in self.figures.items()},
            "target": self.target and {**asdict(self.target), **self._reached(self.target)},
        }

    def _reached(self, target: Target) -> dict[str, Any]:
        value = self._value(target.figure)
        return {"value": _rounded(value), "met": target.met(value)}

    def _value(self, figure: str) -> float:
        if figure == targets.RATIO and self.ratio:
            return self.ratio.median
        return self.seconds.median if figure == targets.SECONDS else self.figures[figure]


@dataclass
class Measurement:
    """What was measured, and a message for each optional contender that failed."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Measurement) -> None:
        """Append the rows of ``other``, and its failures where they are new."""
        self.rows += other.rows
        self.failures += [text for text in other.failures if text not in self.failures]


def make_folder(folder: Path) -> None:
    """Make the folder for results, before anything is measured for it.

    Raises:
        SourceError: it cannot be made, or is not a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SourceError(f"cannot make the folder {folder}: {e.strerror}; choose another folder (--out)") from None


def write(document: Document, folder: Path, name: str) -> tuple[Path, bool]:
    """Write ``folder/name.json``; return the path, and whether it replaced such a file.

    Raises:
        SourceError: the folder cannot be written to, or holds a file of that name from another instruction set, whose
            figures would pass for the same measurement.
    """
    path = folder / f"{name}.json"
    make_folder(folder)
    try:
        former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if former is not None and (theirs := instruction_set_of(former)) != (ours := instruction_set_of(document)):
            raise SourceError(
                f"{path} was measured with {theirs}, this with {ours}: their figures do not compare; choose another "
                "folder (--out)"
            )
        partial = path.with_suffix(".partial")
        partial.write_text(_text(document), encoding="utf-8")
        partial.replace(path)  # in one step: nothing half-written stays
    except (OSError, ValueError) as e:
        if isinstance(e, SourceError):
            raise
        raise SourceError(f"cannot write the results to {path}: {e}; choose another folder (--out)") from None
    return path, former is not None


def instruction_set_of(document: Document) -> str:
    """Return the instruction set that a document was measured with (:func:`instruction_set`)."""
    return document.get("instruction set") or instruction_set(document["machine"], document["settings"]["device"])


def read(folder: Path) -> dict[str, Document]:
    """Return the documents in ``folder`` by file name, without those that no benchmark of this package wrote.

    Raises:
        SourceError: there are none, or one cannot be read.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}: name the one with benchmark results (--results)")
    found = {path.stem: _renamed(document) for path, document in _json_files(folder) if _is_document(document)}
    for name, document in found.items():
        if missing := [key for key in _KEYS if key not in document]:
            raise SourceError(f"{folder / name}.json lacks {', '.join(missing)}: remove it, or measure again")
    if not found:
        raise SourceError(f"no benchmark results in {folder}: make some with `mxlab bench --out {folder}`")
    return found


def _json_files(folder: Path) -> Iterator[tuple[Path, Any]]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise SourceError(f"cannot read {path}: {e}; remove it, or measure again") from None


_KEYS = ("measured on", "command", "settings", "load", "failures")


def _is_document(value: Any) -> bool:
    return isinstance(value, Mapping) and {"benchmark", "rows", "machine"} <= value.keys()


def _renamed(document: Document) -> Document:
    """Return a document with the word of today, where it was written when a contender was called a twin."""
    rows = [{"contender" if key == "twin" else key: value for key, value in row.items()} for row in document["rows"]]
    return {**document, "rows": rows}


def _text(document: Document) -> str:
    """Return JSON with a line for each row, so that a file with hundreds of samples can be looked through."""
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in document["rows"])
    head = json.dumps({**document, "rows": []}, indent=1, ensure_ascii=False)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n ]' if rows else '"rows": []') + "\n"


def _plain(value: Spread) -> dict[str, float]:
    return {name: _rounded(number) for name, number in asdict(value).items()}


def _rounded(value: float) -> float:
    """Round to six digits, more than any timing has."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
