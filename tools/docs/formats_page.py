"""Writes the tables of docs/formats.md anew and draws figs/formats/: every number is what the code says or computes.

python tools/docs/formats_page.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``. With --check nothing is written, and a page out of date
is an error.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from formats_figures import grids, save, staircases

from mxlab.formats import ELEMENTS, FAMILIES, ElementFormat, FormatFamily, MXFormat, element, parse_format
from mxlab.formats.scales import SCALE_RULES, SCALES, ScaleFormat
from mxlab.numerics import quantize

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "formats.md"
FIGURES = ROOT / "figs" / "formats"
SECTION = re.compile(r"(<!-- (?P<name>[a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The exponent of the scale (floor and ceil go to the integer below and above, log is to the base 2), and who uses it.
RULES = {
    "floor": ("floor(log amax) - emax", "OCP MX v1.0, microxcaling's kernels, torchao `FLOOR`, Brevitas, auto-round"),
    "ceil": ("ceil(log amax) - emax", "torchao `CEIL`"),
    "even": ("`floor` of amax rounded to the element's mantissa, half up", "torchao `EVEN`, AMD Quark's default"),
    "rceil": ("ceil(log(amax / max))", "torchao `RCEIL`, auto-round"),
    "mase_int": ("ceil(log amax); integers on [-1, 1), ties to even", "MASE's MXINT"),
    "mse": ("that of `floor` or the next, that with the smaller squared error", "mxlab; the better of two"),
    "none": ("`floor`, every element for itself", "microxcaling's `shared_exp_method=none`"),
    "four_thirds": ("that of `floor`; the scale is 4/3 of the power of two, for `fp4_e2m1`", "FP-Quant's `abs_max`"),
    "quest": ("floor(log(2.92247856 / 6 · std + 10^-8)), for `fp4_e2m1`", "FP-Quant's and QuEST's `quest`"),
    "max": ("no exponent: amax / max on the grid of the scale, ties to even", "NVFP4; e5m3 scales"),
}
MX = [
    *(f"{name}@{block}" for name in ELEMENTS if element(name).bits <= 8 for block in (32, 16)),
    "fp4_e2m1@16,scale=e5m3", "nvfp4",
]  # fmt: skip
EXAMPLES = {
    "integer": ["integer,width=4,frac=2", "integer,width=4,frac=0", "integer,width=6,frac=3"],
    "minifloat_denorm": [f"minifloat_denorm,width={w},exponent_bits={e}" for w, e in ((4, 2), (6, 2), (6, 3))],
    "minifloat_ieee": [f"minifloat_ieee,width={w},exponent_bits={e}" for w, e in ((4, 2), (6, 2), (6, 3))],
    "log": ["log,width=3", "log,width=4", "log,width=4,bias=7"],
    "block_fp": ["block_fp@16,width=3", "block_fp@16,width=4", "block_fp@16,width=6"],
    "block_minifloat": [f"block_minifloat@16,width={w},exponent_bits={e}" for w, e in ((4, 2), (6, 2), (6, 3))],
    "block_log": ["block_log@16,width=3", "block_log@16,width=4", "block_log@16,width=6"],
    "binary": ["binary", "binary,scaled=true", "binary,scaled=true,stochastic=true"],
    "binary_residual": [f"binary_residual,levels={n}" for n in (1, 2, 3)],
    "ternary": ["ternary"],
}


# Tables


def fill(page: str) -> str:
    """``page`` with every table as the code has it."""
    return SECTION.sub(lambda m: m[1] + TABLES[m["name"]]() + m[3], page)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; a column whose head begins with # is aligned to the right."""
    rule = ["--:" if head.startswith("#") else "---" for head in heads]
    lines = [[head.removeprefix("#") for head in heads], rule, *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def number(value: float) -> str:
    """A value as a short decimal number, or as a power of two where that is shorter."""
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5 and not -5 < exponent < 12:
        return f"2^{exponent - 1}"
    return f"{value:.10g}"


def elements(chosen: Iterable[ElementFormat]) -> str:
    """What there is to know of element formats."""
    heads = ["format", *(f"#{h}" for h in ("bits", "exponent", "mantissa", "bias", "emin", "emax", "smallest",
             "smallest normal", "largest", "values")), "reserved codes"]  # fmt: skip
    return table(heads, map(_element, chosen))


def _element(f: ElementFormat) -> list[object]:
    reserved = {"none": "none", "nan": "2 NaN", "ieee": f"2 infinities, {2 ** (f.mantissa_bits + 1) - 2} NaN"}
    exponents = ["–"] * 3 if f.is_int else [f.bias, f.emin, f.emax]
    sizes = [number(f.min), "–" if f.is_int else number(f.min_normal), number(f.max)]
    count = 2 * len(f.magnitudes()) - 1
    return [f"`{f}`", f.bits, f.exponent_bits, f.mantissa_bits, *exponents, *sizes, count, reserved[f.specials]]


def others() -> list[ElementFormat]:
    """The formats that no name but their parameters stand for."""
    floats = [f"fp{bits}_e{e}m{bits - 1 - e}" for bits in range(8, 1, -1) for e in range(bits - 1, 0, -1)]
    return [element(name) for name in [*floats, *(f"int{bits}" for bits in range(8, 1, -1))] if name not in ELEMENTS]


def scales() -> str:
    """The formats of a shared scale."""
    heads = ["#bits", "#exponent", "#mantissa", "#smallest", "#largest", "#values", "default rule", "per tensor"]
    return table(["scale", *heads], map(_scale, SCALES.values()))


def _scale(s: ScaleFormat) -> list[object]:
    values, tensor = scale_values(s), f"{s.tensor_bits} bits" if s.tensor_bits else "–"
    ends = [number(values[0]), number(values[-1]), len(values)]
    bits = MXFormat("fp4", scale=s.name).scale_bits
    return [f"`{s.name}`", bits, s.exponent_bits, s.mantissa_bits, *ends, f"`{s.default_rule}`", tensor]


def scale_values(s: ScaleFormat) -> list[float]:
    """Every value of a scale, ascending."""
    fmt = MXFormat("fp4", scale=s.name)
    if s.is_float:
        return list(fmt.scale_grid.magnitudes()[1:])
    return [2.0**e for e in range(-fmt.scale_emax, fmt.scale_emax + 1)]


def mx_formats() -> str:
    """Bits per element of the usual MX formats."""
    formats = [MXFormat.parse(text) for text in MX]
    rows = [[f"`{text}`", f.element_format.bits, f.block_size, f"`{f.scale}`", f"{f.bits_per_element:g}"]
            for text, f in zip(MX, formats, strict=True)]  # fmt: skip
    return table(["format", "#bits", "#block size", "scale", "#bits per element"], rows)


def options() -> str:
    """The options of an MX format, as its docstring has them."""
    documented = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(MXFormat) or "", re.MULTILINE))
    rows = [[f"`{f.name}`", _default(f.default), _markdown(" ".join(documented[f.name].split()))]
            for f in fields(MXFormat)]  # fmt: skip
    return table(["option", "default", "what it is"], rows)


