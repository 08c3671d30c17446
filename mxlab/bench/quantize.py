"""Quantizing a tensor, against a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxlab.bench import mxpackage, targets
from mxlab.bench.results import Spread
from mxlab.bench.subjects import Values
from mxlab.bench.timing import Contender
from mxlab.bench.workload import (
    Case,
    Workload,
    check_choices,
    check_dtypes,
    check_numerics,
    expand_formats,
    parse_shape,
    shape_text,
)
from mxlab.errors import SpecError
from mxlab.formats import MXFormat, Numerics
from mxlab.numerics import quantize, quantize_

CLONE, COPY = "clone", "copy"
_COLUMNS = 4096  # of the tensor that the bandwidth is measured on


@dataclass(frozen=True, kw_only=True)
class QuantizeWorkload(Workload):
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

    def __len__(self) -> int:
        """See :meth:`Workload.__len__`."""
        a_shape = len(self.dtypes) * len(self._formats())
        return a_shape * (len(self.shapes) + (self.copy_gib > 0))

    def cases(self) -> Iterator[Case]:
        """See :meth:`Workload.cases`."""
        values = Values(self.values == "auto")
        for shape in map(parse_shape, self.shapes):
            for dtype in self.dtypes:
                x, data = values.tensor(shape, dtype, self.place)
                for fmt in self._formats():
                    name = f"quantize {shape_text(shape)} {dtype} {fmt}"
                    yield self._case(name, x, data, fmt, self._contenders(x, dtype, fmt))
        if self.copy_gib:
            yield from self._bandwidth()

    def _bandwidth(self) -> Iterator[Case]:
        """Measure on a tensor that no cache holds, against a copy to memory that is there already."""
        for dtype in self.dtypes:
            size = getattr(torch, dtype).itemsize
            shape = max(1, int(self.copy_gib * 2**30 / size / _COLUMNS)), _COLUMNS
            x, data = Values(False).tensor(shape, dtype, self.place)
            copy = Contender(COPY, partial(torch.empty_like(x).copy_, x))
            for fmt in self._formats():
                contenders = [
                    copy,
                    *self._out_of_place(x, fmt, dict.fromkeys(self.numerics, targets.bandwidth_target())),
                ]
                yield self._case(f"copy of {self.copy_gib:g} GiB, {dtype} {fmt}", x, data, fmt, contenders)

    def _case(self, name: str, x: Tensor, data: str, fmt: MXFormat, contenders: list[Contender]) -> Case:
        def figures(_: str, seconds: Spread, ratio: Spread | None) -> dict[str, float]:
            bandwidth = 2 * x.numel() * x.element_size() / seconds.median / 1e9
            found = {"ns/element": seconds.median / x.numel() * 1e9, "GB/s": bandwidth}
            if ratio and contenders[0].name == COPY:
                # Both read and write the same bytes: the share of the bandwidth is the share of the time.
                found[targets.FRACTION] = 1 / ratio.median
            return found

        columns = {
            "shape": shape_text(tuple(x.shape)),
            "dtype": str(x.dtype).removeprefix("torch."),
            "format": str(fmt),
        }
        columns |= {"values": data, "threads": self.threads, "device": self.device}
        return Case(name, columns, contenders, self.effort, figures)

    def _contenders(self, x: Tensor, dtype: str, fmt: MXFormat) -> list[Contender]:
        bounds = {name: targets.quantize_target(name, self.place.type, dtype, self.threads) for name in self.numerics}
        own = x.clone()  # on the grid after the first call, which makes no difference to the work
        in_place = [
            Contender(f"{name}, in place", partial(quantize_, own, fmt, numerics=name)) for name in self.numerics
        ]
        others = [mxpackage.quantizing(x, fmt)] if mxpackage.is_there() and self.place.type == "cpu" else []
        return [Contender(CLONE, x.clone), *self._out_of_place(x, fmt, bounds), *in_place, *others]

    def _out_of_place(self, x: Tensor, fmt: MXFormat, bounds: Mapping[Any, targets.Target | None]) -> list[Contender]:
        return [
            Contender(name, partial(quantize, x, fmt, numerics=name), target=bounds[name]) for name in self.numerics
        ]

    def _formats(self) -> list[MXFormat]:
        return expand_formats(self.formats, self.blocks)
