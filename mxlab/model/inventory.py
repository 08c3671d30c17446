"""What a conversion touches and what it leaves, as rows a person can read: layers that are alike share one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mxlab.model.conversion import Conversion

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """Modules, or parameters, that differ in the number of their layer only, and one of their roles.

    ``name`` has ``*`` for that number and ``layers`` lists it; ``bits`` are those of one element, its share of the
    scale included.
    """

    name: str
    layers: str
    count: int
    shape: tuple[int, ...]
    role: str
    format: str
    bits: float


def quantized(conversion: Conversion) -> list[Row]:
    """A row for each role of each kind of site."""
    found = (
        (site.name, site.shape, role, str(fmt), fmt.bits_per_element)
        for site in conversion.sites
        for role, fmt in site.all_formats.items()
    )
    return _grouped(found)


def in_high_precision(conversion: Conversion) -> list[Row]:
    """A row for each kind of parameter that stays as it is; one that is used in two places is named once."""
    stored = {id(p) for site in conversion.sites for p in site.stored()}
    found = (
        (name, tuple(p.shape), "parameter", str(p.dtype).removeprefix("torch."), p.element_size() * 8)
        for name, p in conversion.model.named_parameters()
        if id(p) not in stored
    )
    return _grouped(found)


def _grouped(found: Iterable[tuple[str, tuple[int, ...], str, str, float]]) -> list[Row]:
    groups: dict[tuple, list[str]] = {}
    for name, *rest in found:
        groups.setdefault((_NUMBER.sub("*", name, count=1), *rest), []).append(name)
    return [Row(key[0], _layers(names), len(names), *key[1:]) for key, names in groups.items()]


def _layers(names: list[str]) -> str:
    """The layers of these names, as ranges; nothing for what lies outside of them."""
    numbers = sorted({int(match[0]) for name in names if (match := _NUMBER.search(name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
