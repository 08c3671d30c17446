"""Compare the bits of every kernel with the reference's: formats, rules, roundings, dtypes, numerics, layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mxlab import quantize
from mxlab.errors import FormatError
from mxlab.formats import ELEMENTS, MICROXCALING_ROUNDINGS, NUMERICS, ROUNDINGS, MXFormat
from mxlab.formats.scales import SCALE_RULES
from mxlab.numerics import DTYPES, microxcaling, philox, quantize_, round_elementwise
from mxlab.numerics.kernels import cuda, native

SEED = 7
BLOCKS = (1, 8, 16, 32, 64, 128, 256, 5, 100, 0)
# Shapes and axes: the last, with odd lengths and partial blocks; the first; the middle.
SHAPES = (((6, 384), -1), ((7, 100), -1), ((2056,), 0), ((100, 7), 0), ((3, 70, 5), 1))
# Blocks that take two kernels, whole axes, and tiles of two axes.
LONG = (((2, 5000), -1, 0), ((1, 9100), -1, 4500), ((2, 601, 3), 1, 0), ((70, 70), (0, 1), 0), ((50, 70), (0, 1), 32))
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda t: t.permute(2, 0, 1),
    "transposed": lambda t: t.transpose(0, 2),
    "every other row": lambda t: t[:, ::2],
    "unaligned": lambda t: t[..., 1:],
    "expanded": lambda t: t.expand(2, *t.shape),
}

Call = Callable[[Tensor, str], Tensor]  # computes on a tensor with a backend


def cases(device: str) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Return all comparisons, each with its name; a call raises AssertionError where bits differ."""
    backend = "cuda" if device == "cuda" else "native"
    found = [(f"random numbers, seed {seed}", partial(_same_noise, device, seed)) for seed in (0, 1, -1, 2**63 - 1)]
    for name, dtype, shape, call in _quantizations():
        found.append((name, partial(_same, device, backend, call, dtype, shape)))
    return list(dict(found).items())


def _same_noise(device: str, seed: int) -> dict[str, Any]:
    kernels, place = (cuda, native)[device == "cpu"], torch.device(device)
    for count in (1, 4, 1001):
        drawn = kernels.uniform((count,), seed, _with_index(place))
        check(drawn.cpu(), philox.uniform((count,), seed, torch.device("cpu")))
    return {}


