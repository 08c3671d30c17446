# The extension module of csrc/module.cpp. Tensors are passed as addresses; an address of 0 for `noise` means none.
# `dtype` is the value of a Dtype.

from collections.abc import Sequence
from enum import Enum

class Dtype(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class Numerics(Enum):
    exact = 0
    microxcaling = 1

class Rounding(Enum):
    nearest = 0
    nearest_zero = 1
    even = 2
    floor = 3
    dither = 4

class Scaling(Enum):
    power = 0
    asymmetric = 1
    searched = 2
    floating = 3

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

class QuantizePlan:
    def __init__(self, format: Format, scaling: Scaling, rounding: Rounding, numerics: Numerics) -> None: ...
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
    def run_transformed(
        self,
        source: int,
        target: int,
        noise: int,
        matrices: int,
        dtype: int,
        size: int,
        is_shared: bool,
        rows: int,
        axis: int,
        block: int,
        threads: int,
        /,
    ) -> None: ...

class RoundPlan:
    def __init__(self, element: Element, rounding: Rounding, subnormals: bool, numerics: Numerics) -> None: ...
    def run(self, source: int, target: int, noise: int, dtype: int, count: int, threads: int, /) -> None: ...

class DotElement:
    def __init__(self, bits: int, is_int: bool, offset: int, bytes: Sequence[int]) -> None: ...

class ProductPlan:
    def __init__(
        self,
        activation: Format,
        scaling: Scaling,
        rounding: Rounding,
        largest_input: int,
        weight: DotElement,
        largest_weight: int,
        block: int,
    ) -> None: ...
    def bytes(self, rows: int, inputs: int, /) -> int: ...
    def encode(
        self, source: int, dtype: int, rows: int, inputs: int, rounder: RoundPlan | None, memory: int, threads: int, /
    ) -> None: ...
    def multiply(
        self,
        memory: int,
        rows: int,
        inputs: int,
        elements: int,
        scales: int,
        scale_of: int,
        unit: float,
        outputs: int,
        row_bytes: int,
        smallest: float,
        largest: float,
        target: int,
        bias: int,
        dtype: int,
        rounder: RoundPlan | None,
        threads: int,
        /,
    ) -> bool: ...

class PackedHeads:
    def __init__(
        self,
        elements: int,
        scales: int,
        scale_of: int,
        element: DotElement,
        value_of: int,
        batch: int,
        heads: int,
        tokens: int,
        length: int,
        block: int,
        row_bytes: int,
        element_batch: int,
        element_head: int,
        scale_batch: int,
        scale_head: int,
        /,
    ) -> None: ...
    def score(self, queries: int, rows: int, target: int, threads: int, /) -> None: ...
    def mix(self, factors: int, rows: int, target: int, threads: int, /) -> None: ...

def pack(
    source: int,
    dtype: int,
    elements: int,
    scales: int,
    rows: int,
    length: int,
    block: int,
    row_bytes: int,
    bits: int,
    nan_scale: int,
    format: Format,
    scaling: Scaling,
    rounding: Rounding,
    threads: int,
    /,
) -> float: ...
def unpack(
    elements: int,
    scales: int,
    scale_of: int,
    rows: int,
    length: int,
    block: int,
    row_bytes: int,
    element: DotElement,
    value_of: int,
    target: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def transform(
    source: int,
    target: int,
    matrices: int,
    dtype: int,
    size: int,
    is_shared: bool,
    rows: int,
    axis: int,
    threads: int,
    /,
) -> None: ...
def settle(
    weight: int,
    scales: int,
    factors: int,
    errors: int,
    inputs: int,
    outputs: int,
    element: Element,
    lowest: float,
    rounding: Rounding,
    threads: int,
    /,
) -> None: ...
def uniform(target: int, count: int, seed: int, threads: int, /) -> None: ...
def adopt_openmp(path: str) -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use(name: str) -> None: ...
