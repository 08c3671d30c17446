"""Weights on the grid beside what they were chosen for, and what their elements are multiples of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxlab.formats import MXFormat
from mxlab.model.nn.experts import QuantizedExperts
from mxlab.model.nn.linear import QuantizedLayer
from mxlab.numerics.blocks import Blocks
from mxlab.numerics.reference import block_layout
from mxlab.ptq.scales import rounded


@dataclass
class ChosenWeight(ABC):
    """A quantized weight.

    Attributes:
        name: of the layer, or of the parameter.
        fmt: its format.
        scales: of the blocks, [out, blocks, 1].
        target: [out, in], what was to be rounded, in the basis of the transform; None for the values themselves.
    """

    name: str
    fmt: MXFormat
    scales: Tensor
    target: Tensor | None

    @property
    @abstractmethod
    def weight(self) -> nn.Parameter:
        """The parameter with the values on the grid, in the basis of the transform."""

    @abstractmethod
    def by_outputs(self, weight: Tensor) -> Tensor:
        """Return a tensor of the shape of the parameter as [out, in]."""

    @abstractmethod
    def freeze_as(self, values: Tensor) -> None:
        """Give the parameter values [out, in] on the grid."""

    @property
    def values(self) -> Tensor:
        """The weight as [out, in]."""
        return self.by_outputs(self.weight.detach())

    @property
    def blocks(self) -> Blocks:
        """How [out, in] is cut into blocks."""
        return block_layout(self.values, self.fmt, (1,))

    def hold_in_memory(self) -> None:
        """Read all of it into memory of its own on the parameter's device, from the file that keeps it."""
        values, device = self.values.clone(), self.weight.device
        self.target = (values if self.target is None else self.target).to(device, torch.float32, copy=True)
        self.scales = self.scales.to(device, copy=True)
        self.freeze_as(values)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight [out, in] on the grid of the present scales."""
        cut = self.blocks
        return cut.join(rounded(cut.split(weight), self.scales, self.fmt))


@dataclass
class ChosenLayer(ChosenWeight):
    """The weight of a linear layer.

    Attributes:
        layer: which one.
        shares_with: name of the first of the layers that read the same input under the same transform.
    """

    layer: QuantizedLayer
    shares_with: str

    @property
    def weight(self) -> nn.Parameter:  # noqa: D102
        return self.layer.weight

    def by_outputs(self, weight: Tensor) -> Tensor:  # noqa: D102
        return weight.t() if self.layer.input_axis == 0 else weight

    def freeze_as(self, values: Tensor) -> None:  # noqa: D102
        self.layer.freeze_as(values)


@dataclass
class ChosenExperts(ChosenWeight):
    """The weights of all experts in one parameter, those of one below those of the other, or of a router.

    Attributes:
        experts: the module that multiplies by it.
        parameter: its name there.
        is_transposed: whether it is [experts, in, out] instead of [experts, out, in].
    """

    experts: QuantizedExperts
    parameter: str
    is_transposed: bool

    @property
    def weight(self) -> nn.Parameter:  # noqa: D102
        return self.experts.weight(self.parameter)

    def by_outputs(self, weight: Tensor) -> Tensor:  # noqa: D102
        return (weight.mT if self.is_transposed else weight).flatten(0, -2)

    def freeze_as(self, values: Tensor) -> None:  # noqa: D102
        shape = self.weight.mT.shape if self.is_transposed else self.weight.shape
        stacked = values.view(shape)
        self.experts.freeze_as(self.parameter, stacked.mT if self.is_transposed else stacked)
