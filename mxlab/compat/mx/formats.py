"""microxcaling's names of formats and roundings, for mxlab's rows."""

from __future__ import annotations

from enum import Enum, IntEnum

from mxlab.errors import FormatError
from mxlab.formats import ALIASES, ELEMENTS, ElementFormat, element


class RoundingMode(IntEnum):
    """The roundings that microxcaling's kernels know."""

    nearest = 0
    floor = 1
    even = 2

    @staticmethod
    def string_enums() -> list[str]:
        """Return the names of all members."""
        return [mode.name for mode in RoundingMode]


class _Named(Enum):
    @classmethod
    def from_str(cls, s: str) -> _Named:
        """Return the member of that name. Raises FormatError where there is none."""
        row = element(s)
        if row.name not in ELEMENTS:
            raise FormatError(f"{s!r} is no member of ElemFormat: pass the name itself instead")
        return cls(row.name)


# The element formats; the value of each is its name in mxlab.
ElemFormat = _Named("ElemFormat", {name: name for name in ELEMENTS} | ALIASES, module=__name__)


def row(fmt: str | Enum) -> ElementFormat:
    """Return the element format that a name or a member of :data:`ElemFormat` stands for.

    Raises:
        FormatError: no such format.
    """
    return element(fmt.value if isinstance(fmt, Enum) else fmt)


def _get_format_params(fmt: str | Enum) -> tuple[int, int, int, float, float]:
    """Exponent bits, mantissa bits with the sign and the leading one, emax, largest and smallest normal number."""
    found = row(fmt)
    return (
        found.exponent_bits,
        found.mantissa_bits + 2,
        found.emax,
        found.max,
        0 if found.is_int else found.min_normal,
    )


def _get_min_norm(ebits: int) -> float:
    """Return the smallest normal number of a format of ``ebits`` exponent bits; 0 for integers."""
    return ElementFormat("", ebits, 0).min_normal if ebits else 0


def _get_max_norm(ebits: int, mbits: int) -> float:
    """Return the largest number of an IEEE format; ``mbits`` counts the sign and the leading one."""
    if ebits < 5:
        raise FormatError(f"ebits is {ebits}: formats of fewer than 5 exponent bits have no infinity")
    return ElementFormat("", ebits, mbits - 2, "ieee").max
