"""Tiny randomly initialised models of many architectures."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY, HIDDEN, LAYERS, HEADS, EXPERTS = 64, 32, 2, 4, 4
# Before its version 5, transformers keeps experts as modules with three linear layers each.
IS_OLD = transformers.__version__.startswith("4.")

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_NO_GQA = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}

# The configuration's class and arguments, and how many linear layers (or experts' weights) each decoder layer has:
# those of the MLP, those of attention.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("LlamaConfig", _LLAMA, 3, 4),
    "qwen2": ("Qwen2Config", _LLAMA, 3, 4),
    "qwen2.5": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}, 3, 4),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}, 3, 4),
    "phi": ("PhiConfig", _LLAMA, 2, 4),
    "phi3": ("Phi3Config", _LLAMA, 2, 2),
    "mistral": ("MistralConfig", _LLAMA, 3, 4),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": EXPERTS}, 3 * EXPERTS if IS_OLD else 2, 4),
    "mpt": ("MptConfig", {**_GPT, "d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64}, 2, 2),
    "gpt_neox": ("GPTNeoXConfig", _NO_GQA, 2, 2),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **_GPT,
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
        2,
        4,
    ),
    "opt": (
        "OPTConfig",
        {
            **{k: v for k, v in _NO_GQA.items() if k != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": HIDDEN,
        },
        2,
        4,
    ),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 8}, 3, 4),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 8}, 3, 4),
    "gpt2": ("GPT2Config", {**_GPT, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}, 2, 2),
    "bert": ("BertConfig", _NO_GQA, 2, 4),
}
ENCODERS = ("bert",)
CAUSAL = tuple(name for name in MODELS if name not in ENCODERS)
WITH_ROPE = ("llama", "qwen2", "qwen2.5", "qwen3", "phi", "phi3", "mistral", "mixtral", "gpt_neox", "gemma", "gemma2")


def build(name: str, **config: Any) -> Any:
    """The model, in evaluation mode, its weights drawn from seed 0."""
    config_class, arguments, _, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config_class)(**{**arguments, **config})
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    model = auto.from_config(made)
    with torch.no_grad():
        for p in model.parameters():  # initialisations are small: outputs must depend on what is quantized
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return model.eval()


def tokens(length: int = 10, batch: int = 2) -> torch.Tensor:
    """Random token ids (batch, length), none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def run(model: Any, ids: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    """The model's logits."""
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **more).logits


def counts(name: str) -> tuple[int, int]:
    """How many linear layers of all MLPs, and of all attentions, the model has."""
    _, _, mlp, attention = MODELS[name]
    return LAYERS * mlp, LAYERS * attention
