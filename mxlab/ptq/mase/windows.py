"""Draw the calibration windows that the tables of a MASE file ask for."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import torch
from torch import Tensor

from mxlab.errors import SpecError
from mxlab.ptq.calibration import Windows
from mxlab.ptq.mase.tables import DATASET, MaseTables
from mxlab.recipe import Recipe

_SEED = 0  # MASE's
_OURS = {"wikitext2": "wikitext2_valid"}

logger = logging.getLogger("mxlab")


def windows(recipe: Recipe, read: Callable[[str], Tensor]) -> Windows:
    """Return the windows of ``[gptq]`` as ``ids``, those of ``[rotation_search]`` as ``rest``; none is held out.

    Args:
        recipe: of a MASE file.
        read: returns the token ids (tokens,) of a text, by its name or file.

    Raises:
        SpecError: an option or a text that cannot be had, or one that is too short.
    """
    tables = MaseTables.of(recipe)
    for_gptq = for_search = torch.empty(0, 0, dtype=torch.long)
    dataset = DATASET if tables.gptq is None else tables.gptq.dataset
    if (gptq := tables.gptq) is not None:
        for_gptq = _drawn(read, dataset, gptq.nsamples, gptq.seqlen, "[gptq]: fewer nsamples or a shorter seqlen")
    if (search := tables.rotation) is not None:
        remedy = "[rotation_search]: fewer calib_nsamples or a shorter calib_seqlen"
        for_search = _drawn(read, search.calib_data or dataset, search.calib_nsamples, search.calib_seqlen, remedy)
    return Windows(for_gptq, 0, for_search)


def _drawn(read: Callable[[str], Tensor], dataset: str, count: int, length: int, remedy: str) -> Tensor:
    """Draw windows [count, length] of a text from anywhere in it, as MASE does; they may overlap."""
    if dataset in _OURS:
        logger.warning("MASE calibrates by the training split of %s, mxlab by %s", dataset, _OURS[dataset])
    ids = read(_OURS.get(dataset, dataset))
    if len(ids) <= length:
        raise SpecError(f"the text {dataset} has {len(ids)} tokens, too few for windows of {length}: ask in {remedy}")
    draw = random.Random(_SEED)
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])
