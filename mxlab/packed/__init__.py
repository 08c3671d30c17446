"""Tensors stored in the bits of their format."""

from mxlab.packed.tensor import MXTensor

__all__ = ["MXTensor"]
