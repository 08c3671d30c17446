"""The table of formats against the OCP specifications, and how formats print and parse."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxlab.errors import FormatError, MxlabError
from mxlab.formats import ELEMENTS, ROUNDINGS, ElementFormat, MXFormat, element

# name: bits, exponent bits, mantissa bits, bias, emin, emax, smallest normal, largest, smallest positive.
# OCP MX v1.0, tables 1 and 2 to 5; OFP8 v1.0, table 1; IEEE 754 for fp16.
TABLE = {
    "fp8_e5m2": (8, 5, 2, 15, -14, 15, 2**-14, 57344.0, 2**-16),
    "fp8_e4m3": (8, 4, 3, 7, -6, 8, 2**-6, 448.0, 2**-9),
    "fp6_e3m2": (6, 3, 2, 3, -2, 4, 0.25, 28.0, 0.0625),
    "fp6_e2m3": (6, 2, 3, 1, 0, 2, 1.0, 7.5, 0.125),
    "fp4_e2m1": (4, 2, 1, 1, 0, 2, 1.0, 6.0, 0.5),
    "int8": (8, 0, 6, 0, 0, 0, 1.0, 1.984375, 0.015625),
    "int4": (4, 0, 2, 0, 0, 0, 1.0, 1.75, 0.25),
    "int2": (2, 0, 0, 0, 0, 0, 1.0, 1.0, 1.0),
    "fp16": (16, 5, 10, 15, -14, 15, 2**-14, 65504.0, 2**-24),
    "bf16": (16, 8, 7, 127, -126, 127, 2**-126, (2 - 2**-7) * 2.0**127, 2**-133),
    # Not in the OCP table, but reachable: bias 2^(X-1) - 1, no reserved codes.
    "int3": (3, 0, 1, 0, 0, 0, 1.0, 1.5, 0.5),
    "int5": (5, 0, 3, 0, 0, 0, 1.0, 1.875, 0.125),
    "fp8_e3m4": (8, 3, 4, 3, -2, 4, 0.25, 31.0, 2**-6),
    "fp8_e2m5": (8, 2, 5, 1, 0, 2, 1.0, 7.875, 2**-5),
    "fp6_e4m1": (6, 4, 1, 7, -6, 8, 2**-6, 384.0, 2**-7),
    "fp4_e3m0": (4, 3, 0, 3, -2, 4, 0.25, 16.0, 0.25),
    "fp4_e1m2": (4, 1, 2, 0, 1, 1, 2.0, 3.5, 0.5),
    "fp2_e1m0": (2, 1, 0, 0, 1, 1, 2.0, 2.0, 2.0),
    "fp8_e7m0": (8, 7, 0, 63, -62, 64, 2.0**-62, 2.0**64, 2.0**-62),
}
PARAMETRIC = [f"int{b}" for b in range(2, 9)] + [
    f"fp{n}_e{x}m{n - 1 - x}" for n in range(2, 9) for x in range(1, n) if n - 1 - x >= 0
]
EVERY_NAME = sorted({*ELEMENTS, *PARAMETRIC})

block_sizes = st.one_of(st.just(0), st.integers(1, 2**40))
formats = st.one_of(
    st.builds(
        MXFormat,
        element=st.sampled_from(EVERY_NAME),
        block_size=block_sizes,
        scale_bits=st.integers(0, 8),
        scale_rule=st.sampled_from(["floor", "ceil", "even", "rceil", "none"]),
        rounding=st.sampled_from(ROUNDINGS),
        flush_fp32_subnorms=st.booleans(),
    ),
    st.builds(
        MXFormat,
        element=st.sampled_from([name for name in EVERY_NAME if name != "bf16"]),
        block_size=block_sizes,
        scale=st.sampled_from(["e5m3", "e4m3"]),
        scale_rule=st.sampled_from(["floor", "max"]),
        rounding=st.sampled_from(ROUNDINGS),
    ),
    st.builds(
        MXFormat,
        element=st.sampled_from(["int2", "int4", "int8"]),
        block_size=block_sizes,
        scale_bits=st.integers(0, 8),
        scale_rule=st.sampled_from(["mse", "mase_int"]),
        rounding=st.sampled_from(["nearest", "even"]),
    ),
)


# The table


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    f = element(name)
    facts = (f.bits, f.exponent_bits, f.mantissa_bits, f.bias, f.emin, f.emax, f.min_normal, f.max, f.magnitudes()[1])
    assert facts == TABLE[name]
    assert f.is_int == name.startswith("int")
    assert f.name == str(f) == name


def test_reserved_codes():
    assert {name: element(name).specials for name in EVERY_NAME if element(name).specials != "none"} == {
        "fp8_e5m2": "ieee",
        "fp8_e4m3": "nan",
        "fp16": "ieee",
        "bf16": "ieee",
    }


def test_every_value_of_the_small_formats():
    assert element("fp4_e2m1").magnitudes() == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert element("int4").magnitudes() == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert element("int2").magnitudes() == (0.0, 1.0)
    assert element("fp3_e1m1").magnitudes() == (0.0, 1.0, 2.0, 3.0)
    assert element("fp4_e3m0").magnitudes() == (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    assert element("fp6_e2m3").magnitudes() == tuple(k / 8 for k in [*range(16), *range(16, 32, 2), *range(32, 64, 4)])


@pytest.mark.parametrize("name", EVERY_NAME)
def test_one_value_for_each_code(name):
    f = element(name)
    values = f.magnitudes()
    reserved = {"none": 0, "nan": 1, "ieee": 2**f.mantissa_bits}[f.specials]
    assert len(values) == 2 ** (f.bits - 1) - reserved
    assert values[0] == 0
    assert values[-1] == f.max
    assert f.min_normal in values
    assert list(values) == sorted(set(values))
    assert math.frexp(f.max)[1] - 1 == f.emax


# Names


def test_every_width_is_reachable():
    assert len(PARAMETRIC) == 7 + 28
    for name in PARAMETRIC:
        assert element(name).bits == int(name.removeprefix("int").removeprefix("fp").partition("_")[0])


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("fp4", "fp4_e2m1"),
        ("mxfp4", "fp4_e2m1"),
        ("bfloat16", "bf16"),
        ("float16", "fp16"),
        ("mxfp6_e2m3", "fp6_e2m3"),
        ("mxint8", "int8"),
        ("MXFP8_E4M3", "fp8_e4m3"),
        (" FP6_E3M2 ", "fp6_e3m2"),
    ],
)
def test_aliases(alias, name):
    assert element(alias) == element(name)
    assert MXFormat(alias) == MXFormat(name)
    assert MXFormat(alias).element == name
    assert MXFormat.parse(f"{alias}@16") == MXFormat(name, 16)


UNKNOWN = ["", "fp4_e2m2", "fp9_e4m4", "fp8_e0m7", "int1", "int9", "int16", "int", "fp8", "fp8_e4m3fn", "e2m1", "nvfp4"]


@pytest.mark.parametrize("name", [*UNKNOWN, "int٤", "fp٦_e٢m٣", None, 4])
def test_an_unknown_element_lists_those_that_exist(name):
    with pytest.raises(FormatError) as error:
        element(name)
    message = str(error.value)
    assert message.startswith(f"unknown element format {name!r}")
    assert all(known in message for known in ELEMENTS)
    assert "intB" in message
    assert "fpN_eXmY" in message


@pytest.mark.parametrize(
    ("name", "near"), [("fp8_e4m3fn", "fp8_e4m3"), ("fp4_e2m2", "fp4_e2m1"), ("fp6_e2m4", "fp6_e2m3"), ("imt8", "int8")]
)
def test_an_unknown_element_suggests_the_nearest(name, near):
    with pytest.raises(FormatError, match=f"did you mean '{near}'"):
        element(name)


def test_nothing_is_suggested_for_nonsense():
    with pytest.raises(FormatError) as error:
        element("zzzzzz")
    assert "did you mean" not in str(error.value)


# MX formats


def test_defaults():
    f = MXFormat("fp4_e2m1")
    assert dataclasses.astuple(f) == ("fp4_e2m1", 32, "e8m0", 8, "floor", "nearest", False)
    assert str(f) == "fp4_e2m1@32"
    assert f.element_format == element("fp4_e2m1")


@pytest.mark.parametrize("scale", ["e5m3", "e4m3"])
def test_a_floating_point_scale_has_one_rule(scale):
    f = MXFormat("fp4_e2m1", 16, scale=scale)
    assert f == MXFormat("fp4_e2m1", 16, scale=scale, scale_rule="max", scale_bits=0)
    assert f.scale_rule == "max"
    assert str(f) == f"fp4_e2m1@16,scale={scale}"
    assert dataclasses.replace(f, block_size=8) == MXFormat.parse(f"fp4@8,scale={scale},scale_rule=max")


def test_mase_int_rounds_to_even():
    f = MXFormat("int8", scale_rule="mase_int")
    assert f == MXFormat("int8", scale_rule="mase_int", rounding="even")
    assert f.rounding == "even"
    assert MXFormat.parse("int8,scale_rule=mase_int") == f
    assert f.grid.magnitudes()[:3] == (0, 2**-7, 2**-6)
    assert f.limits == (-1, 127 / 128)
    assert MXFormat("int8").limits == (-127 / 64, 127 / 64)


def test_the_largest_values_of_the_scales():
    grids = {scale: MXFormat("fp4", scale=scale).scale_grid for scale in ("e5m3", "e4m3")}
    assert {scale: (grid.min, grid.max) for scale, grid in grids.items()} == {
        "e5m3": (2**-17, 57344 * 2),
        "e4m3": (2**-9, 448),
    }


def test_nvfp4():
    assert MXFormat.parse("nvfp4") == MXFormat.parse(" NVFP4@16 ") == MXFormat("fp4_e2m1", 16, scale="e4m3")
    assert str(MXFormat.parse("nvfp4,rounding=even")) == "fp4_e2m1@16,scale=e4m3,rounding=even"
    assert MXFormat.parse("nvfp4@32").block_size == 32
    with pytest.raises(FormatError, match="each once"):
        MXFormat.parse("nvfp4,scale=e8m0")


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("fp4@32", (64,), 64 * 4 + 2 * 8),
        ("fp4@32", (3, 40), 3 * (40 * 4 + 2 * 8)),
        ("fp6_e2m3@32,scale_bits=5", (2, 3, 33), 6 * (33 * 6 + 2 * 5)),
        ("int8@0", (5, 100), 5 * (100 * 8 + 8)),
        ("int8@100", (5, 10), 5 * (10 * 8 + 8)),
        ("int8@32,scale_rule=none", (5, 10), 50 * 16),
        ("fp4@16,scale=e5m3", (3, 40), 3 * (40 * 4 + 3 * 8)),
        ("nvfp4", (3, 40), 3 * (40 * 4 + 3 * 8) + 32),
        ("nvfp4", (0, 40), 0),
        ("fp4@0", (3, 0), 0),
    ],
)
def test_storage_bits(text, shape, bits):
    assert MXFormat.parse(text).storage_bits(shape) == bits


def test_storage_needs_an_axis():
    with pytest.raises(FormatError, match="0-dimensional"):
        MXFormat("fp4").storage_bits(())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_dither_is_random(rounding):
    assert MXFormat("fp4", rounding=rounding).is_random == (rounding == "dither")


def test_zero_scale_bits_means_eight():
    assert MXFormat("int8", scale_bits=0) == MXFormat("int8", scale_bits=8)
    assert MXFormat("int8", scale_bits=0).scale_bits == 8


@pytest.mark.parametrize(
    ("scale_bits", "largest"), [(0, 127), (8, 127), (7, 63), (6, 31), (5, 15), (4, 7), (2, 1), (1, 0)]
)
def test_scale_range(scale_bits, largest):
    assert MXFormat("int8", scale_bits=scale_bits).scale_emax == largest


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("fp4_e2m1@32", 4.25),
        ("fp4_e2m1@16", 4.5),
        ("fp6_e2m3@32", 6.25),
        ("fp8_e4m3@32", 8.25),
        ("int8@32", 8.25),
        ("int4@8", 5.0),
        ("int8@16,scale_bits=4", 8.25),
        ("int8@16,scale_bits=0", 8.5),
        ("fp4_e2m1@0", 4.0),
        ("fp4_e2m1@32,scale_rule=none", 12.0),
        ("fp16@32", 16.25),
        ("fp3_e1m1@8", 4.0),
    ],
)
def test_bits_per_element(text, bits):
    assert MXFormat.parse(text).bits_per_element == bits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp6_e2m3", MXFormat("fp6_e2m3", 32)),
        ("int8@0", MXFormat("int8", 0)),
        ("fp4@16,rounding=even", MXFormat("fp4_e2m1", 16, rounding="even")),
        (
            " int4 @ 8 , scale_bits = 6 , flush_fp32_subnorms = True ",
            MXFormat("int4", 8, scale_bits=6, flush_fp32_subnorms=True),
        ),
        ("int8@32,flush_fp32_subnorms=false,scale=e8m0,scale_rule=none", MXFormat("int8", scale_rule="none")),
    ],
)
def test_parse(text, expected):
    assert MXFormat.parse(text) == expected


def test_prints_only_what_differs_from_the_defaults():
    full = MXFormat("fp4", 16, scale_bits=6, scale_rule="none", rounding="dither", flush_fp32_subnorms=True)
    assert str(full) == "fp4_e2m1@16,scale_bits=6,scale_rule=none,rounding=dither,flush_fp32_subnorms=true"
    assert str(MXFormat("int8", 0, rounding="even")) == "int8@0,rounding=even"


@given(formats)
def test_parse_reads_back_what_str_wrote(f):
    again = MXFormat.parse(str(f))
    assert again == f
    assert hash(again) == hash(f)
    assert str(again) == str(f)
    assert MXFormat.parse(f) is f


@given(formats, formats)
def test_different_formats_print_differently(a, b):
    assert (a == b) == (str(a) == str(b))


@pytest.mark.parametrize("name", ["bf16", "fp4_e2m1", "fp16"])
def test_elements_that_a_scale_or_a_rule_cannot_have(name):
    with pytest.raises(FormatError, match=f"'mase_int'.*intB elements, not for {name}"):
        MXFormat(name, scale_rule="mase_int")
    for scale in ("e5m3", "e4m3"):
        if name == "bf16":
            with pytest.raises(FormatError, match=f"bf16.*{scale}.*float32"):
                MXFormat(name, scale=scale)
        else:
            assert MXFormat(name, scale=scale).scale_rule == "max"


def test_frozen_and_hashable():
    f = MXFormat("fp4_e2m1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.block_size = 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.element_format.name = "fp5"
    assert len({f, MXFormat("fp4"), MXFormat.parse("mxfp4@32"), f.element_format, element("fp4")}) == 2
    assert isinstance(element("int8"), ElementFormat)


# What is wrong, where, and what it may be


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"block_size": -1}, ["block_size", "-1", "0 for the whole axis"]),
        ({"block_size": 1.5}, ["block_size", "1.5", "positive number"]),
        ({"block_size": True}, ["block_size", "True"]),
        ({"block_size": "32"}, ["block_size", "'32'"]),
        ({"block_size": None}, ["block_size", "None"]),
        ({"scale_bits": 9}, ["scale_bits", "9", "1 to 8"]),
        ({"scale_bits": -1}, ["scale_bits", "-1", "1 to 8"]),
        ({"scale_bits": False}, ["scale_bits", "False", "1 to 8"]),
        ({"scale_bits": 8.0}, ["scale_bits", "8.0", "1 to 8"]),
        ({"scale": "e9m0"}, ["scale", "'e9m0'", "e8m0", "did you mean"]),
        ({"scale": None}, ["scale", "None", "e8m0"]),
        ({"scale_rule": "max"}, ["scale_rule", "'max'", "e8m0", "scale=e5m3", "floor", "none"]),
        ({"scale_rule": "rciel"}, ["scale_rule", "'rciel'", "did you mean 'rceil'"]),
        ({"scale": "e5m3", "scale_rule": "ceil"}, ["scale_rule", "'ceil'", "e5m3", "'max'", "leave scale_rule out"]),
        ({"scale": "e4m3", "scale_rule": "none"}, ["scale_rule", "'none'", "e4m3", "'max'"]),
        ({"scale": "e4m3", "scale_bits": 7}, ["scale_bits", "7", "e4m3", "8 bits"]),
        ({"scale": "e5m3", "flush_fp32_subnorms": True}, ["flush_fp32_subnorms", "e8m0", "e5m3"]),
        ({"scale": "e8m3"}, ["scale", "'e8m3'", "e8m0, e5m3, e4m3"]),
        ({"scale_rule": "mse", "rounding": "dither"}, ["rounding", "'dither'", "'mse'"]),
        ({"scale_rule": "mase_int", "rounding": "dither"}, ["rounding", "'dither'", "'mase_int'", "ties to even"]),
        ({"scale_rule": "mase_int", "rounding": "floor"}, ["rounding", "'floor'", "'mase_int'", "ties to even"]),
        ({"scale_rule": None}, ["scale_rule", "None", "floor"]),
        ({"scale_rule": "quest"}, ["scale_rule", "'quest'", "fp4_e2m1", "int8", "rceil"]),
        (
            {"rounding": "nearst"},
            ["rounding", "'nearst'", "nearest_zero, even", "did you mean 'nearest'"],
        ),
        ({"rounding": ["even"]}, ["rounding", "['even']", "nearest_zero, even, floor, dither"]),
        ({"flush_fp32_subnorms": 1}, ["flush_fp32_subnorms", "1", "true or false"]),
        ({"flush_fp32_subnorms": "yes"}, ["flush_fp32_subnorms", "'yes'", "true or false"]),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_remedy(options, parts):
    with pytest.raises(FormatError) as error:
        MXFormat("int8", **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["unknown element format ''"]),
        ("@32", ["unknown element format ''"]),
        ("fp5@32", ["unknown element format 'fp5'"]),
        ("fp4_e2m1@", ["block_size", "''", "whole number"]),
        ("fp4_e2m1@x", ["block_size", "'x'", "whole number"]),
        ("fp4_e2m1@16@16", ["block_size", "'16@16'"]),
        ("fp4_e2m1@-8", ["block_size", "-8", "positive"]),
        ("fp4_e2m1@3.5", ["block_size", "'3.5'"]),
        ("fp4_e2m1,", ["''", "key=value", "rounding"]),
        ("fp4_e2m1@32,even", ["'even'", "key=value"]),
        ("fp4_e2m1@32,roundin=even", ["'roundin=even'", "did you mean 'rounding'"]),
        ("fp4_e2m1@32,block_size=16", ["'block_size=16'", "after the block size"]),
        ("fp4_e2m1@32,rounding=even,rounding=even", ["'rounding=even'", "each once"]),
        ("fp4_e2m1@32,rounding=", ["rounding", "''", "nearest_zero, even"]),
        ("fp4_e2m1@32,rounding=up", ["rounding", "'up'", "nearest_zero, even"]),
        ("fp4_e2m1@32,scale_bits=x", ["scale_bits", "'x'", "whole number"]),
        ("fp4_e2m1@32,scale_bits=12", ["scale_bits", "12", "1 to 8"]),
        ("fp4_e2m1@32,scale_bits=true", ["scale_bits"]),
        ("fp4_e2m1@32,flush_fp32_subnorms=1", ["flush_fp32_subnorms", "true or false"]),
        ("fp4_e2m1@32;rounding=even", ["block_size", "whole number"]),
    ],
)
def test_a_malformed_string_is_named_by_its_bad_part(text, parts):
    with pytest.raises(FormatError) as error:
        MXFormat.parse(text)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("thing", [None, 4, ("fp4_e2m1", 32), {"element": "int8"}])
def test_what_is_not_text_is_refused(thing):
    with pytest.raises(FormatError, match="write it like 'fp4_e2m1@32'"):
        MXFormat.parse(thing)


def test_a_format_error_can_be_caught_as_a_value_error_or_an_mxlab_error():
    assert issubclass(FormatError, ValueError)
    assert issubclass(FormatError, MxlabError)
