"""Choose the golden cases of microxcaling's ``linear`` kept with the tests, from the full set of vectors.

    python tests/golden/make_linear_selection.py PATH/TO/golden/open

writes ``linear.json`` and ``linear.npz`` beside this file. The case that shows most per byte of what is not shown yet
is kept, until all is. Arrays are named ``<case>_<x, w, b, grad_out, y, gx, gw or gb>``; bfloat16 is stored as its
uint16 bit patterns.
"""

import argparse
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
INPUTS = ("x", "w", "b", "grad_out")


def read(source: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The linear cases of the full set, and their arrays by the names of this selection."""
    cases = [c for c in json.loads((source / "manifest.json").read_text())["cases"] if c["op"] == "linear"]
    inputs, arrays = np.load(source / "inputs.npz"), dict(np.load(source / "linear.npz"))
    arrays |= {f"{c['id']}_{name}": inputs[c[name]] for c in cases for name in INPUTS if c[name]}
    keys = ("id", "dtype", "outputs", "raw_specs", "resolved_specs", "tol")
    return [{key: c[key] for key in keys} for c in cases], arrays


def traits(case: dict, arrays: dict[str, np.ndarray]) -> set[tuple]:
    """What a case shows that is worth having at least once."""
    specs = case["raw_specs"]
    return {
        ("formats", specs["w_elem_format"], specs["a_elem_format"], specs["block_size"]),
        ("shape", arrays[f"{case['id']}_x"].shape),
        ("dtype", case["dtype"], specs["bfloat"]),
        ("backward", specs["quantize_backprop"], specs["bfloat"]),
        ("round", specs["round"]),
        ("bias", "gb" in case["outputs"]),
    }


def select(cases: list[dict], arrays: dict[str, np.ndarray]) -> list[dict]:
    """The cases to keep, by id."""
    missing = set.union(*(traits(case, arrays) for case in cases))
    kept = []
    while missing:
        best = max(cases, key=lambda c: len(traits(c, arrays) & missing) / arrays[f"{c['id']}_w"].nbytes)
        missing -= traits(best, arrays)
        kept.append(best)
    return sorted(kept, key=lambda c: c["id"])


def main(source: Path) -> None:
    cases, arrays = read(source)
    kept = select(cases, arrays)
    ids = tuple(f"{case['id']}_" for case in kept)
    chosen = {name: array for name, array in arrays.items() if name.startswith(ids)}
    np.savez_compressed(HERE / "linear.npz", **chosen)
    lines = ",\n".join(json.dumps({k: v for k, v in c.items() if k != "resolved_specs"}) for c in kept)
    (HERE / "linear.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(kept)} of {len(cases)} cases, {(HERE / 'linear.npz').stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the full set: manifest.json and its npz files")
    main(parser.parse_args().source)
