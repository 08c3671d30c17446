"""Choose a device and a dtype, know what memory there is, and spread a model over several GPUs."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import platform
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from mxlab.checks import check_choice
from mxlab.errors import RunError, SpecError

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
logger = logging.getLogger("mxlab")

_ROOM = 1.2  # what a model takes with its activations, as a multiple of its parameters
_FILLED = 0.9  # of a GPU's free memory, that a part of a spread model may take
# The CPU features that multiply a dtype: on x86, on Arm.
_UNITS = {
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
# What torch says in RuntimeErrors: on a GPU (older versions, and cuBLAS) and on the CPU.
_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def choose_device(device: str) -> torch.device:
    """Return the device of that name; ``auto`` is the visible GPU with the most free memory, else the CPU.

    Raises:
        SpecError: not a device, or one this machine lacks.
    """
    if device == "auto":
        return max(_gpus(), key=free_memory, default=torch.device("cpu"))
    try:
        place = torch.device(device)
    except RuntimeError:
        raise SpecError(f"device is {device!r}: it must be auto, cpu, or cuda (cuda:0, cuda:1, ...)") from None
    if place.type not in ("cpu", "cuda"):
        raise SpecError(f"device is {device!r}: mxlab computes on cpu and cuda")
    if place.type == "cuda" and not (place.index or 0) < torch.cuda.device_count():
        raise SpecError(f"device is {device!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu or auto")
    return place


def choose_dtype(dtype: str, device: torch.device) -> str:
    """Return the dtype to compute in on ``device``; ``auto`` is the fastest one that the device computes natively.

    That is bfloat16 where there are units for it (:func:`is_native`), float16 on older GPUs, else float32.

    Raises:
        FormatError: an unknown dtype.
    """
    check_choice("dtype", dtype, (AUTO, *DTYPES))
    if dtype != AUTO:
        return dtype
    if is_native(torch.bfloat16, device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether ``device`` has units that multiply ``dtype``.

    bfloat16 needs AVX512-BF16, AMX or Arm's BF16 on a CPU, and compute capability 8.0 on a GPU.
    """
    if dtype == torch.float32 or (dtype == torch.float16 and device.type == "cuda"):
        return True
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(_UNITS.get(dtype, frozenset()) & _cpu_flags())


def describe_dtype(device: torch.device) -> str:
    """Say in words why ``auto`` means what it means on ``device``."""
    has = "has" if is_native(torch.bfloat16, device) else "has no"
    return f"this {'GPU' if device.type == 'cuda' else 'CPU'} {has} bfloat16 units"


def warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Log a warning, once, where ``device`` computes ``dtype`` far more slowly than float32."""
    if device.type == "cpu" and not is_native(getattr(torch, dtype), device) and (dtype, device.type) not in _warned:
        _warned.add((dtype, device.type))
        logger.warning(
            "%s on a CPU without %s units: matrix products take six to ten times as long as in float32; use "
            "dtype auto or float32",
            dtype, dtype,
        )  # fmt: skip


_warned: set[tuple[str, str]] = set()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Return the features of the processor that torch uses, as Linux names them; none elsewhere."""
    if platform.machine() in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return frozenset()  # torch is kept from using them (ATEN_CPU_CAPABILITY), or they are not there
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return next(
        (frozenset(value.split()) for name, _, value in named if name.strip() in ("flags", "Features")), frozenset()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of a GPU or of the machine, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release_memory() -> None:
    """Give back memory that nothing refers to any more, what torch holds in reserve on GPUs included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of main memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would say what the parent had when it started this process
        return told_by_system(status, "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def told_by_system(file: Path, name: str) -> int:
    """Return the bytes that a file of /proc has for ``name``, in kilobytes."""
    [line] = [line for line in file.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def resident_memory() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc, which keeps it.

    Tensors of many sizes leave holes in its heap, which it does not fill: half a gigabyte over the layers of a model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def has_room_for_copy(model: nn.Module, share: float) -> bool:
    """Return whether a copy of ``model`` takes at most that share of the free memory of each device it is on."""
    sizes: Counter[torch.device] = Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[tensor.device] += tensor.numel() * tensor.element_size()
    return all(size <= share * free_memory(device) for device, size in sizes.items())


def shares_of_gpus(source: str, dtype: torch.dtype, place: torch.device) -> dict[int, int] | None:
    """Return the bytes to use of each GPU for a model that ``place``, the freest GPU, does not hold; None if it does.

    The need is estimated: the parameters of the model's config in ``dtype``, times 1.2.

    Raises:
        RunError: all GPUs together do not hold it.
    """
    needed = int(_ROOM * dtype.itemsize * _parameters(source))
    if needed <= free_memory(place):
        return None
    free = {gpu.index: free_memory(gpu) for gpu in _gpus()}
    if needed > _FILLED * sum(free.values()):
        found = ", ".join(f"cuda:{i}: {_gib(size)}" for i, size in free.items())
        raise RunError(
            f"{source} needs about {_gib(needed)} in {str(dtype).removeprefix('torch.')}, more than the GPUs have free "
            f"({found}): choose --device cpu, a smaller dtype or another model"
        )
    return {i: int(_FILLED * size) for i, size in free.items()}


def connect_parts(model: Any) -> None:
    """Make each part of a spread model (its ``hf_device_map``) fetch its inputs, and the output go back to the start.

    Takes the place of accelerate's hooks, which replace the forward of every module, so that none could be quantized.
    """
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for name, device in getattr(model, "hf_device_map", {}).items():  # none where all went to one GPU after all
        model.get_submodule(name).register_forward_pre_hook(partial(_fetch, device), with_kwargs=True)
    model.register_forward_hook(partial(_return, model.device))


def _fetch(device: Any, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _sent((args, kwargs), device)


def _return(device: Any, module: nn.Module, args: Any, output: Any) -> Any:
    return _sent(output, device)


def _sent(values: Any, device: Any) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(values, device)


def _parameters(source: str) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", i) for i in range(count)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
