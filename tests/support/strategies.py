"""Tensors and formats for hypothesis to draw."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from mxlab.formats import ELEMENTS, MICROXCALING_ROUNDINGS, ROUNDINGS, MXFormat, element
from mxlab.formats.scales import FP4_RULES, SCALE_RULES

PARAMETRIC = [f"int{b}" for b in range(2, 9)] + [
    f"fp{n}_e{x}m{n - 1 - x}" for n in range(2, 9) for x in range(1, n) if n - 1 - x >= 0
]
EVERY_NAME = sorted({*ELEMENTS, *PARAMETRIC})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The numerics, and the roundings that each has.
NUMERICS_ROUNDINGS = [
    *(("exact", rounding) for rounding in ROUNDINGS),
    *(("microxcaling", rounding) for rounding in MICROXCALING_ROUNDINGS),
]

dtypes = st.sampled_from(DTYPES)
anything = st.one_of(
    st.floats(-8, 8, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.75, 2.0**-149, -(2.0**-126), 2.0**127]),
)
# Far from every limit of range, so that nothing is clamped, flushed or subnormal: 2^-20 to 2^5.
moderate = st.one_of(
    st.floats(2.0**-20, 32, width=32), st.floats(-32, -(2.0**-20), width=32), st.sampled_from([0.0, 1.0, -1.5])
)
every_rounding = st.sampled_from(ROUNDINGS)
deterministic = st.sampled_from([r for r in ROUNDINGS if r != "dither"])


@st.composite
def tensors(draw, dims=(1, 3), side=12, elements=anything):
    shape = draw(array_shapes(min_dims=dims[0], max_dims=dims[1], min_side=1, max_side=side))
    x = torch.from_numpy(draw(arrays(np.float32, shape, elements=elements)))
    return x.to(draw(dtypes))


def allowed(element_name: str, rule: str, rounding: str) -> bool:
    """Whether a scale that is a power of two can have the rule, in every backend."""
    if rule == "mase_int":
        return element_name.startswith("int") and rounding in ("nearest", "even")
    return rule not in ("max", *FP4_RULES) and (rule, rounding) != ("mse", "dither")


@st.composite
def formats(draw, rounding=every_rounding, rules=SCALE_RULES, **fixed):
    """Formats whose scale is a power of two."""
    name, mode = draw(st.sampled_from(EVERY_NAME)), draw(rounding)
    fields = {
        "block_size": st.integers(0, 9),
        "scale_bits": st.integers(1, 8),
        "scale_rule": st.sampled_from([rule for rule in rules if allowed(name, rule, mode)]),
        "flush_fp32_subnorms": st.booleans(),
    }
    return MXFormat(name, rounding=mode, **{k: fixed[k] if k in fixed else draw(s) for k, s in fields.items()})


def float_scaled(rounding=every_rounding, scales=("e5m3", "e4m3")):
    """Formats whose scale is a floating-point number."""
    names = st.sampled_from([name for name in EVERY_NAME if name != "bf16"])
    return st.builds(MXFormat, names, st.integers(0, 9), st.sampled_from(scales), rounding=rounding)


def full_range(**fixed):
    """Formats whose scale reaches everywhere: what is left is the rounding."""
    return formats(scale_bits=8, flush_fp32_subnorms=False, **fixed)


def refused(x: Tensor, fmt: MXFormat, numerics: str) -> bool:
    """Whether microxcaling has no such rule or rounding, or no room in the dtype for the largest code."""
    known = fmt.scale_rule in ("floor", "none") and fmt.rounding in MICROXCALING_ROUNDINGS
    known &= element(fmt.element).max <= torch.finfo(x.dtype).max
    return numerics == "microxcaling" and not known
