"""How much memory there is, and whether an error says that it ran out."""

from __future__ import annotations

import gc
from collections import Counter

import psutil
import torch
from torch import nn

# What torch says in RuntimeErrors: on a GPU (older versions, and cuBLAS) and on the CPU.
_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the machine, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release() -> None:
    """Give back what nothing refers to any more, GPU memory that torch holds in reserve included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free(device: torch.device) -> int:
    """Free bytes of a GPU, or of main memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def has_room_for_copy(model: nn.Module, share: float) -> bool:
    """Whether another ``model`` takes at most that share of the free memory of every device that it lies on."""
    sizes: Counter[torch.device] = Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[tensor.device] += tensor.numel() * tensor.element_size()
    return all(size <= share * free(device) for device, size in sizes.items())
