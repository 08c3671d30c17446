"""How far a model's next tokens are from the unquantized model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def divergence(model: Any, original: Any, windows: Tensor) -> float:
    """Return the mean KL divergence of a model's next tokens from the unquantized model's, in nats.

    Args:
        model: the quantized model.
        original: the unquantized one.
        windows: token ids [windows, tokens]; one window at a time, as logits are the largest tensors by far.
    """
    total = 0.0
    for window in windows.split(1):
        ids = window.to(model.device)
        total += mean_divergence(log_probabilities(original, ids), log_probabilities(model, ids))
    return total / len(windows)


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return the log-probabilities [windows, tokens, vocabulary] of the tokens after each, float32."""
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def mean_divergence(wanted: Tensor, found: Tensor) -> float:
    """Return the mean over tokens of KL(wanted, found), of log-probabilities."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())
