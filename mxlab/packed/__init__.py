"""Tensors stored in the bits of their format, and products with them.

Read in this order: ``bits`` (codes of a few bits in bytes), ``tensor`` (MXTensor: codes and scales), ``matmul`` (an
activation times a packed weight).
"""

from mxlab.packed.matmul import linear
from mxlab.packed.tensor import MXTensor

__all__ = ["MXTensor", "linear"]
