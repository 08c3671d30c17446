"""Inspections: statistics against hand-computed numbers, the parts of recipes, the files, the command."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from mxlab import apply
from mxlab.errors import ConversionError, MetricError, SpecError
from mxlab.eval.metrics import next_token_loss, sqnr_db
from mxlab.formats import MXFormat, parse_format
from mxlab.inspect import figures, tables, write
from mxlab.inspect.inspection import inspect
from mxlab.inspect.operands import collect, projection_of
from mxlab.inspect.parts import cut
from mxlab.inspect.run import first_windows
from mxlab.inspect.sensitivity import Estimate
from mxlab.inspect.statistics import measure
from mxlab.model.plan import make_plan
from mxlab.numerics import quantization
from mxlab.recipe import Elementwise, Recipe, load_recipe
from mxlab.recipe.rule import Rule

from support import architectures

FP4, FP6, FP8 = (MXFormat.parse(f"{name}@16") for name in ("fp4_e2m1", "fp6_e2m3", "fp8_e4m3"))
WEIGHTS_KV = Recipe("both", (Rule(part="attention", k=FP4, v=FP6), Rule(part="all", weight=FP4, activation=FP8)))
ROWS = torch.randint(1, architectures.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    return architectures.build("llama")


@pytest.fixture(scope="module")
def inspection(llama):
    return inspect(llama, WEIGHTS_KV, ROWS)


# ---- statistics


def test_statistics_by_hand():
    # The block's largest magnitude is 7: floor(log2 7) - emax(E2M1) = 2 - 2 = 0, so that the scale is 1 and the grid
    # 0 .5 1 1.5 2 3 4 6. 7 saturates, 0.2 is flushed, -2.4 becomes -2 and 3 stays.
    found = measure(torch.tensor([[7.0, -2.4, 3.0, 0.2, 0.0]]), MXFormat.parse("fp4_e2m1@8"), "exact")
    signal, noise = 49 + 2.4**2 + 9 + 0.04, 1 + 0.4**2 + 0.04
    assert (found.count, found.blocks, found.clamped, found.lost) == (5, 1, 0, 0)
    assert (found.saturated, found.flushed, found.amax) == (1, 1, 7.0)
    assert found.signal == pytest.approx(signal, rel=1e-6)
    assert found.noise == pytest.approx(noise, rel=1e-6)
    assert (found.saturated_noise, found.flushed_noise) == (pytest.approx(1.0), pytest.approx(0.04, rel=1e-6))
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert found.relative_error == pytest.approx(math.sqrt(noise / signal), rel=1e-6)
    assert found.outlier_ratio == pytest.approx(7 / math.sqrt(signal / 5), rel=1e-6)
    assert found.values == found.elements == {2: 1, 1: 2, -3: 1}
    assert found.scales == {0: 1}


def test_exponents_are_of_elements_beside_their_scale():
    found = measure(torch.tensor([[48.0, 8.0, 0.0, 0.0], [0.0] * 4]), MXFormat.parse("fp4_e2m1@4"), "exact")
    assert found.values == {5: 1, 3: 1}
    assert found.scales == {3: 1}  # 5 - 2; a block of zeros has no scale that counts
    assert found.elements == {2: 1, 0: 1}


def test_exponents_are_exact():
    found = measure(torch.tensor([2.0, 2.0 - 2.0**-22, 2.0**-130, -(2.0**-149)]), MXFormat.parse("int8@0"), "exact")
    assert found.values == {1: 1, 0: 1, -130: 1, -149: 1}


def test_blocks_beyond_the_scale():
    narrow = MXFormat.parse("fp4_e2m1@2,scale_bits=2")  # scales 1/2, 1 and 2
    found = measure(torch.tensor([0.25, 0.125, 64.0, 1.0, 4.0, 0.1]), narrow, "exact")
    assert (found.blocks, found.clamped, found.lost, found.count) == (3, 1, 2, 6)
    assert (found.saturated, found.flushed) == (0, 1)
    # 0.125 is a quarter of the smallest element's scale, a tie, and goes up; of 64 and 1 nothing is left to compare.
    assert found.noise == pytest.approx(0.125**2 + 0.1**2, rel=1e-6)
    assert found.scales == {-1: 1, 0: 1, 1: 1}


@pytest.mark.parametrize("text", ["fp4_e2m1@16", "fp8_e4m3@32,scale_rule=rceil", "int8@8,scale_rule=mase_int", "nvfp4"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_noise_is_that_of_quantize(text, axis):
    x = torch.randn(48, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    fmt = MXFormat.parse(text)
    found = measure(x, fmt, "exact", axis)
    quantized = quantization.quantize(x, fmt, axis=axis)
    assert found.sqnr_db == pytest.approx(sqnr_db(x, quantized), rel=1e-9)
    assert found.flushed == int(((quantized == 0) & (x != 0)).sum())
    assert found.count == sum(found.values.values()) + int((x == 0).sum())
    assert sum(found.scales.values()) == found.blocks == quantization.scale_clamps(x, fmt, axis)["blocks"]


def test_no_element_is_saturated_where_the_scale_makes_room():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    assert measure(x, MXFormat.parse("fp8_e4m3@32,scale_rule=rceil"), "exact").saturated == 0
    floor = measure(x, MXFormat.parse("fp8_e4m3@32"), "exact")
    significands = x.unflatten(-1, (-1, 32)).abs().amax(-1).frexp().mantissa * 2
    assert floor.saturated >= int((significands > 1.75).sum()) > 0


def test_statistics_add_up():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    halves = measure(x[:4], FP4, "exact") + measure(x[4:], FP4, "exact")
    whole = measure(x, FP4, "exact")
    assert halves.sqnr_db == pytest.approx(whole.sqnr_db)
    assert halves.histograms() == whole.histograms()
    assert replace(halves, signal=0, noise=0, saturated_noise=0, flushed_noise=0) == replace(
        whole, signal=0, noise=0, saturated_noise=0, flushed_noise=0
    )


def test_an_input_on_the_grid_has_an_infinite_sqnr_which_is_null_in_json():
    x = quantization.quantize(torch.randn(4, 16, generator=torch.Generator().manual_seed(4)), FP4)
    found = measure(x, FP4, "exact")
    assert found.sqnr_db == math.inf
    assert found.summary()["sqnr_db"] is None
    assert found.relative_error == 0


@pytest.mark.parametrize("x", [torch.zeros(2, 16), torch.empty(0, 16)])
def test_zeros_and_nothing(x):
    summary = measure(x, FP4, "exact").summary()
    assert summary.pop("count") == x.numel()
    assert summary.pop("sqnr_db") is None
    assert not any(summary.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_numbers(bad):
    with pytest.raises(MetricError, match="1 of 16 values are NaN or infinite"):
        measure(torch.tensor([bad] + [1.0] * 15), FP4, "exact")


# ---- operands


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_proj", "mlp.c_proj"),
        ("model.layers.0.block_sparse_moe.experts.7.w1", "block_sparse_moe.experts.*.w1"),
        ("lm_head", "lm_head"),
        ("layers.2", "layers.*"),
    ],
)
def test_projections(name, projection):
    assert projection_of(name) == projection


def test_operands_are_those_of_the_unquantized_model(llama):
    seen = {}
    layer = llama.model.layers[1]
    handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        llama(input_ids=ROWS)
    handle.remove()
    found = {(o.module, o.role): o for o in collect(llama, WEIGHTS_KV, ROWS.split(1))}
    activation = found["model.layers.1.mlp.down_proj", "activation"]
    quantized = quantization.quantize(seen["x"], FP8)
    assert activation.statistics.sqnr_db == pytest.approx(sqnr_db(seen["x"], quantized), rel=1e-4)
    assert (activation.layer, activation.projection, activation.format) == (1, "mlp.down_proj", str(FP8))
    weight = found["model.layers.1.mlp.down_proj", "weight"].statistics
    expected = layer.mlp.down_proj.weight.detach()
    assert weight.sqnr_db == pytest.approx(sqnr_db(expected, quantization.quantize(expected, FP4)), rel=1e-6)


def test_keys_are_those_after_the_rotary_embedding(llama):
    kept = llama(input_ids=ROWS, use_cache=True).past_key_values.layers[0]
    found = {(o.module, o.role): o.statistics for o in collect(llama, WEIGHTS_KV, ROWS.split(1))}
    for role, x, fmt in (("k", kept.keys, FP4), ("v", kept.values, FP6)):
        expected = sqnr_db(x, quantization.quantize(x.detach(), fmt))
        assert found["model.layers.0.self_attn", role].sqnr_db == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [n for n in architectures.MODELS if n not in architectures.ENCODERS])
def test_every_operand_of_every_architecture_is_met(name):
    model = architectures.build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    operands = collect(model, WEIGHTS_KV, ROWS.split(1))
    mlp, attention = architectures.counts(name)
    roles = [o.role for o in operands]
    routers = architectures.LAYERS if name == "mixtral" else 0
    assert roles.count("weight") == roles.count("activation") == mlp + attention + routers + 1  # and the head
    assert roles.count("k") == roles.count("v") == architectures.LAYERS
    assert all(o.statistics.count and math.isfinite(o.statistics.sqnr_db) for o in operands)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_lies_inside_attentions_and_behind_linear_layers():
    model = architectures.build("qwen2", attn_implementation="eager")
    inner = Rule(part="attention", q=FP8, p=FP8, softmax=FP8, rope=FP8)
    recipe = Recipe("inner", (inner, Rule(name="model.layers.0.self_attn.q_proj", bias=FP8, output=FP8)))
    found = {(o.module, o.role): o.statistics for o in collect(model, recipe, ROWS.split(1))}
    heads, tokens = architectures.HEADS, ROWS.numel()
    assert found["model.layers.0.self_attn", "p"].count == heads * tokens * ROWS.shape[1]
    assert found["model.layers.0.self_attn", "p"].amax <= 1
    assert found["model.layers.0.self_attn", "softmax"].amax < 1e3  # the masked scores do not count
    assert found["model.layers.0.self_attn", "q"].count == architectures.HIDDEN * tokens
    assert found["model.layers.0.self_attn", "rope"].amax == 1
    assert found["model.layers.0.self_attn.q_proj", "output"].count == architectures.HIDDEN * tokens
    assert found["model.layers.0.self_attn.q_proj", "bias"].count == architectures.HIDDEN


def test_infinite_operands_are_named(llama):
    model = architectures.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(MetricError, match=r"the activation of model\.layers\.1\.mlp\.down_proj, in the unquantized"):
        collect(model, WEIGHTS_KV, ROWS.split(1))


def test_formats_beside_microscaling(llama, tmp_path):
    fixed = parse_format("integer,width=6,frac=4")
    found = inspect(llama, Recipe("fixed", (Rule(part="mlp", layers="0", weight=fixed, activation=FP8),)), ROWS)
    weight = next(o for o in found.operands if o.role == "weight").statistics
    expected = llama.model.layers[0].mlp.gate_proj.weight.detach()
    assert weight.sqnr_db == pytest.approx(sqnr_db(expected, quantization.quantize(expected, fixed)), rel=1e-9)
    assert weight.values
    assert not weight.scales
    write.write_inspection(found, {"model": "m", "dtype": "float32", "text": {"name": "t"}}, tmp_path)
    assert (tmp_path / "exponents.png").stat().st_size > 10_000


# ---- parts


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mpt"])
def test_a_recipe_spelled_out_quantizes_alike(name):
    recipe = replace(
        WEIGHTS_KV, rules=(*WEIGHTS_KV.rules[:1], Rule(part="mlp", layers="0", skip=True), WEIGHTS_KV.rules[1])
    )
    model, other = architectures.build(name), architectures.build(name)
    spelled = make_plan(model, recipe).spelled_out()
    assert all(rule.name for rule in spelled.rules)
    assert apply(model, recipe).inventory()["sites"] == apply(other, spelled).inventory()["sites"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ROWS).logits, other(input_ids=ROWS).logits)


def test_phases_are_spelled_out(llama):
    phases = (
        Rule(part="mlp", phase="decode", weight=FP4),
        Rule(part="mlp", weight=FP8),
        Rule(part="head", phase="prefill", weight=FP6),
    )
    recipe = Recipe("phases", phases)
    spelled = make_plan(llama, recipe).spelled_out()
    assert [m.by_phase for m in make_plan(llama, spelled).sites] == [m.by_phase for m in make_plan(llama, recipe).sites]


def test_the_parts_of_a_recipe(llama):
    whole, cuts = cut(llama, WEIGHTS_KV)
    found = {(c.group, c.name): c for c in cuts}
    assert [c.name for c in cuts if c.group == "role"] == ["weights", "activations", "KV"]
    assert [c.name for c in cuts if c.group == "layer"] == ["0", "1", "outside"]
    assert [c.name for c in cuts if c.group == "projection"][:2] == ["self_attn (k, v)", "self_attn.q_proj"]
    assert {rule.name for rule in found["layer", "outside"].alone.rules} == {"lm_head"}
    assert {r for rule in found["role", "KV"].alone.rules for r in rule.formats} == {"k", "v"}
    for c in cuts:
        assert sum(len(r.formats) for recipe in (c.alone, c.without) for r in recipe.rules) == sum(
            len(r.formats) for r in whole.rules
        )


@pytest.mark.parametrize(("numerics_", "present"), [("exact", False), ("microxcaling", True)])
def test_rounding_around_matmuls_is_a_role_where_it_changes_something(numerics_, present):
    recipe = replace(WEIGHTS_KV, numerics=numerics_, elementwise=Elementwise(bfloat=16))
    _, cuts = cut(architectures.build("llama", dtype=torch.bfloat16), recipe)
    assert ("elementwise" in [c.name for c in cuts]) == present


# ---- what the parts cost


def logits_under(recipe: Recipe) -> torch.Tensor:
    model = architectures.build("llama")
    apply(model, recipe)
    with torch.no_grad():
        return model(input_ids=ROWS, use_cache=False).logits


def test_costs_are_differences_of_true_losses(inspection):
    plain = next_token_loss(logits_under(Recipe("none")), ROWS)
    found = inspection.sensitivity
    assert found.tokens == plain.tokens == ROWS.numel() - len(ROWS)
    assert found.cross_entropy == pytest.approx(plain.cross_entropy, abs=1e-5)
    layer = Rule(part="mlp", layers="0", weight=FP4, activation=FP8)
    attention = (replace(layer, part="attention"), Rule(part="attention", layers="0", k=FP4, v=FP6))
    recipes_ = {
        ("layer", "0"): Recipe("layer", (layer, *attention)),
        ("role", "weights"): Recipe("weights", (Rule(part="all", weight=FP4),)),
        ("role", "KV"): Recipe("kv", (Rule(part="attention", k=FP4, v=FP6),)),
        ("projection", "lm_head"): Recipe("head", (Rule(part="head", weight=FP4, activation=FP8),)),
    }
    parts = {(p.group, p.name): p for p in found.parts}
    for key, recipe in recipes_.items():
        expected = next_token_loss(logits_under(recipe), ROWS).cross_entropy - plain.cross_entropy
        assert parts[key].alone.cross_entropy.value == pytest.approx(expected, abs=1e-5), key
        assert parts[key].alone.kl.value > 0
    whole = next_token_loss(logits_under(WEIGHTS_KV), ROWS).cross_entropy - plain.cross_entropy
    assert found.whole.cross_entropy.value == pytest.approx(whole, abs=1e-5)
    no_head = next_token_loss(
        logits_under(Recipe("rest", (WEIGHTS_KV.rules[0], Rule(part="head", skip=True), WEIGHTS_KV.rules[1]))), ROWS
    )
    saved = whole + plain.cross_entropy - no_head.cross_entropy
    assert parts["layer", "outside"].saved.cross_entropy.value == pytest.approx(saved, abs=1e-5)


def test_the_interaction_is_what_the_parts_leave(inspection):
    found = inspection.sensitivity
    for group in ("role", "layer", "projection"):
        parts = sum(part.alone.kl.value for part in found.of(group))
        assert found.interactions[group].kl.value == pytest.approx(found.whole.kl.value - parts, abs=1e-9)


def test_what_is_on_the_grid_already_costs_nothing(tmp_path):
    model = architectures.build("llama")
    first = model.model.layers[0]
    with torch.no_grad():
        for linear in (m for m in first.modules() if isinstance(m, nn.Linear)):
            quantization.quantize_(linear.weight, FP4)
    found = inspect(model, Recipe("w", (Rule(part="mlp", weight=FP4), Rule(part="attention", weight=FP4))), ROWS)
    layers = {part.name: part for part in found.sensitivity.of("layer")}
    for cost in (layers["0"].alone, layers["0"].saved):
        assert cost.cross_entropy == cost.kl == Estimate(0.0, 0.0)
    assert layers["1"].alone == layers["1"].saved == found.sensitivity.whole
    assert found.sensitivity.whole.kl.value > 0
    write.write_inspection(found, {"model": "m", "dtype": "float32", "text": {"name": "t"}}, tmp_path)
    rows = {row["module"]: row for row in json.loads((tmp_path / "inspection.json").read_text())["operands"]}
    assert rows["model.layers.0.mlp.up_proj"]["sqnr_db"] is None
    assert rows["model.layers.1.mlp.up_proj"]["sqnr_db"] > 10


def test_a_part_that_gives_no_numbers(tmp_path):
    overflowing = MXFormat.parse("int8@16,scale_bits=1")  # no scale but 1: blocks from 2 on become NaN
    found = inspect(
        architectures.build("llama"), Recipe("w", (Rule(part="mlp", weight=FP4, activation=overflowing),)), ROWS
    )
    roles = {part.name: part for part in found.sensitivity.of("role")}
    assert found.sensitivity.whole is None
    assert found.sensitivity.interactions["role"] is None
    assert roles["activations"].alone is None
    assert roles["weights"].alone.kl.value > 0
    assert any(o.statistics.lost for o in found.operands)
    write.write_inspection(found, {"model": "m", "dtype": "float32", "text": {"name": "t"}}, tmp_path)
    with (tmp_path / "roles.csv").open(newline="") as file:
        rows = {row["role"]: row for row in csv.DictReader(file)}
    assert rows["activations"]["kl_alone"] == rows["whole recipe"]["kl_alone"] == rows["weights"]["kl_share_%"] == ""
    assert float(rows["weights"]["kl_alone"]) > 0
    assert tables.costliest(found, "role", 1).rows[0][0] == "activations"


def test_noise_is_the_same_every_time(llama):
    dither = MXFormat.parse("fp4_e2m1@16,rounding=dither")
    recipe = Recipe("noise", (Rule(part="mlp", layers="1", weight=dither, activation=dither),))
    state = torch.random.get_rng_state()
    first, second = (inspect(llama, recipe, ROWS).sensitivity for _ in range(2))
    assert first == second
    assert first.whole.kl.value > 0
    assert not torch.equal(state, torch.random.get_rng_state())  # the statistics draw from it


def test_attention_is_computed_alike_in_all_passes():
    model = architectures.build("llama", attn_implementation="sdpa")
    found = inspect(model, Recipe("p", (Rule(part="attention", layers="1", p=FP8),)), ROWS)
    assert model.config._attn_implementation == "sdpa"
    assert any("eagerly" in note for note in found.notes)
    assert [part.name for part in found.sensitivity.of("role")] == ["p"]
    eager = architectures.build("llama", attn_implementation="eager")
    assert inspect(eager, found.recipe, ROWS).sensitivity == found.sensitivity


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "mpt"])
def test_other_architectures(name):
    found = inspect(architectures.build(name), WEIGHTS_KV, ROWS)
    assert [part.name for part in found.sensitivity.of("layer")] == ["0", "1", "outside"]
    assert all(p.alone.kl.value > 0 for p in found.sensitivity.parts)
    assert found.sensitivity.whole.kl.value > max(p.alone.kl.value for p in found.sensitivity.of("role")) / 2


# ---- errors


@pytest.mark.parametrize("rules", [(), (Rule(part="all", phase="decode", weight=FP4),)])
def test_nothing_to_inspect(llama, rules):
    with pytest.raises(SpecError, match="recipe empty gives no operand of this model a format in prefill"):
        inspect(llama, Recipe("empty", rules), ROWS)


def test_a_recipe_that_does_not_fit(llama):
    with pytest.raises(ConversionError, match="matches no module"):
        inspect(llama, Recipe("lost", (Rule(modules="nothing", weight=FP4),)), ROWS)


def test_a_model_that_is_quantized_already():
    model = architectures.build("llama")
    apply(model, WEIGHTS_KV)
    with pytest.raises(ConversionError, match="quantized already"):
        inspect(model, WEIGHTS_KV, ROWS)


def test_a_text_that_is_too_short():
    assert first_windows(torch.arange(7), 3, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(MetricError, match="7 tokens, fewer than 2 windows of 4"):
        first_windows(torch.arange(7), 2, 4)


# ---- files


def test_the_files_of_an_inspection(inspection, tmp_path):
    write.write_inspection(inspection, {"model": "tiny", "dtype": "float32", "text": {"name": "random"}}, tmp_path)
    document = json.loads((tmp_path / "inspection.json").read_text())
    assert document["model"] == "tiny"
    assert len(document["operands"]) == len(inspection.operands) == 34
    assert (document["windows"], document["window"]) == tuple(ROWS.shape)
    up = next(h for h in document["histograms"] if (h["projection"], h["role"]) == ("mlp.up_proj", "weight"))
    assert sum(up["values"].values()) == architectures.LAYERS * 48 * architectures.HIDDEN
    with (tmp_path / "operands.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["module"] for row in rows] == [o.module for o in inspection.operands]
    assert float(rows[0]["sqnr_db"]) == pytest.approx(inspection.operands[0].statistics.sqnr_db, rel=1e-3)
    with (tmp_path / "layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    assert [row["layer"] for row in layers] == ["0", "1", "outside", "interaction", "whole recipe"]
    assert sum(float(row["kl_share_%"]) for row in layers[:-1]) == pytest.approx(100, abs=0.1)
    page = (tmp_path / "inspection.md").read_text()
    for name in ("sqnr.png", "layers.png", "exponents.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).stat().st_size > 10_000
    assert not re.search(r"\b(nan|inf)\b.*\|", page)
    assert str(tmp_path) not in page


def test_worst_operands_of_each_role(inspection):
    worst = inspection.worst("weight", 2)
    assert len(worst) == 2
    assert worst[0].statistics.sqnr_db <= worst[1].statistics.sqnr_db
    assert worst[1].statistics.sqnr_db <= min(
        o.statistics.sqnr_db for o in inspection.operands if o.role == "weight" and o not in worst
    )
    assert [row[1] for row in tables.worst_operands(inspection, 1).rows] == ["weight", "activation", "k", "v"]


def test_the_heat_maps(inspection):
    drawn = figures.sqnr(inspection)
    shown = {axes.get_title(loc="left"): axes for axes in drawn.axes if axes.get_title(loc="left")}
    assert list(shown) == ["Weights", "Activations", "K, V and other operands of attentions"]
    weights = shown["Weights"].images[0].get_array()
    assert weights.shape == (8, 3)  # seven projections and the head; two layers and outside
    assert int(weights.mask.sum()) == 7 + 2  # the head lies outside, the others inside
    expected = next(o for o in inspection.operands if (o.module, o.role) == ("model.layers.1.mlp.up_proj", "weight"))
    names = [label.get_text() for label in shown["Weights"].get_yticklabels()]
    assert weights[names.index("mlp.up_proj"), 1] == pytest.approx(expected.statistics.sqnr_db)


# ---- the command


QUICK = ("--windows", 2, "--window", 16, "--dtype", "float32", "--device", "cpu")


def test_the_command(mxlab, tiny_llama, tmp_path):
    code, out, _ = mxlab("inspect", tiny_llama, "--recipe", "ex2", *QUICK, "--out", tmp_path)
    assert code == 0
    [folder] = tmp_path.iterdir()
    assert folder.name.endswith("_ex2")
    assert f"written: {folder}" in out
    assert "activations" in out
    assert {p.name for p in folder.iterdir()} == {
        "command.txt",
        "env.json",
        "env.txt",
        "recipe.toml",
        "inspection.json",
        "inspection.md",
        "operand_kinds.csv",
        "operands.csv",
        "roles.csv",
        "layers.csv",
        "projections.csv",
        "sqnr.png",
        "layers.png",
        "exponents.png",
    }
    assert load_recipe(folder / "recipe.toml") == load_recipe("ex2")
    document = json.loads((folder / "inspection.json").read_text())
    assert document["text"]["name"] == "passages"
    assert len(document["text"]["sha256"]) == 64
    assert document["model"].startswith("tiny-llama@")
    assert [p["name"] for p in document["sensitivity"]["parts"]][:3] == ["weights", "activations", "KV"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--recipe", "baseline"), "nothing to inspect"),
        (("--recipe", "exx1"), "did you mean 'ex1'"),
        (("--windows", "9999"), "fewer than 9999 windows"),
        (("--window", "500"), "context 128"),
        (("--windows", "0"), "windows is 0"),
        (("--text", "wikitext2_valid"), "--data-dir"),
    ],
)
def test_what_the_command_refuses(mxlab, tiny_llama, tmp_path, arguments, complaint):
    code, _, err = mxlab("inspect", tiny_llama, *QUICK, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert complaint in err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_the_command_refuses_the_environments_options(mxlab, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("MX_SPECS_JSON", "{}")
    code, _, err = mxlab("inspect", tiny_llama, *QUICK, "--out", tmp_path)
    assert (code, "MX_SPECS_JSON is set" in err) == (2, True)
