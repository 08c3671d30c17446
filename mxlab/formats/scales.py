"""The scale that a block shares, as data: its format, and the rule that chooses it from the block's values.

With amax the largest magnitude of a block, and emax and max the exponent and the value of the largest element, a scale
that is a power of two has as its exponent

- ``floor``: floor(log2 amax) - emax (OCP MX v1.0, section 6.3);
- ``ceil``: ceil(log2 amax) - emax;
- ``even``: ``floor`` of amax rounded to the element's mantissa, half up;
- ``rceil``: ceil(log2(amax / max));
- ``mse``: the better of the clamped ``floor`` exponent and its successor, by sum of squared errors (float32, in index
  order); ``floor`` if the sums are equal;
- ``mase_int``: MASE's MXINT, E = ceil(log2 amax); elements are round(x / 2^E * 2^(B-1)), ties to even, clamped to
  -2^(B-1) and 2^(B-1) - 1;
- ``none``: each element has its own;
- ``four_thirds``: that of ``floor``; the scale is 4/3 times this power of two, with which the largest value of a binade
  becomes the largest element, 8 * 3/4 = 6 (FP-Quant's ``abs_max``; for fp4_e2m1);
- ``quest``: floor(log2(c / 6 * std + 1e-8)), std the standard deviation of the block and c = 2.92247856, where four
  bits best clip a normal distribution (FP-Quant's and QuEST's ``quest``; for fp4_e2m1).

A floating-point scale has one rule, ``max``: amax / max, ties to even. :mod:`mxlab.numerics.reference` says all
of it exactly. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mxlab.errors import FormatError

ScaleRule = Literal["floor", "ceil", "even", "rceil", "mase_int", "mse", "none", "four_thirds", "quest", "max"]

SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)
FP4_RULES = ("four_thirds", "quest")  # for fp4_e2m1 only, and without kernels: eager torch computes them


@dataclass(frozen=True)
class ScaleFormat:
    """The format of a scale: a bare exponent, or a positive floating-point number.

    A floating-point scale has subnormals, the bias 2^(exponent_bits - 1) - 1, and its top code is NaN, as in OFP8's
    E4M3. ``tensor_bits`` is the width of one more scale that all blocks of a tensor share; 0 where there is none.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    tensor_bits: int = 0

    @property
    def is_float(self) -> bool:
        """Whether the scale is a floating-point number, not a bare power of two."""
        return self.mantissa_bits > 0

    @property
    def default_rule(self) -> ScaleRule:
        """The rule that a format with this scale has unless it names another."""
        return "max" if self.is_float else "floor"


SCALES: dict[str, ScaleFormat] = {
    row.name: row
    for row in (
        # OCP MX v1.0, section 5.4.1.
        ScaleFormat("e8m0", 8, 0),
        # Unsigned, 8 bits. One NaN code is all that a scale needs, as in E4M3, so that the largest is 1.75 * 2^16 =
        # 114688. With the top code as a number it would be 122880, with IEEE's reserved binade 61440.
        ScaleFormat("e5m3", 5, 3),
        # NVFP4: OFP8's E4M3 without a sign, below one float32 scale for the tensor.
        ScaleFormat("e4m3", 4, 3, tensor_bits=32),
    )
}


def resolved_rule(scale: ScaleFormat, rule: ScaleRule, scale_bits: int, flush: bool) -> ScaleRule:
    """Return the rule that ``rule`` stands for: with a floating-point scale the default, ``floor``, is ``max``.

    Raises:
        FormatError: a rule or an option that the scale does not have.
    """
    if not scale.is_float:
        if rule == "max":
            others = ", ".join(r for r in SCALE_RULES if r != "max")
            raise FormatError(f"scale_rule is 'max': with the scale {scale.name} it is one of {others}; or scale=e5m3")
        return rule
    if rule not in ("floor", "max"):
        raise FormatError(
            f"scale_rule is {rule!r}: the scale {scale.name} has the rule 'max' only; leave scale_rule out"
        )
    if scale_bits != 8:
        raise FormatError(f"scale_bits is {scale_bits}: the scale {scale.name} has 8 bits; leave scale_bits out")
    if flush:
        raise FormatError(f"flush_fp32_subnorms is true: only the scale e8m0 flushes blocks, not {scale.name}")
    return "max"


def resolved_rounding(rule: ScaleRule, rounding: str, element: str, is_int: bool) -> str:
    """Return the rounding that ``rounding`` stands for: under ``mase_int`` the default, ``nearest``, is ``even``.

    Raises:
        FormatError: an element or a rounding that the rule does not have.
    """
    if rule in FP4_RULES and element != "fp4_e2m1":
        raise FormatError(f"scale_rule is {rule!r}: it is for fp4_e2m1 elements, not for {element}; use floor or rceil")
    if rule == "mse" and rounding == "dither":
        raise FormatError("rounding is 'dither': the rule 'mse' compares errors, which noise would change; use another")
    if rule != "mase_int":
        return rounding
    if not is_int:
        raise FormatError(f"scale_rule is 'mase_int': it is for intB elements, not for {element}; use ceil or rceil")
    if rounding not in ("nearest", "even"):
        raise FormatError(f"rounding is {rounding!r}: the rule 'mase_int' rounds ties to even; leave rounding out")
    return "even"
