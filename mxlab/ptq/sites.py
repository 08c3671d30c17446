"""What the algorithms ask of a site's weight."""

from __future__ import annotations

from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.model.nn.operands import LinearOperands
from mxlab.model.plan import QuantizedSite
from mxlab.numerics.transforms import inverse_transposed


def layer_at(site: QuantizedSite) -> QuantizedLayer:
    """Return the converted layer of a site of linear layers."""
    assert isinstance(site.module, QuantizedLayer)
    return site.module


def weight_format(site: QuantizedSite) -> MXFormat:
    """Return the format of a site's weight, which is a microscaling one."""
    fmt = site.formats["weight"]
    assert isinstance(fmt, MXFormat)
    return fmt


def by_outputs(site: QuantizedSite) -> Tensor:
    """Return the weight of a linear layer as float32 [out, in]."""
    weight = site.weight.detach().float()
    return weight.t() if site.input_axis == 0 else weight


def round_to_nearest(site: QuantizedSite) -> None:
    """Quantize the weight of a linear layer as it is, in the basis of its transform."""
    layer = layer_at(site)
    operands = layer.operands["prefill"]
    layer.freeze_as(operands.on_transformed_weight(weight_in_basis(by_outputs(site), operands, layer.input_transform)))


def weight_in_basis(weight: Tensor, operands: LinearOperands, matrices: Tensor | None) -> Tensor:
    """Return the weight of a linear layer, [out, in], in the basis of a transform of its input.

    Args:
        weight: float32 [out, in].
        operands: what has the transform.
        matrices: by which a transform that is fitted multiplies the input; None where none is.
    """
    return operands.transformed(weight, -1, None if matrices is None else inverse_transposed(matrices))
