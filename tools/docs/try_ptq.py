"""Measure what was tried on calibrated models and left out of mxlab, a line of OUT/tried.jsonl each.

python tools/docs/try_ptq.py --data-dir DATA --folder FOLDER --out results/smollm2-135m/ptq TRIAL ...

FOLDER holds what ``mxlab quantize smollm2 --recipe R -o FOLDER`` saved under the recipe given by ``--recipe``, by which
those trials that change the model before it is quantized quantize it themselves. Each is evaluated on the first 8
windows of 512 tokens of WikiText-2's test split, beside the folder as it is (the trial ``nothing``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ptq_trial import CALIBRATED, Setting
from ptq_trials_of_form import permutation, residual_rotation, smoothing
from torch import Tensor

from mxlab.experiments import provenance
from mxlab.model.conversion import Conversion
from mxlab.model.nn.attention import QuantizedAttention
from mxlab.model.observe import observe_inputs
from mxlab.model.saved import conversion_of
from mxlab.ptq.blocks import BlockStream, decoder_layers
from mxlab.ptq.sites import layer_at, weight_in_basis

ROWS = "tried.jsonl"

KeyValue = Callable[[str, str, Tensor, Callable[[Tensor], Tensor]], Tensor]  # attention, role, operand, its quantizing


@contextmanager
def keys_and_values(quantizing: KeyValue) -> Iterator[None]:
    """Have every attention quantize K and V in another way, as long as the context is open."""
    on_grid = QuantizedAttention._on_grid

    def changed(self: QuantizedAttention, role: str, x: Tensor, fmt: Any, axis: int) -> Tensor:
        return quantizing(self._name, role, x, lambda y: on_grid(self, role, y, fmt, axis))

    QuantizedAttention._on_grid = changed
    try:
        yield
    finally:
        QuantizedAttention._on_grid = on_grid


def _seen(setting: Setting, model: Any, of: Callable[[Tensor], Tensor]) -> dict[tuple[str, str], Tensor]:
    """Return the sum of a statistic of K and V by attention and role."""
    sums: dict[tuple[str, str], Tensor] = {}

    def collect(name: str, role: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        sums[name, role] = sums.get((name, role), torch.zeros(())) + of(x)
        return quantize(x)

    with keys_and_values(collect):
        setting.calibrate(model)
    return sums


def first_tokens(setting: Setting, count: int) -> dict[str, float]:
    """Leave K and V of the first tokens unquantized (PrefixQuant, KVQuant)."""

    def quantizing(_: str, __: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([x[:, :, :count], quantize(x)[:, :, count:]], 2)

    with keys_and_values(quantizing):
        return setting.score(setting.quantized())


def pair_scale(setting: Setting, power: float) -> dict[str, float]:
    """Divide K by a power of the size of each rotary pair, which the query is multiplied by (KVSmooth)."""
    model = setting.quantized()
    squares = _seen(setting, model, lambda x: x.square().sum((0, 2)))

    def quantizing(name: str, role: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        if role != "k":
            return quantize(x)
        pairs = squares[name, role].unflatten(-1, (2, -1)).sum(-2).sqrt()
        scale = (pairs / pairs.mean(-1, keepdim=True)).clamp(min=1e-2).pow(power).repeat(1, 2)[:, None]
        return quantize(x / scale) * scale

    with keys_and_values(quantizing):
        return setting.score(model)


def mean_of_values(setting: Setting, _: float) -> dict[str, float]:
    """Quantize V without its mean, which is added again behind the softmax (SageAttention)."""
    model = setting.quantized()
    means = _seen(setting, model, lambda x: x.mean((0, 2)) / CALIBRATED)

    def quantizing(name: str, role: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        mean = means[name, role][:, None] if role == "v" else torch.zeros(())
        return quantize(x - mean) + mean

    with keys_and_values(quantizing):
        return setting.score(model)


@torch.no_grad()
def bias(setting: Setting, _: float) -> dict[str, float]:
    """Add to the hidden states after each layer what their mean has lost."""
    model = setting.quantized()
    names, ids = decoder_layers(model), setting.windows.ids[:CALIBRATED]
    ours, theirs = (BlockStream(m, names, ids) for m in (model, setting.original))
    for layer, name in enumerate(names):
        wanted, found = theirs.outputs(layer), ours.outputs(layer)
        lost = torch.stack([w - f for w, f in zip(wanted, found, strict=True)]).mean((0, 1, 2))
        model.get_submodule(name).register_forward_hook(lambda _, __, output, lost=lost: output + lost)
        ours.hidden, theirs.hidden = [f + lost for f in found], wanted
    return setting.score(model)


@torch.no_grad()
def low_rank(setting: Setting, rank: int) -> dict[str, float]:
    """Add a product of low rank to each weight, of what its rounding has lost (QERA, the approximate form)."""
    model = setting.quantized()
    conversion = conversion_of(model)
    assert conversion is not None
    bits = count = 0.0
    sizes = _input_sizes(setting, model, conversion)
    for site in (site for site in conversion.sites if site.name in sizes):
        layer, size = layer_at(site), sizes[site.name]
        weight = setting.original.get_submodule(site.name).weight.detach()
        wanted = weight_in_basis(weight, layer.operands["prefill"], layer.input_transform)
        u, s, v = torch.linalg.svd((wanted - layer.weight) * size, full_matrices=False)
        left, right = (u[:, :rank] * s[:rank]).bfloat16().float(), (v[:rank] / size).bfloat16().float()

        def add(module: Any, args: tuple, output: Tensor, left: Tensor = left, right: Tensor = right) -> Tensor:
            x = module.mx.on_activation(args[0], matrices=module.input_transform)
            return output + x @ right.t() @ left.t()

        layer.register_forward_hook(add)
        bits, count = bits + 16 * (left.numel() + right.numel()), count + weight.numel()
    return {**setting.score(model), "bits_more": bits / count}


def _input_sizes(setting: Setting, model: Any, conversion: Conversion) -> dict[str, Tensor]:
    """Return by name of a linear layer the root of the mean square of each of its inputs, as they are multiplied."""
    sums: dict[str, Tensor] = {}

    def see(site: Any, x: Tensor) -> None:
        layer = layer_at(site)
        seen = layer.operands["prefill"].on_activation(x, matrices=layer.input_transform)
        sums[site.name] = sums.get(site.name, torch.zeros(())) + seen.square().mean((0, 1)) / CALIBRATED

    with observe_inputs(conversion, see):
        setting.calibrate(model)
    return {name: total.sqrt().clamp(min=1e-6) for name, total in sums.items()}


TRIALS: dict[str, tuple[Callable[[Setting, Any], dict[str, float]], tuple[Any, ...]]] = {
    "nothing": (lambda setting, _: setting.score(setting.quantized()), (None,)),
    "first_tokens": (first_tokens, (4,)),
    "pair_scale": (pair_scale, (0.5,)),
    "mean_of_values": (mean_of_values, (None,)),
    "bias": (bias, (None,)),
    "low_rank": (low_rank, (32,)),
    "permutation": (permutation, (None,)),
    "smoothing": (smoothing, (0.5,)),
    "residual_rotation": (residual_rotation, ("none", "wush@32")),
}


def main() -> None:
    """Make the trials that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+", choices=TRIALS)
    parser.add_argument("--recipe", default="mxfp4_w4a4kv4_best")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(options)
    for name in options.trials:
        trial, values = TRIALS[name]
        for value in values:
            found = trial(setting, value)
            row = {"trial": name, "value": value, "recipe": setting.recipe.name, **found}
            print(json.dumps(row), flush=True)
            with (options.out / ROWS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({**row, "environment": provenance.describe()}) + "\n")


if __name__ == "__main__":
    main()
