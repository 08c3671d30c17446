"""Whether a weight is still what it was when something was made of it."""

from __future__ import annotations

import weakref

from torch import Tensor


class Mark:
    """Recognises a weight for as long as it is the same tensor and has not been written to, be it moved or cast.

    Torch does not count writes through ``weight.data``, nor any to a tensor of inference mode.
    """

    __slots__ = ("_version", "_weight", "address")

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version, self.address = weakref.ref(weight), _version(weight), weight.data_ptr()

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the one that was marked, with the values it had."""
        return self._weight() is weight and self._version == _version(weight)

    def is_in_place(self, weight: Tensor) -> bool:
        """The same, and whether it lies where it lay: one that was moved, cast or given other data does not."""
        return self.is_of(weight) and self.address == weight.data_ptr()


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
