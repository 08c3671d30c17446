"""docs/published_tools.md says what the recorded outputs say."""

import importlib
import sys

import pytest

from support.paths import ROOT


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(ROOT / "tools" / "docs"))
    try:
        yield importlib.import_module("published_tools_page")
    finally:
        sys.path.remove(str(ROOT / "tools" / "docs"))
        for name in ("published_tools_page", "formats_page", "formats_figures"):
            sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_files(page):
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- end -->") == 2
    assert page.fill(text) == text
