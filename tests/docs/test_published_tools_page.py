"""docs/published_tools.md says what the recorded outputs say."""

import pytest

from support.tools import docs_tool


@pytest.fixture(scope="module")
def page():
    with docs_tool("published_tools_page") as module:
        yield module


def test_the_tables_are_those_of_the_files(page):
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- end -->") == 2
    assert page.fill(text) == text
