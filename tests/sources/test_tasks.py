"""Tasks by name: where their data comes from, lm-eval's own definitions, and honest errors."""

import codecs
import json
import re
from pathlib import Path

import datasets
import pytest
from lm_eval.evaluator_utils import get_sample_size

from mxlab import environment
from mxlab.errors import SourceError
from mxlab.sources import tasks as data
from mxlab.sources import texts
from mxlab.sources.tasks import PASSAGES, wikitext_pages

RAW = """ 
 = First = 
 
 Some text = with equals = in it . 
 
 = = Part = = 
 
 = = = Part of a part = = = 
 
 More . 
 
 = Second ( of = two ) = 
 
 Text . 
 
 = X = 
 
"""  # noqa: W291, W293 (WikiText has these blanks)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    """Nothing of these tests stays in the caches of the user."""
    monkeypatch.setenv(environment.CACHE, str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": "the cat sat on the mat"}, {"text": "two and two are four"}, {"text": "Grün ist die Wiese"}]
    lines = (json.dumps(row) for row in rows)
    (tmp_path / "lambada_openai.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "wikitext2_test.raw").write_text(RAW, encoding="utf-8")
    return tmp_path


def task(name: str, data_dir: Path | None = None):
    return data.load_tasks([name], data_dir).manager.load([name])["tasks"][name]


def docs(name: str, data_dir: Path | None = None) -> list[dict]:
    return list(task(name, data_dir).test_docs())


# ---- WikiText pages


def hub_pages(text: str) -> list[str]:
    """As the data set EleutherAI/wikitext_document_level is made, in other words."""
    pages, lines = [], []
    for line in text.split("\n"):
        squeezed = re.sub("= = =", "===", line).replace("= =", "==").strip()
        if squeezed[:2] == "= " and squeezed[-2:] == " =":
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [page for page in [*pages, "\n".join(lines)] if page.strip()]


def test_pages_start_at_top_level_titles():
    pages = wikitext_pages(RAW)
    assert [page.split("\n")[0] for page in pages] == [" = First = ", " = Second ( of = two ) = ", " = X = "]
    assert "Part of a part" in pages[0]
    assert " \n" + "\n".join(pages) == RAW
    assert pages == hub_pages(RAW)


def test_text_before_the_first_title_is_a_page_and_blank_text_is_not():
    assert wikitext_pages("\n \nlost ?\n = A = \n b") == ["\n \nlost ?", " = A = \n b"]
    assert wikitext_pages("\n \n = A = \n b") == [" = A = \n b"]


@pytest.mark.parametrize("text", ["", "text\nmore text\n", " = = Part = = \n text", " == X == \n", " = A \n A = \n"])
def test_no_title_no_page(text):
    with pytest.raises(ValueError, match="holds no WikiText page"):
        wikitext_pages(text)


def test_other_line_separators_do_not_start_a_page():
    assert len(wikitext_pages(" = A = \n text\u2028 = B = \u2028 text\x0b = C = \x0b\n")) == 1


def test_pages_of_wikitext2(shared):
    text = (shared / "data" / "wikitext2_test.raw").read_text(encoding="utf-8")
    pages = wikitext_pages(text)
    assert len(pages) == 62
    assert pages[0].startswith(" = Robert Boulter = \n")
    assert pages == hub_pages(text)


# ---- tasks from local files


def test_tasks_have_lm_evals_names_metrics_and_prompts(folder):
    lambada, wikitext = task("lambada_openai", folder), task("wikitext", folder)
    assert sorted(lambada.aggregation()) == ["acc", "perplexity"]
    assert sorted(wikitext.aggregation()) == ["bits_per_byte", "byte_perplexity", "word_perplexity"]
    doc = next(iter(lambada.test_docs()))
    assert (lambada.doc_to_text(doc), lambada.doc_to_target(doc)) == ("the cat sat on the", " mat")
    assert [doc["page"] for doc in wikitext.test_docs()] == wikitext_pages(RAW)


def test_a_file_with_other_line_ends(folder):
    for name in ("lambada_openai.jsonl", "wikitext2_test.raw"):
        file = folder / name
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert [doc["page"] for doc in docs("wikitext", folder)] == wikitext_pages(RAW)
    assert [doc["text"] for doc in docs("lambada_openai", folder)][-1] == "Grün ist die Wiese"


def test_a_byte_order_mark_is_not_content(folder):
    expected = {name: docs(name, folder)[:] for name in ("lambada_openai", "wikitext")}
    for name in ("lambada_openai.jsonl", "wikitext2_test.raw"):
        file = folder / name
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert {name: docs(name, folder)[:] for name in expected} == expected


def test_several_tasks(folder):
    tasks = data.load_tasks(["wikitext", "lambada_openai", PASSAGES], folder)
    assert tasks.names == ("wikitext", "lambada_openai", PASSAGES)
    loaded = tasks.manager.load(["wikitext"])["tasks"]
    assert [len(loaded[name].test_docs()) for name in tasks.names] == [3, 3, len(docs(PASSAGES))]


def test_a_changed_file_is_read_again(folder):
    first = data.digests(["lambada_openai"], folder)
    assert len(docs("lambada_openai", folder)) == 3
    (folder / "lambada_openai.jsonl").write_text('{"text": "only one row"}\n', encoding="utf-8")
    assert [doc["text"] for doc in docs("lambada_openai", folder)] == ["only one row"]
    assert data.digests(["lambada_openai"], folder) != first
    (folder / "wikitext2_test.raw").write_text(" = New = \n text \n", encoding="utf-8")
    assert len(docs("wikitext", folder)) == 1


def test_digests(folder):
    found = data.digests(["lambada_openai", "wikitext", "hellaswag", PASSAGES], folder)
    assert found["hellaswag"] == "hub"
    assert all(re.fullmatch("[0-9a-f]{64}", found[name]) for name in ("lambada_openai", "wikitext", PASSAGES))
    assert data.digests(["lambada_openai"], None) == {"lambada_openai": "hub"}
    assert data.load_tasks(["wikitext"], folder).digests == {"wikitext": found["wikitext"]}


def test_lambada_and_its_quarter(shared):
    lambada = task("lambada_openai", shared / "data")
    assert len(lambada.eval_docs) == 5153
    assert get_sample_size(lambada, 0.25) == 1289
    assert get_sample_size(lambada, 256) == 256


def test_the_embedded_passages():
    lines = (texts.PASSAGES_FILE).read_text(encoding="utf-8").splitlines()
    assert [doc["text"] for doc in docs(PASSAGES)] == [json.loads(line)["text"] for line in lines]
    assert sorted(task(PASSAGES).aggregation()) == ["acc", "perplexity"]


def test_the_embedded_passages_need_no_data_folder(tmp_path):
    assert len(docs(PASSAGES, tmp_path / "nowhere")) >= 200


# ---- errors


@pytest.mark.parametrize("name", ["lambada_openai", "wikitext"])
def test_a_missing_file_or_folder(name, tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SourceError, match=rf"{data.LOCAL[name].file} is missing: the task {name} .*--data-dir"):
            data.load_tasks([name], place)
        with pytest.raises(SourceError, match="is missing"):
            data.digests([name], place)


@pytest.mark.parametrize("name", ["lambada_openai", "wikitext"])
@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_an_empty_file(name, content, folder):
    (folder / data.LOCAL[name].file).write_bytes(content)
    with pytest.raises(SourceError, match=rf"{data.LOCAL[name].file} is empty"):
        data.load_tasks([name], folder)


@pytest.mark.parametrize("name", ["lambada_openai", "wikitext"])
def test_a_file_that_is_not_utf8(name, folder):
    (folder / data.LOCAL[name].file).write_bytes(b"\xff\xfe = A = \n")
    with pytest.raises(SourceError, match=rf"cannot read .*{data.LOCAL[name].file}.*utf-8"):
        data.load_tasks([name], folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": oops}', r"is not valid JSON in line 2: Expecting value at column 10"),
        ('{"text": "cut o', r"is not valid JSON in line 2: Unterminated string"),
        ('{"txt": "a b"}', "holds no object with a text under 'text' in line 2"),
        ('{"text": 5}', "holds no object with a text under 'text' in line 2"),
        ('{"text": " "}', "holds no object with a text under 'text' in line 2"),
        ('["a b"]', "holds no object with a text under 'text' in line 2"),
    ],
)
def test_a_bad_row(line, message, tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text(f'{{"text": "a b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(SourceError, match=rf"lambada_openai\.jsonl {message}"):
        data.load_tasks(["lambada_openai"], tmp_path)


def test_a_text_that_is_not_wikitext(tmp_path):
    (tmp_path / "wikitext2_test.raw").write_text("just text\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"wikitext2_test\.raw holds no WikiText page"):
        data.load_tasks(["wikitext"], tmp_path)


@pytest.mark.parametrize("name", ["lambada_openai", "wikitext"])
def test_the_hub_cannot_be_reached(name):
    """No other data set takes the place of the one that was asked for."""
    with pytest.raises(SourceError, match=rf"cannot load the data of {name} from the Hugging Face hub.*--data-dir"):
        data.load_tasks([name])


def test_only_the_missing_ones_are_named(folder):
    (folder / "wikitext2_test.raw").unlink()
    with pytest.raises(SourceError, match="data of lambada_openai from the"):
        data.load_tasks([PASSAGES, "lambada_openai"])


def test_an_unknown_task():
    with pytest.raises(SourceError, match=r"no such task: .*'mxlab_passage'.*did you mean 'mxlab_passages'"):
        data.load_tasks(["mxlab_passage"])
