"""Tell prefill from decode, pass by pass."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mxlab.recipe.rule import Phase


class PassPhase(threading.local):
    """Knows, during a forward pass of the model it is installed in, which phase of generation that is.

    ``decode`` is a pass that adds one token to a cache which holds others; every other, and whatever runs outside of a
    pass, is ``prefill``. Threads have a phase each.
    """

    current: Phase = "prefill"

    def __init__(self) -> None:
        self._outer: list[Phase] = []  # of the passes that the present one is part of

    def install(self, model: nn.Module) -> None:
        """Follow every call of ``model``, and of the models inside it, which may be called alone, from now on."""
        model.register_forward_pre_hook(self._restart)
        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(self._begin, with_kwargs=True)
                module.register_forward_hook(self._end, always_call=True)

    def _restart(self, *_: Any) -> None:
        """Forget passes that an interrupt ended: this one is part of no other."""
        self._outer.clear()
        self.current = "prefill"

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the phase from the arguments of a model's forward."""
        self._outer.append(self.current)
        if "past_key_values" not in kwargs:
            return
        cache = kwargs["past_key_values"]
        named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        tokens = next((x for x in (*args[:1], *named) if x is not None), None)
        is_decode = cache is not None and tokens is not None and tokens.shape[1] == 1 and cache.get_seq_length() > 0
        self.current = "decode" if is_decode else "prefill"

    def _end(self, *_: Any) -> None:
        self.current = self._outer.pop() if self._outer else "prefill"

    def __reduce__(self) -> tuple[Any, ...]:
        return PassPhase, ()  # a copy begins outside of a pass; copies of layers that share one share one
