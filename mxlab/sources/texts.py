"""Texts by name, for perplexity and for calibration: WikiText-2, PTB, C4, the Pile, the embedded passages, a file.

None takes another's place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxlab.checks import suggestion
from mxlab.errors import MetricError, SourceError

FILES = {"wikitext2": "wikitext2_test.raw", "wikitext2_valid": "wikitext2_valid.txt"}
PASSAGES = "passages"
PILE = "pile"
CALIBRATION = ("wikitext2_train", "ptb", "c4")  # of the hub's training splits
PASSAGES_FILE = Path(__file__).parent / "passages.jsonl"  # lines of JSON, each with a "text"
NAMES = (*FILES, *CALIBRATION, PILE, PASSAGES)
PILE_DOCUMENTS = 256  # about 1.5 million characters
C4_DOCUMENTS = 1024  # about 2 million characters
_HUB = "hub"


@dataclass(frozen=True)
class CorpusText:
    """A text, the sha256 of its UTF-8 bytes, and where it came from in words."""

    name: str
    sha256: str
    text: str
    origin: str


def load_text(name: str, data_dir: Path | None = None) -> CorpusText:
    """Return the text ``name``.

    Args:
        name: one of the following, or the path of a text file (UTF-8), which goes under its file name.
            ``wikitext2``: the raw test split: ``wikitext2_test.raw`` of the data folder, or without one that of the
            hub's Salesforce/wikitext, put together to the same file. ``wikitext2_valid``: ``wikitext2_valid.txt`` of
            the data folder, for calibration. ``wikitext2_train``: the hub's training split, put together likewise.
            ``ptb``: that of the hub's ptb-text-only/ptb_text_only, a space between sentences. ``c4``: the first 1024
            documents of the first file of the hub's allenai/c4, with an empty line between them. ``pile``: the first
            256 documents of the hub's NeelNanda/pile-10k, likewise. ``passages``: the embedded passages of
            ``mxlab_passages``, likewise.
        data_dir: a folder with the files above.

    Raises:
        SourceError: no such text, an unreadable or empty file, or a hub that cannot be reached.
    """
    file = _file(name, data_dir)
    if file is not None:
        text, origin = _read(file), file.name
    elif name == PASSAGES:
        text, origin = _passages(), "embedded in mxlab"
    else:
        text, origin = _from_hub(name)
    if not text.strip():
        raise SourceError(f"the text {name} is empty ({origin}): there is nothing to score; give another")
    return CorpusText(label(name), hashlib.sha256(text.encode()).hexdigest(), text, origin)


def label(name: str) -> str:
    """Return what results call the text: its name, or of a path the file's."""
    return name if name in NAMES else Path(name).name


def digest(name: str, data_dir: Path | None = None) -> str:
    """Return the sha256 of the text; ``hub`` for one that comes from there.

    Raises:
        SourceError: as :func:`load_text`, but for the hub's.
    """
    return load_text(name, data_dir).sha256 if name == PASSAGES or _file(name, data_dir) else _HUB


def encode(tokenizer: Any, text: CorpusText) -> Tensor:
    """Return the whole text as token ids (tokens,), without special tokens.

    Raises:
        MetricError: the tokenizer makes no token of it.
    """
    ids = _token_ids(tokenizer, text.text)
    if not ids.numel():
        raise MetricError(f"the tokenizer makes no token of the text {text.name}: there is nothing to score")
    return ids


@lru_cache(maxsize=1)  # a sweep scores one text under many recipes
def _token_ids(tokenizer: Any, text: str) -> Tensor:
    # `verbose` would have the tokenizer warn that the text is longer than the model's context.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _file(name: str, data_dir: Path | None) -> Path | None:
    """Return the file to read, or None for a text that is embedded or the hub's."""
    if name in FILES:
        return _data_file(name, data_dir)
    if name in NAMES:
        return None
    file = Path(name).expanduser()
    if not file.is_file():
        raise SourceError(
            f"no text {name!r}: give {', '.join(NAMES)} or the path of a text file{suggestion(name, NAMES)}"
        )
    return file


def _data_file(name: str, data_dir: Path | None) -> Path | None:
    if data_dir is None and name in _HUB_TEXTS:
        return None
    if data_dir is None:
        raise SourceError(f"the text {name} is {FILES[name]} of a data folder: name the folder with --data-dir")
    file = data_dir / FILES[name]
    if not file.is_file():
        instead = ", or leave --data-dir out to read the hub's" if name in _HUB_TEXTS else ""
        raise SourceError(f"{file} is missing: the text {name} reads it; put it there{instead}")
    return file


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # line ends as they are; a byte order mark is no content
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"cannot read {file}: {e}") from None


def _passages() -> str:
    lines = PASSAGES_FILE.read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["text"] for line in lines)


def _wikitext(split: str = "test") -> Iterator[str]:
    """Return the raw file, line by line: the hub has the blank lines, `` \\n``, as empty rows."""
    from datasets import load_dataset

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split, streaming=True)
    return (row["text"] or " \n" for row in rows)


def _ptb() -> Iterator[str]:
    """Return the sentences, as the hub converted them: datasets does not run the script that the data set is."""
    from datasets import load_dataset

    name, converted = "ptb-text-only/ptb_text_only", "refs/convert/parquet"
    rows = load_dataset(name, "penn_treebank", revision=converted, split="train", streaming=True)
    return (row["sentence"] for row in rows)


def _c4() -> Iterator[str]:
    from datasets import load_dataset

    first = {"train": "en/c4-train.00000-of-01024.json.gz"}
    rows = load_dataset("allenai/c4", data_files=first, split="train", streaming=True)
    return (row["text"] for row in itertools.islice(rows, C4_DOCUMENTS))


def _pile() -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset("NeelNanda/pile-10k", split="train", streaming=True)
    return (row["text"] for row in itertools.islice(rows, PILE_DOCUMENTS))


# Rows, what stands between them, and the origin in words.
_HUB_TEXTS: dict[str, tuple[Callable[[], Iterator[str]], str, str]] = {
    "wikitext2": (_wikitext, "", "the hub's Salesforce/wikitext, wikitext-2-raw-v1, test"),
    "wikitext2_train": (partial(_wikitext, "train"), "", "the hub's Salesforce/wikitext, wikitext-2-raw-v1, train"),
    "ptb": (_ptb, " ", "the hub's ptb-text-only/ptb_text_only, train"),
    "c4": (_c4, "\n\n", f"the hub's allenai/c4, the first {C4_DOCUMENTS} documents"),
    PILE: (_pile, "\n\n", f"the hub's NeelNanda/pile-10k, the first {PILE_DOCUMENTS} documents"),
}


def _from_hub(name: str) -> tuple[str, str]:
    rows, between, origin = _HUB_TEXTS[name]
    try:
        return between.join(rows()), origin
    except Exception as e:  # whatever datasets or its HTTP client raise
        first_line = str(e).strip().partition("\n")[0]
        file = f"give a folder with {FILES[name]} (--data-dir), or " if name in FILES else ""
        raise SourceError(
            f"cannot load the text {name} ({origin}): {type(e).__name__}: {first_line}. Check the network; or {file}"
            f"score another text (--text {PASSAGES} is embedded, --text FILE reads a file)"
        ) from e
