"""The pages of docs/ say what the files under results/ hold."""

import importlib.util
import re

import pytest

from support.paths import ROOT


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "tools" / "docs" / "fill_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "tables"), [("results", 8), ("inspect", 2), ("recipes", 1), ("ptq", 3)])
def test_the_tables_of_a_page_are_those_of_the_files(fill, name, tables):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.count("<!-- table ") == len(fill.TABLE.findall(page)) >= tables
    assert fill.fill(page) == page


def test_a_table_takes_the_named_columns(fill, tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    (tmp_path / "t.csv").write_text("bs,acc,acc_stderr,ppl,ppl_stderr,id\n16,0.13266,0.00945,268.349,22.918,x\n")
    page = "before\n<!-- table t.csv: bs acc ppl -->\nold\n<!-- end -->\nafter\n"
    assert fill.fill(page) == (
        "before\n<!-- table t.csv: bs acc ppl -->\n| bs | acc (±stderr) | ppl (±stderr) |\n| --: | --: | --: |\n"
        "| 16 | 0.1327 ± 0.0095 | 268.3 ± 22.9 |\n<!-- end -->\nafter\n"
    )


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_and_figures_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
