"""A model under a recipe of injected operators computes what one computes that is built after inject_pyt_ops."""

import pytest
import torch
import torch.nn.functional as F

import mxlab
from mxlab.compat.mx import finalize_mx_specs
from mxlab.compat.mx.mx_mapping import injected
from mxlab.errors import RunError, SpecError
from mxlab.eval.request import check_rules_acted
from mxlab.recipe import Recipe, load_recipe

from support.llama import tiny, tokens


def test_as_built_after_injection():
    recipe = load_recipe("injected")
    model, ids = tiny(), tokens()
    before, linear, softmax = model(ids).logits, F.linear, F.softmax
    conversion = mxlab.apply(model, recipe)
    assert not torch.allclose(model(ids).logits, before, rtol=1e-3)
    assert (F.linear, F.softmax) == (linear, softmax)
    with injected(finalize_mx_specs({**recipe.inject, "custom_cuda": True})):
        built = tiny(attn_implementation="eager")
        assert type(built.model.layers[0].mlp.up_proj).__name__ == "Linear_inj"
        expected = built(ids).logits
    assert torch.equal(model(ids).logits, expected)

    layers = model.config.num_hidden_layers
    calls = conversion.inventory()["injected_calls"]
    assert calls == {
        "linear": 2 * (7 * layers + 1),
        **dict.fromkeys(("softmax", "silu"), 2 * layers),
        "matmul": 4 * layers,
    }
    assert conversion.notes == ["attention is computed eagerly, not by sdpa, for the sake of its products and softmax"]
    assert "torch's operators are replaced while the model computes (w_elem_format fp8_e4m3" in conversion.summary()
    assert mxlab.apply(model, recipe) is conversion


def test_a_saved_model_carries_it(tmp_path):
    model, ids = tiny(), tokens()
    mxlab.apply(model, "injected")
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_what_has_no_effect():
    conversion = mxlab.apply(torch.nn.Identity(), "injected")
    conversion.model(torch.ones(3))
    with pytest.raises(RunError, match="None of the injected operators was called"):
        check_rules_acted(conversion)
    with pytest.raises(SpecError, match="nothing is quantized"):
        mxlab.apply(torch.nn.Identity(), Recipe("r", inject={"block_size": 8}))
