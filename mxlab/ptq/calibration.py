"""Choose the windows of a text by which a model is calibrated, and those held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxlab.errors import SpecError
from mxlab.recipe.algorithms import Calibration


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, tokens]; the last ``held_out`` of them judge what the others chose.

    ``rest`` are the windows of the text that are not held out, the others of ``ids`` first: what learns reads them in
    turn.
    """

    ids: Tensor
    held_out: int
    rest: Tensor

    @property
    def held_out_ids(self) -> Tensor:
        """The windows that are held out."""
        return self.ids[len(self.ids) - self.held_out :]


def sample(ids: Tensor, options: Calibration) -> Windows:
    """Draw windows from a text, without overlap, in an order that the seed decides.

    Args:
        ids: (tokens,), the whole text.
        options: how many windows, of which length.

    Raises:
        SpecError: the text is too short for so many windows.
    """
    wanted = options.samples + options.held_out
    there = len(ids) // options.length
    if there < wanted:
        raise SpecError(
            f"the calibration text {options.text} has {len(ids)} tokens, {there} windows of {options.length}: for "
            f"{options.samples} windows and {options.held_out} held out it takes {wanted}; ask for fewer or shorter "
            "ones (samples, length), or give a longer text"
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(options.seed))
    drawn = ids[: there * options.length].view(there, options.length)[order]
    rest = torch.cat([drawn[: options.samples], drawn[wanted:]])
    return Windows(drawn[:wanted], options.held_out, rest)
