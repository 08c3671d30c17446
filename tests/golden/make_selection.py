"""Choose the golden cases kept with the tests from the full set of vectors.

    python tests/golden/make_selection.py PATH/TO/golden/open

writes ``manifest.json`` and ``arrays.npz`` beside this file. The full set holds the outputs of microsoft/microxcaling
on the CPU (numerics ``microxcaling``) and of its CUDA kernels' code (numerics ``exact``) for about four thousand cases.

How the selection is made, deterministically: a case is worth keeping if it shows something (:func:`traits`) that no
case kept before it shows. Cases are looked at with both outputs before those with one, then small before large, then
by id. ``linear`` cases and the traits of single elements are left out.

How it is stored: ``arrays.npz`` has one flat array per dtype (bfloat16 as its uint16 bit patterns) in which inputs and
outputs lie end to end; a case names the offset of its ``input``, and of its output under each numerics. A case without
any output ``raises``.
"""

import argparse
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DEFAULTS = {
    "scale_bits": 8,
    "scale_rule": "floor",
    "rounding": "nearest",
    "flush_fp32_subnorms": False,
    "bfloat": 0,
    "fp": 0,
    "subnormals": True,
}
NUMERICS_FILES = {"microxcaling": ("mx.npz", "elem.npz"), "exact": ("mx_kernel.npz",)}


def translate(case: dict) -> dict:
    """A case of the full manifest in mxlab's words; a linear case gives nothing."""
    if case["op"] == "linear":
        return {}
    common = {key: case[key] for key in ("id", "kind", "dtype", "shape", "input")}
    common |= {"raises": True} if "raises" in case else {}
    if case["op"] == "quantize_mx_op":
        format_ = {
            "element": case["elem_format"],
            "block_size": case["block_size"],
            "scale_bits": case["scale_bits"],
            "scale_rule": {"max": "floor", "none": "none"}[case["shared_exp_method"]],
            "rounding": case["round"],
            "flush_fp32_subnorms": case["mx_flush_fp32_subnorms"],
        }
        return common | {"format": without_defaults(format_), "axis": case["axes"]}
    assert case["op"] == "quantize_elemwise_op", case["op"]
    scalar = {"bfloat": case["bfloat"], "fp": case["fp"]}
    scalar |= {"rounding": case["round"], "subnormals": case["bfloat_subnorms"]}
    return common | {"elementwise": without_defaults(scalar)}


def without_defaults(options: dict) -> dict:
    return {key: value for key, value in options.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def traits(case: dict, outputs: dict) -> set[tuple]:
    """What a case shows that is worth having at least once."""
    numerics = sorted(outputs) or ["raises"]
    if "elementwise" in case:
        e = DEFAULTS | case["elementwise"]
        width = (e["bfloat"], e["fp"])
        return {
            ("elementwise", *width, case["dtype"], e["rounding"], e["subnormals"]),
            ("elementwise kind", *width, case["dtype"], case["kind"]),
        }
    f = DEFAULTS | case["format"]
    axes = case["axis"] if isinstance(case["axis"], list) else [case["axis"]]
    seen = {
        ("block", f["element"], f["block_size"]),
        ("flush", f["flush_fp32_subnorms"], f["element"], case["dtype"]),
        ("rule", f["scale_rule"], f["element"], case["dtype"]),
        ("scale bits", f["element"], f["scale_bits"], case["dtype"]),
        ("shape", case["dtype"], tuple(case["shape"])),
        ("tiles", tuple(axes), case["dtype"]),
        ("whole axis", f["block_size"] == 0, len(axes), f["element"]),
    }
    main = {(n, f["element"], case["dtype"], f["rounding"], case["kind"]) for n in numerics}
    return seen | main


def select(cases: list[dict], outputs: dict[str, dict]) -> list[dict]:
    """The cases to keep, by id."""
    cases = sorted(cases, key=lambda c: (-len(outputs[c["id"]]), int(np.prod(c["shape"])), c["id"]))
    seen: set[tuple] = set()
    kept = []
    for case in cases:
        new = traits(case, outputs[case["id"]]) - seen
        if new or case.get("raises"):
            seen |= new
            kept.append(case)
    return sorted(kept, key=lambda c: c["id"])


class Store:
    """Arrays laid end to end, one flat array per dtype, each named array once."""

    def __init__(self):
        self.parts: dict[str, list[np.ndarray]] = {}
        self.offsets: dict[tuple, int] = {}
        self.lengths: dict[str, int] = {}

    def add(self, dtype: str, name: tuple, array: np.ndarray) -> int:
        if (dtype, *name) not in self.offsets:
            self.offsets[(dtype, *name)] = self.lengths.get(dtype, 0)
            self.lengths[dtype] = self.lengths.get(dtype, 0) + array.size
            self.parts.setdefault(dtype, []).append(array.ravel())
        return self.offsets[(dtype, *name)]

    def arrays(self) -> dict[str, np.ndarray]:
        return {dtype: np.concatenate(parts) for dtype, parts in self.parts.items()}


def main(source: Path) -> None:
    manifest = json.loads((source / "manifest.json").read_text())
    inputs = dict(np.load(source / "inputs.npz"))
    files = {numerics: {} for numerics in NUMERICS_FILES}
    for numerics, names in NUMERICS_FILES.items():
        for name in names:
            files[numerics] |= dict(np.load(source / name))
    cases = [case for case in map(translate, manifest["cases"]) if case]
    outputs = {c["id"]: {n: arrays[c["id"]] for n, arrays in files.items() if c["id"] in arrays} for c in cases}
    kept, store = select(cases, outputs), Store()
    for case in kept:
        case["input"] = store.add(case["dtype"], ("input", case["input"]), inputs[case["input"]])
        for numerics, array in outputs[case["id"]].items():
            case[numerics] = store.add(case["dtype"], (numerics, case["id"]), array)
    np.savez_compressed(HERE / "arrays.npz", **store.arrays())
    head = {key: manifest[key] for key in ("source", "path", "torch", "seed")}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in kept)
    (HERE / "manifest.json").write_text(json.dumps(head, indent=1)[:-2] + f',\n"cases": [\n{lines}\n]\n}}\n')
    size = sum((HERE / name).stat().st_size for name in ("manifest.json", "arrays.npz"))
    print(f"{len(kept)} of {len(cases)} cases, {size / 1000:.0f} KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the full set: manifest.json and its npz files")
    main(parser.parse_args().source)
