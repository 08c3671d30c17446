"""The inventory as rows, and the conversion of a folder: `mxlab convert`."""

import json

import pytest
import torch

import mxlab
from mxlab.errors import FormatError
from mxlab.formats import parse_format
from mxlab.model.conversion import high_precision_rows, left_names, quantized_rows, totals
from mxlab.recipe import Elementwise
from mxlab.sources import models

from support.architectures import LAYERS, build

RULE = mxlab.Rule(part="mlp", weight=mxlab.MXFormat("int4", 16), activation=mxlab.MXFormat("int8", 16))


def test_layers_that_are_alike_share_a_row():
    conversion = mxlab.apply(build("llama"), mxlab.Recipe("test", (RULE,)))
    rows = {(row.name, row.role): row for row in quantized_rows(conversion)}
    down = rows["model.layers.*.mlp.down_proj", "weight"]
    assert (down.layers, down.count, down.shape, down.format, down.bits) == ("0-1", LAYERS, (32, 48), "int4@16", 4.5)
    assert len(rows) == 2 * 3


def test_what_stays_is_named_with_its_dtype():
    conversion = mxlab.apply(build("llama").bfloat16(), mxlab.Recipe("test", (RULE,)))
    rows = {row.name: row for row in high_precision_rows(conversion)}
    assert rows["model.layers.*.self_attn.q_proj.weight"].bits == 16
    assert rows["lm_head.weight"].format == "bfloat16"
    assert "model.layers.*.mlp.down_proj.weight" not in rows


