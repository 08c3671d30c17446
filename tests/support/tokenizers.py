"""Tiny models in folders, with a tokenizer of few tokens: that of the embedded model takes seconds to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from support.llama import tiny

TEXT = "It's 2024, and the sea\n\n  is 123 km wide."


def small_tokenizer() -> Any:
    """A byte-level BPE of 300 tokens at most."""
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT] * 3, BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def saved(folder: Path, model: Any = None, **changes: Any) -> str:
    """Save a model, by default a Llama of two layers, and the tokenizer; the folder as a string."""
    tokenizer = small_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tokenizer)}
    (model or tiny(**sizes, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
