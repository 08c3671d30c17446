"""The quantizers beside microscaling, as data: fixed point, minifloats, logarithms, shared exponents, signs.

A format prints and parses like an MX format: ``integer,width=8,frac=4``, ``block_fp@16,width=8``. Each class says in
its docstring what it computes; :mod:`mxlab.backends.quantizers` does it. Nothing here needs torch.

Common to all: round() goes to the nearest integer, halves to even; clamp(v, low, high) limits v. A zero result is +0.
Where every element stands alone, NaN stays NaN and an infinity saturates. Where elements share something, a NaN or an
infinity among them makes all of them NaN. The result of a formula is rounded once, to the tensor's dtype, in which it
becomes infinite where that dtype does not reach so far.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from mxlab.errors import FormatError
from mxlab.formats import MXFormat, element, suggestion
from mxlab.quantizers.base import Quantizer
from mxlab.quantizers.block import BlockFP, BlockLog, BlockMinifloat
from mxlab.quantizers.scalar import Integer, Log, MinifloatDenorm, MinifloatIEEE
from mxlab.quantizers.sign import Binary, ResidualBinary, Ternary

__all__ = [
    "FAMILIES",
    "Binary",
    "BlockFP",
    "BlockLog",
    "BlockMinifloat",
    "Format",
    "Integer",
    "Log",
    "MinifloatDenorm",
    "MinifloatIEEE",
    "Quantizer",
    "ResidualBinary",
    "Ternary",
    "parse_format",
]

Format = MXFormat | Quantizer

FAMILIES: dict[str, type[Quantizer]] = {
    family.family: family
    for family in (
        Integer,
        MinifloatDenorm,
        MinifloatIEEE,
        Log,
        BlockFP,
        BlockMinifloat,
        BlockLog,
        Binary,
        ResidualBinary,
        Ternary,
    )
}
# What each is made from, and the default values; at import, as torch.compile cannot trace dataclasses.fields.
_PARAMETERS = {name: {f.name: f.default for f in fields(family)} for name, family in FAMILIES.items()}
_PARSED: dict[str, Format] = {}  # no lru_cache: torch.compile warns of those it meets


def parse_format(text: Format | str) -> Format:
    """The format that ``text`` spells, microscaling (``fp4_e2m1@32``) or a quantizer (``integer,width=8,frac=4``).

    Raises:
        FormatError: neither; the message lists both kinds, or names the parameter that could not be read.
    """
    if isinstance(text, MXFormat | Quantizer):
        return text
    if not isinstance(text, str):
        raise FormatError(f"{text!r} is not a format: write it like 'fp4_e2m1@32' or 'integer,width=8,frac=4'")
    if text not in _PARSED:
        _PARSED[text] = _parse(text)
    return _PARSED[text]


def _parse(text: str) -> Format:
    name = re.split("[@,]", text)[0].strip().lower()
    if family := FAMILIES.get(name):
        return _parse_quantizer(family, text)
    try:
        return MXFormat.parse(text)
    except FormatError as e:
        raise FormatError(f"{e}{_other_kind(name)}") from None


def _other_kind(name: str) -> str:
    """What an error adds where ``name`` is no element format: perhaps a quantizer was meant."""
    try:
        element(name)
    except FormatError:
        return f". Beside the MX formats there are {', '.join(FAMILIES)}{suggestion(name, FAMILIES)}"
    return ""


def _parse_quantizer(family: type[Quantizer], text: str) -> Quantizer:
    head, *extras = (part.strip() for part in text.split(","))
    _, at, block = (part.strip() for part in head.partition("@"))
    if at and "block_size" not in _PARAMETERS[family.family]:
        raise FormatError(f"cannot read {head!r} in the format {text!r}: {family.family} has no block size")
    values = _parse_extras(family, extras, text)
    if at:
        values["block_size"] = _value(block)
    required = [name for name, default in _PARAMETERS[family.family].items() if default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise FormatError(f"the format {text!r} does not say its {' and '.join(missing)}: add {missing[0]}=<number>")
    return family(**values)


def _parse_extras(family: type[Quantizer], extras: Sequence[str], text: str) -> dict[str, Any]:
    known = [name for name in _PARAMETERS[family.family] if name != "block_size"]
    values: dict[str, Any] = {}
    for extra in extras:
        key, equals, value = (part.strip() for part in extra.partition("="))
        if key not in known or not equals or key in values:
            raise FormatError(
                f"cannot read {extra!r} in the format {text!r}: {family.family} takes key=value pairs, each once, "
                f"of {', '.join(known) or 'nothing'}{suggestion(key, known)}"
            )
        values[key] = _value(value)
    return values


def _value(text: str) -> object:
    """The number or truth value that ``text`` spells; anything else as it is, for the format to refuse by name."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)
