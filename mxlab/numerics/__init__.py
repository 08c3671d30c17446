"""How a number format is computed: the numerics, in every backend, to the same bits.

Read in this order: ``quantization`` (the functions that everything else calls), ``reference`` (the ``exact`` numerics
in eager torch: the readable specification), ``blocks`` (cutting a tensor into blocks), ``microxcaling`` (the published
emulator's numerics), ``families`` (the formats beside microscaling), ``philox`` (random numbers for dither rounding),
``operators`` (torch operators, which choose a backend by the tensor's device), ``kernels`` (C++ and CUDA).
"""

from mxlab.numerics.quantization import (
    DTYPES,
    is_lossless,
    quantize,
    quantize_,
    round_elementwise,
    scale_clamps,
)

__all__ = ["DTYPES", "is_lossless", "quantize", "quantize_", "round_elementwise", "scale_clamps"]
