"""Token ids for calibration: of texts and of token files, and errors that name the file, the place and the remedy."""

import numpy as np
import pytest
import torch

from mxlab.errors import SourceError
from mxlab.sources.texts import NAMES
from mxlab.sources.tokens import token_ids


class Tokenizer:
    """Knows 256 tokens: the bytes of UTF-8."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def __len__(self):
        return 256


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint64", ">i4"])
def test_a_token_file(tmp_path, dtype):
    np.save(tmp_path / "ids.npy", np.array([3, 0, 255], dtype))
    found = token_ids(str(tmp_path / "ids.npy"), Tokenizer())
    assert found.dtype == torch.int64
    assert found.tolist() == [3, 0, 255]


def test_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("ab", encoding="utf-8")
    assert token_ids(str(tmp_path / "a.txt"), Tokenizer()).tolist() == [97, 98]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1.0, 2.0]), r"ids\.npy holds float64 of shape \(2,\): .*whole numbers of shape \(tokens,\)"),
        (np.array([True]), r"holds bool"),
        (np.zeros((2, 3), "int32"), r"holds int32 of shape \(2, 3\)"),
        (np.zeros((), "int32"), r"of shape \(\)"),
        (np.zeros(0, "int32"), r"ids\.npy is empty: save one row of token ids by numpy\.save"),
        (np.array([0, 255, 256, 300]), r"holds 256 as token 2, and the tokenizer knows 0 to 255: make the file with"),
        (np.array([0, -1], "int8"), r"holds -1 as token 1"),
        (np.array([2**63], "uint64"), r"holds 9223372036854775808 as token 0"),
    ],
)
def test_a_token_file_that_does_not_fit(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(SourceError, match=message):
        token_ids(str(tmp_path / "ids.npy"), Tokenizer())


@pytest.mark.parametrize(
    ("content", "message"), [(b"", r"cannot read the token file .*ids\.npy"), (b"no array", r"numpy\.save$")]
)
def test_what_is_no_token_file(tmp_path, content, message):
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        token_ids(str(tmp_path / "ids.npy"), Tokenizer())


def test_a_pickle_is_not_loaded(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match=r"cannot read the token file"):
        token_ids(str(tmp_path / "ids.npy"), Tokenizer())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.npy", r"no token file nowhere\.npy: save one row .* or give the name of a text"),
        ("calib.pt", r"calib\.pt is no text, and token ids are read from \.npy alone"),
        ("a.safetensors", r"read from \.npy alone"),
        ("wikitext", r"no text 'wikitext': give wikitext2, .* c4, .*did you mean 'wikitext2'"),
        (3, r"the calibration text is 3: write a name"),
    ],
)
def test_no_such_text(name, message):
    with pytest.raises(SourceError, match=message):
        token_ids(name, Tokenizer())


def test_a_text_that_is_empty(tmp_path):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"a\.txt is empty .*give another"):
        token_ids(str(tmp_path / "a.txt"), Tokenizer())


def test_every_name_is_listed():
    assert NAMES == ("wikitext2", "wikitext2_valid", "wikitext2_train", "ptb", "c4", "pile", "passages")
