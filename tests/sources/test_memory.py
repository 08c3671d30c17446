"""Memory: errors that tell of it, and whether there is room."""

import pytest
import torch
from torch import nn

from mxlab.sources import devices


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory(error, expected):
    assert devices.is_out_of_memory(error) is expected


def test_torch_says_so_on_the_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)


def test_room_for_a_copy(monkeypatch):
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(5))
    size = 4 * (100 + 10 + 4 * 5) + 8  # parameters, running statistics, and their counter
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    assert devices.has_room_for_copy(model, size / 1000)
    assert not devices.has_room_for_copy(model, (size - 1) / 1000)


def test_room_is_needed_on_every_device(monkeypatch):
    model = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10, device="meta")])
    for full in ("cpu", "meta"):
        monkeypatch.setattr(devices, "free_memory", lambda device, full=full: 0 if device.type == full else 1000)
        assert not devices.has_room_for_copy(model, 1)
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    assert devices.has_room_for_copy(model, 1)


def test_main_memory():
    assert devices.free_memory(torch.device("cpu")) > 2**20
    devices.release_memory()
