"""From the text of a format to the format: microscaling, or one of the families beside it."""

from __future__ import annotations

from dataclasses import fields

from mxlab.checks import suggestion
from mxlab.errors import FormatError
from mxlab.formats.base import NumberFormat, Spelling
from mxlab.formats.block import BlockFP, BlockLog, BlockMinifloat
from mxlab.formats.elements import element
from mxlab.formats.family import FormatFamily
from mxlab.formats.mx import MXFormat
from mxlab.formats.scalar import Integer, Log, MinifloatDenorm, MinifloatIEEE
from mxlab.formats.sign import Binary, ResidualBinary, Ternary

FAMILIES: dict[str, type[FormatFamily]] = {
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
# At import, as torch.compile cannot trace dataclasses.fields.
_PARAMETERS = {name: {f.name: f.default for f in fields(family)} for name, family in FAMILIES.items()}
_PARSED: dict[str, NumberFormat] = {}  # no lru_cache: torch.compile warns of those it meets


def parse_format(text: NumberFormat | str) -> NumberFormat:
    """Return the format that ``text`` spells (``fp4_e2m1@32``, ``integer,width=8,frac=4``), or is.

    Raises:
        FormatError: no such format; the message lists both kinds, or names the parameter that could not be read.
    """
    if isinstance(text, NumberFormat):
        return text
    found = _PARSED.get(text) if isinstance(text, str) else None
    if found is None:
        found = _PARSED[text] = _parse(Spelling.read(text))
    return found


def _parse(spelling: Spelling) -> NumberFormat:
    name = spelling.name.lower()
    if family := FAMILIES.get(name):
        return family(**spelling.arguments(_PARAMETERS[name], name))
    try:
        return MXFormat.parse(spelling.text)
    except FormatError as e:
        raise FormatError(f"{e}{_families_hint(name)}") from None


def _families_hint(name: str) -> str:
    """Return what an error adds where ``name`` is no element format: perhaps a family was meant."""
    try:
        element(name)
    except FormatError:
        return f". Beside the MX formats there are {', '.join(FAMILIES)}{suggestion(name, FAMILIES)}"
    return ""
