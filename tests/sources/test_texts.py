"""Texts by name: what is read, its digest, and honest errors."""

import codecs
import hashlib
import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from mxlab.errors import MetricError, SourceError
from mxlab.sources import texts

RAW = " \n = Title = \n \n Some words . \n \n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wikitext2_test.raw").write_text(RAW, encoding="utf-8")
    (tmp_path / "wikitext2_valid.txt").write_text("valid words\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A hub that has these rows, and keeps what it was asked for."""

    def set_up(rows):
        asked = []

        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return iter({"text": row, "sentence": row} for row in rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return set_up


@pytest.mark.parametrize(("name", "expected"), [("wikitext2", RAW), ("wikitext2_valid", "valid words\n")])
def test_files_of_the_data_folder(name, expected, folder):
    text = texts.load_text(name, folder)
    assert (text.name, text.text, text.origin) == (name, expected, texts.FILES[name])
    assert text.sha256 == texts.digest(name, folder) == hashlib.sha256(expected.encode()).hexdigest()


def test_a_path(tmp_path, monkeypatch):
    (tmp_path / "Grün.txt").write_bytes("Grün\r\nist\n".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path / "Grün.txt"), "~/Grün.txt"):
        text = texts.load_text(name, tmp_path / "elsewhere")
        assert (text.name, text.text) == ("Grün.txt", "Grün\r\nist\n")
        assert text.sha256 == hashlib.sha256((tmp_path / "Grün.txt").read_bytes()).hexdigest()


def test_a_byte_order_mark_is_not_content(folder):
    plain = texts.load_text("wikitext2", folder)
    for name in ("wikitext2_test.raw", "mine.txt"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + RAW.encode())
    assert texts.load_text("wikitext2", folder) == plain
    assert texts.digest("wikitext2", folder) == plain.sha256
    assert texts.load_text(str(folder / "mine.txt")).text == RAW


def test_the_passages():
    text = texts.load_text("passages")
    rows = [json.loads(line)["text"] for line in (texts.PASSAGES_FILE).read_text("utf-8").splitlines()]
    assert text.text.split("\n\n") == rows
    assert texts.digest("passages") == text.sha256


def test_wikitext_of_the_hub_is_the_same_file(hub, folder):
    asked = hub([line + "\n" if line.strip() else "" for line in RAW.split("\n")[:-1]])
    text = texts.load_text("wikitext2")
    assert (text.text, text.sha256) == (RAW, texts.load_text("wikitext2", folder).sha256)
    assert asked[0][0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert asked[0][1]["split"] == "test"
    assert "Salesforce/wikitext" in text.origin


def test_wikitext_of_the_reference_material(shared, hub):
    text = texts.load_text("wikitext2", shared / "data")
    assert text.sha256.startswith("173c87a5")
    assert text.sha256.endswith("e7dd08")
    hub([line + "\n" if line.strip() else "" for line in text.text.split("\n")[:-1]])
    assert texts.load_text("wikitext2").sha256 == text.sha256


def test_the_pile(hub, tmp_path):
    asked = hub(map(str, range(1000)))
    text = texts.load_text("pile", tmp_path)
    assert text.text.split("\n\n") == [str(i) for i in range(texts.PILE_DOCUMENTS)]
    assert asked[0][0] == ("NeelNanda/pile-10k",)
    assert asked[0][1]["streaming"]
    assert "256 documents" in text.origin
    assert texts.digest("pile") == "hub"


def test_wikitext_for_training(hub, folder):
    asked = hub([line + "\n" if line.strip() else "" for line in RAW.split("\n")[:-1]])
    assert texts.load_text("wikitext2_train", folder).text == RAW
    assert asked[0][1]["split"] == "train"


def test_ptb(hub):
    asked = hub(["a b", "c"])
    text = texts.load_text("ptb")
    assert text.text == "a b c"
    assert asked[0][0] == ("ptb-text-only/ptb_text_only", "penn_treebank")
    assert (asked[0][1]["split"], asked[0][1]["revision"]) == ("train", "refs/convert/parquet")


def test_c4(hub):
    asked = hub(map(str, range(2000)))
    text = texts.load_text("c4")
    assert text.text.split("\n\n") == [str(i) for i in range(texts.C4_DOCUMENTS)]
    assert asked[0][0] == ("allenai/c4",)
    assert asked[0][1]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert "1024 documents" in text.origin


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        (
            "wikitext",
            None,
            r"no text 'wikitext': give wikitext2, .* or the path of a text file; did you mean 'wikitext2'",
        ),
        ("no/such.txt", None, r"no text 'no/such\.txt'"),
        ("", None, r"no text ''"),
        ("wikitext2_valid", None, r"wikitext2_valid\.txt of a data folder: name the folder with --data-dir"),
        ("wikitext2", Path("nowhere"), r"wikitext2_test\.raw is missing.*or leave --data-dir out to read the hub's"),
        ("wikitext2_valid", Path("nowhere"), r"wikitext2_valid\.txt is missing: .* put it there$"),
    ],
)
def test_no_such_text(name, data_dir, message):
    for find in (texts.load_text, texts.digest):
        with pytest.raises(SourceError, match=message):
            find(name, data_dir)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("wikitext2", ["(the hub's Salesforce/wikitext", "--data-dir", "wikitext2_test.raw"]),
        ("pile", ["(the hub's NeelNanda/pile-10k", "--text passages is embedded"]),
    ],
)
def test_the_hub_cannot_be_reached(name, parts, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(SourceError) as caught:
        texts.load_text(name)
    for part in (f"cannot load the text {name}", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_text(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SourceError, match=r"the text .*a\.txt is empty"):
        texts.load_text(str(tmp_path / "a.txt"))


def test_a_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"cannot read .*a\.txt: .*utf-8"):
        texts.load_text(str(tmp_path / "a.txt"))


def test_tokens(tiny_llama, folder, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = texts.load_text("wikitext2", folder)
    ids = texts.encode(tokenizer, text)
    assert tokenizer.decode(ids) == RAW
    twice = tokenizer.encode(RAW * 2)
    tokenizer.model_max_length = 2
    assert texts.encode(tokenizer, texts.CorpusText("x", "", RAW * 2, "")).tolist() == twice
    assert caplog.text == ""
    with pytest.raises(MetricError, match="makes no token of the text x"):
        texts.encode(lambda *_, **__: {"input_ids": []}, texts.CorpusText("x", "", "?", ""))
