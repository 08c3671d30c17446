"""The CUDA backend: compiled for several GPUs, run on the CPU, and, where there is a GPU, run on it."""

import ctypes
import dataclasses
import functools
import itertools
import json
import logging
import math
import shutil
import subprocess
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from mxlab import quantize
from mxlab.errors import FormatError
from mxlab.formats import ELEMENTS, MICROXCALING_ROUNDINGS, NUMERICS, ROUNDINGS, MXFormat, element, elementwise_format
from mxlab.numerics import microxcaling, operators, philox, quantize_, reference, round_elementwise
from mxlab.numerics.fingerprints import fingerprint, fingerprints
from mxlab.numerics.kernels import cuda, launches
from mxlab.numerics.kernels.compiled import Compiled, address

from support import golden
from support.paths import TESTS
from support.strategies import NUMERICS_ROUNDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")  # T4, A100, H100 and H200
EAGER = {"exact": reference, "microxcaling": microxcaling}


def numbers(shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of all kinds: of a few binades, of many, any bits at all (NaN, infinities, subnormals), zeros, ties."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    x = torch.randn(count, generator=generator)
    wide = x * torch.randn(count, generator=generator).mul(8).exp2()
    coarse = (x * 8).round() / 16
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    any_bits = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype).float()
    kinds = torch.stack([x, wide, coarse, any_bits, torch.zeros(count)])
    kind = torch.randint(0, 50, (-(-count // 40),), generator=generator).repeat_interleave(40)[:count]
    kind = torch.where(kind > 4, kind % 3, kind)  # runs of one kind, or every block would hold a NaN
    return kinds.gather(0, kind[None])[0].to(dtype).reshape(shape)


def check(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    same = got.contiguous().view(bits) == expected.contiguous().view(bits)
    same |= got.isnan() & expected.isnan()
    assert same.all(), f"{int((~same).sum())} of {same.numel()}: {got[~same][:4]}, not {expected[~same][:4]}"


# On the CPU: the code of kernels.cu with tests/support/cuda_on_cpu.h in place of CUDA


DIVERGING = "namespace mx::device { void diverging() { if (threadIdx.x < 3) __shfl_xor_sync(WARP, 0u, 1); } }\n"


class OnCpu(Compiled):
    """The CUDA backend, but for what launches the kernels."""

    def __init__(self, kernels: dict) -> None:
        self.kernels = kernels

    def start(self, launch: launches.Launch) -> None:
        arguments = (ctypes.c_longlong * len(launch.arguments))(*launch.arguments)
        well = self.kernels[launch.kernel](ctypes.c_longlong(launch.threads), arguments, len(arguments))
        assert well, f"{launch.kernel}: not every thread reached a shuffle"

    def uniform(self, shape, seed, device):
        out = torch.full(shape, -1.0)
        self.start(launches.plan_uniform(out.data_ptr(), out.numel(), seed))
        return out

    def _run(self, x, out, noise, fmt, numerics, layout):
        scratch = torch.zeros(launches.scratch_words(fmt, layout), dtype=torch.int32)
        for launch in launches.plan(
            (*map(address, (x, out, noise)),), x.dtype, fmt, numerics, layout, scratch.data_ptr()
        ):
            self.start(launch)

    def _run_elementwise(self, x, out, noise, element, rounding, subnormals, numerics):
        addresses = (*map(address, (x, out, noise)),)
        self.start(launches.plan_elementwise(addresses, x.dtype, x.numel(), element, rounding, subnormals, numerics))


# What serves the rules and scales other than floor and e8m0, and the roundings that the tests below use.
NEW_OPERATIONS = {
    "Asymmetric": ["even"],
    "Searched": ["nearest", "nearest_zero", "floor"],
    "Floating": ["even", "nearest", "dither"],
}
NEW_FORMATS = [
    *(f"{name},scale_rule={rule}" for name in ("fp4_e2m1", "fp8_e4m3", "int8") for rule in ("ceil", "even", "rceil")),
    *("int4,scale_rule=mase_int", "int8,scale_rule=mase_int,scale_bits=4"),
    *("fp6_e2m3,scale_rule=mse", "int4,scale_rule=mse,rounding=floor", "fp8_e5m2,scale_rule=mse,scale_bits=4"),
    *(f"{name},scale={scale},rounding=even" for name in ("fp4", "fp8_e4m3", "int4") for scale in ("e5m3", "e4m3")),
    *("fp4,scale_rule=rceil,rounding=nearest_zero", "int4,scale_rule=mse,rounding=nearest_zero"),
    *("fp4,scale=e5m3,rounding=dither", "fp4,scale=e4m3,rounding=dither", "fp6_e3m2,scale=e4m3"),
]


def vector_sizes(rounding: str) -> tuple[int, ...]:
    return {
        "nearest": (1, 8, 16, 32, 64, 128, 256),
        "nearest_zero": (1, 8, 16, 32, 128),
        "dither": (1, 8, 32, 256),
    }.get(rounding, (1, 32))


def kernel_names() -> list[str]:
    finding = product(("find_largest", "find_largest_finite"), ("F32", "BF16", "F16"))
    names = ["uniform_numbers", "sum_words", *(f"{kernel}<mx::device::{t}>" for kernel, t in finding)]
    operations = ("Exact", "Microxcaling", "SimpleMicroxcaling")
    for storage, op, rounding in product(("F32", "BF16", "F16"), operations, ROUNDINGS):
        if op != "Exact" and rounding not in MICROXCALING_ROUNDINGS:
            continue
        operation = f"mx::device::{op}<mx::device::{storage}, mx::Rounding::{rounding}>"
        names += [f"{kernel}<{operation}>" for kernel in ("quantize_blocks", "quantize_pieces", "round_alone")]
        names += [f"quantize_vectors<{operation}, {size}>" for size in vector_sizes(rounding)]
    for storage, (op, roundings) in product(("F32", "BF16", "F16"), NEW_OPERATIONS.items()):
        for rounding in roundings:
            operation = f"mx::device::{op}<mx::device::{storage}, mx::Rounding::{rounding}>"
            names += [f"{kernel}<{operation}>" for kernel in ("quantize_blocks", "quantize_pieces")]
            names += [f"quantize_vectors<{operation}, {size}>" for size in (1, 8, 16, 32, 128)]
    return names


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> OnCpu:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA kernels for the CPU with")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    names = [*kernel_names(), "diverging"]
    functions = (
        f'extern "C" int kernel_{i}(long long threads, const long long* arguments, int count) '
        f"{{ return on_cpu::launch({cuda.expression(name)}, threads, arguments, count); }}\n"
        for i, name in enumerate(names)
    )
    (folder / "driver.cpp").write_text(
        '#include "cuda_on_cpu.h"\n#include "kernels.cu"\n' + DIVERGING + "".join(functions)
    )
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
    paths = ["-I", str(TESTS / "support"), "-I", str(cuda.SOURCES)]
    subprocess.run([compiler, *flags, *paths, "driver.cpp", "-o", "driver.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "driver.so"))
    return OnCpu({name: library[f"kernel_{i}"] for i, name in enumerate(names)})


def check_quantize(backend: OnCpu, x: Tensor, fmt: MXFormat, axes: tuple[int, ...], numerics) -> None:
    expected = EAGER[numerics].quantize(x, fmt, axes, 7)
    check(backend.quantize(x, fmt, axes, 7, numerics), expected)
    backend.quantize_(x, fmt, axes, 7, numerics)
    check(x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("numerics", "rounding", "block_size"),
    [(n, r, size) for n, r in NUMERICS_ROUNDINGS for size in (*vector_sizes(r), 5, 100, 0)],
)
def test_bits(on_cpu, numerics, dtype, rounding, block_size):
    fmt = MXFormat("fp6_e2m3", block_size, rounding=rounding)
    for shape, axis in [((6, 384), 1), ((7, 100), 1), ((100, 7), 0), ((3, 70, 5), 1), ((1,), 0), ((2056,), 0)]:
        check_quantize(on_cpu, numbers(shape, dtype), fmt, (axis,), numerics)


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_blocks(on_cpu, numerics, dtype, rounding):
    fmt = MXFormat("fp4_e2m1", 0, rounding=rounding)
    for shape, axis in [((2, 5000), 1), ((2, 601, 3), 1)]:
        check_quantize(on_cpu, numbers(shape, dtype), fmt, (axis,), numerics)
    check_quantize(on_cpu, numbers((70, 70), dtype), fmt, (0, 1), numerics)
    check_quantize(on_cpu, numbers((1, 9000), dtype), MXFormat("fp4_e2m1", 4500, rounding=rounding), (1,), numerics)


FORMATS = [*ELEMENTS, "int3", "int5", "int6", "int7", "fp8_e1m6", "fp8_e6m1", "fp8_e7m0", "fp5_e3m1", "fp3_e1m1"]


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(
    ("dtype", "name"), [(t, n) for t in DTYPES for n in FORMATS if element(n).max <= torch.finfo(t).max]
)
def test_formats(on_cpu, numerics, dtype, name):
    fields = product([8, 4, 1], [False, True], ["floor", "none"])
    for scale_bits, flush, rule in fields:
        fmt = MXFormat(name, 32, scale_bits=scale_bits, flush_fp32_subnorms=flush, scale_rule=rule)
        check_quantize(on_cpu, numbers((20, 96), dtype), fmt, (1,), numerics)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", NEW_FORMATS)
def test_rules_and_scales(on_cpu, text, dtype):
    for block_size in (1, 8, 16, 32, 128, 5, 0):
        fmt = dataclasses.replace(MXFormat.parse(text), block_size=block_size)
        for shape, axis in [((6, 384), 1), ((7, 100), 1), ((100, 7), 0), ((3, 70, 5), 1)]:
            x = numbers(shape, dtype)
            check_quantize(on_cpu, x, fmt, (axis,), "exact")
            check_quantize(on_cpu, x.nan_to_num(0, 0, 0) * 2.0**-14, fmt, (axis,), "exact")
    for shape, axes in [((2, 5000), (1,)), ((2, 601, 3), (1,)), ((70, 70), (0, 1))]:
        check_quantize(on_cpu, numbers(shape, dtype), MXFormat.parse(text.replace(",", "@0,", 1)), axes, "exact")


@pytest.mark.parametrize("rounding", MICROXCALING_ROUNDINGS)
@pytest.mark.parametrize("name", [n for n in FORMATS if launches._is_simple(element(n), torch.bfloat16)])
def test_every_bfloat16_beside_a_largest_one(on_cpu, name, rounding):
    """round_scaled_simply gives the bits of round_scaled under the conditions that microxcaling.h states."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    for largest, scale_bits, dtype in (
        (1.0, 8, values.dtype),
        (1.9921875, 3, values.dtype),
        (1.9921875, 8, torch.float32),
    ):
        below = values[values.abs() <= largest]
        rows = len(below) // 31 + 1
        x = torch.zeros(rows * 31, dtype=torch.bfloat16)
        x[: len(below)] = below
        x = torch.cat([torch.full((rows, 1), largest), x.view(rows, 31)], 1).to(dtype)
        fmt = MXFormat(name, 32, rounding=rounding, scale_bits=scale_bits)
        check(on_cpu.quantize(x, fmt, (1,), 3, "microxcaling"), microxcaling.quantize(x, fmt, (1,), 3))


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(on_cpu, numerics, dtype):
    for rounding in ("nearest", "dither"):
        fmt = MXFormat("int8", 32, rounding=rounding)
        memory = numbers((6 * 8 * 64 + 1,), dtype)
        unaligned = memory[1:].view(6, 8, 64)
        for x in (
            unaligned,
            unaligned.permute(2, 0, 1),
            unaligned[:, ::2],
            unaligned[..., 1:],
            unaligned.transpose(0, 2),
        ):
            for axes in ((0,), (1,), (2,), (0, 2)):
                check(
                    on_cpu.quantize(x, fmt, axes, 5, numerics), EAGER[numerics].quantize(x.contiguous(), fmt, axes, 5)
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_else_is_written(on_cpu, dtype):
    for count, start, fmt in product((1, 31, 64, 160, 5000), (0, 1, 16), ("fp4@32", "fp4@5", "fp4@1", "fp4@0")):
        memory = numbers((count + 64,), dtype)
        before = memory.clone()
        on_cpu.quantize_(memory[start : start + count], MXFormat.parse(fmt), (0,), 0, "exact")
        check(memory[:start], before[:start])
        check(memory[start + count :], before[start + count :])


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(16, 0), (12, 0), (31, 0), (0, 16), (0, 8), (0, 29)])
def test_round_elementwise(on_cpu, numerics, dtype, rounding, widths):
    to = elementwise_format(*widths)
    assert to is not None
    memory = numbers((3001,), dtype)
    for x, subnormals in product((memory, memory[1:], memory[:3], memory[:16]), (True, False)):
        expected = EAGER[numerics].round_elementwise(x, to, rounding, subnormals, 3)
        check(on_cpu.round_elementwise(x, to, rounding, subnormals, 3, numerics), expected)


def test_random_numbers(on_cpu):
    for count, seed in product((1, 4, 1001), (0, 1, -1, 2**63 - 1, -(2**63))):
        check(on_cpu.uniform((count,), seed, torch.device("cpu")), philox.uniform((count,), seed, torch.device("cpu")))


def test_sums_of_memory(on_cpu):
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (4, 4096, 20_000)]
    table = torch.tensor([(t.data_ptr(), t.numel() * 4 // launches.PAIR) for t in tensors])
    sums = torch.zeros(len(tensors), dtype=torch.int64)
    on_cpu.start(launches.plan_sums(table.data_ptr(), sums.data_ptr(), len(tensors)))
    assert sums.tolist() == [fingerprint(t) for t in tensors]


def test_a_shuffle_that_some_threads_miss_is_noticed(on_cpu):
    """The fibers are no use if they cannot fail."""
    assert not on_cpu.kernels["diverging"](ctypes.c_longlong(1), (ctypes.c_longlong * 1)(), 0)


# Compiled, for GPUs that need not be here


@functools.cache
def no_nvrtc() -> str | None:
    """Why NVRTC cannot compile here; None where it can."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as e:
        return f"no NVRTC ({e}): pip install mxlab[cuda]"
    return None


OPERATIONS = [
    f"mx::device::{op}<mx::device::{storage}, mx::Rounding::{rounding}>"
    for op, storage, rounding in [
        ("Exact", "BF16", "nearest"),
        ("Asymmetric", "BF16", "even"),
        ("Searched", "BF16", "nearest"),
        ("Floating", "BF16", "even"),
        ("Exact", "F16", "dither"),
        ("Microxcaling", "F16", "nearest"),
        ("Microxcaling", "F32", "even"),
        ("SimpleMicroxcaling", "BF16", "even"),
    ]
]
COMPILED = [
    "uniform_numbers",
    "sum_words",
    "find_largest<mx::device::BF16>",
    "find_largest_finite<mx::device::BF16>",
    *(f"quantize_vectors<{op}, {size}>" for op in OPERATIONS for size in (1, 32)),
    *(f"{kernel}<{op}>" for kernel in ("quantize_blocks", "quantize_pieces", "round_alone") for op in OPERATIONS),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture):
    if reason := no_nvrtc():
        pytest.skip(reason)
    for name in COMPILED:
        assert len(cuda.compile_kernel(name, architecture).code) > 1000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles(architecture, tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc")
    uses = "".join(f"auto* kernel_{i} = {cuda.expression(name)};\n" for i, name in enumerate(COMPILED))
    (tmp_path / "all.cu").write_text(f'#include "kernels.cu"\n{uses}')
    flags = [
        "-std=c++17",
        "--fmad=false",
        "-Werror=all-warnings",
        "-cubin",
        f"-arch={architecture}",
        "-I",
        cuda.SOURCES,
    ]
    subprocess.run([compiler, *flags, "all.cu", "-o", "all.cubin"], cwd=tmp_path, check=True)


# Which backend


def test_cuda_is_for_cuda_tensors():
    with pytest.raises(FormatError, match=r"'cuda'.*the tensor is on cpu"):
        quantize(torch.ones(4), "fp4", backend="cuda")


@pytest.mark.parametrize(("hip", "found", "reason"), [("6.0", True, "ROCm"), (None, False, "no CUDA device")])
def test_without_kernels_the_reference_serves_and_one_warning_says_why(monkeypatch, caplog, hip, found, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(cuda, "missing", cuda.missing.__wrapped__)
    operators.choose.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "mxlab"):
            assert [operators.choose("cuda", "auto") for _ in range(2)] == ["reference"] * 2
        assert len(caplog.messages) == 1
        assert reason in caplog.text
        with pytest.raises(FormatError, match=f"'cuda'.*{reason}"):
            operators.choose("cuda", "cuda")
    finally:
        operators.choose.cache_clear()


def test_a_package_that_is_missing_is_named(monkeypatch):
    def fail(*_):
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "_kernel", fail)
    assert "No module named 'cuda'" in (cuda.missing.__wrapped__() or "")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert cuda.remedy() == 'pip install "mxlab[cuda12]"'


# On a GPU


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if reason := cuda.missing():
        pytest.skip(f"no GPU to run CUDA kernels on: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_on_a_gpu(gpu, numerics, dtype, rounding):
    for block_size, scale_bits in product((1, 5, 16, 32, 64, 100, 0), (8, 4)):
        for shape, axis in [
            ((60, 384), 1),
            ((7, 100), 1),
            ((100, 70), 0),
            ((3, 70, 50), 1),
            ((3, 9000), 1),
            ((64, 64), (0, 1)),
        ]:
            x = numbers(shape, dtype)
            fmt = MXFormat("fp6_e2m3", block_size, rounding=rounding, scale_bits=scale_bits)
            ways = {"axis": axis, "numerics": numerics, "seed": 3}
            expected = quantize(x, fmt, **ways, backend="reference")
            on_gpu = x.to(gpu)
            check(quantize(on_gpu, fmt, **ways, backend="cuda").cpu(), expected)
            check(quantize_(on_gpu, fmt, **ways, backend="cuda").cpu(), expected)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_formats_on_a_gpu(gpu, numerics, dtype, name):
    if element(name).max <= torch.finfo(dtype).max:
        x = numbers((50, 96), dtype)
        for text in (f"{name}@32", f"{name}@32,scale_rule=none", f"{name}@24,flush_fp32_subnorms=true"):
            expected = quantize(x, text, numerics=numerics, backend="reference")
            check(quantize(x.to(gpu), text, numerics=numerics, backend="cuda").cpu(), expected)


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_elementwise_on_a_gpu(gpu, numerics, dtype, rounding):
    x = numbers((4001,), dtype)
    for widths, start in product(({"bfloat": 16}, {"bfloat": 12}, {"fp": 16}, {"fp": 29}), (0, 1)):
        ways = {**widths, "rounding": rounding, "numerics": numerics, "seed": 3}
        expected = round_elementwise(x[start:], **ways, backend="reference")
        check(round_elementwise(x.to(gpu)[start:], **ways, backend="cuda").cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", NEW_FORMATS)
def test_rules_and_scales_on_a_gpu(gpu, text, dtype):
    for block_size in (1, 5, 16, 32, 100, 0):
        fmt = dataclasses.replace(MXFormat.parse(text), block_size=block_size)
        for shape, axis in [((60, 384), 1), ((100, 70), 0), ((3, 5000), 1), ((64, 64), (0, 1))]:
            for x in (numbers(shape, dtype), numbers(shape, dtype).nan_to_num(0, 0, 0) * 2.0**-14):
                expected = quantize(x, fmt, axis=axis, seed=3, backend="reference")
                check(quantize(x.to(gpu), fmt, axis=axis, seed=3, backend="cuda").cpu(), expected)
                check(quantize(x.to(gpu), fmt, axis=axis, seed=3, backend="reference").cpu(), expected)


def test_golden_vectors_on_a_gpu(gpu):
    cases = json.loads((golden.SELECTION / "manifest.json").read_text())["cases"]
    arrays = dict(np.load(golden.SELECTION / "arrays.npz"))

    def load(case: dict, key: str) -> Tensor | None:
        if key not in case:
            return None
        flat = arrays[case["dtype"]][case[key] : case[key] + math.prod(case["shape"])]
        return golden.tensor(flat.reshape(case["shape"]), case["dtype"])

    for case, x, expected, numerics in itertools.chain(*golden.grouped(cases, load).values()):
        if expected is not None:
            check(golden.run(case, x.to(gpu), numerics).cpu(), expected)


def test_layouts_on_a_gpu(gpu):
    x = numbers((6, 8, 65), torch.bfloat16)
    for view in (
        lambda t: t.permute(2, 0, 1),
        lambda t: t[:, ::2],
        lambda t: t[..., 1:],
        lambda t: t.expand(2, 6, 8, 65),
    ):
        for axis, rounding in product((0, 1, -1), ("nearest", "dither")):
            fmt = f"fp4@32,rounding={rounding}"
            result = quantize(view(x.to(gpu)), fmt, axis=axis, seed=1, backend="cuda")
            check(result.cpu(), quantize(view(x), fmt, axis=axis, seed=1, backend="reference"))
            assert result.stride() == torch.empty_like(view(x)).stride()


def test_the_current_stream_is_used(gpu):
    x = torch.randn(4096, 4096, device=gpu)
    expected = quantize(x * 2, "fp4@32", backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            result = quantize(x * 2, "fp4@32", backend="cuda")
    stream.synchronize()
    check(result.cpu(), expected.cpu())


def test_fingerprints_on_a_gpu(gpu):
    memory = torch.randn(100_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = [memory[:8], memory[1:9], memory[:80_000].view(8, -1).t(), memory, memory[:0], memory.float()]
    assert fingerprints([t.to(gpu) for t in tensors]) == [fingerprint(t) for t in tensors]


def test_cuda_graphs(gpu):
    x = torch.randn(64, 256, device=gpu)
    quantize(x, "fp4@32", backend="cuda")  # compiled and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = quantize(x, "fp4@32", backend="cuda")
    x.mul_(3)
    graph.replay()
    check(result.cpu(), quantize(x.cpu(), "fp4@32", backend="reference"))


def test_torch_compile_on_a_gpu(gpu):
    x = torch.randn(64, 256, device=gpu)
    function = torch.compile(lambda t: quantize(t + 1, "fp4@32", backend="cuda") * 2, fullgraph=True)
    check(function(x).cpu(), quantize(x.cpu() + 1, "fp4@32", backend="reference") * 2)


def test_more_than_2_to_the_31_elements(gpu):
    count = 2**31 + 96
    if torch.cuda.mem_get_info()[0] < 10 * count:
        pytest.skip("too little memory on the GPU")
    x = torch.zeros(count, dtype=torch.bfloat16, device=gpu)
    end = numbers((96,), torch.bfloat16)
    for block in (32, 24):
        x[-96:] = end.to(gpu)
        quantize_(x, f"fp4@{block}", backend="cuda")
        tail = count % block  # the last blocks start here
        expected = quantize(
            torch.cat([torch.zeros((block - 96 + tail) % block), end.float()]).bfloat16(), f"fp4@{block}"
        )
        check(x[-96:].cpu(), expected[-96:])
