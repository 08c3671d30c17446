"""The C++ kernels give the reference's bits: every instruction set, format, layout and number of threads."""

import copy
import os
import threading
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mxlab.errors import FormatError
from mxlab.formats import ELEMENTS, NUMERICS, ROUNDINGS, MXFormat, element
from mxlab.formats.scales import SCALE_RULES
from mxlab.numerics import operators, philox, quantize, quantize_, round_elementwise
from mxlab.numerics.kernels import native

from support.bits import same
from support.strategies import DTYPES, EVERY_NAME, NUMERICS_ROUNDINGS, allowed, float_scaled, formats, refused, tensors

if native.MISSING and os.environ.get("MXLAB_REQUIRE_NATIVE") == "0":
    pytest.skip(f"no native kernels ({native.MISSING}), and none are required", allow_module_level=True)


def test_the_native_kernels_are_built():
    assert native.MISSING is None


def hard(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """(48, 192): ordinary numbers, every magnitude, ties, subnormals, all bit patterns, zeros, NaN and infinities."""
    g = torch.Generator().manual_seed(seed)
    shape = (6, 192)
    normal = torch.randn(shape, generator=g)
    wide = normal * torch.exp2(torch.randint(-40, 40, shape, generator=g))
    ties = torch.randint(-64, 65, shape, generator=g) / 16
    subnormal = torch.randn(shape, generator=g) * 2.0**-130
    sparse = torch.where(torch.rand(shape, generator=g) < 0.97, 0.0, normal) * -1
    bits = torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32).view(torch.float32)
    large = normal * 2.0**126
    special = torch.where(torch.rand(shape, generator=g) < 0.02, torch.inf, normal)
    special[::2] = torch.where(torch.rand(3, 192, generator=g) < 0.01, torch.nan, special[::2])
    x = torch.cat([normal, wide, ties, subnormal, sparse, bits, large, special]).to(dtype)
    if dtype != torch.float32:
        x[30:36] = torch.randint(-(2**15), 2**15, shape, generator=g).to(torch.int16).view(dtype)
    return x


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format_has_the_bits_of_the_reference(instruction_set, numerics, dtype, rounding):
    x = hard(dtype)
    for i, name in enumerate(EVERY_NAME):
        # Every block size and option comes up; not all of them with every element.
        block = (32, 16, 64, 0, 5, 100, 1)[i % 7]
        fmt = MXFormat(
            name,
            block,
            scale_bits=(8, 8, 6, 4)[i % 4],
            scale_rule="none" if i % 11 == 3 else "floor",
            rounding=rounding,
            flush_fp32_subnorms=i % 5 == 2,
        )
        if refused(x, fmt, numerics):
            with pytest.raises(FormatError, match="too large"):
                quantize(x, fmt, numerics=numerics, backend="native")
            continue
        for axis in (-1, 0):
            options = {"axis": axis, "numerics": numerics, "seed": i}
            same(quantize(x, fmt, **options, backend="native"), quantize(x, fmt, **options, backend="reference"))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_and_scale_has_the_bits_of_the_reference(instruction_set, dtype, rounding):
    x, finite = hard(dtype), hard(dtype).nan_to_num(0, 0, 0) * 2.0**-20
    names = [*ELEMENTS, "fp8_e7m0", "fp4_e1m2"]  # every other one: test_any_tensor_has_the_bits_of_the_reference
    for i, (name, rule) in enumerate(product(names, SCALE_RULES)):
        options = {"scale_bits": (8, 8, 6, 4)[i % 4], "flush_fp32_subnorms": i % 5 == 2}
        if rule == "max":
            options = {"scale": ("e5m3", "e4m3")[i // len(SCALE_RULES) % 2]}
        if (rule == "max" and name != "bf16") or allowed(name, rule, rounding):
            fmt = MXFormat(name, (32, 16, 64, 0, 5, 100, 1)[i % 7], scale_rule=rule, rounding=rounding, **options)
            for values, axis in product((x, finite), (-1, 0)):
                mine = quantize(values, fmt, axis=axis, seed=i, backend="native")
                same(mine, quantize(values, fmt, axis=axis, seed=i, backend="reference"))


@pytest.mark.parametrize(("numerics", "rounding"), NUMERICS_ROUNDINGS)
def test_element_wise_rounding_has_the_bits_of_the_reference(instruction_set, numerics, rounding):
    widths = [{"bfloat": b} for b in range(10, 32)] + [{"fp": b} for b in range(7, 30)]
    for dtype in DTYPES:
        x = hard(dtype)
        for i, width in enumerate(widths):
            options = {**width, "rounding": rounding, "subnormals": i % 3 > 0, "numerics": numerics, "seed": i}
            mine = round_elementwise(x, **options, backend="native")
            same(mine, round_elementwise(x, **options, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_every_value_of_a_16_bit_type(instruction_set, numerics, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for name in ("fp4_e2m1", "fp8_e5m2", "int8", "fp8_e4m3"):
        for fmt in (MXFormat(name, 32), MXFormat(name, scale_rule="none"), MXFormat(name, 8, rounding="even")):
            same(
                quantize(x, fmt, numerics=numerics, backend="native"),
                quantize(x, fmt, numerics=numerics, backend="reference"),
            )


@settings(max_examples=200)
@given(tensors(side=40), st.one_of(formats(), float_scaled()), st.sampled_from(NUMERICS), st.data())
def test_any_tensor_has_the_bits_of_the_reference(x, fmt, numerics, data):
    assume(not refused(x, fmt, numerics))
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    options = {"axis": axes, "numerics": numerics, "seed": data.draw(st.integers(-(2**64), 2**64))}
    expected = quantize(x, fmt, **options, backend="reference")
    same(quantize(x, fmt, **options, backend="native"), expected)
    same(quantize_(x.clone(), fmt, **options, backend="native"), expected)


VIEWS = {
    "transposed": lambda x: x.T,
    "permuted": lambda x: x.view(6, 8, 8, 24).permute(2, 0, 3, 1),
    "strided": lambda x: x[::2, ::3],
    "reversed axes of a slice": lambda x: x[1:, 5:77].T,
    "unaligned": lambda x: x.flatten()[1:],
    "unaligned rows": lambda x: x.flatten()[3 : 3 + 47 * 191].view(47, 191),
    "expanded": lambda x: x[:, None, :1].expand(48, 3, 64),
    "one element": lambda x: x[5, 7],
    "one row": lambda x: x[:1, :1],
    "empty": lambda x: x[:0],
    "empty rows": lambda x: x[:, :0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rounding", ["nearest", "dither"])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_any_layout(view, rounding, numerics):
    for dtype in DTYPES:
        x = VIEWS[view](hard(dtype))
        x = x.reshape(1) if x.ndim == 0 else x
        for axis in [*range(x.ndim), tuple(range(x.ndim))]:
            for block in (32, 7, 0):
                fmt = MXFormat("fp6_e2m3", block, rounding=rounding)
                options = {"axis": axis, "numerics": numerics, "seed": 3}
                expected = quantize(x, fmt, **options, backend="reference")
                same(quantize(x, fmt, **options, backend="native"), expected)
                if view != "expanded":
                    same(quantize_(x.clone(), fmt, **options), expected)
                    written = x.detach().clone(memory_format=torch.preserve_format)
                    quantize_(written, fmt, **options)
                    same(written, expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_into_another_tensor(backend):
    x = hard(torch.bfloat16)
    for y in (x, x.T, x[::2]):
        for axis, fmt in product((0, -1, (0, 1)), ("fp6_e2m3@32", "nvfp4", "int8@8,scale_rule=mse")):
            out = torch.empty(y.shape, dtype=y.dtype)
            assert quantize(y, fmt, axis=axis, backend=backend, out=out) is out
            same(out, quantize(y, fmt, axis=axis))
    assert quantize(x[:0], "fp4@32", out=x[:0].clone()).shape == (0, 192)
    with pytest.raises(FormatError, match="out is"):
        quantize(x, "fp4@32", out=torch.empty(3, dtype=x.dtype), backend=backend)
    with pytest.raises(FormatError, match="no_grad"):
        quantize(x.float().requires_grad_(), "fp4@32", out=torch.empty(x.shape))


def test_in_place_writes_through_a_strided_view():
    whole = hard(torch.float32)
    expected = whole.clone()
    expected[:, ::2] = quantize(whole[:, ::2], "fp4@32")
    assert quantize_(whole[:, ::2], "fp4@32").data_ptr() == whole.data_ptr()
    same(whole, expected)


def test_in_place_counts_as_a_change_and_refuses_what_needs_a_gradient():
    x = torch.randn(4, 32)
    version = x._version
    quantize_(x, "fp4@32")
    assert x._version > version
    leaf = torch.randn(4, 32, requires_grad=True)
    with pytest.raises(FormatError, match="no_grad"):
        quantize_(leaf, "fp4@32")
    with torch.no_grad():
        quantize_(leaf, "fp4@32")
    with torch.inference_mode():
        same(quantize_(x.clone(), "int8@16"), quantize(x, "int8@16"))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_the_number_of_threads_changes_nothing(threads, numerics):
    x = torch.randn(517, 1031, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for axis, block in ((-1, 32), (0, 32), (-1, 0), (-1, 1031 * 517)):
                tensor_scaled = numerics == "exact" and block == 0
                rounding = "dither" if axis else "nearest"
                fmt = MXFormat("fp6_e3m2", block, "e4m3" if tensor_scaled else "e8m0", rounding=rounding)
                torch.set_num_threads(threads)
                mine = quantize(x.to(dtype), fmt, axis=axis, numerics=numerics, seed=9)
                torch.set_num_threads(1)
                same(mine, quantize(x.to(dtype), fmt, axis=axis, numerics=numerics, seed=9, backend="reference"))
    finally:
        torch.set_num_threads(before)


def test_a_large_tensor():
    # 2^27 elements: offsets in bytes pass 2^28; the reference sees its ends.
    x = torch.arange(2**27, dtype=torch.int32).view(2**17, 2**10).to(torch.bfloat16)
    result = quantize(x, "fp4@32")
    for part in (slice(0, 64), slice(2**16, 2**16 + 64), slice(-64, None)):
        same(result[part], quantize(x[part], "fp4@32", backend="reference"))


def test_many_python_threads_at_once():
    x = torch.randn(700, 512)
    expected = quantize(x, "fp6_e2m3@32", backend="reference")
    wrong = []

    def work() -> None:
        for _ in range(30):
            if not torch.equal(quantize(x, "fp6_e2m3@32"), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_quantize():
    x = torch.randn(700, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = quantize(x, "fp4@32")
        if (child := os.fork()) == 0:
            # The parent's threads do not exist here; torch's own parallel operators must not be called at all.
            result = native.quantize(x, MXFormat.parse("fp4@32"), (1,), 0, "exact")
            os._exit(0 if bytes(result.numpy().data) == bytes(expected.numpy().data) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_flushing_denormals_in_torch_changes_no_bit(numerics):
    x = hard(torch.float32)
    fmt = MXFormat("fp8_e5m2", 16)
    expected = quantize(x, fmt, numerics=numerics)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        same(quantize(x, fmt, numerics=numerics), expected)
    finally:
        torch.set_flush_denormal(False)


def test_the_noise_is_philox():
    for count in (1, 3, 4, 5, 1000, 70_001):
        for seed in (0, 1, 2**63, -5):
            place = torch.device("cpu")
            same(native.uniform((count,), seed, place), philox.uniform((count,), seed, place))


def test_results_do_not_depend_on_what_the_kernels_have_seen():
    x = hard(torch.bfloat16)
    first = quantize(x, "fp6_e2m3@32", numerics="microxcaling")
    for name in ("int8", "fp4_e2m1"):
        quantize(x, MXFormat(name), numerics="microxcaling")
    same(quantize(x, "fp6_e2m3@32", numerics="microxcaling"), first)


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "MISSING", "No module named 'mxlab.numerics.kernels._native'")
    operators.choose.cache_clear()
    yield
    operators.choose.cache_clear()


def test_without_kernels_the_reference_serves_and_says_so_once(without_kernels, caplog):
    x = torch.randn(4, 64)
    same(quantize(x, "fp4@32"), quantize(x, "fp4@32", backend="reference"))
    round_elementwise(x, bfloat=16)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "native kernels" in caplog.text
    assert "compiler" in caplog.text


def test_without_kernels_asking_for_them_is_an_error(without_kernels):
    with pytest.raises(FormatError, match="compiler"):
        quantize(torch.randn(4, 64), "fp4@32", backend="native")


def test_native_kernels_are_for_the_cpu():
    with pytest.raises(FormatError, match=r"on cuda.*'auto'"):
        operators.choose("cuda", "native")
    with pytest.raises(FormatError, match="did you mean 'native'"):
        quantize(torch.randn(4, 64), "fp4@32", backend="nativ")
    with pytest.raises(ValueError, match="mmx"):
        native._native.use("mmx")


# The operators, as torch sees them


@pytest.mark.parametrize("numerics", NUMERICS)
def test_the_operators_keep_torchs_rules(numerics):
    x = hard(torch.float32)[:6]
    tests = ("test_schema", "test_faketensor")
    for y in (x, x.T, x[::2, ::2]):
        torch.library.opcheck(operators.quantize, (y, "fp4_e2m1@32", [1], numerics, "auto", 0), test_utils=tests)
        torch.library.opcheck(
            operators.round_elementwise, (y, 16, 0, "nearest", True, numerics, "auto", 0), test_utils=tests
        )
    torch.library.opcheck(operators.quantize_, (x.clone(), "fp4_e2m1@32", [1], numerics, "auto", 0), test_utils=tests)


def test_the_operators_check_what_they_are_given():
    q, r, x = torch.ops.mxlab.quantize, torch.ops.mxlab.round_elementwise, torch.randn(4, 64)
    for backend in ("auto", "reference"):
        same(q(x, "fp4_e2m1@32", [-1], "exact", backend, 0), quantize(x, "fp4_e2m1@32"))
        for empty, axis in ((torch.empty(4, 0), 1), (torch.empty(0, 4), 0)):
            assert q(empty, "fp4_e2m1@32", [axis], "exact", backend, 0).shape == empty.shape
            torch.ops.mxlab.quantize_(empty, "fp4_e2m1@32", [axis], "exact", backend, 0)
        same(r(x, 0, 0, "nearest", True, "exact", backend, 0), x)
        with pytest.raises(FormatError, match="numerics"):
            q(x, "fp4_e2m1@32", [1], "mx", backend, 0)
        with pytest.raises(FormatError, match="cannot quantize"):
            q(x.double(), "fp4_e2m1@32", [1], "exact", backend, 0)
        with pytest.raises(FormatError, match="rounding"):
            r(x, 16, 0, "nearset", True, "exact", backend, 0)
    with pytest.raises(FormatError, match="did you mean 'native'"):
        q(x, "fp4_e2m1@32", [1], "exact", "natve", 0)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([1.0, 2.0], {}, "x is a list"),
        (None, {}, "x is a NoneType"),
        (torch.eye(3).to_sparse(), {}, "to_dense"),
        (torch.randn(4, 32), {"fmt": "fp4@32,rounding=dither", "seed": "1"}, "seed is '1'"),
        (torch.randn(4, 32), {"fmt": "fp4@32,rounding=dither", "seed": 1.5}, "seed is 1.5"),
    ],
)
def test_bad_input_is_named(x, options, message):
    with pytest.raises(FormatError, match=message):
        quantize(x, **{"fmt": "fp4@32", **options})


def test_meta_tensors():
    x = torch.randn(4, 64, device="meta")
    assert quantize(x, "fp4@32").device.type == "meta"
    assert quantize_(x, "fp4@32") is x
    assert round_elementwise(x, bfloat=16).shape == (4, 64)


def test_compiled_code_has_the_operator_in_one_graph():
    def f(x):
        return quantize(x, "fp4_e2m1@32").mul(2), round_elementwise(x, bfloat=12)

    x = torch.randn(4, 64)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(compiled(x), f(x), strict=True):
        same(mine, expected)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # torch's own tracing
def test_the_gradient_passes_through_compiled_code():
    def f(x):
        return quantize(x, "fp4_e2m1@32", numerics="microxcaling").pow(2).sum()

    x = torch.randn(4, 64, requires_grad=True)
    y = copy.deepcopy(x)
    torch.compile(f, fullgraph=True, backend="aot_eager")(x).backward()
    f(y).backward()
    same(x.grad, y.grad)


def test_exported_programs_call_the_operator():
    class Quantizer(torch.nn.Module):
        def forward(self, x):
            return quantize(x, "fp6_e2m3@32")

    x = torch.randn(4, 64)
    program = torch.export.export(Quantizer(), (x,))
    assert torch.ops.mxlab.quantize.default in [node.target for node in program.graph.nodes]
    same(program.module()(x), quantize(x, "fp6_e2m3@32"))


def test_elements_limits_reach_the_kernels_unrounded():
    # Element rows cross to C++ as float32; every limit of every format is a float32.
    for name in EVERY_NAME:
        row = element(name)
        assert torch.tensor(row.max, dtype=torch.float32).item() == row.max
        assert torch.tensor(row.min_normal, dtype=torch.float32).item() == row.min_normal
