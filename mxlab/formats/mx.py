"""Microscaling (MX) formats: blocks of elements that share a scale.

Source: OCP Microscaling Formats (MX) Specification v1.0, section 6.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from mxlab.checks import check_bool, check_choice, check_int
from mxlab.errors import FormatError
from mxlab.formats.base import ROUNDINGS, NumberFormat, Rounding, Spelling, check_block_size
from mxlab.formats.elements import ElementFormat, element
from mxlab.formats.scales import (
    FP4_RULES,
    SCALE_RULES,
    SCALES,
    ScaleFormat,
    ScaleRule,
    resolved_rounding,
    resolved_rule,
)

_FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class MXFormat(NumberFormat):
    """A microscaling format: blocks of ``block_size`` elements that share one scale.

    Prints as ``fp4_e2m1@32`` with whatever differs from the defaults behind it
    (``fp4_e2m1@32,scale_bits=6,rounding=even``); :meth:`parse` reads that back.

    Attributes:
        element: element format name (see :func:`element`); stored in its canonical spelling.
        block_size: elements that share a scale, along the quantized axis; 0 means the whole axis.
        scale: format of the shared scale (:data:`mxlab.formats.scales.SCALES`): ``e8m0``, a bare exponent; ``e5m3``;
            ``e4m3``, with one float32 scale for the tensor (NVFP4).
        scale_bits: width of the shared exponent, 1..8; 0 means 8, as in microxcaling.
        scale_rule: how the scale is chosen (:mod:`mxlab.formats.scales`); with a floating-point scale ``floor`` means
            ``max``.
        rounding: ``nearest`` (ties away from zero), ``nearest_zero`` (ties toward zero), ``even`` (ties to even),
            ``floor`` (toward zero) or ``dither`` (stochastic); with the rule ``mase_int``, ``nearest`` means ``even``.
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
    _element: ClassVar[ElementFormat]  # not a dataclass field; set in __post_init__

    def __post_init__(self) -> None:
        row = element(self.element)
        object.__setattr__(self, "element", row.name)
        check_block_size(self.block_size)
        check_int("scale_bits", self.scale_bits, 0, 8, "1 to 8, or 0 for 8")
        object.__setattr__(self, "scale_bits", self.scale_bits or 8)
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("scale_rule", self.scale_rule, SCALE_RULES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_bool("flush_fp32_subnorms", self.flush_fp32_subnorms)
        self._resolve(row)
        object.__setattr__(self, "_element", row)
        self._spell(f"{self.element}@{self.block_size}", _OPTIONS | {"scale_rule": self.scale_format.default_rule})

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
    def is_idempotent(self) -> bool:
        """Whether quantizing a quantized tensor once more leaves it unchanged, in the ``exact`` numerics."""
        return not self.scale_format.is_float and self.scale_rule not in ("mase_int", *FP4_RULES)

    @property
    def has_kernels(self) -> bool:
        """Whether the compiled backends have the format; eager torch has all."""
        return self.scale_rule not in FP4_RULES

    @property
    def element_bits(self) -> int:
        """Storage of one element in bits, sign included."""
        return self._element.bits

    @property
    def shared_bits(self) -> int:
        """The scale of a block; under the rule ``none`` every element has one of its own."""
        return self.scale_bits

    @property
    def tensor_bits(self) -> int:
        """The scale of the tensor, where there is one."""
        return self.scale_format.tensor_bits

    @property
    def elements_per_scale(self) -> int:
        """Elements that share one scale: each has its own under the rule ``none``; 0 means the whole axis."""
        return 1 if self.scale_rule == "none" else self.block_size

    @classmethod
    def parse(cls, text: str | MXFormat) -> MXFormat:
        """Return the format that ``text`` spells, such as ``fp6_e2m3@32`` or ``int8@16,scale_bits=6``.

        The block size may be left out (32). ``nvfp4`` is ``fp4_e2m1@16,scale=e4m3``.

        Raises:
            FormatError: not a format; the message names the part that could not be read.
        """
        if isinstance(text, MXFormat):
            return text
        spelling = Spelling.read(text)
        if spelling.name.lower() == "nvfp4":
            spelling = replace(
                spelling,
                name="fp4_e2m1",
                block_size=spelling.block_size or "16",
                options=("scale=e4m3", *spelling.options),
            )
        return cls(spelling.name, **spelling.arguments(_PARAMETERS, "an MX format"))


# At import, as torch.compile cannot trace dataclasses.fields.
_PARAMETERS = {f.name: f.default for f in fields(MXFormat) if f.name != "element"}
_OPTIONS = {name: default for name, default in _PARAMETERS.items() if name != "block_size"}