def test_rows_account_for_every_bit():
    conversion = mxlab.apply(build("mixtral").bfloat16(), "tier_a")
    bits = 0.0
    for row in quantized_rows(conversion):
        if row.role == "weight":
            *outer, axis = row.shape
            blocks = torch.Size(outer).numel() * -(-axis // 32)
            bits += row.count * (torch.Size(row.shape).numel() * 8 + blocks * 8)
    for row in high_precision_rows(conversion):
        bits += row.count * torch.Size(row.shape).numel() * row.bits
    assert conversion.bits_per_parameter == bits / sum(p.numel() for p in conversion.model.parameters())


def test_a_tied_weight_and_its_quantized_copy_both_count():
    model = build("qwen2.5").bfloat16()
    plain = sum(p.numel() for p in model.parameters()) * 16
    rule = mxlab.Rule(name="lm_head", weight=mxlab.MXFormat("int8", 32))
    conversion = mxlab.apply(model, mxlab.Recipe("test", (rule,)))
    copy = model.lm_head.weight.numel() * 8.25
    assert conversion.bits_per_parameter == (plain + copy) / (plain / 16)


def test_layers_with_gaps():
    rule = mxlab.Rule(part="mlp", layers="0, 2-3", weight=mxlab.MXFormat("int4", 16))
    conversion = mxlab.apply(build("llama", num_hidden_layers=5), mxlab.Recipe("test", (rule,)))
    assert {row.layers for row in quantized_rows(conversion)} == {"0, 2-3"}


def test_bits_of_each_phase():
    """Of a Llama of two layers, whose MLPs read 4.5 bits (int4@16) in decode and their dtype in prefill."""
    model = build("llama").bfloat16()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    in_mlps, everything = sum(n for name, n in sizes.items() if ".mlp." in name), sum(sizes.values())
    kept = mxlab.Rule(part="attention", layers="0", k=mxlab.MXFormat("int8", 8), v=mxlab.MXFormat("int4", 8))
    cached = mxlab.Rule(part="attention", phase="prefill", k=mxlab.MXFormat("int4", 8))
    mlps = mxlab.Rule(part="mlp", phase="decode", weight=mxlab.MXFormat("int4", 16))
    conversion = mxlab.apply(model, mxlab.Recipe("test", (kept, cached, mlps)))
    assert conversion.bits_in("prefill") == 16
    assert conversion.bits_in("decode") == pytest.approx((16 * (everything - in_mlps) + 4.5 * in_mlps) / everything)
    assert conversion.bits_per_parameter == pytest.approx((16 * everything + 4.5 * in_mlps) / everything)
    # 9 and 5 bits in layer 0; in layer 1 5 bits for the K of prefill, and else the dtype.
    assert conversion.kv_bits_in("prefill") == (9 + 5 + 5 + 16) / 4
    assert conversion.kv_bits_in("decode") == (9 + 5 + 16 + 16) / 4
    text = "\n".join(totals(conversion))
    assert "K and V: 8.7500 in prefill, 11.5000 in decode" in text
    assert f"parameter: 16.0000 in prefill, {conversion.bits_in('decode'):.4f} in decode; " in text
    assert f"{conversion.bits_per_parameter:.4f} in memory" in text


def test_one_number_where_the_phases_are_alike():
    conversion = mxlab.apply(build("llama").bfloat16(), mxlab.Recipe("test", (RULE,)))
    assert conversion.bits_in("prefill") == conversion.bits_in("decode") == conversion.bits_per_parameter
    assert totals(conversion) == [
        "element-wise rounding: none",
        "average bits per element of K and V: 16.0000 in every phase",
        f"average bits per parameter: {conversion.bits_per_parameter:.4f} in every phase",
    ]


def test_elementwise_rounding_in_words():
    elementwise = Elementwise(bfloat=12, subnormals=False, weight_rounding="even")
    conversion = mxlab.apply(build("llama"), mxlab.Recipe("test", (RULE,), elementwise=elementwise))
    assert totals(conversion)[0] == (
        "element-wise rounding: to bfloat, 12 bits, around the products of 6 linear layers "
        "(weights even, inputs and results nearest, subnormals flushed to zero)"
    )


def test_what_is_left_in_a_line():
    rule = mxlab.Rule(part="mlp", layers="1", weight=mxlab.MXFormat("int4", 16))
    conversion = mxlab.apply(build("llama"), mxlab.Recipe("test", (rule,)))
    projections = [f"model.layers.*.self_attn.{name}_proj (0-1)" for name in "qkvo"]
    mlps = [f"model.layers.*.mlp.{name}_proj (0)" for name in ("gate", "up", "down")]
    assert sorted(left_names(conversion)) == sorted([*projections, *mlps, "lm_head"])


# ---- mxlab convert


def test_a_skeleton_has_no_weights(tiny_llama):
    model = models.skeleton(str(tiny_llama))
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(FormatError, match=r"dtype is .int8."):
        models.skeleton(str(tiny_llama), "int8")


def test_a_converted_folder_loads_and_is_on_the_grid(tiny_llama, tmp_path):
    from mxlab.hf import checkpoint
    from mxlab.recipe import load_recipe

    out = tmp_path / "made" / "model"
    checkpoint.save_converted(str(tiny_llama), load_recipe("ex1"), "float32", out)
    loaded = models.load_model(str(out), "float32", "cpu").model
    original = models.load_model(str(tiny_llama), "float32", "cpu").model
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, mxlab.quantize(original.model.layers[0].mlp.up_proj.weight.bfloat16().float(), "fp4@32"))
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert load_recipe(out / "recipe.toml") == load_recipe("ex1")
    assert json.loads((out / "inventory.json").read_text())["linear_layers"] == 14
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_failed_conversion_leaves_nothing(tiny_llama, tmp_path):
    from mxlab.errors import ConversionError, RunError
    from mxlab.hf import checkpoint

    nothing = mxlab.Recipe("nothing", (mxlab.Rule("nothing", weight=mxlab.MXFormat("int8")),))
    with pytest.raises(ConversionError):
        checkpoint.save_converted(str(tiny_llama), nothing, "float32", tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    with pytest.raises(RunError, match=r"model exists already"):
        checkpoint.save_converted(str(tiny_llama), nothing, "float32", tmp_path / "model")


@pytest.mark.parametrize("fmt", ["int4@16,scale_rule=mase_int", "block_fp@16,width=6", "nvfp4", "fp4@32"])
def test_saving_does_not_quantize_twice(fmt, tmp_path):
    model = build("llama")
    rule = mxlab.Rule(part="mlp", weight=parse_format(fmt))
    mxlab.apply(model, mxlab.Recipe("test", (rule,)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.state_dict()
    model.save_pretrained(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
