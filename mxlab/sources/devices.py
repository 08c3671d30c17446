"""On which device a model goes, and models that are spread over several GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mxlab.errors import RunError, SpecError
from mxlab.sources import memory

_ROOM = 1.2  # what a model takes with its activations, as a multiple of its parameters
_FILLED = 0.9  # of a GPU's free memory, that a part of a spread model may take


def choose_device(device: str) -> torch.device:
    """``auto`` is the visible GPU with the most free memory, or the CPU where there is none.

    Raises:
        SpecError: not a device, or one this machine lacks.
    """
    if device == "auto":
        return max(_gpus(), key=memory.free, default=torch.device("cpu"))
    try:
        place = torch.device(device)
    except RuntimeError:
        raise SpecError(f"device is {device!r}: it must be auto, cpu, or cuda (cuda:0, cuda:1, ...)") from None
    if place.type not in ("cpu", "cuda"):
        raise SpecError(f"device is {device!r}: mxlab computes on cpu and cuda")
    if place.type == "cuda" and not (place.index or 0) < torch.cuda.device_count():
        raise SpecError(f"device is {device!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu or auto")
    return place


def spread(source: str, dtype: torch.dtype, place: torch.device) -> dict[int, int] | None:
    """Bytes to use of each GPU for a model that ``place``, the freest GPU, does not hold; None where it does.

    The need is estimated: the parameters of the model's config in ``dtype``, times 1.2.

    Raises:
        RunError: all GPUs together do not hold it.
    """
    needed = int(_ROOM * dtype.itemsize * _parameters(source))
    if needed <= memory.free(place):
        return None
    free = {gpu.index: memory.free(gpu) for gpu in _gpus()}
    if needed > _FILLED * sum(free.values()):
        found = ", ".join(f"cuda:{i}: {_gib(size)}" for i, size in free.items())
        raise RunError(
            f"{source} needs about {_gib(needed)} in {str(dtype).removeprefix('torch.')}, more than the GPUs have free "
            f"({found}): choose --device cpu, a smaller dtype or another model"
        )
    return {i: int(_FILLED * size) for i, size in free.items()}


def connect(model: Any) -> None:
    """Have the parts of a spread model (its ``hf_device_map``) fetch their inputs; the output goes where the input was.

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
