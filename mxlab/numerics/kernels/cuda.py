"""Compute both numerics in CUDA C++ (``csrc/kernels.cu``), compiled at run time by NVRTC for the GPU at hand.

cuda-core compiles and launches. Unlike CuPy it is NVIDIA's own, follows CUDA 12 and 13, adds only a few megabytes to
the NVRTC that torch brings along, and leaves memory and streams to torch. It is the optional extra ``cuda``; without it
:func:`missing` says so. A kernel is compiled, in a fraction of a second, when its dtype, numerics, rounding and block
size are first met; formats are arguments. Kernels run on torch's current stream, so that CUDA graphs capture them.
"""

from __future__ import annotations

import functools
import importlib
import struct
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxlab.formats import ElementFormat, MXFormat, Numerics, Rounding
from mxlab.numerics.kernels.compiled import Compiled, Layout, address, carry, scaling

SOURCES = Path(__file__).parent / "csrc"
THREADS = 256  # of a thread block: kernels.cu
_AT_ONCE = 2  # vectors of a thread in quantize_vectors
_READ_AT_ONCE = 32  # elements of a thread in find_largest_finite
_STORAGE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A longer block takes two kernels: first its largest magnitude, then its elements. Along the last axis, and another.
_LONG, _LONG_COLUMN = 4096, 512
_PIECE, _PIECE_OF_COLUMN = 1024, 64


class Launch(NamedTuple):
    """A kernel, as a name expression of ``kernels.cu``; the number of threads it needs; its arguments, all integers."""

    kernel: str
    threads: int
    arguments: tuple[int, ...]


class _Cuda(Compiled):
    def uniform(self, shape: torch.Size | tuple[int, ...], seed: int, device: torch.device) -> Tensor:
        out = torch.empty(shape, dtype=torch.float32, device=device)
        _launch(device, plan_uniform(out.data_ptr(), out.numel(), seed))
        return out

    def _run(
        self, x: Tensor, out: Tensor, noise: Tensor | None, fmt: MXFormat, numerics: Numerics, layout: Layout
    ) -> None:
        addresses = x.data_ptr(), out.data_ptr(), address(noise)
        words = scratch_words(fmt, layout)
        scratch = torch.zeros(words, dtype=torch.int32, device=x.device) if words else None
        for launch in plan(addresses, x.dtype, fmt, numerics, layout, address(scratch)):
            _launch(x.device, launch)

    def _run_elementwise(
        self,
        x: Tensor,
        out: Tensor,
        noise: Tensor | None,
        element: ElementFormat,
        rounding: Rounding,
        subnormals: bool,
        numerics: Numerics,
    ) -> None:
        addresses = x.data_ptr(), out.data_ptr(), address(noise)
        launch = plan_elementwise(addresses, x.dtype, x.numel(), element, rounding, subnormals, numerics)
        _launch(x.device, launch)


_backend = _Cuda()
quantize, quantize_out, quantize_ = _backend.quantize, _backend.quantize_out, _backend.quantize_
round_elementwise, uniform = _backend.round_elementwise, _backend.uniform


# Plans: which kernels to launch


