"""What a quantized model that was calibrated still loses, and where: with each part in turn left unquantized.

A part of such a model cannot be quantized alone, as the other weights were chosen to make up for it. It can be left
out: its operands are computed in the basis of their transform, unrounded, and its weight is the unquantized model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from mxlab.errors import SpecError
from mxlab.eval.metrics import TokenScores
from mxlab.eval.scorer import Predictor, Scorer, remember
from mxlab.eval.windows import sliding_windows
from mxlab.inspect.parts import cut
from mxlab.inspect.sensitivity import Cost, Estimate
from mxlab.model.apply import make_room
from mxlab.model.conversion import Conversion
from mxlab.model.plan import QuantizedSite
from mxlab.model.saved import conversion_of, quantization_config, recorded
from mxlab.progress import track
from mxlab.ptq.sites import layer_at, weight_in_basis
from mxlab.recipe import Recipe
from mxlab.recipe.transform import Wush


@dataclass(frozen=True)
class Remainder:
    """What a part is to blame for: what the whole model loses beyond the model without the part quantized."""

    group: str
    name: str
    saved: Cost


@dataclass(frozen=True)
class Remaining:
    """What a quantized model loses, and what each part is to blame for.

    Attributes:
        recipe: what it is quantized under.
        rows: the windows, and the tokens of each.
        cross_entropy: of the unquantized model, in nats per token.
        whole: what the quantized model loses.
        parts: by role, by decoder layer and by projection.
        positions: the loss by place in the window, in ranges that double in length: which places, and the loss.
    """

    recipe: Recipe
    rows: tuple[int, int]
    cross_entropy: float
    whole: Cost
    parts: tuple[Remainder, ...]
    positions: tuple[tuple[str, Cost], ...]

    def of(self, group: str) -> list[Remainder]:
        """Return the parts of one kind."""
        return [part for part in self.parts if part.group == group]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = {
            "kind": "remaining",
            "recipe": self.recipe.name,
            "hash": self.recipe.hash,
            "windows": self.rows[0],
            "window": self.rows[1],
        }
        found = {name: value for name, value in asdict(self).items() if name not in ("recipe", "rows")}
        return {**values, **found}


def remaining(model: nn.Module, original: nn.Module, rows: Tensor) -> Remaining:
    """Score a quantized model, and with each part of its recipe left unquantized; neither model is changed.

    Args:
        model: as ``mxlab quantize`` saved it, loaded.
        original: the unquantized model that it was made from; one more copy of it must fit into memory.
        rows: (windows, tokens) of token ids; each token but a window's first is predicted.

    Raises:
        SpecError: the model is not quantized, or was not made from the other.
        MetricError: logits are not numbers.
    """
    conversion = conversion_of(model)
    if conversion is None:
        raise SpecError("the model is not quantized: there is nothing that it has lost")
    ids, windows = rows.flatten(), sliding_windows(rows.numel(), rows.shape[1])
    reference = remember(Predictor(original))
    saved = _Saved(conversion)
    saved.check_made_from(original)

    def score(recipe: Recipe) -> TokenScores:
        return Scorer(lambda: saved.under(recipe, original), ids, windows, 1, reference).score(recipe).tokens

    scorer = Scorer(lambda: model, ids, windows, 1, reference)
    plain, full = scorer.score_reference(), scorer.score(conversion.recipe).tokens
    _, cuts = cut(original, conversion.recipe)
    parts = tuple(
        Remainder(c.group, c.name, _cost(full, score(c.without))) for c in track(cuts, "leaving out", len(cuts))
    )
    return Remaining(
        conversion.recipe,
        (rows.shape[0], rows.shape[1]),
        plain.loss.cross_entropy,
        _cost(full, plain),
        parts,
        tuple(_by_position(full, plain, len(rows))),
    )


class _Saved:
    """A quantized model's values, of which other models can be made."""

    def __init__(self, conversion: Conversion) -> None:
        self._state = conversion.model.state_dict()
        self._config = quantization_config(conversion, self._state)
        self._sites = [site for site in conversion.sites if site.kind != "attention"]

    def check_made_from(self, original: nn.Module) -> None:
        """Raise SpecError where a quantized weight has another shape in ``original``, or is not there."""
        theirs = dict(original.named_parameters())
        for site in self._sites:
            name = f"{site.module_name}.{site.parameter}"
            shape = theirs[name].shape if name in theirs else None
            if shape != site.weight.shape:
                found = "no such weight" if shape is None else f"one of {tuple(shape)}"
                raise SpecError(
                    f"{name} of the quantized model is {tuple(site.weight.shape)}, and the reference has {found}: name "
                    "the model that it was made from"
                )

    def under(self, recipe: Recipe, original: nn.Module) -> Any:
        """Return a copy of the unquantized model with the values of what ``recipe`` quantizes, before it is converted.

        Vectors, such as the gains of norms, are those of the quantized model.
        """
        made: Any = copy.deepcopy(original)
        make_room(made, recipe)
        rules = {rule.name: rule for rule in recipe.rules}
        state, frozen = dict(self._state), dict(self._config["frozen"])
        for site in self._sites:
            name, rule = f"{site.module_name}.{site.parameter}", rules.get(site.name)
            if rule is None or rule.weight is None:
                frozen.pop(name, None)
                state[name] = original.get_parameter(name).detach()
                if rule is not None and isinstance(rule.transform, Wush):
                    state[name] = _in_basis(site, state[name])
                    frozen[name] = recorded(state[name])  # so that it is not transformed again
        room = made.state_dict()
        made.load_state_dict({name: value for name, value in state.items() if name in room}, strict=False)
        made.config.quantization_config = {**self._config, "recipe": recipe.to_dict(), "frozen": frozen}
        return made


def _in_basis(site: QuantizedSite, weight: Tensor) -> Tensor:
    """Return the unquantized weight of a linear layer in the basis of its fitted transform, as it lies in the model."""
    layer, is_transposed = layer_at(site), site.input_axis == 0
    by_outputs = (weight.t() if is_transposed else weight).float()
    found = weight_in_basis(by_outputs, layer.operands["prefill"], layer.input_transform)
    return (found.t() if is_transposed else found).contiguous().to(weight.dtype)


def _cost(scores: TokenScores, base: TokenScores) -> Cost:
    found = Cost.of(scores, base)
    assert found is not None
    return found


def _by_position(scores: TokenScores, base: TokenScores, windows: int) -> Iterator[tuple[str, Cost]]:
    """Yield what the tokens at some places lose: 1, 2 to 3, 4 to 7 and so on, the place of the first token being 0."""
    assert scores.kl is not None
    assert base.kl is not None
    nll, kl = ((a - b).double().view(windows, -1) for a, b in ((scores.nll, base.nll), (scores.kl, base.kl)))
    places = nll.shape[1]
    for first in (2**n for n in range(places.bit_length())):
        last = min(2 * first - 1, places)
        name = str(first) if first == last else f"{first}-{last}"
        yield name, Cost(*(Estimate.of(x[:, first - 1 : last].flatten()) for x in (nll, kl)))
