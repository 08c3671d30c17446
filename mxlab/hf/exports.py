"""What exports to other tools have in common: weights in the bits of their format, and nothing lost unsaid."""

from __future__ import annotations

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model.apply import apply
from mxlab.model.conversion import Conversion
from mxlab.model.plan import QuantizedSite
from mxlab.recipe import Recipe
from mxlab.recipe.rule import PHASES
from mxlab.sources import models
from mxlab.sources.models import LoadedModel


def packed_model(
    model: str, recipe: Recipe, dtype: str, weights_only: bool, tool: str
) -> tuple[LoadedModel, Conversion]:
    """Load a model and pack its weights, to be exported.

    Args:
        model: a hub name, a folder, or ``smollm2``; one that mxlab saved is taken as it is.
        recipe: what to quantize.
        dtype: of what stays unquantized.
        weights_only: leave out what a recipe has beside weights, such as activations and the KV cache.
        tool: what it is exported to, for errors.

    Raises:
        ConversionError: no weight is quantized, or something else is and ``weights_only`` is not given.
    """
    loaded = models.load_model(model, dtype, "cpu")
    conversion = apply(loaded.model, recipe, "packed")
    _refuse_others(conversion, weights_only, tool)
    return loaded, conversion


def weight_format(site: QuantizedSite, tool: str) -> MXFormat:
    """Return the format of a packed weight [outputs, inputs] in whole blocks, that the layer multiplies as it is.

    Raises:
        ConversionError: it is transposed, has a block that is not whole, or a transform.
    """
    fmt = site.formats["weight"]
    assert isinstance(fmt, MXFormat)
    length = site.shape[site.input_axis]
    if fmt.block_size and length % fmt.block_size:
        raise ConversionError(
            f"{site.name} has {length} inputs, and {tool} wants whole blocks of {fmt.block_size}: leave it out"
        )
    if site.input_axis == 0:
        raise ConversionError(f"{site.name} keeps its weight as [inputs, outputs], which {tool} has not")
    if site.transform is not None:
        raise ConversionError(f"{site.name} has a transform ({site.transform}), which {tool} does not apply")
    return fmt


def _refuse_others(conversion: Conversion, weights_only: bool, tool: str) -> None:
    if not any(site.is_packed for site in conversion.linears):
        raise ConversionError(f"recipe {conversion.recipe.name} quantizes no weight of a linear layer")
    others = sorted(
        {
            f"{role} of {fmt}"
            for site in conversion.sites
            for phase in PHASES
            for role, fmt in site.by_phase[phase].items()
            if role != "weight"
        }
    )
    if conversion.recipe.elementwise.is_used:
        others.append("element-wise rounding")
    if others and not weights_only:
        raise ConversionError(
            f"recipe {conversion.recipe.name} has {', '.join(others)}, which {tool} rounds in its own way or not at "
            "all: --weights-only leaves them out"
        )
