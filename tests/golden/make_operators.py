"""Write ``operators.npz``: what microxcaling computes for the cases of ``operators.py``.

    PYTHONPATH=tests python tests/golden/make_operators.py CLONE_OF_MICROXCALING

runs its torch path on the CPU. A case that it fails at is left out, and named.
"""

import sys
from pathlib import Path

import numpy as np

from golden.operators import CASES, SPECS, arithmetic, run


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import mx
    import mx.mx_mapping
    import mx.vector_ops
    from mx.specs import finalize_mx_specs

    arrays = {"arithmetic": arithmetic()}
    for specs in SPECS:
        for case in CASES:
            try:
                arrays[f"{case}-{specs}"] = run(case, specs, mx, finalize_mx_specs)
            except Exception as e:
                print(f"{case}, {specs}: {type(e).__name__}: {e}")
    file = Path(__file__).parent / "operators.npz"
    np.savez_compressed(file, **arrays)
    print(len(arrays) - 1, "results,", sum(a.size for a in arrays.values()), "numbers,", file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
