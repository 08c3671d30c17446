"""What the algorithms ask of a site's weight."""

from __future__ import annotations

from torch import Tensor

from mxlab.formats import MXFormat
from mxlab.model.plan import QuantizedSite


def weight_format(site: QuantizedSite) -> MXFormat:
    """Return the format of a site's weight, which is a microscaling one."""
    fmt = site.formats["weight"]
    assert isinstance(fmt, MXFormat)
    return fmt


def by_outputs(site: QuantizedSite) -> Tensor:
    """Return the weight of a linear layer as float32 [out, in]."""
    weight = site.weight.detach().float()
    return weight.t() if site.input_axis == 0 else weight
