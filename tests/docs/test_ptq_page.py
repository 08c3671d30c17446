"""docs/ptq.md says what the recorded rows say."""

import json

import pytest

from support.tools import docs_tool


@pytest.fixture(scope="module")
def tool():
    with docs_tool("ptq_page") as module:
        yield module


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.fill(page) == page


def test_a_share_is_of_what_rounding_to_nearest_loses(tool, tmp_path, monkeypatch):
    common = {
        "text": "wikitext2",
        "window": 2048,
        "changes": "",
        "kl_divergence": 0.1,
        "top1_agreement": 0.5,
        "bits_per_weight": 4.25,
    }
    found = [("baseline", None, 3.0), ("mxfp4_w4a4kv4", None, 5.0)]
    found += [("mxfp4_w4a4kv4_gptq", seed, loss) for seed, loss in enumerate((3.9, 4.0, 4.1))]
    rows = [{"recipe": recipe, "seed": seed, "cross_entropy": loss, **common} for recipe, seed, loss in found]
    monkeypatch.setattr(tool, "ROWS", tmp_path / "rows.jsonl")
    tool.ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(tool, "FIGURE", tmp_path / "figure.png")
    table = tool.fill("<!-- steps -->\n<!-- end -->")
    assert "| MXFP4 | GPTQ | 54.60 | 1.000 ± 0.100 | 50% |" in table
    assert "| 0, 1, 2 |" in table
    tool.draw()
    assert tool.FIGURE.exists()
