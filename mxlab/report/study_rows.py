"""The rows of a study of formats, as its folder holds them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mxlab.errors import RunError

ROWS, STUDY = "rows.jsonl", "study.json"  # of the folder
UNQUANTIZED = "unquantized"  # the format of the row that the others are compared with
ROLES = ("weights", "activations", "kv", "all")


@dataclass(frozen=True)
class StudyRow:
    """One format in one role. Cross-entropy and KL divergence are nats per token; ``error`` says what failed."""

    format: str
    role: str
    recipe: str = ""
    bits_per_parameter: float | None = None
    perplexity: float | None = None
    cross_entropy: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""


def read_rows(folder: Path) -> list[StudyRow]:
    """Return the rows of a study, the last one made of each point. Raises RunError where one cannot be read."""
    file = folder / ROWS
    rows: dict[tuple[str, str], StudyRow] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            row = StudyRow(**json.loads(line))
        except (ValueError, TypeError) as e:
            raise RunError(f"{file}, line {number} is not a row of a comparison: {e}; remove the line") from None
        rows[row.format, row.role] = row
    return list(rows.values())
