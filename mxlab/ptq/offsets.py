"""Fit the offsets of keys: their means over the calibration text, as the quantized model computes them.

A number added to every key moves all scores of a query alike, which the softmax does not see; so the mean need not be
kept on the grid. Source: Zhang et al., "SageAttention", 2024 (arXiv 2410.02367), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mxlab.model.conversion import Conversion
from mxlab.model.nn.attention import K_OFFSET
from mxlab.model.observe import observe_keys
from mxlab.model.plan import QuantizedSite
from mxlab.ptq.statistics import check_finite


@contextmanager
def fitting_offsets(conversion: Conversion, held_out: int) -> Iterator[None]:
    """Set the offset of each attention that has one as the calibration text first passes it, before it is used.

    Args:
        conversion: of the model, through which the text passes while the context is open.
        held_out: how many of the last windows are left out of the means.

    Raises:
        ConversionError: keys that are NaN or infinite.
    """
    fitted: set[str] = set()

    def fit(site: QuantizedSite, keys: Tensor) -> None:
        if site.k_offset and site.name not in fitted:
            fitted.add(site.name)
            check_finite(keys, site.name, "leave the attention out of the recipe")
            offset = site.module.get_buffer(K_OFFSET)
            mean = keys[: len(keys) - held_out].float().mean((0, -2))
            heads = mean.view(len(offset), -1, mean.shape[-1])  # a head may come several times over
            offset.copy_(heads[:, :1].bfloat16())  # so that a model in bfloat16 has the same

    with observe_keys(conversion, fit):
        yield
