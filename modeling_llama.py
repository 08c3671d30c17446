# mxlab overlay of transformers/models/llama/modeling_llama.py
"""Llama that computes in microscaling (MX) formats, as the environment variable MX_SPECS_JSON says.

An overlay, not a copy: ``install.sh --patch`` keeps transformers' own file beside this one, untouched, as
``modular_llama_upstream.py``. All there is of Llama comes from there; the one class below adds the conversion of the
projections (``MxLinear``) and of K and V. Without MX_SPECS_JSON it adds nothing: stock Llama, bit for bit.
"""

# ruff: noqa: E402
# pyright: reportMissingImports=false
import os

from ...utils.auto_docstring import AUTODOC_FILES

# Else transformers 4.57 finds no model name for the doc strings of the file below, and says so on standard output.
AUTODOC_FILES.append("modular_*_upstream.py")

# transformers looks for model files in this folder; a name with the prefix ``modular_`` is not taken for one.
from . import modular_llama_upstream as upstream
from .modular_llama_upstream import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaPreTrainedModel,
)


class LlamaModel(upstream.LlamaModel):
    """The bare Llama decoder, as upstream, and converted as it is made, before weights are loaded."""

    def __init__(self, config):
        super().__init__(config)
        if "MX_SPECS_JSON" in os.environ:
            from mxlab.hf.patched_llama import convert_llama

            convert_llama(self)


# Every head makes its decoder by this name, which it looks up in its own module.
upstream.LlamaModel = LlamaModel


def __getattr__(name):
    # Whatever else other models import from this file: LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb, ...
    return getattr(upstream, name)


__all__ = [  # noqa: RUF022 (the order of the upstream file)
    "LlamaForCausalLM",
    "LlamaModel",
    "LlamaPreTrainedModel",
    "LlamaForSequenceClassification",
    "LlamaForQuestionAnswering",
    "LlamaForTokenClassification",
]