def _same(device: str, backend: str, call: Call, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """Compare a computation on the device with the reference's on the CPU."""
    x = numbers(shape, dtype)
    check(call(x.to(device), backend).cpu(), call(x, "reference"))
    return {}


def check(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless both have the same dtype and bits; any NaN equals any other."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise AssertionError(f"{got.dtype} of {tuple(got.shape)}, not {expected.dtype} of {tuple(expected.shape)}")
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    same = got.contiguous().view(bits) == expected.contiguous().view(bits)
    same |= got.isnan() & expected.isnan()
    if not same.all():
        count, wrong = int((~same).sum()), ~same
        raise AssertionError(
            f"{count} of {same.numel()} differ, such as {got[wrong][0].item()!r} for {expected[wrong][0].item()!r}"
        )


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return numbers of all kinds, in runs: of few binades, of many, any bits at all, tiny, ties, zeros."""
    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape)
    x = torch.randn(count, generator=generator)
    wide = x * torch.randn(count, generator=generator).mul(8).exp2()
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    any_bits = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype).float()
    tiny, ties = x * 2.0**-130, (x * 8).round() / 16
    kinds = torch.stack([x, wide, ties, tiny, any_bits, torch.zeros(count)])
    kind = torch.randint(0, 40, (-(-count // 40),), generator=generator).repeat_interleave(40)[:count]
    kind = torch.where(kind > 5, kind % 3, kind)  # runs of one kind, or every block would hold a NaN
    return kinds.gather(0, kind[None])[0].to(dtype).reshape(shape)


# What is compared


def _quantizations() -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Call]]:
    """Yield the name, dtype and shape of each computation, and what computes it; a few of each kind of kernel first."""
    for dtype, numerics, rounding in product(DTYPES, NUMERICS, ROUNDINGS):
        for fmt in _formats([f"{name}@32,rounding={rounding}" for name in (*ELEMENTS, "int3", "fp8_e1m6", "fp5_e3m1")]):
            yield from _calls(fmt, dtype, numerics, SHAPES[:1])
    for dtype, numerics, rounding in product(DTYPES, NUMERICS, ROUNDINGS):
        yield from _rules(dtype, numerics, rounding)
    for dtype, numerics, rounding in product(DTYPES, NUMERICS, ROUNDINGS):
        yield from _roundings(dtype, numerics, rounding)
    for dtype, numerics, rounding in product(DTYPES, NUMERICS, ("nearest", "dither")):
        yield from _layouts(dtype, numerics, rounding)
    for dtype, numerics, rounding in product(DTYPES, NUMERICS, ROUNDINGS):
        yield from _blocks(dtype, numerics, rounding)


def _rules(dtype: torch.dtype, numerics: Any, rounding: str) -> Iterator[tuple]:
    """Every rule and scale, with narrow and flushed scales, along the last axis, the first, and in long blocks."""
    options = [f"scale_rule={rule}" for rule in SCALE_RULES if rule != "max"]
    options += ["scale_bits=4", "flush_fp32_subnorms=true", "scale=e5m3", "scale=e4m3"]
    names = ("fp4_e2m1", "fp8_e4m3", "int8")
    for fmt in _formats([f"{name}@32,{option},rounding={rounding}" for name, option in product(names, options)]):
        yield from _calls(fmt, dtype, numerics, (SHAPES[0], SHAPES[3]))
        if fmt.element == "int8" or fmt.scale_format.is_float:
            for shape, axis, block in LONG[:3]:
                yield from _calls(dataclasses.replace(fmt, block_size=block), dtype, numerics, [(shape, axis)])


def _roundings(dtype: torch.dtype, numerics: Any, rounding: str) -> Iterator[tuple]:
    """Element-wise rounding of aligned and unaligned tensors."""
    if numerics == "microxcaling" and rounding not in MICROXCALING_ROUNDINGS:
        return
    widths = ({"bfloat": 16}, {"bfloat": 12}, {"fp": 16}, {"fp": 8})
    for width, subnormals, start in product(widths, (True, False), (0, 1)):
        ways = {**width, "rounding": rounding, "subnormals": subnormals, "numerics": numerics, "seed": SEED}
        name = f"round_elementwise {width}, {rounding}, subnormals {subnormals}, {numerics}, {dtype}, from {start}"
        yield name, dtype, (3001,), partial(_round, ways, start)


def _layouts(dtype: torch.dtype, numerics: Any, rounding: str) -> Iterator[tuple]:
    """Tensors that are not contiguous; results in place and in a tensor that is given."""
    for fmt in _formats([f"int8@32,rounding={rounding}", f"nvfp4,rounding={rounding}"]):
        if not _has(fmt, dtype, numerics):
            continue
        ways = {"fmt": fmt, "numerics": numerics, "seed": SEED}
        for (view, change), axis in product(VIEWS.items(), (0, 1, -1, (0, 2))):
            name = f"{fmt} {numerics} {dtype} {view} axis {axis}"
            yield name, dtype, (6, 8, 65), partial(_quantize, {**ways, "axis": axis}, change)
        for shape, axis in SHAPES:
            what = f"{fmt} {numerics} {dtype} {shape} axis {axis}"
            yield f"{what} in place", dtype, shape, partial(_in_place, {**ways, "axis": axis})
            yield f"{what} out=", dtype, shape, partial(_out, {**ways, "axis": axis})


def _blocks(dtype: torch.dtype, numerics: Any, rounding: str) -> Iterator[tuple]:
    """Every block size and shape, long blocks and tiles; fp16 as an element that takes all of microxcaling's steps."""
    for fmt in _formats([f"fp6_e2m3@{block},rounding={rounding}" for block in BLOCKS]):
        yield from _calls(fmt, dtype, numerics, SHAPES)
    for name, (shape, axis, block) in product(("fp4_e2m1", "fp16"), LONG):
        fmt = MXFormat.parse(f"{name}@{block},rounding={rounding}")
        yield from _calls(fmt, dtype, numerics, [(shape, axis)])
    yield from _calls(MXFormat.parse(f"fp16@32,rounding={rounding}"), dtype, numerics, SHAPES)


def _calls(fmt: MXFormat, dtype: torch.dtype, numerics: Any, shapes: Any) -> Iterator[tuple]:
    if _has(fmt, dtype, numerics):
        for shape, axis in shapes:
            ways = {"fmt": fmt, "axis": axis, "numerics": numerics, "seed": SEED}
            yield f"{fmt} {numerics} {dtype} {shape} axis {axis}", dtype, shape, partial(_quantize, ways, None)


def _formats(texts: list[str]) -> Iterator[MXFormat]:
    """Yield the formats, without combinations of rule, rounding and element that mxlab refuses."""
    for text in texts:
        with contextlib.suppress(FormatError):
            yield MXFormat.parse(text)


def _has(fmt: MXFormat, dtype: torch.dtype, numerics: str) -> bool:
    """Return whether the numerics have the format in the dtype, and kernels for it."""
    if numerics == "exact":
        return fmt.has_kernels
    try:
        microxcaling.check(fmt, dtype)
    except FormatError:
        return False
    return True


def _quantize(ways: dict[str, Any], change: Callable[[Tensor], Tensor] | None, x: Tensor, backend: str) -> Tensor:
    return quantize(change(x) if change else x, **ways, backend=backend)


def _in_place(ways: dict[str, Any], x: Tensor, backend: str) -> Tensor:
    return quantize_(x.clone(), **ways, backend=backend)


def _out(ways: dict[str, Any], x: Tensor, backend: str) -> Tensor:
    return quantize(x, **ways, backend=backend, out=torch.full_like(x, -1))


def _round(ways: dict[str, Any], start: int, x: Tensor, backend: str) -> Tensor:
    return round_elementwise(x[start:], **ways, backend=backend)


def _with_index(device: torch.device) -> torch.device:
    """Return the device with its number, by which kernels are compiled and launched."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
