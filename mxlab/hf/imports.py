"""Models that other tools have quantized to microscaling formats, taken over code by code.

Read are folders of compressed-tensors (MXFP4, MXFP6, MXFP8 and NVFP4 weights, as vLLM's llm-compressor writes them) and
GGUF files with ggml's MXFP4. What becomes of them is a packed model of mxlab, under a recipe that says what is there.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import torch
from accelerate import init_empty_weights
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mxlab.errors import ConversionError, SourceError
from mxlab.formats import MXFormat
from mxlab.hf import checkpoint, compressed_tensors, gguf_export
from mxlab.model.apply import pack_sites, prepare
from mxlab.model.conversion import Conversion
from mxlab.model.nn.packed import PARTS
from mxlab.model.saved import make_packed_room
from mxlab.packed import MXTensor
from mxlab.packed.bits import pack
from mxlab.packed.tensor import LAYOUT
from mxlab.progress import Steps
from mxlab.recipe import Recipe, Rule

_REMEDY = "the file is damaged, or of another layout; fetch it again, or take the unquantized model"


@dataclass(frozen=True)
class Found:
    """A quantized model as it was found.

    Attributes:
        config: transformers' configuration, without a quantization.
        tokenizer: its tokenizer.
        packed: the packed weights, by the names of their layers.
        others: all other parameters, by name.
    """

    config: Any
    tokenizer: Any
    packed: Mapping[str, MXTensor]
    others: Mapping[str, Tensor]


def import_model(source: Path, out: Path, weights_only: bool = False) -> Conversion:
    """Save a model that another tool has quantized as a packed model of mxlab, into the new folder ``out``.

    Args:
        source: a folder of compressed-tensors, or a GGUF file.
        out: the folder, which is whole afterwards, or not there.
        weights_only: leave out what else is quantized there, activations and the KV cache.

    Raises:
        SourceError: it is neither, is damaged, has weights in a format that is no microscaling one, or computes what
            mxlab does not know how to.
        RunError: ``out`` exists already, or cannot be written.
    """

    def make() -> tuple[Conversion, Any]:
        with Steps(f"reading {source.name}"):
            found = read_gguf(source) if source.is_file() else read_compressed_tensors(source, weights_only)
        return assembled(found, source.stem), found.tokenizer

    return checkpoint.save(make, out)


def read_compressed_tensors(folder: Path, weights_only: bool = False) -> Found:
    """Read a folder of compressed-tensors; arguments and errors are those of :func:`import_model`."""
    file = folder / "config.json"
    if not file.is_file():
        raise SourceError(f"{folder} has no config.json: give a folder of compressed-tensors, or a GGUF file")
    told = json.loads(file.read_text(encoding="utf-8"))
    quantization = told.pop("quantization_config", None) or {}
    if quantization.get("quant_method") != compressed_tensors.METHOD:
        raise SourceError(
            f"{folder} is quantized by {quantization.get('quant_method', 'nothing')}: mxlab imports "
            f"{compressed_tensors.METHOD} and GGUF; load what mxlab saved as it is"
        )
    _refuse_others(folder, quantization, weights_only)
    config = AutoConfig.for_model(**told)
    tensors = {key: x for key, x in _tensors_in(folder).items() if not key.endswith(_OF_ACTIVATIONS)}
    packed = {}
    for name in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        found = {part: tensors.pop(f"{name}.{part}", None) for part in _STORED}
        packed[name] = _weight(name, {k: x for k, x in found.items() if x is not None}, _dtype(told))
    return Found(config, AutoTokenizer.from_pretrained(folder), packed, tensors)


_STORED = ("weight", "weight_packed", "weight_scale", "weight_global_scale")
_OF_ACTIVATIONS = (".input_global_scale", ".k_scale", ".v_scale")


def _refuse_others(folder: Path, quantization: Mapping[str, Any], weights_only: bool) -> None:
    """Raise SourceError where more is quantized than weights, or something is transformed."""
    if quantization.get("transform_config"):
        raise SourceError(f"{folder} has a transform_config, which mxlab does not read: take the unquantized model")
    groups = (quantization.get("config_groups") or {}).values()
    others = ["activations"] * any(group.get("input_activations") for group in groups)
    others += ["the KV cache"] * bool(quantization.get("kv_cache_scheme"))
    if others and not weights_only:
        raise SourceError(
            f"{folder} quantizes {' and '.join(others)}, too, in the way of that library: --weights-only leaves them "
            "out; a recipe of your own can quantize them again"
        )


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  no dictionary
        except Exception as e:  # whatever safetensors raises
            raise SourceError(f"{file}: {e}; {_REMEDY}") from e
    return found


def _dtype(told: Mapping[str, Any]) -> str:
    return str(told.get("dtype") or told.get("torch_dtype") or "bfloat16")


def _weight(name: str, found: Mapping[str, Tensor], dtype: str) -> MXTensor:
    """Return a weight of compressed-tensors; its format follows from what is stored."""
    codes = found.get("weight_packed", found.get("weight"))
    scales = found["weight_scale"]
    if codes is None or codes.ndim != 2 or scales.ndim != 2 or codes.shape[0] != scales.shape[0]:
        raise SourceError(f"{name} has tensors {sorted(found)} that are no packed weight: {_REMEDY}")
    element, bits = _element(codes, scales)
    inputs = codes.shape[1] * 8 // bits
    size, scale = inputs // max(scales.shape[1], 1), "e4m3" if scales.dtype == torch.float8_e4m3fn else "e8m0"
    if (element, size, scale) not in compressed_tensors.TARGETS or inputs != size * scales.shape[1]:
        raise SourceError(
            f"{name} has {codes.shape[1]} bytes of codes and {scales.shape[1]} scales of {scales.dtype} for each "
            "output, which is no microscaling format that mxlab imports"
        )
    parts = {"elements": codes.view(torch.uint8), "scales": scales.view(torch.uint8)}
    if scale == "e4m3":
        unit = found.get("weight_global_scale")
        if unit is None:
            raise SourceError(f"{name} has no weight_global_scale: {_REMEDY}")
        parts["tensor_scale"] = (1 / unit.float()).reshape(())
    return _checked(parts, MXFormat(element, size, scale=scale), (codes.shape[0], inputs), dtype, name)


def _checked(parts: Mapping[str, Tensor], fmt: MXFormat, shape: tuple[int, ...], dtype: str, name: str) -> MXTensor:
    """Return a weight [outputs, inputs] from its parts. Raises SourceError where they do not fit."""
    description = {"layout": LAYOUT, "format": str(fmt), "axis": 1, "dtype": dtype, "shape": shape}
    return MXTensor.from_tensors(parts, description, name)


def _element(codes: Tensor, scales: Tensor) -> tuple[str, int]:
    """Return the element, and its bits; those of packed codes follow from how many there are for a scale."""
    if codes.dtype == torch.float8_e4m3fn:
        return "fp8_e4m3", 8
    if scales.dtype == torch.uint8 and codes.shape[1] == scales.shape[1] * 24:  # 32 elements
        return "fp6_e2m3", 6
    return "fp4_e2m1", 4


def read_gguf(file: Path) -> Found:
    """Read a GGUF file; tensors of other types than MXFP4 are taken as values.

    Raises:
        SourceError: it is none, or of a model that mxlab does not know the names of.
    """
    try:
        reader = GGUFReader(file)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as e:  # whatever gguf and transformers raise
        raise SourceError(f"{file} cannot be read as GGUF: {e}; {_REMEDY}") from e
    model = _skeleton(config)
    try:
        architecture = gguf_export.architecture_of(model)
    except ConversionError as e:
        raise SourceError(f"{file} cannot be imported: {e}") from None
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    scaling = reader.fields.get(f"{gguf.MODEL_ARCH_NAMES[architecture.arch]}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise SourceError(f"{file} has a rotary embedding that is scaled ({scaling.contents()}): it cannot be imported")
    _take_frequencies(by_name, config, file)
    packed, others, taken = {}, {}, {"rope_freqs.weight"}
    for name, _ in model.named_parameters(remove_duplicate=False):
        there = names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        tensor = by_name.get(there)
        taken.add(there)
        if tensor is None:
            continue  # assembled() knows whether it may be missing
        moved = gguf_export.row_order(name, int(tensor.shape[-1]), model, architecture)
        rows = slice(None) if moved is None else moved.argsort()
        if tensor.tensor_type == GGMLQuantizationType.MXFP4:
            packed[name.removesuffix(".weight")] = _mxfp4(torch.from_numpy(tensor.data.copy())[rows], name)
        else:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            others[name] = values[rows]
    if left := sorted(by_name.keys() - taken):
        raise SourceError(f"{file} has {', '.join(left[:3])}, which transformers' model has not: {_REMEDY}")
    config.tie_word_embeddings = "output.weight" not in by_name
    return Found(config, tokenizer, packed, others)


def _mxfp4(blocks: Tensor, name: str) -> MXTensor:
    """Return a weight of ggml's MXFP4: for each 32 elements a scale, then codes of the first half and the second."""
    stored = blocks.unflatten(-1, (-1, 17))
    codes = torch.cat([stored[..., 1:] & 15, stored[..., 1:] >> 4], dim=-1).flatten(1)
    parts = {"elements": pack(codes, 4), "scales": stored[..., 0].contiguous()}
    return _checked(parts, MXFormat("fp4_e2m1", gguf_export.BLOCK), tuple(codes.shape), "float32", name)


