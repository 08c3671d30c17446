"""The numbers to reach, each beside measurements in its own setting: device, threads, dtype, model, batch.

That of quantizing stands beside every shape and format, not only those that it was set for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

RATIO = "ratio"
SECONDS = "seconds"
FRACTION = "fraction of copy"

# By recipe: a forward pass over that of the unquantized model.
_FORWARD = {
    ("smollm2", "cpu", "bfloat16"): {"ex1": 1.08, "ex2": 1.12},
    ("smollm2", "cpu", "float32"): {"ex1": 1.08, "ex2": 1.08},
    ("llama-1b-random", "cuda", "bfloat16"): {"ex1": 1.10, "ex2": 1.15},
}
# (batch, threads) on the CPU; on a GPU the number of threads does not matter.
_BATCH = {"cpu": (16, 2), "cuda": (32, None)}
_QUANTIZE = {"exact": 2.5, "microxcaling": 5.0}


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a row: the ratio, the seconds, or one of its other figures."""

    figure: str
    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        """Whether ``value`` reaches the target."""
        return (operator.le if self.at_most else operator.ge)(value, self.limit)


CONVERT = Target(SECONDS, 1.0)
IMPORT = Target(SECONDS, 0.2)
BANDWIDTH = Target(FRACTION, 0.7, at_most=False)


def quantize(numerics: str, device: str, dtype: str, threads: int) -> Target | None:
    """Quantizing out of place, against a clone."""
    if device != "cpu" or threads != 1 or dtype not in ("float32", "bfloat16"):
        return None
    return Target(RATIO, _QUANTIZE[numerics]) if numerics in _QUANTIZE else None


def forward(recipe: str, model: str, device: str, dtype: str, batch: int, threads: int) -> Target | None:
    """A forward pass, against the unquantized one."""
    wanted_batch, wanted_threads = _BATCH.get(device, (None, None))
    limit = _FORWARD.get((model, device, dtype), {}).get(recipe)
    if limit is None or batch != wanted_batch or wanted_threads not in (None, threads):
        return None
    return Target(RATIO, limit)


def generate(recipe: str, model: str, device: str, dtype: str, tokens: int, threads: int) -> Target | None:
    """Generating at batch 1, against the unquantized model."""
    setting = (recipe, model, device, dtype, tokens, threads)
    return Target(RATIO, 1.15) if setting == ("ex2", "smollm2", "cpu", "bfloat16", 64, 2) else None
