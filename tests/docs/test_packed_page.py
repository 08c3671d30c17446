"""docs/packed.md says what the benchmarks measured."""

import importlib
import sys

import pytest

from support.paths import ROOT

TOOLS = ROOT / "tools" / "docs"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module("packed_page")
    finally:
        sys.path.remove(str(TOOLS))
        for name in ("packed_page", "formats_page"):
            sys.modules.pop(name, None)


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.fill(page) == page
    for benchmark in ("linear", "forward", "generate"):
        assert f"mxlab bench {benchmark}" in page
