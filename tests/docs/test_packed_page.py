"""docs/packed.md says what the benchmarks measured."""

import pytest

from support.tools import docs_tool


@pytest.fixture(scope="module")
def tool():
    with docs_tool("packed_page") as module:
        yield module


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.fill(page) == page
    for benchmark in ("linear", "forward", "generate"):
        assert f"mxlab bench {benchmark}" in page
