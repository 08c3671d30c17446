"""A weight on the grid beside what it was chosen for, and what its elements are multiples of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.numerics.blocks import Blocks
from mxlab.numerics.reference import block_layout
from mxlab.ptq.scales import rounded


@dataclass(frozen=True)
class ChosenWeight:
    """The quantized weight of one layer.

    Attributes:
        name: of the layer.
        shares_with: name of the first of the layers that read the same input under the same transform.
        layer: whose weight holds the values on the grid, in the basis of its transform.
        fmt: their format.
        scales: of the blocks, [out, blocks, 1].
        target: [out, in], what was to be rounded, in the same basis.
    """

    name: str
    shares_with: str
    layer: QuantizedLayer
    fmt: MXFormat
    scales: Tensor
    target: Tensor

    @property
    def values(self) -> Tensor:
        """The weight as [out, in]."""
        return self.by_outputs(self.layer.weight.detach())

    def by_outputs(self, weight: Tensor) -> Tensor:
        """Return a tensor of the shape of the layer's weight as [out, in]."""
        return weight.t() if self.layer.input_axis == 0 else weight

    @property
    def blocks(self) -> Blocks:
        """How [out, in] is cut into blocks."""
        return block_layout(self.target, self.fmt, (1,))

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight [out, in] on the grid of the present scales."""
        cut = self.blocks
        return cut.join(rounded(cut.split(weight), self.scales, self.fmt))
