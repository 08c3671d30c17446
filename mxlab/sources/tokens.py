"""Token ids for calibration: of a text, or of a token file.

A token file is what ``numpy.save`` writes of one row of token ids: ``.npy``, whole numbers (tokens,) of any width, made
with the model's own tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxlab.errors import SourceError
from mxlab.sources.texts import encode, load_text

SUFFIX = ".npy"
# What others keep token ids in: pickles, which may run code, and files of several arrays.
_OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".npz", ".safetensors")
_REMEDY = "save one row of token ids by numpy.save"


def token_ids(name: str, tokenizer: Any, data_dir: Path | None = None) -> Tensor:
    """Return the token ids (tokens,) of a text, int64, without special tokens.

    Args:
        name: a text's name or file, as :func:`mxlab.sources.texts.load_text` takes it, or a token file (``.npy``).
        tokenizer: the model's.
        data_dir: a folder with texts.

    Raises:
        SourceError: no such text or file, one that is empty, or a token file that does not fit the tokenizer.
        MetricError: the tokenizer makes no token of the text.
    """
    if not isinstance(name, str):
        raise SourceError(f"the calibration text is {name!r}: write a name, or the path of a file")
    file = Path(name).expanduser()
    if file.suffix == SUFFIX:
        return _read(file, len(tokenizer))
    if file.suffix in _OTHER_SUFFIXES:
        raise SourceError(f"{name} is no text, and token ids are read from {SUFFIX} alone: {_REMEDY}")
    return encode(tokenizer, load_text(name, data_dir))


def _read(file: Path, vocabulary: int) -> Tensor:
    """Return the token ids of a file, all of them below ``vocabulary``."""
    try:
        ids = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise SourceError(f"no token file {file}: {_REMEDY}, or give the name of a text") from None
    except (OSError, ValueError, EOFError) as e:
        raise SourceError(f"cannot read the token file {file}: {e}; {_REMEDY}") from None
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise SourceError(
            f"the token file {file} holds {ids.dtype} of shape {ids.shape}: it must be whole numbers of shape "
            f"(tokens,); {_REMEDY}"
        )
    if not ids.size:
        raise SourceError(f"the token file {file} is empty: {_REMEDY}")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if wrong.size:
        raise SourceError(
            f"the token file {file} holds {ids[wrong[0]]} as token {wrong[0]}, and the tokenizer knows 0 to "
            f"{vocabulary - 1}: make the file with the tokenizer of this model"
        )
    return torch.from_numpy(ids.astype(np.int64))
