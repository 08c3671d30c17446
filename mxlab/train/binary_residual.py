"""Residual binarization with learnable means, for quantization-aware training.

The format ``binary_residual`` takes the means from the data each time; here they are parameters. Source: Ghasemzadeh,
Samragh, Koushanfar, "ReBNet: residual binarized neural network", FCCM 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mxlab.errors import FormatError
from mxlab.formats import ResidualBinary


class BinaryResidual(nn.Module):
    """The sum over levels i of means[i]·sign(r_i), r_1 = x, r_(i+1) = r_i - means[i]·sign(r_i), the sign of 0 being 1.

    A mean gets the gradient of its sum of signs; the gradient of x passes straight through.

    Attributes:
        means: (levels, ...); each of them fits x by broadcasting: (levels, out, 1) for a weight [out, in].

    Raises:
        FormatError: not 1 to 3 levels.
    """

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        ResidualBinary(len(means))  # checks the number of levels
        self.means = nn.Parameter(means.detach().clone())

    @classmethod
    def from_data(cls, x: Tensor, levels: int = 2, axis: int | Sequence[int] = -1) -> BinaryResidual:
        """Make one with the means that the format ``binary_residual`` takes from ``x`` along ``axis``.

        An axis whose length changes from call to call, such as that of the tokens of an activation, belongs to
        ``axis``, too: ``axis=range(x.ndim)`` gives one mean a level, as in the paper.
        """
        rest, means = x.detach().to(torch.float32), []
        for _ in range(ResidualBinary(levels).levels):
            means.append(rest.abs().mean(tuple(axis) if isinstance(axis, Sequence) else axis, keepdim=True))
            rest = rest - means[-1] * _sign(rest)
        return cls(torch.stack(means))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid of its signs; same shape and dtype.

        Raises:
            FormatError: the means do not fit the shape of ``x``.
        """
        self._check(x)
        rest = x.detach().to(self.means.dtype)
        y = torch.zeros_like(rest)
        for mean in self.means:
            sign = _sign(rest)
            rest = rest - mean.detach() * sign
            y = y + mean * sign
        return y.to(x.dtype) + (x - x.detach())

    def extra_repr(self) -> str:  # noqa: D102
        return f"levels={len(self.means)}, means={tuple(self.means.shape)}"

    def _check(self, x: Tensor) -> None:
        means = self.means.shape[1:]
        missing = x.ndim - len(means)
        if missing < 0 or any(m not in (1, n) for m, n in zip(means, x.shape[missing:], strict=True)):
            raise FormatError(
                f"means for tensors that fit {tuple(means)} meet x of shape {tuple(x.shape)}: make them with "
                "BinaryResidual.from_data from a tensor of that shape, or over more axes"
            )


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
