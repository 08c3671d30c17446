"""Ways to run the native kernels: every instruction set of this processor, and numbers of threads."""

from collections.abc import Iterator

from mxlab.bench.timing import threads
from mxlab.numerics.kernels import native


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
