"""How far a model's next tokens are from the unquantized model's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import MetricError
from mxlab.eval.metrics import kl_divergence


@torch.no_grad()
def divergence(model: Any, original: Any, windows: Tensor) -> float:
    """Return the mean KL divergence of a model's next tokens from the unquantized model's, in nats.

    Args:
        model: the quantized model.
        original: the unquantized one.
        windows: token ids [windows, tokens]; one window at a time, as logits are the largest tensors by far.
    """
    parts = windows.to(model.device).split(1)
    return sum(mean_divergence(logits_of(original, ids), logits_of(model, ids)) for ids in parts) / len(parts)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [windows, tokens, vocabulary] of the tokens after each."""
    return model(input_ids=ids, use_cache=False).logits


def mean_divergence(reference: Tensor, logits: Tensor) -> float:
    """Return the mean over tokens of KL(reference, model); infinite where logits are not numbers."""
    try:
        return kl_divergence(reference.flatten(0, -2), logits.flatten(0, -2)).double().mean().item()
    except MetricError:
        return math.inf
