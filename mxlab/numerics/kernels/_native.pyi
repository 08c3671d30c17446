# The extension module of csrc/module.cpp. Tensors are passed as addresses; `dtype` is 0, 1, 2 for float32, bfloat16,
# float16; `rounding` an index into mxlab.formats.ROUNDINGS, `scaling` into mxlab.backends.compiled.SCALINGS; an address
# of 0 for `noise` means none.

class Element:
    def __init__(self, mantissa_bits: int, emax: int, min_normal: float, max: float, is_int: bool) -> None: ...

class Format:
    def __init__(
        self,
        element: Element,
        scale_emax: int,
        flush_fp32_subnorms: bool,
        carry: int,
        scale: Element,
        per_tensor: bool,
    ) -> None: ...

class Quantizer:
    def __init__(self, format: Format, scaling: int, rounding: int, emulate: bool) -> None: ...
    def run(
        self,
        source: int,
        target: int,
        noise: int,
        dtype: int,
        outer: int,
        axis: int,
        inner: int,
        block: int,
        threads: int,
        /,
    ) -> None: ...

class Rounder:
    def __init__(self, element: Element, rounding: int, subnormals: bool, emulate: bool) -> None: ...
    def run(self, source: int, target: int, noise: int, dtype: int, count: int, threads: int, /) -> None: ...

def uniform(target: int, count: int, seed: int, threads: int, /) -> None: ...
def adopt_openmp(path: str) -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use(name: str) -> None: ...
