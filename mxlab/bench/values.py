"""Numbers to quantize: activations of the embedded model where they have the shape, else random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxlab.bench.subjects import texts
from mxlab.errors import SourceError
from mxlab.sources import models

_TOKENS = (4, 512)
_LAYER = 15  # of 30
RANDOM = "normal random numbers"


class Values:
    """Gives tensors of any shape; ``is_real`` asks for activations where there are any of that width."""

    def __init__(self, is_real: bool) -> None:
        self._recorded = _record() if is_real else {}

    def tensor(self, shape: tuple[int, ...], dtype: str, device: torch.device) -> tuple[Tensor, str]:
        """A tensor, and what its numbers are."""
        kind = getattr(torch, dtype)
        name, found = self._recorded.get(shape[-1], ("", None))
        if found is not None and len(shape) == 2 and shape[0] <= len(found):
            return found[: shape[0]].to(device, kind, copy=True), name
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=kind, device=device), RANDOM


def _record() -> dict[int, tuple[str, Tensor]]:
    """By width: what a query and a down projection in the middle of SmolLM2 read, a row a token of the passages."""
    try:
        loaded = models.load_model(models.EMBEDDED, "float32", "cpu")
    except SourceError:
        return {}  # not installed: the results say what the numbers are
    layer = loaded.model.model.layers[_LAYER]
    found: dict[int, tuple[str, Tensor]] = {}
    _remember(found, layer.self_attn.q_proj, "input of SmolLM2's q_proj")
    _remember(found, layer.mlp.down_proj, "input of SmolLM2's down_proj")
    ids = loaded.tokenizer("\n".join(texts(None, 100)), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loaded.model.model(ids[0, : _TOKENS[0] * _TOKENS[1]].view(_TOKENS))
    return found


def _remember(found: dict[int, tuple[str, Tensor]], linear: Any, name: str) -> None:
    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, 1)
        found[x.shape[-1]] = name, x.clone()

    linear.register_forward_pre_hook(hook)
