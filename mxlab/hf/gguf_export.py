"""A model as a GGUF file, which llama.cpp and what is built on it run: weights alone, bit for bit.

ggml's MXFP4 has the elements and scales of OCP's. Fixed-point formats become Q8_0 and Q4_0, whose scales are float16
numbers: powers of two that these hold. ggml rounds activations in its own way, so that only weights are exported.

Source of the layouts: ggml-common.h (``block_mxfp4``, ``block_q8_0``, ``block_q4_0``); the ``gguf`` package has the
names of tensors and writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.hf.checkpoint import new_folder
from mxlab.hf.exports import packed_model, weight_format
from mxlab.model.conversion import Conversion
from mxlab.model.nn.packed import PARTS
from mxlab.model.plan import QuantizedSite
from mxlab.numerics.codes import scale_values
from mxlab.packed import MXTensor
from mxlab.packed.bits import unpack
from mxlab.progress import Steps
from mxlab.recipe import Recipe

FILE = "model.gguf"
TOOL = "GGUF"
BLOCK = 32  # elements of a block, in all of its types that are written here
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Target:
    """What ggml calls a format.

    Attributes:
        type: of a tensor.
        file_type: of a file that has mostly such tensors.
    """

    type: GGMLQuantizationType
    file_type: LlamaFileType


# By element; blocks are of 32, scales E8M0. How scales and elements were chosen does not matter.
TARGETS = {
    "fp4_e2m1": Target(GGMLQuantizationType.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
    "int8": Target(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "int4": Target(GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a kind of model.

    Attributes:
        arch: its name there.
        interleaves: the rotary embedding turns neighbouring elements, not those of both halves of a head.
    """

    arch: gguf.MODEL_ARCH
    interleaves: bool


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False),
}

_LETTERS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"""
_REST = r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
# How llama.cpp calls what cuts a text before the merges, by the regular expression that does.
_CUTS = {_LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe", _LETTERS + r"\p{N}" + _REST: "qwen2"}


def export(model: str, recipe: Recipe, dtype: str, out: Path, weights_only: bool = False) -> Conversion:
    """Quantize a model, or take one that is, and write it as ``model.gguf`` into the new folder ``out``.

    Args:
        model: a hub name, a folder, or ``smollm2``; one that mxlab saved is taken as it is.
        recipe: what to quantize.
        dtype: of what stays unquantized.
        out: the folder, which is whole afterwards, or not there.
        weights_only: leave out what a recipe has beside weights, such as activations and the KV cache.

    Raises:
        ConversionError: something that GGUF cannot express; it is named.
        RunError: ``out`` exists already, or cannot be written.
    """
    with new_folder(out) as folder:
        loaded, conversion = packed_model(model, recipe, dtype, weights_only, TOOL)
        architecture = architecture_of(loaded.model)
        targets = {site.name: target_of(site) for site in conversion.linears if site.is_packed}
        with Steps("saving"):
            writer = GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture.arch], use_temp_file=True)
            _describe(writer, loaded.model, targets)
            _describe_tokenizer(writer, loaded.tokenizer, loaded.model.config.vocab_size)
            for name, array, kind in _tensors(loaded.model, architecture, targets):
                writer.add_tensor(name, array, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return conversion


def architecture_of(model: Any) -> Architecture:
    """Return what llama.cpp calls the model. Raises ConversionError where mxlab does not know."""
    config = model.config
    found = ARCHITECTURES.get(config.model_type)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if found is None:
        raise ConversionError(
            f"models of type {config.model_type} cannot be written as {TOOL} yet: {', '.join(ARCHITECTURES)} can"
        )
    if kind not in ("default", "linear", "llama3"):
        raise ConversionError(f"the model has a rotary embedding of type {kind}, which is not written as {TOOL} yet")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ConversionError(f"the model has a sliding window of {window} tokens, which is not written as {TOOL} yet")
    if config.hidden_act != "silu":
        raise ConversionError(f"the model has the activation {config.hidden_act}, and llama.cpp computes silu for it")
    if config.model_type == "qwen3" and config.attention_bias:
        raise ConversionError("the model's attention has biases, which llama.cpp does not read for qwen3")
    return found


def target_of(site: QuantizedSite) -> Target:
    """Return the type of a linear layer's weight. Raises ConversionError where there is none."""
    fmt = weight_format(site, TOOL)
    target = TARGETS.get(fmt.element)
    if target is None or fmt.block_size != BLOCK or fmt.scale != "e8m0" or fmt.scale_bits != 8:
        known = ", ".join(f"{element}@{BLOCK}" for element in TARGETS)
        raise ConversionError(f"{site.name} has weights of {fmt}: {TOOL} has {known} only")
    if target.type != GGMLQuantizationType.MXFP4:
        _check_scales(site.module.packed, site.name)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return target


