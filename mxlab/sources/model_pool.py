"""Models for many evaluations in a row."""

from __future__ import annotations

import copy

from mxlab.sources import devices, models
from mxlab.sources.models import LoadedModel

_SHARE = 0.25  # of the free memory, that a copy may take


class ModelPool:
    """Lends models that the borrower may change: copies of the last one, which is kept as it was loaded.

    Where a copy would take more than a quarter of the free memory, the model itself is lent, and loaded anew next time.
    """

    def __init__(self) -> None:
        self._key: tuple[str, str, str] | None = None
        self._kept: LoadedModel | None = None

    def load(self, name: str, dtype: str, device: str) -> LoadedModel:
        """Load as :func:`mxlab.sources.models.load_model`."""
        key = (name, dtype, device)
        if self._kept is None or self._key != key:
            self._forget()
            self._key, self._kept = key, models.load_model(*key)
        kept = self._kept
        if devices.has_room_for_copy(kept.model, _SHARE):
            return LoadedModel(copy.deepcopy(kept.model), kept.tokenizer)
        self._forget()
        return kept

    def _forget(self) -> None:
        """Give the memory of the kept model back before another is loaded."""
        self._key = self._kept = None
        devices.release_memory()
