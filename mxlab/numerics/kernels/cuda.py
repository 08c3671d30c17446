"""Compute both numerics in CUDA C++ (``csrc/kernels.cu``), compiled at run time by NVRTC for the GPU at hand.

cuda-core compiles and launches. Unlike CuPy it is NVIDIA's own, follows CUDA 12 and 13, adds only a few megabytes to
the NVRTC that torch brings along, and leaves memory and streams to torch. It is the optional extra ``cuda``; without it
:func:`missing` says so. A kernel is compiled, in a fraction of a second, when its dtype, numerics, rounding and block
size are first met; formats are arguments. Kernels run on torch's current stream, so that CUDA graphs capture them.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab.formats import ElementFormat, MXFormat, Numerics, Rounding
from mxlab.numerics.kernels import launches
from mxlab.numerics.kernels.compiled import Compiled, Layout, address
from mxlab.numerics.kernels.launches import Launch

SOURCES = Path(__file__).parent / "csrc"


class _Cuda(Compiled):
    def uniform(self, shape: torch.Size | tuple[int, ...], seed: int, device: torch.device) -> Tensor:
        out = torch.empty(shape, dtype=torch.float32, device=device)
        _launch(device, launches.plan_uniform(out.data_ptr(), out.numel(), seed))
        return out

    def _run(
        self, x: Tensor, out: Tensor, noise: Tensor | None, fmt: MXFormat, numerics: Numerics, layout: Layout
    ) -> None:
        addresses = x.data_ptr(), out.data_ptr(), address(noise)
        words = launches.scratch_words(fmt, layout)
        scratch = torch.zeros(words, dtype=torch.int32, device=x.device) if words else None
        for launch in launches.plan(addresses, x.dtype, fmt, numerics, layout, address(scratch)):
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
        launch = launches.plan_elementwise(addresses, x.dtype, x.numel(), element, rounding, subnormals, numerics)
        _launch(x.device, launch)


_backend = _Cuda()
quantize, quantize_out, quantize_ = _backend.quantize, _backend.quantize_out, _backend.quantize_
round_elementwise, uniform = _backend.round_elementwise, _backend.uniform


def sum_words(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tensor's memory read as 64-bit integers, modulo 2^64, as int64 [tensors].

    All are contiguous, on one GPU, and aligned to ``launches.PAIR`` bytes, of which each has a whole number.
    """
    device = tensors[0].device
    entries = [(t.data_ptr(), t.nbytes // launches.PAIR) for t in tensors]
    table = torch.tensor(entries, dtype=torch.int64, device=device)
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    _launch(device, launches.plan_sums(table.data_ptr(), sums.data_ptr(), len(tensors)))
    return sums


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
    kernel, config = _kernel(launch.kernel, index), _config(launch.threads)
    stream = _stream(torch.cuda.current_stream(device).cuda_stream, index)
    _launcher()(stream, config, kernel, *launch.arguments)


@functools.lru_cache(maxsize=1024)
def _config(threads: int) -> Any:
    return _core().LaunchConfig(grid=-(-threads // launches.THREADS), block=launches.THREADS)


@functools.cache
def _launcher() -> Any:
    return _core().launch
