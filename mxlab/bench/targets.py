"""Compare figures with the numbers that this project wants to reach, where a checkout has them (bench/targets.toml).

Each target stands beside measurements in its own setting: device, threads, dtype, model, batch. That of quantizing
stands beside every shape and format.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

from mxlab import shipped

RATIO = "ratio"
SECONDS = "seconds"
FRACTION = "fraction of copy"


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a row: the ratio, the seconds, or one of its other figures."""

    figure: str
    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        """Return whether ``value`` reaches the target."""
        return (operator.le if self.at_most else operator.ge)(value, self.limit)


def quantize_target(numerics: str, device: str, dtype: str, threads: int) -> Target | None:
    """Return the bound on quantizing out of place over a clone; None where there is none for the setting."""
    if device != "cpu" or threads != 1 or dtype not in ("float32", "bfloat16"):
        return None
    return _target(RATIO, _targets().get("quantize", {}).get(numerics))


def bandwidth_target() -> Target | None:
    """Return the bound on the speed of quantizing a large tensor, as a fraction of that of a copy."""
    return _target(FRACTION, _targets().get("bandwidth", {}).get("fraction"), at_most=False)


def seconds_target(name: str) -> Target | None:
    """Return the bound on the seconds of ``convert`` or ``import``."""
    return _target(SECONDS, _targets().get("seconds", {}).get(name))


def model_target(benchmark: str, recipe: str, **setting: Any) -> Target | None:
    """Return the bound on a model's time over the unquantized one's: of ``forward`` or ``generate``, in a setting."""
    for row in _targets().get(benchmark, []):
        if all(setting.get(key) == value for key, value in row.items() if key != "limits"):
            return _target(RATIO, row["limits"].get(recipe))
    return None


def _target(figure: str, limit: float | None, at_most: bool = True) -> Target | None:
    return None if limit is None else Target(figure, limit, at_most)


@functools.cache
def _targets() -> dict[str, Any]:
    file = shipped.PACKAGE.parent / "bench" / "targets.toml"
    return shipped.read_toml(file, str(file)) if file.is_file() else {}
