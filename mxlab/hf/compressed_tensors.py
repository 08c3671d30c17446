"""A model as compressed-tensors stores it, which vLLM and transformers read: weights alone, bit for bit.

Its packed codes and power-of-two scales have the layout of :mod:`mxlab.packed`; what differs are names, and for NVFP4
the scale of a tensor, which is divided by there. That library computes in the dtype of the model, and decides by itself
how activations are rounded, so that only weights are exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.hf.checkpoint import SHARD, new_folder
from mxlab.hf.exports import packed_model, weight_format
from mxlab.model import sites
from mxlab.model.conversion import Conversion
from mxlab.model.nn.packed import PARTS
from mxlab.model.plan import QuantizedSite
from mxlab.packed import MXTensor
from mxlab.progress import Steps
from mxlab.recipe import Recipe

METHOD = "compressed-tensors"


@dataclass(frozen=True)
class Target:
    """What compressed-tensors calls a format, and the arguments of its weights."""

    name: str
    bits: int
    block_size: int
    scale_dtype: str = "torch.uint8"
    strategy: str = "group"

    @property
    def weights(self) -> dict[str, Any]:
        """The ``weights`` of a group of its configuration."""
        return {
            "num_bits": self.bits,
            "type": "float",
            "strategy": self.strategy,
            "group_size": self.block_size,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": self.scale_dtype,
            "zp_dtype": self.scale_dtype,
        }


# By element, block size and scale: how scales and elements were chosen does not matter.
TARGETS = {
    ("fp4_e2m1", 32, "e8m0"): Target("mxfp4-pack-quantized", 4, 32),
    ("fp6_e2m3", 32, "e8m0"): Target("mxfp6-pack-quantized", 6, 32),
    ("fp8_e4m3", 32, "e8m0"): Target("mxfp8-quantized", 8, 32),
    ("fp4_e2m1", 16, "e4m3"): Target("nvfp4-pack-quantized", 4, 16, "torch.float8_e4m3fn", "tensor_group"),
}


def export(model: str, recipe: Recipe, dtype: str, out: Path, weights_only: bool = False) -> Conversion:
    """Quantize a model, or take one that is, and write it into the new folder ``out``, whole or not at all.

    Args:
        model: a hub name, a folder, or ``smollm2``; one that mxlab saved is taken as it is.
        recipe: what to quantize.
        dtype: of what stays unquantized.
        out: the folder.
        weights_only: leave out what a recipe has beside weights, such as activations and the KV cache.

    Raises:
        ConversionError: something that compressed-tensors cannot express; it is named.
        RunError: ``out`` exists already, or cannot be written.
    """
    with new_folder(out) as folder:
        loaded, conversion = packed_model(model, recipe, dtype, weights_only, METHOD)
        targets = {site.name: target_of(site) for site in conversion.linears if site.is_packed}
        with Steps("saving"):
            _save(loaded.model, targets, folder)
            loaded.tokenizer.save_pretrained(folder)
    return conversion


def target_of(site: QuantizedSite) -> Target:
    """Return what a linear layer's weight is there.

    Raises:
        ConversionError: it cannot be expressed.
    """
    fmt = weight_format(site, METHOD)
    target = TARGETS.get((fmt.element, fmt.block_size, fmt.scale))
    if target is None or (fmt.scale == "e8m0" and fmt.scale_bits != 8):
        known = ", ".join(str(MXFormat(element, size, scale=scale)) for element, size, scale in TARGETS)
        raise ConversionError(f"{site.name} has weights of {fmt}: {METHOD} has {known} only")
    if site.tied_to is not None:
        raise ConversionError(
            f"the weight of {site.name} is shared with {site.tied_to}, which stays unquantized: leave {site.name} out"
        )
    return target


def _save(model: Any, targets: Mapping[str, Target], folder: Path) -> None:
    state = model.state_dict()
    for name, target in targets.items():
        for part in PARTS.values():
            state.pop(f"{name}.{part}", None)
        weight = model.get_submodule(name).packed
        state.update({f"{name}.{part}": tensor for part, tensor in tensors(weight, target).items()})
    type(model).save_pretrained(model, folder, state_dict=state, max_shard_size=SHARD)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": configuration(model, targets)}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensors(weight: MXTensor, target: Target) -> dict[str, Tensor]:
    """Return the tensors of a weight, by the names that compressed-tensors gives them in a layer."""
    if target.bits == 8:
        return {"weight": weight.elements.view(torch.float8_e4m3fn), "weight_scale": weight.scales}
    if weight.fmt.tensor_bits:
        scales = weight.scales.view(torch.float8_e4m3fn)
        return {
            "weight_packed": weight.elements,
            "weight_scale": scales,
            "weight_global_scale": 1 / weight.tensor_scale.reshape(1),
        }
    return {"weight_packed": weight.elements, "weight_scale": weight.scales}


def configuration(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model whose layers have these targets."""
    kinds = list(dict.fromkeys(targets.values()))
    others = [s.name for s in sites.find_sites(model) if s.kind == "linear" and s.name not in targets]
    return {
        "quant_method": METHOD,
        "format": kinds[0].name if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(kinds) == 1 else _names(targets, kind),
                "weights": kind.weights,
                "format": kind.name,
            }
            for i, kind in enumerate(kinds)
        },
        "ignore": others,
    }


def _names(targets: Mapping[str, Target], kind: Target) -> Sequence[str]:
    return [name for name, target in targets.items() if target == kind]
