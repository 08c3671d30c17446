"""docs/formats.md says what the code says, of every format there is, with a picture of each."""

import re
import sys
from pathlib import Path

import pytest

from mxlab.formats import ELEMENTS, FAMILIES, MXFormat, element, parse_format
from mxlab.formats.scales import SCALE_RULES, SCALES

from support.paths import ROOT
from support.tools import docs_tool

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
DRAWN = {path.name for path in (ROOT / "figs" / "formats").glob("*.png")}


@pytest.fixture(scope="module")
def page():
    with docs_tool("formats_page") as module:
        yield module


def rows(section: str) -> dict[str, list[str]]:
    """The rows of a table of the page, by what stands in their first column."""
    body = PAGE.split(f"<!-- {section} -->\n")[1].partition("<!-- end -->")[0]
    cells = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in body.splitlines() if line[:1] == "|"
    ]
    return {row[0]: row for row in cells[2:]}


def test_the_page_is_what_the_code_says(page):
    assert set(page.TABLES) == {match["name"] for match in page.SECTION.finditer(PAGE)}
    assert page.fill(PAGE) == PAGE


def test_check_refuses_a_page_out_of_date(page, tmp_path, monkeypatch):
    stale = tmp_path / "formats.md"
    stale.write_text(PAGE.replace("57344", "57345"), encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", stale)
    with pytest.raises(SystemExit, match="out of date: run `make figs`"):
        page.main("--check")
    assert "57345" in stale.read_text(encoding="utf-8")


def test_every_format_has_its_row():
    names = [*rows("elements"), *rows("other elements")]
    parametric = [f"fp{n}_e{x}m{n - 1 - x}" for n in range(2, 9) for x in range(1, n)] + [
        f"int{b}" for b in range(2, 9)
    ]
    assert sorted(names) == sorted({*ELEMENTS, *parametric})
    assert list(rows("scales")) == list(SCALES)
    assert list(rows("scale rules")) == list(SCALE_RULES)
    assert list(rows("options")) == ["element", "block_size", "scale", "scale_bits", "scale_rule", "rounding",
                                     "flush_fp32_subnorms"]  # fmt: skip
    assert {re.split("[@,]", text)[0] for text in rows("families")} == set(FAMILIES)
    assert re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE) == list(FAMILIES)


def test_rows_by_hand():
    # OFP8 v1.0, table 1; OCP MX v1.0, tables 2 to 5.
    assert rows("elements")["fp8_e4m3"][1:] == ["8", "4", "3", "7", "-6", "8", "2^-9", "2^-6", "448", "253", "2 NaN"]
    assert rows("elements")["fp8_e5m2"][7:] == ["2^-16", "2^-14", "57344", "247", "2 infinities, 6 NaN"]
    assert rows("elements")["fp4_e2m1"][7:] == ["0.5", "1", "6", "15", "none"]
    assert rows("elements")["int8"][7:] == ["2^-6", "–", "1.984375", "255", "none"]
    assert rows("mx formats")["nvfp4"][1:] == ["4", "16", "e4m3", "4.5"]
    assert rows("scales")["e8m0"][1:7] == ["8", "8", "0", "2^-127", "2^127", "255"]
    assert rows("families")["integer,width=4,frac=2"][1:] == ["4", "0", "4", "0.25", "2", "16"]
    assert rows("families")["log,width=4"][1:] == ["4", "0", "4", "0.125", "16", "16"]
    assert rows("families")["block_fp@16,width=4"][1:] == ["4", "8 in 16", "4.5", "0.125", "0.875", "15"]


def test_what_the_page_spells_can_be_parsed():
    for text in [*rows("mx formats"), *rows("families")]:
        assert parse_format(text).bits_per_element > 0
    for text in re.findall(r'^(?:weight|activation) = "(.*)"$', PAGE, re.MULTILINE):
        assert isinstance(parse_format(text), MXFormat)


def test_the_pictures_are_those_that_are_drawn(page, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["formats_figures"], "DPI", 30)  # quick
    files = page.draw(tmp_path / "figures")
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert {file.name for file in files} == DRAWN
    assert {Path(target).name for target in re.findall(r"\]\((\S+\.png)\)", PAGE)} == DRAWN


def test_numbers(page):
    values = [0.5, 6.0, 1.984375, 2.0**-14, 57344.0, 2.0**64, element("bf16").max, 0.0625, 1024.0]
    assert [page.number(v) for v in values] == [
        "0.5", "6", "1.984375", "2^-14", "57344", "2^64", "3.389531389e+38", "0.0625", "1024"
    ]  # fmt: skip
