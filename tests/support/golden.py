"""The golden vectors, recorded from microsoft/microxcaling, and comparing results with them bit for bit.

``tests/golden`` holds a selection (how it was made: ``golden/make_selection.py``); the whole set is read where it lies
beside the repository. NaN equals NaN whatever its payload; everything else is compared as bits, the sign of zero too.
"""

import json
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from mxlab.errors import FormatError
from mxlab.formats import ELEMENTS, MXFormat
from mxlab.numerics import quantize, round_elementwise

from golden.make_selection import NUMERICS_FILES, translate
from support.paths import TESTS

SELECTION = TESTS / "golden"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("belowpow2", "gauss", "huge", "naninf", "outlier", "ties", "tiny", "wide", "zeros")
# The kernels do not know fp16 and bf16 as elements.
MX = [group for group in product(ELEMENTS, NUMERICS_FILES) if group not in (("fp16", "exact"), ("bf16", "exact"))]
GROUPS = [*MX, *(("elementwise", "microxcaling", dtype) for dtype in DTYPES)]


def tensor(array: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(np.array(array)).view(DTYPES[dtype])


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def run(case: dict, x: Tensor, numerics: str) -> Tensor:
    if "elementwise" in case:
        return round_elementwise(x, **case["elementwise"], numerics=numerics)
    return quantize(x, MXFormat(**case["format"]), axis=case["axis"], numerics=numerics)


def complaint(case: dict, x: Tensor, expected: Tensor | None, numerics: str) -> str | None:
    """What is wrong with the result for one case, or nothing. Without an expected output it must raise."""
    try:
        got = run(case, x, numerics)
    except FormatError as error:
        return f"{case['id']}: raises {error}" if expected is not None else None
    if expected is None:
        return f"{case['id']}: should raise"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{case['id']}: {got.dtype} {tuple(got.shape)}"
    wrong = (bits(got) != bits(expected)) & ~(got.isnan() & expected.isnan())
    if not wrong.any():
        return None
    shown = zip(x[wrong].tolist(), got[wrong].tolist(), expected[wrong].tolist(), strict=True)
    a, b, c = next(iter(shown))
    return f"{case['id']}: {int(wrong.sum())} of {x.numel()} differ, first {a!r} -> {b!r}, not {c!r}"


def check(checks: list[tuple[dict, Tensor, Tensor | None, str]]) -> None:
    assert checks, "no golden case for this group"
    complaints = [text for args in checks if (text := complaint(*args))]
    assert not complaints, f"{len(complaints)} of {len(checks)} cases:\n" + "\n".join(complaints[:20])


def grouped(cases: list[dict], load) -> dict[tuple, list]:
    """The checks to make, by element format and numerics (element-wise ones by dtype)."""
    groups = defaultdict(list)
    for case in cases:
        name = ("elementwise",) if "elementwise" in case else (case["format"]["element"],)
        tail = (case["dtype"],) if "elementwise" in case else ()
        x = load(case, "input")
        for numerics in ("microxcaling",) if case.get("raises") else NUMERICS_FILES:
            expected = load(case, numerics)
            if case.get("raises") or expected is not None:
                groups[(*name, numerics, *tail)].append((case, x, expected, numerics))
    return groups


@pytest.fixture(scope="module")
def manifest() -> list[dict]:
    return json.loads((SELECTION / "manifest.json").read_text())["cases"]


@pytest.fixture(scope="module")
def selection(manifest) -> dict[tuple, list]:
    arrays = dict(np.load(SELECTION / "arrays.npz"))

    def load(case: dict, key: str) -> Tensor | None:
        if key not in case:
            return None
        flat = arrays[case["dtype"]][case[key] : case[key] + int(np.prod(case["shape"]))]
        return tensor(flat.reshape(case["shape"]), case["dtype"])

    return grouped(manifest, load)


@pytest.fixture(scope="module")
def whole_set(shared) -> dict[tuple, list]:
    folder = shared / "golden" / "open"
    if not folder.is_dir():
        pytest.skip("the whole set of golden vectors is not published; the selection was checked")
    inputs = dict(np.load(folder / "inputs.npz"))
    outputs = {n: {k: v for f in files for k, v in np.load(folder / f).items()} for n, files in NUMERICS_FILES.items()}

    def load(case: dict, key: str) -> Tensor | None:
        array = inputs[case["input"]] if key == "input" else outputs[key].get(case["id"])
        return None if array is None else tensor(array, case["dtype"])

    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    return grouped([case for case in map(translate, cases) if case], load)
