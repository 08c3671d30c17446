"""Describe the device, time quantization against a copy, and time quantized models against the unquantized one."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mxlab import quantize
from mxlab.bench import subjects
from mxlab.bench.results import ratios, spread
from mxlab.bench.timing import Contender, Effort, alternate, clock_for
from mxlab.compat.recipes import load_any_recipe
from mxlab.experiments import provenance

Cases = list[tuple[str, Callable[[], dict[str, Any]]]]

FORMATS = {"MXFP4": "fp4_e2m1@32", "MXFP6": "fp6_e2m3@32", "MXFP8": "fp8_e4m3@32", "MXINT8": "int8@32"}
SHAPES = {"cuda": ((8192, 8192), (2048, 8192)), "cpu": ((32, 64), (16, 96))}
EFFORT = {"cuda": Effort(repeats=15, warmup=3), "cpu": Effort(repeats=2, warmup=1, min_sample=0)}
# Model, batch and tokens: the first has the shape of Llama-3.2-1B.
MODEL = {"cuda": ("llama-1b-random", 32, 128), "cpu": ("random-tiny", 2, 16)}


def machine_cases(device: str) -> Cases:
    """Return one case, which describes the device and the versions of all that computes on it."""
    return [("machine", partial(_describe, device))]


def quantize_cases(device: str) -> Cases:
    """Return the timings of quantization, in the order of their importance: large tensors first."""
    kinds = [(name, text, numerics) for (name, text), numerics in product(FORMATS.items(), ("exact", "microxcaling"))]
    kinds.append(("NVFP4", "nvfp4", "exact"))
    found: Cases = []
    for shape, axis, dtype, (name, text, numerics) in product(SHAPES[device], (-1, 0), ("bfloat16", "float32"), kinds):
        size = "x".join(map(str, shape))
        call = partial(_time_quantize, device, shape, axis, dtype, text, numerics)
        found.append((f"{name} {numerics} {dtype} {size} axis {axis}", call))
    return found


def forward_cases(device: str) -> Cases:
    """Return the timings of a forward pass, a recipe each."""
    model, batch, length = MODEL[device]
    # GPUs before 8.0 do not compute in bfloat16.
    is_old = device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    dtype = "float16" if is_old else "bfloat16"
    return [
        (f"{recipe} {model} {dtype} {batch}x{length}", partial(_time_forward, device, recipe, dtype))
        for recipe in ("ex1", "ex2")
    ]


def _describe(device: str) -> dict[str, Any]:
    found = provenance.describe()
    if device == "cpu":
        return {"device": f"cpu {found['cpu']}", **found}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        **found,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as e:
        return f"unknown: {e}"


def _samples(calls: Mapping[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Return the seconds of ``calls``, which take turns."""
    contenders = [Contender(name, call) for name, call in calls.items()]
    found = alternate(contenders, EFFORT[device], clock_for(torch.device(device)))
    return {name: series.samples for name, series in zip(calls, found, strict=True)}


def _time_quantize(
    device: str, shape: tuple[int, int], axis: int, dtype: str, text: str, numerics: Any
) -> dict[str, Any]:
    """Time quantizing into a tensor that is there already, in turns with copying to it."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=getattr(torch, dtype), device=device)
    out = torch.empty_like(x)
    backend = "cuda" if device == "cuda" else "native"
    ways: dict[str, Any] = {"axis": axis, "numerics": numerics, "backend": backend, "out": out}
    calls = {"copy": partial(out.copy_, x), "quantize": partial(quantize, x, text, **ways)}
    samples = _samples(calls, device)
    seconds, moved = spread(samples["quantize"]).median, 2 * x.numel() * x.element_size()
    return {
        "ns/element": seconds / x.numel() * 1e9,
        "GB/s": moved / seconds / 1e9,
        "copy GB/s": moved / spread(samples["copy"]).median / 1e9,
        "x copy": asdict(spread(ratios(samples["quantize"], samples["copy"]))),
        "samples": samples,
    }


def _time_forward(device: str, recipe: str, dtype: str) -> dict[str, Any]:
    """Time a forward pass of a quantized copy of a model, in turns with the model."""
    name, batch, length = MODEL[device]
    subject = subjects.load(name, dtype, device)
    ids, _ = subjects.tokens(subject, batch, length, None)
    plain = partial(_forward, subject.model, ids)
    plain_peak = _peak(plain)  # before the copy is there
    quantized = partial(_forward, subjects.converted(subject.model, load_any_recipe(recipe)), ids)
    samples = _samples({"plain": plain, recipe: quantized}, device)
    milliseconds = {name: [1000 * s for s in found] for name, found in samples.items()}
    return {
        "ms": asdict(spread(milliseconds[recipe])),
        "plain ms": asdict(spread(milliseconds["plain"])),
        "x plain": asdict(spread(ratios(samples[recipe], samples["plain"]))),
        "peak GiB": (_peak(quantized) - _bytes(subject.model)) / 2**30,
        "plain peak GiB": plain_peak / 2**30,
        "milliseconds": milliseconds,
    }


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def _peak(call: Callable[[], object]) -> int:
    """Return the largest number of bytes that are allocated on the GPU during a call."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _bytes(model: Any) -> int:
    """Return the size of a model's tensors on the GPU."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    return sum(t.numel() * t.element_size() for t in tensors.values())


CASES = {"machine": machine_cases, "quantize": quantize_cases, "forward": forward_cases}