def plan(
    addresses: tuple[int, int, int], dtype: torch.dtype, fmt: MXFormat, numerics: Numerics, layout: Layout, scratch: int
) -> list[Launch]:
    """Return the kernels that quantize a tensor, in order.

    Args:
        addresses: of source, target (which may be the source) and noise, in memory of the device; noise may be 0.
        dtype: of source and target.
        fmt: the format.
        numerics: ``exact`` or ``microxcaling``.
        layout: of source and target, not empty.
        scratch: address of :func:`scratch_words` zeros of 32 bits; anything if there are none.
    """
    layout = _simplified(layout)
    if not fmt.scale_format.tensor_bits:
        return _plan_blocks(addresses, dtype, fmt, numerics, layout, scratch, 0)
    count = layout.outer * layout.axis * layout.inner
    kernel, threads = f"find_largest_finite<{_storage(dtype)}>", -(-count // _READ_AT_ONCE)
    largest = Launch(kernel, threads, (addresses[0], scratch, count))
    return [largest, *_plan_blocks(addresses, dtype, fmt, numerics, layout, scratch + 4, scratch)]


def _plan_blocks(
    addresses: tuple[int, int, int],
    dtype: torch.dtype,
    fmt: MXFormat,
    numerics: Numerics,
    layout: Layout,
    amax: int,
    tensor: int,
) -> list[Launch]:
    outer, axis, inner, block = layout
    op = _operation(dtype, fmt, numerics)
    packed = (*_packed_format(fmt), tensor)
    vector = 16 // dtype.itemsize
    if _in_vectors(layout, vector) and not (addresses[0] | addresses[1]) % 16:
        count = outer * axis // vector
        threads = -(-count // _AT_ONCE)
        return [Launch(f"quantize_vectors<{op}, {block}>", threads, (*addresses, count, *packed))]
    if not _is_long(fmt, layout):
        lanes = 1 if scaling(fmt) == "searched" else _lanes(layout)
        threads = outer * -(-axis // block) * inner * lanes
        return [Launch(f"quantize_blocks<{op}>", threads, (*addresses, *layout, lanes, *packed))]
    piece, lanes = (_PIECE, 32) if inner == 1 else (_PIECE_OF_COLUMN, 1)
    threads = outer * -(-axis // block) * -(-block // piece) * inner * lanes
    return [
        Launch(f"find_largest<{_storage(dtype)}>", threads, (addresses[0], amax, *layout, piece, lanes)),
        Launch(f"quantize_pieces<{op}>", threads, (*addresses, amax, *layout, piece, lanes, *packed)),
    ]


def scratch_words(fmt: MXFormat, layout: Layout) -> int:
    """Return how many largest magnitudes are kept between two kernels: of the tensor, and of long blocks."""
    outer, axis, inner, block = layout = _simplified(layout)
    blocks = outer * -(-axis // block) * inner if _is_long(fmt, layout) else 0
    return blocks + (fmt.scale_format.tensor_bits > 0)


def plan_elementwise(
    addresses: tuple[int, int, int],
    dtype: torch.dtype,
    count: int,
    element: ElementFormat,
    rounding: Rounding,
    subnormals: bool,
    numerics: Numerics,
) -> Launch:
    """Return the kernel that rounds ``count`` elements on their own; addresses as in :func:`plan`."""
    op = _expression("Exact" if numerics == "exact" else "Microxcaling", dtype, rounding)
    aligned = not (addresses[0] | addresses[1]) % 16
    arguments = (*addresses, count, int(aligned), int(subnormals), *_packed(element))
    return Launch(f"round_alone<{op}>", -(-count * dtype.itemsize // 16), arguments)


def plan_uniform(target: int, count: int, seed: int) -> Launch:
    """Return the kernel that draws ``count`` random numbers."""
    seed = (seed + 2**63) % 2**64 - 2**63  # 64 bits as a signed integer, the only kind of integer cuda-core passes
    return Launch("uniform_numbers", -(-count // 4), (target, count, seed))


def _simplified(layout: Layout) -> Layout:
    """Return the layout as one row, where every element is a block or blocks fill the rows; else unchanged."""
    outer, axis, inner, block = layout
    if block == 1 or (inner == 1 and axis % block == 0):
        return Layout(1, outer * axis * inner, 1, block)
    return layout


def _in_vectors(layout: Layout, vector: int) -> bool:
    """Return whether a block is one element, or as many whole vectors as some threads of a warp can share."""
    outer, axis, inner, block = layout
    whole = block == 1 or (block % vector == 0 and block // vector in (1, 2, 4, 8, 16, 32))
    return whole and inner == 1 and axis % block == 0 and outer * axis % vector == 0


def _is_long(fmt: MXFormat, layout: Layout) -> bool:
    """Return whether blocks are cut into pieces. A search adds up errors in order: it gives a block to one thread."""
    return scaling(fmt) != "searched" and layout.block > (_LONG if layout.inner == 1 else _LONG_COLUMN)


def _lanes(layout: Layout) -> int:
    """Return how many neighbouring threads share a block: about one per 4 elements, if these are neighbours, too."""
    return 1 if layout.inner > 1 else min(32, 1 << (-(-layout.block // 4) - 1).bit_length())


_OPERATIONS = {"power": "Exact", "asymmetric": "Asymmetric", "searched": "Searched", "floating": "Floating"}


@functools.cache
def _operation(dtype: torch.dtype, fmt: MXFormat, numerics: Numerics) -> str:
    if numerics == "exact":
        return _expression(_OPERATIONS[scaling(fmt)], dtype, fmt.rounding)
    simple = _is_simple(fmt.element_format, dtype)
    return _expression("SimpleMicroxcaling" if simple else "Microxcaling", dtype, fmt.rounding)


def _expression(operation: str, dtype: torch.dtype, rounding: Rounding) -> str:
    return f"mx::device::{operation}<{_storage(dtype)}, mx::Rounding::{rounding}>"


def _storage(dtype: torch.dtype) -> str:
    return f"mx::device::{_STORAGE[dtype]}"


def _is_simple(element: ElementFormat, dtype: torch.dtype) -> bool:
    """Return whether the format meets the conditions of ``round_scaled_simply`` in microxcaling.h."""
    fits = element.mantissa_bits <= 7 and -64 <= element.emin <= 0 and element.emax <= 32
    return fits and dtype != torch.float16


@functools.cache
def _packed(element: ElementFormat) -> tuple[int, int]:
    """Return the two words from which ``unpacked`` of kernels.cu reads an element format."""
    return _word("3B5x", element.mantissa_bits, element.emax, element.is_int), _limits(element.min_normal, element.max)


@functools.cache
def _packed_format(fmt: MXFormat) -> tuple[int, int, int]:
    """Return the three words from which ``unpacked`` of kernels.cu reads a format."""
    grid, scale = fmt.grid, fmt.scale_grid
    small = (grid.mantissa_bits, grid.emax, grid.is_int, fmt.scale_emax, fmt.flush_fp32_subnorms)
    is_float = fmt.scale_format.is_float
    return (
        _word("7Bx", *small, scale.mantissa_bits, scale.emax),
        _limits(grid.min_normal, fmt.limits[1]),
        _limits(scale.min_normal, scale.max) if is_float else carry(fmt),
    )


def _limits(smallest_normal: float, largest: float) -> int:
    return _word("2f", smallest_normal, largest)


def _word(layout: str, *values: float) -> int:
    """Pack values into 64 bits; ``layout`` as in :mod:`struct`."""
    return int.from_bytes(struct.pack(f"<{layout}", *values), "little")


# Compiling and launching


@functools.cache
def missing() -> str | None:
    """Return why the CUDA kernels are missing; None where they are there. Compiles one to find out."""
    if torch.version.hip:
        return "torch is built for ROCm, not for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        _kernel("uniform_numbers", torch.cuda.current_device())
    except Exception as e:  # drivers, compilers and packages fail in many ways
        return f"{type(e).__name__}: {e}".partition("\n")[0]
    return None


def remedy() -> str:
    """Return what to do where the kernels are missing."""
    version = (torch.version.cuda or "13").partition(".")[0]
    return f'pip install "mxlab[cuda{version}]"'


@functools.cache
def _core() -> Any:
    return importlib.import_module("cuda.core")  # optional, and 0.3 s


def compile_kernel(name: str, architecture: str) -> Any:
    """Compile one kernel for an architecture such as ``sm_90``, to cuda-core object code; needs NVRTC, but no GPU."""
    core = _core()
    options = core.ProgramOptions(
        name="kernels.cu",
        arch=architecture,
        std="c++17",
        fma=False,  # no bit may depend on the compiler: a * b + c is fused only where mx.h says so
        ftz=False,
        prec_div=True,
        include_path=str(SOURCES),
    )
    return core.Program(_source(), "c++", options).compile("cubin", name_expressions=(expression(name),))


def expression(name: str) -> str:
    """Return the name of a kernel as C++ looks it up."""
    return f"mx::device::{name}"


@functools.cache
def _source() -> str:
    return (SOURCES / "kernels.cu").read_text(encoding="utf-8")


@functools.cache
def _compiled(name: str, architecture: str) -> Any:
    return compile_kernel(name, architecture).get_kernel(expression(name))


_compiling = threading.Lock()


@functools.cache
def _kernel(name: str, device: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    with _compiling:  # two threads may ask for the same kernel
        return _compiled(name, f"sm_{major}{minor}")


@functools.cache
def _stream(handle: int, device: int) -> Any:
    return _core().Stream.from_handle(handle)


def _launch(device: torch.device, launch: Launch) -> None:
    if launch.threads == 0:
        return None
    index = device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(device, launch)
    core = _core()
    kernel = _kernel(launch.kernel, index)
    stream = _stream(torch.cuda.current_stream(device).cuda_stream, index)
    config = core.LaunchConfig(grid=-(-launch.threads // THREADS), block=THREADS)
    core.launch(stream, config, kernel, *launch.arguments)
