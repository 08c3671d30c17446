"""Models for many evaluations in a row: each gets a copy of its own, loaded once."""

from __future__ import annotations

import copy
import gc
from typing import Any

import psutil

from mxlab import models
from mxlab.errors import SourceError
from mxlab.models import Loaded


class Pool:
    """Lends models: copies, to be changed at will, of the last one, which is kept in main memory as it was loaded.

    A model of which main memory does not hold a second copy is loaded anew each time. One that could not be loaded is
    not looked for again.
    """

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._kept: Loaded | None = None
        self._failures: dict[tuple[str, str], SourceError] = {}

    def load(self, name: str, dtype: str, device: str) -> Loaded:
        """As :func:`mxlab.models.load`."""
        place = models.choose_device(device)
        kept = self._get((name, dtype))
        if _fits_again(kept.model):
            return Loaded(copy.deepcopy(kept.model).to(place), kept.tokenizer)
        self.clear()
        return Loaded(kept.model.to(place), kept.tokenizer)

    def clear(self) -> None:
        """Give the kept model's memory back."""
        self._key = self._kept = None
        gc.collect()

    def _get(self, key: tuple[str, str]) -> Loaded:
        if key in self._failures:
            raise self._failures[key]
        if self._kept is None or self._key != key:
            self.clear()
            try:
                self._kept = models.load(*key, "cpu")
            except SourceError as e:
                self._failures[key] = e
                raise
            self._key = key
        return self._kept


def _fits_again(model: Any) -> bool:
    """Whether a copy leaves a tenth of the free main memory untouched."""
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return size < 0.9 * psutil.virtual_memory().available
