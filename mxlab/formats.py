"""Number formats as data: element formats and the MX formats built from them.

A format is one row: how many exponent and mantissa bits, and which codes are reserved. Bias, exponent range, largest
value and storage cost are derived from the row. Nothing here needs torch.

Sources: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6; OCP 8-bit Floating Point (OFP8) v1.0.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal, get_args

from mxlab.errors import FormatError
from mxlab.scales import SCALE_RULES, SCALES, ScaleFormat, ScaleRule, resolved_rounding, resolved_rule

Specials = Literal["none", "nan", "ieee"]
Numerics = Literal["exact", "microxcaling"]
Rounding = Literal["nearest", "even", "floor", "dither"]

ROUNDINGS: tuple[str, ...] = get_args(Rounding)
NUMERICS: tuple[str, ...] = get_args(Numerics)


@dataclass(frozen=True)
class ElementFormat:
    """A scalar format: sign, ``exponent_bits``, ``mantissa_bits`` (the implicit leading bit not counted).

    An MX integer is the case of no exponent field: one fixed binade below ``2^(emax + 1)``, so that one set of
    formulas serves both. ``specials`` says which codes are not numbers: ``none``; ``nan``, the top mantissa of the
    top exponent (OFP8 E4M3); ``ieee``, the whole top exponent.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: Specials = "none"

    @property
    def is_int(self) -> bool:
        """Whether this is a symmetric fixed-point format (MXINT)."""
        return self.exponent_bits == 0

    @property
    def bits(self) -> int:
        """Storage of one element in bits, sign included (an integer has one bit before the binary point)."""
        return 1 + max(self.exponent_bits, 1) + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias; 0 for integers and for a one-bit exponent."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number; below it the grid is uniform."""
        return 0 if self.is_int else 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest number (OCP MX v1.0, section 5.3: the MX scale is relative to it)."""
        if self.is_int:
            return 0
        return 2**self.exponent_bits - 1 - self.bias - (self.specials == "ieee")

    @property
    def min_normal(self) -> float:
        """The smallest normal number."""
        return 2.0**self.emin

    @property
    def min(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1, self.emin - self.mantissa_bits)

    @property
    def max(self) -> float:
        """The largest finite number."""
        steps = 2 ** (self.mantissa_bits + 1) - 1 - (self.specials == "nan")
        return math.ldexp(steps, self.emax - self.mantissa_bits)

    def magnitudes(self) -> tuple[float, ...]:
        """Every non-negative finite value, ascending: one per code without the sign."""
        per_binade = 2**self.mantissa_bits
        # The binade at emin holds the subnormals (0 .. per_binade - 1) and the first normals above them.
        values = [math.ldexp(k, self.emin - self.mantissa_bits) for k in range(2 * per_binade)]
        for exponent in range(self.emin + 1, self.emax + 1):
            values += [math.ldexp(per_binade + k, exponent - self.mantissa_bits) for k in range(per_binade)]
        return tuple(v for v in values if v <= self.max)

    def __str__(self) -> str:
        return self.name


ELEMENTS: dict[str, ElementFormat] = {
    row.name: row
    for row in (
        ElementFormat("fp8_e5m2", 5, 2, "ieee"),
        ElementFormat("fp8_e4m3", 4, 3, "nan"),
        ElementFormat("fp6_e3m2", 3, 2),
        ElementFormat("fp6_e2m3", 2, 3),
        ElementFormat("fp4_e2m1", 2, 1),
        ElementFormat("int8", 0, 6),
        ElementFormat("int4", 0, 2),
        ElementFormat("int2", 0, 0),
        ElementFormat("fp16", 5, 10, "ieee"),
        ElementFormat("bf16", 8, 7, "ieee"),
    )
}
_FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
ALIASES = {"fp4": "fp4_e2m1", "mxfp4": "fp4_e2m1", "bfloat16": "bf16", "float16": "fp16"}


def element(name: str) -> ElementFormat:
    """The element format called ``name``.

    Besides the table: any ``intB`` (2 <= B <= 8), any ``fpN_eXmY`` with 1 + X + Y = N <= 8, and ``mx`` in front
    (``mxfp6_e2m3``).

    Raises:
        FormatError: no such format; the message lists those that exist.
    """
    key = name.strip().lower() if isinstance(name, str) else name
    key = ALIASES.get(key, key)
    if isinstance(key, str) and key.startswith("mx"):
        key = key.removeprefix("mx")
    found = ELEMENTS.get(key) or _parametric(key)
    if found is None:
        raise FormatError(
            f"unknown element format {name!r}: known are {', '.join(ELEMENTS)}, any intB (B = 2..8) "
            f"and any fpN_eXmY with 1 + X + Y = N <= 8{suggestion(str(name), ELEMENTS)}"
        )
    return found


def _parametric(name: str) -> ElementFormat | None:
    if match := re.fullmatch(r"int([2-8])", str(name)):
        return ElementFormat(str(name), 0, int(match[1]) - 2)
    if match := re.fullmatch(r"fp([0-9])_e([0-9])m([0-9])", str(name)):
        bits, exponent_bits, mantissa_bits = map(int, match.groups())
        if exponent_bits >= 1 and 1 + exponent_bits + mantissa_bits == bits <= 8:
            return ElementFormat(str(name), exponent_bits, mantissa_bits)
    return None


def elementwise_format(bfloat: int = 0, fp: int = 0) -> ElementFormat | None:
    """The scalar format microxcaling's options ``bfloat`` and ``fp`` stand for; None where nothing is rounded.

    Raises:
        FormatError: a width out of range, or both given.
    """
    check_int("bfloat", bfloat, 0, 32, "10 to 32, or 0 for none")
    check_int("fp", fp, 0, 29, "7 to 29, or 0 for none")
    if bfloat and fp:
        raise FormatError(f"bfloat is {bfloat} and fp is {fp}: give one of them, the other 0")
    if 0 < bfloat < 10 or 0 < fp < 7:
        raise FormatError(f"bfloat is {bfloat}, fp is {fp}: bfloat must be 10 to 32 and fp 7 to 29, or 0 for none")
    if fp:
        return ElementFormat(f"fp{fp}", 5, fp - 6, "ieee")
    return ElementFormat(f"bfloat{bfloat}", 8, bfloat - 9, "ieee") if 0 < bfloat < 32 else None


@dataclass(frozen=True)
class MXFormat:
    """A microscaling format: blocks of ``block_size`` elements that share one scale.

    Prints as ``fp4_e2m1@32`` with whatever differs from the defaults behind it
    (``fp4_e2m1@32,scale_bits=6,rounding=even``); :meth:`parse` reads that back.

    Attributes:
        element: element format name (see :func:`element`); stored in its canonical spelling.
        block_size: elements that share a scale, along the quantized axis; 0 means the whole axis.
        scale: format of the shared scale (:data:`mxlab.scales.SCALES`): ``e8m0``, a bare exponent; ``e5m3``; ``e4m3``,
            with one float32 scale for the tensor (NVFP4).
        scale_bits: width of the shared exponent, 1..8; 0 means 8, as in microxcaling.
        scale_rule: how the scale is chosen (:mod:`mxlab.scales`); with a floating-point scale ``floor`` means ``max``.
        rounding: ``nearest`` (ties away from zero), ``even`` (ties to even), ``floor`` (toward zero) or ``dither``
            (stochastic); with the rule ``mase_int``, ``nearest`` means ``even``.
        flush_fp32_subnorms: blocks whose largest magnitude is below 2^-126 become zero.

    Raises:
        FormatError: a field out of range, or fields that exclude each other; the message names the field and what it
            may be.
    """

    element: str
    block_size: int = 32
    scale: str = "e8m0"
    scale_bits: int = 8
    scale_rule: ScaleRule = "floor"
    rounding: Rounding = "nearest"
    flush_fp32_subnorms: bool = False
    _element: ClassVar[ElementFormat]  # these two are no fields, but set for each instance
    _text: ClassVar[str]

    def __post_init__(self) -> None:
        row = element(self.element)
        object.__setattr__(self, "element", row.name)
        check_int("block_size", self.block_size, 0, None, "a positive number of elements, or 0 for the whole axis")
        check_int("scale_bits", self.scale_bits, 0, 8, "1 to 8, or 0 for 8")
        object.__setattr__(self, "scale_bits", self.scale_bits or 8)
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("scale_rule", self.scale_rule, SCALE_RULES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.flush_fp32_subnorms, bool):
            raise FormatError(f"flush_fp32_subnorms is {self.flush_fp32_subnorms!r}: it must be true or false")
        self._resolve(row)
        # Derived once: the name is what the kernels know the format by.
        object.__setattr__(self, "_element", row)
        usual = {f.name: f.default for f in _EXTRAS} | {"scale_rule": self.scale_format.default_rule}
        extras = [f"{name}={_plain(getattr(self, name))}" for name in usual if getattr(self, name) != usual[name]]
        object.__setattr__(self, "_text", ",".join([f"{self.element}@{self.block_size}", *extras]))

    def _resolve(self, row: ElementFormat) -> None:
        """Put what the defaults of rule and rounding mean here in their place; refuse what excludes each other."""
        scale = self.scale_format
        rule = resolved_rule(scale, self.scale_rule, self.scale_bits, self.flush_fp32_subnorms)
        object.__setattr__(self, "scale_rule", rule)
        object.__setattr__(self, "rounding", resolved_rounding(rule, self.rounding, row.name, row.is_int))
        if scale.is_float and row.max * self.scale_grid.max > _FLOAT32_MAX:
            raise FormatError(f"element is {row.name}: times the scale {scale.name} it exceeds float32; use scale=e8m0")

    @property
    def element_format(self) -> ElementFormat:
        """The row behind :attr:`element`."""
        return self._element

    @property
    def grid(self) -> ElementFormat:
        """The element's values as multiples of the scale; those of ``mase_int`` have B - 1 fraction bits, not B - 2."""
        if self.scale_rule == "mase_int":
            return ElementFormat(self.element, 0, self._element.mantissa_bits + 1)
        return self._element

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value of an element, as multiples of the scale."""
        if self.scale_rule == "mase_int":
            return -1.0, 1 - 2.0**-self.grid.mantissa_bits
        return -self._element.max, self._element.max

    @property
    def scale_format(self) -> ScaleFormat:
        """The row behind :attr:`scale`."""
        return SCALES[self.scale]

    @property
    def scale_grid(self) -> ElementFormat:
        """The values of a floating-point scale."""
        return ElementFormat(self.scale, self.scale_format.exponent_bits, self.scale_format.mantissa_bits, "nan")

    @property
    def scale_emax(self) -> int:
        """Largest magnitude of the shared exponent, 2^(scale_bits - 1) - 1."""
        return 2 ** (self.scale_bits - 1) - 1

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a seed."""
        return self.rounding == "dither"

    @property
    def bits_per_element(self) -> float:
        """Storage of one element in bits, its share of the scale included.

        With ``block_size=0`` the share depends on the length of the axis and is not counted; nor is the one scale of
        a tensor. :meth:`storage_bits` counts all.
        """
        block = 1 if self.scale_rule == "none" else self.block_size
        return self._element.bits + (self.scale_bits / block if block else 0)

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Storage of a tensor in bits, blocks along its last axis: elements, the scales of all blocks, partial ones
        too, and the scale of the tensor.

        Raises:
            FormatError: a shape without an axis.
        """
        if not shape:
            raise FormatError("a 0-dimensional tensor has no axis to quantize along: reshape it to (1,)")
        count, length = math.prod(shape), shape[-1]
        if count == 0:
            return 0
        block = 1 if self.scale_rule == "none" else self.block_size or length
        blocks = count // length * -(-length // block)
        return count * self._element.bits + blocks * self.scale_bits + self.scale_format.tensor_bits

    def __str__(self) -> str:
        return self._text

    @classmethod
    def parse(cls, text: str | MXFormat) -> MXFormat:
        """The format that ``text`` spells, such as ``fp6_e2m3@32`` or ``int8@16,scale_bits=6``.

        The block size may be left out (32). ``nvfp4`` is ``fp4_e2m1@16,scale=e4m3``.

        Raises:
            FormatError: not a format; the message names the part that could not be read.
        """
        if isinstance(text, MXFormat):
            return text
        if not isinstance(text, str):
            raise FormatError(f"{text!r} is not a format: write it like 'fp4_e2m1@32'")
        if text not in _PARSED:
            _PARSED[text] = _parse(text)
        return _PARSED[text]


_EXTRAS = tuple(f for f in fields(MXFormat) if f.name not in ("element", "block_size") and f.default is not MISSING)


# Names of whole formats: element, block size, and what stands behind them.
_NAMED = {"nvfp4": ("fp4_e2m1", 16, ["scale=e4m3"])}
_PARSED: dict[str, MXFormat] = {}  # no lru_cache: torch.compile warns of those it meets


def _parse(text: str) -> MXFormat:
    head, *extras = (part.strip() for part in text.split(","))
    name, at, block = head.partition("@")
    name, block_size, implied = _NAMED.get(name.strip().lower(), (name, 32, []))
    block_size = _integer("block_size", block) if at else block_size
    return MXFormat(name, block_size, **_parse_extras([*implied, *extras], text))


def _parse_extras(extras: Sequence[str], text: str) -> dict:
    known = [f.name for f in _EXTRAS]
    values: dict = {}
    for extra in extras:
        key, equals, value = (part.strip() for part in extra.partition("="))
        if key not in known or not equals or key in values:
            raise FormatError(
                f"cannot read {extra!r} in the format {text!r}: after the block size come key=value pairs, each once, "
                f"of {', '.join(known)}{suggestion(key, known)}"
            )
        values[key] = {"true": True, "false": False}.get(value.lower(), value)
        if key == "scale_bits":
            values[key] = _integer(key, value)
    return values


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise FormatError(f"{name} is {text!r}: it must be a whole number") from None


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_int(name: str, value: object, low: int, high: int | None, allowed: str) -> None:
    """Raise FormatError unless ``value`` is an int (no bool) from ``low`` to ``high``; ``allowed`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise FormatError(f"{name} is {value!r}: it must be {allowed}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise FormatError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise FormatError(
            f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}{suggestion(value, allowed)}"
        )


def suggestion(word: object, known: Iterable[object]) -> str:
    """``; did you mean 'x'?`` for the nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
