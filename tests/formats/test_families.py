"""The quantizers as data: how they print, parse, count their bits and refuse what they are not."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxlab.errors import FormatError
from mxlab.formats import (
    ELEMENTS,
    FAMILIES,
    Binary,
    BlockFP,
    BlockMinifloat,
    FormatFamily,
    Integer,
    Log,
    MinifloatDenorm,
    MinifloatIEEE,
    MXFormat,
    ResidualBinary,
    Ternary,
    parse_format,
)

from support.families import SPELLED, every_family


def message(function, *args, **kwargs) -> str:
    with pytest.raises(FormatError) as error:
        function(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(("fmt", "text", "bits", "block", "storage"), SPELLED, ids=[text for _, text, *_ in SPELLED])
def test_spelling_and_bits(fmt, text, bits, block, storage):
    assert str(fmt) == text
    assert parse_format(text) == fmt
    assert parse_format(fmt) is fmt
    assert fmt.bits_per_element == bits
    assert fmt.block_size == block
    assert fmt.storage_bits((3, 40)) == storage
    assert fmt.is_random == ("stochastic" in text)


def test_every_family_is_spelled_above():
    assert {type(fmt) for fmt, *_ in SPELLED} == set(FAMILIES.values())
    assert all(name == family.family for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        (" Integer , frac = 4 , width = 8 ", Integer(8, 4)),
        ("block_fp,width=8", BlockFP(8, block_size=32)),
        ("BLOCK_FP @ 16,width=+8", BlockFP(8, block_size=16)),
        ("minifloat_ieee,width=8,exponent_bits=4,bias=7", MinifloatIEEE(8, 4)),
        ("log,width=8,bias=63", Log(8)),
        ("binary,scaled=FALSE", Binary()),
        ("binary_residual,levels=2", ResidualBinary()),
        ("fp4", MXFormat("fp4_e2m1")),
        ("int8@16,scale_bits=6", MXFormat("int8", 16, scale_bits=6)),
    ],
)
def test_other_spellings(text, fmt):
    assert parse_format(text) == fmt


@given(every_family)
def test_what_is_printed_is_read_back_equal(fmt):
    assert parse_format(str(fmt)) == fmt
    assert hash(parse_format(str(fmt))) == hash(fmt)
    assert str(parse_format(str(fmt))) == str(fmt)
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert str(dataclasses.replace(fmt)) == str(fmt)


@given(every_family, st.lists(st.integers(0, 70), min_size=1, max_size=3))
def test_storage_counts_every_block(fmt, shape):
    *rest, length = shape
    rows = 1
    for n in rest:
        rows *= n
    blocks = len(range(0, length, fmt.block_size or max(length, 1)))
    assert fmt.storage_bits(tuple(shape)) == rows * (length * fmt.width + blocks * fmt.shared_bits)


def test_formats_are_frozen_and_hashable():
    fmt = Integer(8, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.width = 4
    assert len({Integer(8, 4), Integer(8, 4), MinifloatIEEE(8, 4), MinifloatIEEE(8, 4, 7), MinifloatDenorm(8, 4)}) == 3


def test_exponents():
    denorm, ieee, log, block = MinifloatDenorm(8, 4), MinifloatIEEE(8, 4), Log(4), BlockFP(8, 8)
    assert (denorm.exponent_bias, denorm.emin, denorm.emax, denorm.mantissa_bits) == (7, -7, 8, 3)
    assert (ieee.exponent_bias, ieee.emin, ieee.emax, ieee.mantissa_bits) == (7, -6, 8, 3)
    assert (log.exponent_bias, log.emin, log.emax, log.exponent_bits) == (3, -3, 4, 3)
    assert (block.exponent_bias, block.emin, block.emax, block.mantissa_bits) == (127, -127, 128, 7)
    assert BlockMinifloat(4, 2, 3).bias_limits == (-4, 3)


# Errors


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("integer,width=1,frac=0", ["width is 1", "2 to 32"]),
        ("integer,width=33,frac=0", ["width is 33", "2 to 32"]),
        ("integer,width=8,frac=65", ["frac is 65", "-64 to 64"]),
        ("integer,width=8.0,frac=4", ["width is '8.0'", "2 to 32"]),
        ("integer,width=true,frac=4", ["width is True", "2 to 32"]),
        ("integer,width=,frac=4", ["width is ''", "2 to 32"]),
        ("integer,width=٨,frac=4", ["width is '٨'", "2 to 32"]),
        ("minifloat_denorm,width=2,exponent_bits=1", ["width is 2", "3 to 32"]),
        ("minifloat_denorm,width=8,exponent_bits=7", ["exponent_bits is 7", "1 to 6"]),
        ("minifloat_denorm,width=16,exponent_bits=9", ["exponent_bits is 9", "1 to 8"]),
        ("minifloat_denorm,width=8,exponent_bits=0", ["exponent_bits is 0", "1 to 6"]),
        ("minifloat_ieee,width=8,exponent_bits=8", ["exponent_bits is 8", "1 to 7"]),
        ("minifloat_ieee,width=8,exponent_bits=4,bias=128", ["bias is 128", "-128 to 127", "it is 7"]),
        ("minifloat_ieee,width=16,exponent_bits=8,bias=256", ["bias is 256", "-128 to 255", "it is 127"]),
        ("log,width=1", ["width is 1", "2 to 32"]),
        ("log,width=4,bias=none", ["bias is 'none'", "-128 to 127", "it is 3"]),
        ("block_fp@-1,width=8", ["block_size is -1", "or 0 for the whole axis"]),
        ("block_fp@,width=8", ["block_size is ''", "or 0 for the whole axis"]),
        ("block_fp@16,width=8,exponent_bits=9", ["exponent_bits is 9", "1 to 8"]),
        ("block_minifloat@16,width=8,exponent_bits=4,bias_bits=9", ["bias_bits is 9", "1 to 8"]),
        ("block_log@16,width=8,bias_bits=0", ["bias_bits is 0", "1 to 8"]),
        ("binary,scaled=1", ["scaled is 1", "true or false"]),
        ("binary,stochastic=yes", ["stochastic is 'yes'", "true or false"]),
        ("binary_residual,levels=4", ["levels is 4", "1 to 3"]),
    ],
)
def test_a_parameter_out_of_range(text, parts):
    said = message(parse_format, text)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("integer", ["'integer'", "width and frac", "add width=<number>"]),
        ("integer,width=8", ["does not say its frac", "add frac=<number>"]),
        ("minifloat_ieee,width=8", ["does not say its exponent_bits"]),
        ("block_log@16", ["does not say its width"]),
        ("integer,width=8,fraq=4", ["'fraq=4'", "integer takes", "width, frac", "did you mean 'frac'"]),
        ("integer,width=8,frac=4,frac=4", ["'frac=4'", "each once"]),
        ("integer,width=8,frac", ["'frac'", "key=value"]),
        ("block_fp@16,width=8,block_size=8", ["'block_size=8'", "width, exponent_bits, bias"]),
        ("ternary,scaled=true", ["'scaled=true'", "ternary takes", "nothing"]),
        ("integer@16,width=8,frac=4", ["'integer@16'", "integer has no block size"]),
        ("binary,", ["cannot read ''", "scaled, stochastic"]),
    ],
)
def test_what_cannot_be_read(text, parts):
    said = message(parse_format, text)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("text", ["", "int9", "ternery", "minifloat", "@16", "none", "integer width=8"])
def test_an_unknown_format_lists_both_kinds(text):
    said = message(parse_format, text)
    assert all(name in said for name in (*ELEMENTS, *FAMILIES)), said


def test_a_near_miss_is_suggested():
    assert "did you mean 'ternary'?" in message(parse_format, "ternery")
    assert "did you mean 'block_minifloat'?" in message(parse_format, "block_mini_float@16,width=8")
    assert "did you mean 'fp8_e4m3'?" in message(parse_format, "fp8_e4m4@32")


def test_an_error_in_an_mx_format_does_not_speak_of_quantizers():
    said = message(parse_format, "fp4@32,scale_bit=6")
    assert "did you mean 'scale_bits'" in said
    assert "ternary" not in said


@pytest.mark.parametrize("text", [None, 8, b"ternary", Integer])
def test_what_is_no_text(text):
    said = message(parse_format, text)
    assert repr(text) in said
    assert "integer,width=8,frac=4" in said


@pytest.mark.parametrize("fmt", [Integer(8, 4), BlockFP(8), Ternary()], ids=str)
def test_a_shape_needs_an_axis(fmt: FormatFamily):
    assert "0-dimensional" in message(fmt.storage_bits, ())
    assert fmt.storage_bits((0,)) == fmt.storage_bits((4, 0)) == fmt.storage_bits((0, 4)) == 0