def _check_scales(weight: MXTensor, name: str) -> None:
    steps = _steps(weight)
    lost = int(((steps.to(torch.float16).float() != steps) & weight.holds_numbers()).sum())
    if lost:
        raise ConversionError(
            f"{name} has {lost} blocks whose scale no float16 number is, as {TOOL} would store it: leave it out"
        )


def _steps(weight: MXTensor) -> Tensor:
    """Return what the integers of each block are multiplied by, float32 [outputs, blocks]."""
    return scale_values(weight.fmt)[weight.scales.long()] * weight.fmt.grid.min


def _codes(weight: MXTensor) -> Tensor:
    """Return the codes, uint8 [outputs, blocks, elements of a block]."""
    return unpack(weight.elements, weight.fmt.element_bits, weight.shape[1]).unflatten(-1, (-1, BLOCK))


def blocks(weight: MXTensor, target: Target) -> np.ndarray:
    """Return a weight in the bytes of ggml, uint8 [outputs, bytes]: for each block its scale, then its elements."""
    codes = _codes(weight)
    if target.type == GGMLQuantizationType.MXFP4:
        return _joined(weight.scales[..., None], _halves(codes))
    steps = _steps(weight).masked_fill(~weight.holds_numbers(), 0.0)
    scales = steps.to(torch.float16)[..., None].view(torch.uint8)
    if target.type == GGMLQuantizationType.Q8_0:
        return _joined(scales, codes)
    return _joined(scales, _halves(codes ^ 8))  # two's complement plus 8


def _halves(codes: Tensor) -> Tensor:
    """Return codes of four bits in bytes: those of the first half of a block below, those of the second above."""
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4


def _joined(scales: Tensor, elements: Tensor) -> np.ndarray:
    return torch.cat([scales, elements], dim=-1).flatten(1).contiguous().numpy()


