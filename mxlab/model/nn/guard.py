"""Check before a forward pass that frozen weights are still what was frozen."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxlab.model.nn.experts import QuantizedExperts
from mxlab.model.nn.forward import override_of
from mxlab.model.nn.weights import QuantizedWeight, TensorVersion, verify

logger = logging.getLogger("mxlab")


class WeightGuard(threading.local):
    """Compares the values of all frozen weights once a pass, so that writes count that torch does not count.

    It also looks whether the converted layers of these ``names`` are still in the model.

    PEFT merges adapters through ``weight.data``, NumPy writes through a view. A pass of single tokens, as in decoding,
    is not preceded by a check: reading all weights would take a good part of its time. Compiled code is not checked.
    """

    _depth = 0  # of the passes that the present one is part of

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = tuple(names)
        self._is_missed = False

    def install(self, model: nn.Module) -> None:
        """Check before every call of ``model``, and of the models inside it, which may be called alone."""
        model.register_forward_pre_hook(self._restart)
        model.register_forward_pre_hook(self._begin_all, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        for module in model.modules():
            if module is not model and isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(self._begin, with_kwargs=True)
                module.register_forward_hook(self._end, always_call=True)

    def _restart(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth = 0  # an interrupted pass has not ended

    def _begin_all(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the model that was converted, and that all layers which were are still in it."""
        found = self._check(model, args, kwargs)
        if found and not self._is_missed and sum(isinstance(m, QuantizedWeight) for m in found) < len(self._names):
            self._is_missed = True
            self._warn_of_missing_layers(model)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._check(model, args, kwargs)

    def _check(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[nn.Module]:
        """Verify the weights at the start of a pass; return the modules that were looked at."""
        if torch.compiler.is_compiling():
            return []
        self._depth += 1
        if self._depth > 1 or _is_of_single_tokens(args, kwargs):
            return []
        modules = list(model.modules())
        verify(found for module in modules for found in _versions(module))
        return modules

    def _warn_of_missing_layers(self, model: nn.Module) -> None:
        """Warn where a converted layer was replaced, such as the head by resize_token_embeddings."""
        modules = dict(model.named_modules())
        missing = [name for name in self._names if not isinstance(modules.get(name), QuantizedWeight)]
        logger.warning(
            "%s: converted, but no quantized layer any more; what replaced it computes in full precision. Change the "
            "model before it is converted (as with resize_token_embeddings)",
            ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
        )

    def _end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth = max(0, self._depth - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightGuard, (self._names,)


def _versions(module: nn.Module) -> list[tuple[TensorVersion, Tensor]]:
    if isinstance(module, QuantizedWeight):
        return module.versions()
    experts = override_of(module)
    return experts.versions() if isinstance(experts, QuantizedExperts) else []


def _is_of_single_tokens(args: tuple, kwargs: dict[str, Any]) -> bool:
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    tokens = next((x for x in (*args[:1], *named) if isinstance(x, Tensor)), None)
    return tokens is not None and tokens.ndim > 1 and tokens.shape[1] == 1
