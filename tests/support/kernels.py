"""Ways to run the native kernels: every instruction set of this processor, and numbers of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mxlab.numerics.kernels import native


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and the kernels, use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def every_way() -> Iterator[str]:
    """Use one instruction set after the other, each with one, two and three threads."""
    if native.MISSING is not None:
        return
    before = native.instruction_set()
    try:
        for name in native._native.instruction_sets():
            native._native.use(name)
            for count in (1, 2, 3):
                with threads(count):
                    yield f"{name}, {count} threads"
    finally:
        native._native.use(before)