def _default(value: object) -> str:
    return "–" if value is MISSING else f"`{str(value).lower()}`"


def _markdown(text: str) -> str:
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text.replace("``", "`"))


def families() -> str:
    """A table of examples, and for each family its docstring, which has the formula, and its picture."""
    heads = ["format", "#bits", "#shared bits", "#bits per element", "#smallest", "#largest", "#values"]
    rows = [_example(quantizer(text)) for texts in EXAMPLES.values() for text in texts]
    return "\n".join([table(heads, rows), *(_family(name, family) for name, family in FAMILIES.items())])


def quantizer(text: str) -> FormatFamily:
    """The quantizer that ``text`` spells."""
    fmt = parse_format(text)
    assert isinstance(fmt, FormatFamily)
    return fmt


def _example(fmt: FormatFamily) -> list[object]:
    shared = f"{fmt.shared_bits} in {fmt.block_size or 'an axis'}" if fmt.shared_bits else "0"
    sizes: list[object] = ["–"] * 3  # of means of data there is nothing to say
    if fmt.block_size:
        values = outcomes(fmt)
        positive = [v for v in values if v > 0]
        sizes = [number(positive[0]), number(max(positive[-1], -values[0])), len(values)]
    return [f"`{fmt}`", fmt.width, shared, f"{fmt.bits_per_element:g}", *sizes]


def outcomes(fmt: FormatFamily) -> list[float]:
    """Every number that comes out, ascending; of a block whose largest magnitude is 1, where blocks share something."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 1] if fmt.shared_bits else x[x.isfinite()]
    return quantize(torch.stack([x, torch.ones_like(x)], -1), fmt)[:, 0].unique().tolist()


def _family(name: str, family: type[FormatFamily]) -> str:
    head, _, body = (inspect.getdoc(family) or "").partition("\n")
    parts = [f"### `{name}`", _markdown(head + "\n" + body)]
    if fields(family):
        parts.append(f"Parameters, with their defaults: {', '.join(_parameters(family))}.")
    return "\n\n".join([*parts, f"![What {name} makes of its input](../figs/formats/{name}.png)\n"])


def _parameters(family: type[FormatFamily]) -> list[str]:
    bits = "exponent_bits - 1" if "exponent_bits" in {f.name for f in fields(family)} else "width - 2"
    values = {f.name: f.default for f in fields(family)}
    plain = {name: f"2^({bits}) - 1" if value is None else str(value).lower() for name, value in values.items()}
    return [f"`{name}`" + ("" if values[name] is MISSING else f" ({plain[name]})") for name in values]


TABLES: dict[str, Callable[[], str]] = {
    "options": options,
    "elements": lambda: elements(ELEMENTS.values()),
    "other elements": lambda: elements(others()),
    "mx formats": mx_formats,
    "scales": scales,
    "scale rules": lambda: table(["rule", "exponent of the scale", "who uses it"],
                                 ([f"`{rule}`", *RULES[rule]] for rule in SCALE_RULES)),
    "families": families,
}  # fmt: skip


def draw(folder: Path) -> list[Path]:
    """Draw every picture of the page; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    small = [f for f in ELEMENTS.values() if f.bits <= 8]
    figures = {
        "elements": grids({f.name: f.magnitudes() for f in small}),
        "other_elements": grids({f.name: f.magnitudes() for f in others()}),
        "elements_16_bits": grids({f.name: f.magnitudes() for f in ELEMENTS.values() if f.bits == 16}),
        "scales": grids({s.name: scale_values(s) for s in SCALES.values()}),
        **{name: staircases([quantizer(text) for text in texts]) for name, texts in EXAMPLES.items()},
    }
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def write_or_check(file: Path, fill: Callable[[str], str], arguments: Sequence[str]) -> bool:
    """Fill a page and return True; with ``--check``, exit with an error if it is out of date, and return False."""
    page = file.read_text(encoding="utf-8")
    filled = fill(page)
    if "--check" not in arguments:
        file.write_text(filled, encoding="utf-8")
    elif filled != page:
        sys.exit(f"docs/{file.name} is out of date: run `make figs`")
    return "--check" not in arguments


def main(*arguments: str) -> None:
    """Fill the page and draw its pictures, or check the page."""
    if write_or_check(PAGE, fill, arguments):
        draw(FIGURES)


if __name__ == "__main__":
    main(*sys.argv[1:])
