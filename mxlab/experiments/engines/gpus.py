"""Several processes for one sweep, each with a GPU of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing.queues import Queue

import torch

from mxlab import environment
from mxlab.errors import RunError, SpecError
from mxlab.experiments.engines.local import Engine, Point, Summary


@contextmanager
def started(points: Sequence[Point], workers: int) -> Iterator[list[Future[Summary]]]:
    """Yield the futures of the points, which ``workers`` processes make.

    Each process sees one GPU. Run directories are written whole, so that processes do not disturb each other.

    Raises:
        SpecError: there are not so many GPUs, or a point names its device.
        RunError: a process died.
    """
    gpus = _visible_gpus()
    if workers > len(gpus):
        raise SpecError(f"workers is {workers}, one for each GPU, and torch sees {len(gpus)} here: use 1")
    if named := [point.request.device for point in points if point.request.device != "auto"]:
        raise SpecError(f"device is {named[0]!r}: the workers have a GPU each, so leave the device at auto")
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    queue = context.Queue()
    for gpu in gpus[:workers]:
        queue.put(gpu)
    executor = ProcessPoolExecutor(workers, context, _take_gpu, (queue,))
    try:
        yield [executor.submit(_run, point) for point in points]
    except BrokenProcessPool:
        raise RunError(
            "a worker died, perhaps for lack of memory: start the same command again, what is finished is skipped"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _visible_gpus() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = environment.visible_gpus()
    return (named or [str(i) for i in range(count)])[:count]


def _take_gpu(queue: Queue[str]) -> None:
    """See one GPU alone; CUDA reads this when it starts, which it has not yet in a new process."""
    environment.show_one_gpu(queue.get())


def _run(point: Point) -> Summary:
    return _engine().run(point)


@cache
def _engine() -> Engine:
    """Return the engine of this process."""
    return Engine()
