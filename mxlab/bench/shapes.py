"""Llamas of random weights, by the shape."""

from typing import Any

# The first has Llama-3.2-1B's shape; the other is made in no time, for the tests.
RANDOM: dict[str, dict[str, Any]] = {
    "llama-1b-random": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "random-tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
    },
}