def _take_frequencies(by_name: Mapping[str, Any], config: Any, file: Path) -> None:
    """Give a configuration the frequencies that a file has for the rotary embedding: those of Llama 3, or none."""
    scaled = by_name.get("rope_freqs.weight")
    if scaled is None:
        return
    wanted = torch.from_numpy(scaled.data.copy()).float()
    plain = dict(getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)})
    config.rope_parameters = {**plain, **_LLAMA_3, "factor": float(wanted.max())}
    found = gguf_export.rope_factors(_skeleton(config))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3):
        raise SourceError(
            f"{file} has frequencies of its own for the rotary embedding (rope_freqs), which are not those of Llama 3: "
            "they cannot be imported"
        )


# Of Llama 3.1 to 3.3, but for the factor.
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _skeleton(config: Any) -> Any:
    """Return the model with its parameters on the meta device; what is computed, such as frequencies, is there."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).eval()


def assembled(found: Found, name: str) -> Conversion:
    """Return the model, converted under a recipe that says what is packed.

    Raises:
        SourceError: a parameter is missing, or has no place in the model.
    """
    model = _skeleton(found.config)
    conversion = prepare(model, _recipe(found.packed, name))
    make_packed_room(conversion, {layer: weight.description() for layer, weight in found.packed.items()})
    state = dict(found.others)
    for layer, weight in found.packed.items():
        state |= {f"{layer}.{PARTS[part]}": tensor for part, tensor in weight.tensors().items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    left = [key for key in missing if tensors[key].is_meta]
    if left or unexpected:
        what = f"lacks {', '.join(left[:3])}" if left else f"has {', '.join(unexpected[:3])}, which the model has not"
        raise SourceError(f"{name} {what}: {_REMEDY}")
    pack_sites(conversion.sites)
    return conversion


def _recipe(packed: Mapping[str, MXTensor], name: str) -> Recipe:
    layers: defaultdict[MXFormat, list[str]] = defaultdict(list)
    for layer, weight in packed.items():
        layers[weight.fmt].append(layer)
    rules = [Rule(modules="|".join(map(re.escape, names)), weight=fmt) for fmt, names in layers.items()]
    return Recipe(re.sub(r"[^A-Za-z0-9_.-]", "_", name), tuple(rules))
