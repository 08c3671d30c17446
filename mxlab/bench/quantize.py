"""Quantizing a tensor, against a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxlab.bench import mxpackage, targets
from mxlab.bench.results import Outcome, Row
from mxlab.bench.settings import (
    Settings,
    check_choices,
    check_dtypes,
    check_numerics,
    expand_formats,
    parse_shape,
    shape_text,
)
from mxlab.bench.timing import Timings, Twin, alternate, clock_for, ratios, spread
from mxlab.bench.workloads import Values
from mxlab.errors import SpecError
from mxlab.formats import MXFormat, Numerics
from mxlab.numerics import quantize, quantize_

CLONE, COPY = "clone", "copy"
_COLUMNS = 4096  # of the tensor that the bandwidth is measured on


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(Settings):
    """Every shape in every dtype and format, under all numerics.

    ``values`` is ``auto`` (activations of the embedded model where they have the shape) or ``random``; ``copy_gib`` the
    size of the tensor on which the share of the copy bandwidth is measured, 0 for none.
    """

    BY_DEVICE: ClassVar[dict[str, dict[str, Any]]] = {"cuda": {"copy_gib": 1.0}}

    repeats: int = 21
    warmup: int = 2
    threads: int = 1
    shapes: tuple[str, ...] = ("2048x576", "2048x1536", "4096x4096")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    formats: tuple[str, ...] = ("fp6_e2m3",)
    blocks: tuple[int, ...] = (16, 32, 64)
    numerics: tuple[Numerics, ...] = ("exact", "microxcaling")
    values: str = "auto"
    copy_gib: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for shape in self.shapes:
            parse_shape(shape)
        check_dtypes(self.dtypes)
        check_numerics(self.numerics)
        check_choices("values", (self.values,), ("auto", "random"))
        expand_formats(self.formats, self.blocks)
        if not 0 <= self.copy_gib < 1024:
            raise SpecError(f"copy_gib is {self.copy_gib}: it must be a size in GiB, or 0 to leave the copy out")


def measure(settings: QuantizeSettings) -> Iterator[tuple[str, Outcome]]:
    """Case after case: what it is, and its rows."""
    values = Values(settings.values == "auto")
    formats = expand_formats(settings.formats, settings.blocks)
    for shape in map(parse_shape, settings.shapes):
        for dtype in settings.dtypes:
            x, data = values.tensor(shape, dtype, settings.place)
            for fmt in formats:
                case = _case(settings, shape, dtype, fmt, data)
                yield f"{shape_text(shape)} {dtype} {fmt}", _outcome(settings, case, x, _twins(settings, x, fmt))
    if settings.copy_gib:
        yield from _bandwidth(settings, formats)


def _bandwidth(settings: QuantizeSettings, formats: list[MXFormat]) -> Iterator[tuple[str, Outcome]]:
    """Measure on a tensor that no cache holds, against a copy to memory that is there already."""
    for dtype in settings.dtypes:
        size = getattr(torch, dtype).itemsize
        shape = max(1, int(settings.copy_gib * 2**30 / size / _COLUMNS)), _COLUMNS
        x, data = Values(False).tensor(shape, dtype, settings.place)
        target = torch.empty_like(x)
        for fmt in formats:
            case = _case(settings, shape, dtype, fmt, data)
            twins = [Twin(COPY, partial(target.copy_, x)), *_out_of_place(settings, x, fmt)]
            yield f"copy of {settings.copy_gib:g} GiB, {dtype} {fmt}", _outcome(settings, case, x, twins)


def _case(settings: QuantizeSettings, shape: tuple[int, ...], dtype: str, fmt: MXFormat, data: str) -> dict[str, Any]:
    return {
        "shape": shape_text(shape),
        "dtype": dtype,
        "format": str(fmt),
        "values": data,
        "threads": settings.threads,
        "device": settings.device,
    }


def _twins(settings: QuantizeSettings, x: Tensor, fmt: MXFormat) -> list[Twin]:
    own = x.clone()  # on the grid after the first call, which makes no difference to the work
    in_place = [
        Twin(f"{numerics}, in place", partial(quantize_, own, fmt, numerics=numerics)) for numerics in settings.numerics
    ]
    guests = [mxpackage.quantizing(x, fmt)] if mxpackage.is_there() and settings.place.type == "cpu" else []
    return [Twin(CLONE, x.clone), *_out_of_place(settings, x, fmt), *in_place, *guests]


def _out_of_place(settings: QuantizeSettings, x: Tensor, fmt: MXFormat) -> list[Twin]:
    return [Twin(numerics, partial(quantize, x, fmt, numerics=numerics)) for numerics in settings.numerics]


def _outcome(settings: QuantizeSettings, case: dict[str, Any], x: Tensor, twins: list[Twin]) -> Outcome:
    timings = alternate(twins, settings.effort, clock_for(settings.place))
    rows = [
        _row(settings, case, x, twin.name, twins[0].name, timings) for twin in twins if twin.name in timings.samples
    ]
    failures = [f"{name}, {case['dtype']} {case['format']}: {error}" for name, error in timings.failures.items()]
    return Outcome(rows, failures)


def _row(settings: QuantizeSettings, case: dict[str, Any], x: Tensor, twin: str, first: str, timings: Timings) -> Row:
    samples, reference = timings.samples[twin], timings.samples[first]
    seconds = spread(samples).median
    figures = {"ns/element": seconds / x.numel() * 1e9, "GB/s": 2 * x.numel() * x.element_size() / seconds / 1e9}
    if twin == first:
        return Row(case, twin, samples, figures=figures)
    target = targets.quantize_target(twin, settings.place.type, case["dtype"], settings.threads)
    if first == COPY:
        # Both read and write the same bytes: the share of the bandwidth is the share of the time.
        figures[targets.FRACTION] = 1 / spread(ratios(samples, reference)).median
        target = targets.bandwidth_target()
    return Row(case, twin, samples, first, reference, figures, target)
