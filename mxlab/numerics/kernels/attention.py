"""Products of queries with packed keys, and of probabilities with packed values (``csrc/attend.h``), on the CPU.

Codes are unpacked a few tokens at a time, in the processor's cache, and multiplied in float32. The order of the sums
depends on the shapes alone: the bits are those of any instruction set and number of threads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import MXFormat
from mxlab.numerics.codes import scale_values
from mxlab.numerics.kernels import native
from mxlab.numerics.kernels.compiled import address
from mxlab.numerics.kernels.packing import codes

_LANES, _MOST_LENGTH = 8, 1024  # LANES in attend.h, MOST_LENGTH in dot.h
MOST_ROWS = 16  # for which unpacking is worth it again and again


class PackedHeads(NamedTuple):
    """Keys or values in the codes of a format.

    Attributes:
        elements: uint8 [batch, heads, tokens, bytes], packed codes of head_dim elements.
        scales: uint8 [batch, heads, tokens, blocks].
        fmt: whose scale of a tensor, if it has one, is taken for 1.
        length: head_dim.
    """

    elements: Tensor
    scales: Tensor
    fmt: MXFormat
    length: int


def obstacle(heads: PackedHeads, rows: int) -> str | None:
    """Return why so many rows for each head cannot be multiplied by packed ones; None where they can."""
    if native.MISSING:
        return f"the native kernels are missing ({native.MISSING})"
    if heads.elements.device.type != "cpu":
        return f"the codes are on {heads.elements.device}"
    if heads.length % _LANES or not 0 < heads.length <= _MOST_LENGTH:
        return f"head_dim is {heads.length}"
    if not 0 < rows <= MOST_ROWS or not heads.elements.numel():
        return f"there are {rows} rows, and {heads.elements.shape[-2]} tokens"
    return None


def score(queries: Tensor, keys: PackedHeads) -> Tensor:
    """Return the products of queries [batch, heads, rows, head_dim] with keys, float32 [batch, heads, rows, tokens].

    Raises:
        FormatError: other sizes than those of the keys, or not on the CPU.
    """
    return _multiplied("score", queries, keys, keys.length, keys.elements.shape[-2])


def mix(probabilities: Tensor, values: PackedHeads) -> Tensor:
    """Return probabilities [batch, heads, rows, tokens] times values, float32 [batch, heads, rows, head_dim].

    Raises:
        FormatError: as :func:`score`.
    """
    return _multiplied("mix", probabilities, values, values.elements.shape[-2], values.length)


def _multiplied(name: str, source: Tensor, heads: PackedHeads, summed: int, length: int) -> Tensor:
    batch, states, *_ = heads.elements.shape
    if source.device.type != "cpu" or (*source.shape[:2], source.shape[-1]) != (batch, states, summed):
        raise FormatError(
            f"rows {tuple(source.shape)} on {source.device} cannot be multiplied by packed ones on the CPU: "
            f"({batch}, {states}, rows, {summed}) are wanted"
        )
    given = source.to(torch.float32).contiguous()
    out = torch.empty(*source.shape[:-1], length)
    elements, scales = _dense(heads.elements), _dense(heads.scales)
    element, values, scale_of = _table(heads.fmt)
    shape = *elements.shape[:3], heads.length, heads.fmt.elements_per_scale or heads.length, elements.shape[-1]
    addresses = elements.data_ptr(), scales.data_ptr(), scale_of.data_ptr(), element, address(values)
    plan = native.packed_heads(*addresses, *shape, *elements.stride()[:2], *scales.stride()[:2])
    getattr(plan, name)(given.data_ptr(), source.shape[-2], out.data_ptr(), torch.get_num_threads())
    return out


def _dense(codes: Tensor) -> Tensor:
    """Return codes whose last two axes are dense."""
    return codes if codes.stride()[-2:] == (codes.shape[-1], 1) else codes.contiguous()


@functools.cache
def _table(fmt: MXFormat) -> tuple:
    """Return what the codes of a format are to the kernels, their values, and those of the scales."""
    element, values, unit = codes(fmt)
    return element, values, scale_values(fmt) * unit
