"""The patched Llama's half of mxlab: what ``modeling_llama.py`` calls when MX_SPECS_JSON is set."""

from __future__ import annotations

import logging

from torch import nn

from mxlab import environment
from mxlab.model.apply import prepare
from mxlab.recipe.mx_specs import MxSpecs

logger = logging.getLogger("mxlab")


def convert_llama(model: nn.Module) -> None:
    """Convert a Llama under construction as MX_SPECS_JSON says, and say so in one log line.

    Raises:
        SpecError: MX_SPECS_JSON cannot be read.
        ConversionError: nothing of the model matches.
    """
    specs = MxSpecs.from_environment()
    assert specs is not None  # the caller looked
    conversion = prepare(model, specs.to_recipe("MX_SPECS_JSON"))
    line = conversion.summary()
    if specs.without_effect:
        line += f"; without effect: {', '.join(specs.without_effect)}"
    # A warning, so that it is seen without any set-up of logging.
    logger.warning(line)
    conversion.write_inventory(environment.inventory_file())
