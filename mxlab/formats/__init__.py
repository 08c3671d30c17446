"""What a number can be: element formats, MX formats and the families beside them, as frozen data. No torch.

Read in this order: ``base`` (what every format has, and how it is spelled), ``elements`` (scalar formats as rows of a
table), ``scales`` (formats and rules of the shared scale), ``mx`` (blocks of elements under one scale); then the
families beside microscaling: ``family`` (their base), ``scalar`` (every element alone), ``block`` (a shared exponent or
bias), ``sign`` (one to three bits); ``parse`` reads the text of any of them.

Each class says in its docstring what it computes; :mod:`mxlab.numerics` does it. Common to the families: round() goes
to the nearest integer, ties to even; clamp(v, low, high) limits v. A zero result is +0. Where every element stands
alone, NaN stays NaN and an infinity saturates. Where elements share something, a NaN or an infinity among them makes
all of them NaN. The result of a formula is rounded once, to the tensor's dtype, at whose largest value it saturates.
"""

from mxlab.formats.base import MICROXCALING_ROUNDINGS, NUMERICS, ROUNDINGS, NumberFormat, Numerics, Rounding
from mxlab.formats.block import BlockFP, BlockLog, BlockMinifloat
from mxlab.formats.elements import ALIASES, ELEMENTS, ElementFormat, element, elementwise_format
from mxlab.formats.family import FormatFamily
from mxlab.formats.mx import MXFormat
from mxlab.formats.parse import FAMILIES, parse_format
from mxlab.formats.scalar import Integer, Log, MinifloatDenorm, MinifloatIEEE
from mxlab.formats.scales import SCALE_RULES, SCALES, ScaleFormat, ScaleRule
from mxlab.formats.sign import Binary, ResidualBinary, Ternary

__all__ = [
    "ALIASES",
    "ELEMENTS",
    "FAMILIES",
    "MICROXCALING_ROUNDINGS",
    "NUMERICS",
    "ROUNDINGS",
    "SCALES",
    "SCALE_RULES",
    "Binary",
    "BlockFP",
    "BlockLog",
    "BlockMinifloat",
    "ElementFormat",
    "FormatFamily",
    "Integer",
    "Log",
    "MXFormat",
    "MinifloatDenorm",
    "MinifloatIEEE",
    "NumberFormat",
    "Numerics",
    "ResidualBinary",
    "Rounding",
    "ScaleFormat",
    "ScaleRule",
    "Ternary",
    "element",
    "elementwise_format",
    "parse_format",
]
