"""The numerics against recorded outputs of microsoft/microxcaling, bit for bit."""

from itertools import product

import pytest

from mxlab.formats import ELEMENTS

from golden.make_selection import DEFAULTS, NUMERICS_FILES
from support.golden import DTYPES, GROUPS, KINDS, SELECTION, check, manifest, selection, whole_set  # noqa: F401


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_selection(selection, group):  # noqa: F811
    check(selection[group])


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_whole_set(whole_set, group):  # noqa: F811
    check(whole_set[group])


def test_the_groups_leave_nothing_out(selection):  # noqa: F811
    assert set(selection) == set(GROUPS)


def test_the_selection_covers(manifest):  # noqa: F811
    mx = [DEFAULTS | case | case["format"] for case in manifest if "format" in case]
    main = {(c["element"], c["dtype"], c["rounding"], c["kind"]) for c in mx if "microxcaling" in c}
    expected = set(product(ELEMENTS, DTYPES, ("nearest", "even", "floor"), KINDS))
    assert expected - main == set(product(["bf16"], ["fp16"], ("nearest", "even", "floor"), KINDS))
    for numerics in NUMERICS_FILES:
        seen = [c for c in mx if numerics in c]
        assert {c["block_size"] for c in seen} >= {0, 8, 16, 32, 64}
        assert {c["scale_bits"] for c in seen} == {0, 4, 5, 6, 8}
        assert {c["flush_fp32_subnorms"] for c in seen} == {True, False}
        assert any(isinstance(c["axis"], list) and c["axis"] not in ([-1], [len(c["shape"]) - 1]) for c in seen)
    assert any(isinstance(c["axis"], list) and len(c["axis"]) > 1 for c in mx)
    assert any(c["scale_rule"] == "none" for c in mx)
    assert sum(c.get("raises", False) for c in mx) == 3


def test_the_selection_is_small():
    assert sum(path.stat().st_size for path in SELECTION.glob("*.*")) < 1_000_000