def _tensors(
    model: Any, architecture: Architecture, targets: dict[str, Target]
) -> Iterator[tuple[str, np.ndarray, GGMLQuantizationType]]:
    """Yield each tensor of the file: its name there, its bytes, and their type."""
    names = gguf.get_tensor_name_map(architecture.arch, model.config.num_hidden_layers)
    packed = {f"{name}.{part}" for name in targets for part in PARTS.values()}
    shared = {id(model.get_input_embeddings().weight)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in packed or (name.startswith("lm_head.") and id(parameter) in shared):
            continue  # llama.cpp takes the embeddings for a head that is not there
        rows = row_order(name, parameter.shape[0], model, architecture)
        yield _name(names, name), *_plain(parameter.detach() if rows is None else parameter.detach()[rows])
    for name, target in targets.items():
        weight = model.get_submodule(name).packed
        if (rows := row_order(name, weight.shape[0], model, architecture)) is not None:
            weight = MXTensor.from_tensors(
                {part: x[rows] if x.ndim else x for part, x in weight.tensors().items()}, weight.description(), name
            )
        yield _name(names, f"{name}.weight"), blocks(weight, target), target.type
    factors = rope_factors(model)
    if not torch.equal(factors, torch.ones_like(factors)):
        yield "rope_freqs.weight", *_plain(factors)


def _name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConversionError(f"llama.cpp has no tensor for {name}: the model cannot be written as {TOOL}")
    return found


def _plain(x: Tensor) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Return a tensor that is not quantized; vectors are float32 there."""
    if x.ndim == 1 or x.dtype == torch.float32:
        return x.float().contiguous().numpy(), GGMLQuantizationType.F32
    if x.dtype == torch.float16:
        return x.contiguous().numpy(), GGMLQuantizationType.F16
    return x.contiguous().view(torch.uint8).numpy(), GGMLQuantizationType.BF16


def row_order(name: str, rows: int, model: Any, architecture: Architecture) -> Tensor | None:
    """Return the rows of a parameter in the order of llama.cpp; None where that is the same.

    The elements of a head that the rotary embedding turns together are neighbours there.
    """
    last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}.get(last)
    if heads is None or not architecture.interleaves:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def rope_factors(model: Any) -> Tensor:
    """Return by what the frequencies of the rotary embedding are divided, float32 [half of head_dim]."""
    rotary = model.model.rotary_emb
    if getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise ConversionError(f"the rotary embedding scales the attention, which is not written as {TOOL} yet")
    present = rotary.inv_freq.float()
    exponents = torch.arange(len(present), dtype=torch.float32) / len(present)
    return (_rope_base(model.config) ** -exponents / present).round(decimals=5)


def _rope_base(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta") or config.rope_theta)


def _describe(writer: GGUFWriter, model: Any, targets: dict[str, Target]) -> None:
    config = model.config
    heads, states = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(states)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_rope_dimension_count(head_dim)
    kinds = [target.file_type for target in targets.values()]
    writer.add_file_type(max(kinds, key=kinds.count))
    writer.add_quantization_version(_QUANTIZATION_VERSION)


def _describe_tokenizer(writer: GGUFWriter, tokenizer: Any, count: int) -> None:
    """Write the tokenizer, a byte-level BPE, with as many tokens as the model has embeddings.

    Raises:
        ConversionError: it is another, cuts a text in a way that llama.cpp has not, or has more tokens.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = whole["model"].get("merges")
    # llama.cpp normalizes nothing; almost every text is in NFC as it is.
    is_normal = whole["normalizer"] in (None, {"type": "NFC"})
    if whole["model"]["type"] != "BPE" or whole["model"].get("byte_fallback") or not is_normal:
        raise ConversionError(
            f"the tokenizer is no byte-level BPE, or has a normalizer other than NFC: it is not written as {TOOL}"
        )
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in whole["added_tokens"]}
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    if max(texts) >= count:
        raise ConversionError(f"the tokenizer has {max(texts) + 1} tokens, and the model embeddings for {count}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(whole["pre_tokenizer"]))
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(count)])
    writer.add_token_types([kinds[added.get(i)] if i in texts else gguf.TokenType.UNUSED for i in range(count)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind, number in _special_tokens(tokenizer).items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    found = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    return {kind: number for kind, number in found.items() if number is not None}


def _cut(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return what llama.cpp calls the way in which a text is cut before the merges."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    match [(step["type"], step) for step in steps]:
        case [("ByteLevel", last)] if _are(last, use_regex=True):
            return "gpt-2"
        case [("Digits", first), ("ByteLevel", last)] if _are(last, use_regex=True) and first["individual_digits"]:
            return "smollm"
        case [("Split", first), ("ByteLevel", last)] if _are(last, use_regex=False):
            name = _CUTS.get(first["pattern"].get("Regex"))
            if name is not None and first.get("behavior", "Isolated") == "Isolated" and not first.get("invert"):
                return name
    raise ConversionError(
        f"the tokenizer cuts a text by {json.dumps(pre_tokenizer)}, and mxlab does not know what llama.cpp calls that"
    )


def _are(byte_level: dict[str, Any], use_regex: bool) -> bool:
    """Return whether bytes are what llama.cpp makes of a text: no space before it, and cut by a regex or not."""
    return byte_level["use_regex"] == use_regex and not byte_level.get("add_prefix_space")
