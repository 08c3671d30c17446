"""Quantize the weights of experts and routers, each expert by the tokens that the router sends to it.

Experts whose weights are stacked in one parameter are computed one by one while the text passes. An expert that none of
its tokens reaches is rounded to nearest.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxlab.errors import ConversionError
from mxlab.formats import MXFormat
from mxlab.model.conversion import Conversion, computer_of
from mxlab.model.nn.experts import QuantizedExperts
from mxlab.model.plan import QuantizedSite
from mxlab.numerics.reference import block_layout
from mxlab.ptq.chosen import ChosenExperts
from mxlab.ptq.resume import Progress
from mxlab.ptq.rounding import best_rounding
from mxlab.ptq.scales import block_scales, rounded
from mxlab.ptq.sites import weight_format, weight_in_basis
from mxlab.ptq.statistics import input_statistics
from mxlab.recipe.algorithms import Gptq

_LEARNING = ("scales", "target")  # what is kept of an expert for what learns, by name
_HELD_OUT = 0.125  # the share of an expert's tokens that judge, where there is something to choose

logger = logging.getLogger("mxlab")


class ExpertQuantizer:
    """Chooses the weights of experts.

    Args:
        options: of the rounding. There is no correction for what was lost before: the unquantized model's router sends
            other tokens to an expert.
        conversion: of the model.
        progress: what is kept of each expert.
        learns: whether the weights are to learn from what they were to be, which is kept then.

    Raises:
        ConversionError: there are experts, and the options ask for a correction.
    """

    def __init__(self, options: Gptq, conversion: Conversion, progress: Progress, learns: bool) -> None:
        self._options, self._progress, self._model = options, progress, conversion.model
        self._kept = _LEARNING if learns else ()
        self._sites = [site for site in conversion.sites if site.kind == "experts" and _is_to_be_chosen(site)]
        if self._sites and options.corrects:
            raise ConversionError(
                f"{self._sites[0].name}: experts have no correction for what the layers before have lost, as other "
                "tokens reach them in the unquantized model: take correction = 0 in [algorithms.gptq]"
            )
        # Of each site and expert, what it was to be, and the scales of what it is.
        self._done: defaultdict[str, dict[int, Mapping[str, Tensor]]] = defaultdict(dict)
        self.count = sum(_count(site) for site in self._sites)

    @contextmanager
    def choosing(self, advance: Callable[[int], Any]) -> Iterator[None]:
        """Choose the weights of every expert as the text passes, as long as the context is open.

        Args:
            advance: told of each expert that is done.

        Raises:
            ConversionError: an input that is NaN or infinite.
        """
        with ExitStack() as stack:
            if self._sites:
                stack.enter_context(_one_by_one(self._model))
            for site in self._sites:
                choose = partial(self._choose, site, advance)
                stack.enter_context(_experts_at(site).choosing(site.parameter, choose))
            yield
        for site in self._sites:
            self._finish(site)

    @property
    def chosen(self) -> list[ChosenExperts]:
        """What was chosen and learns, all experts of a parameter together."""
        return [self._together(site) for site in self._sites] if self._kept else []

    def _together(self, site: QuantizedSite) -> ChosenExperts:
        parts = [self._done[site.name][expert] for expert in range(_count(site))]
        scales, target = (torch.cat([part[name].to(site.weight.device) for part in parts]) for name in _LEARNING)
        computer, is_transposed = _experts_at(site), _is_transposed(site)
        return ChosenExperts(site.name, weight_format(site), scales, target, computer, site.parameter, is_transposed)

    def _choose(self, site: QuantizedSite, advance: Callable[[int], Any], x: Tensor, weight: Tensor) -> None:
        """Quantize the weight of one expert in place, by its inputs [tokens, in]."""
        expert = (weight.storage_offset() - site.weight.storage_offset()) // _matrix(site, 0).numel()
        if expert in self._done[site.name] or not x.numel():
            return
        name = f"{site.name}.{expert}"
        if (kept := self._progress.load(name)) is None:
            kept = self._progress.keep(name, self._rounded(site, name, x, _matrix(site, expert)))
        _matrix(site, expert).copy_(kept["values"])
        self._done[site.name][expert] = {part: kept[part] for part in self._kept}
        advance(1)

    def _rounded(self, site: QuantizedSite, name: str, x: Tensor, matrix: Tensor) -> dict[str, Tensor]:
        """Return the quantized matrix of an expert, its scales, and what was to be rounded."""
        operands, rows = _experts_at(site).operands(site.parameter), x.reshape(-1, x.shape[-1])
        held_out = _HELD_OUT if len(self._options.damping) > 1 else 0
        statistics = input_statistics(
            operands.on_activation(rows), operands.transformed(rows, -1), held_out, name, with_cross=False
        )
        weight, fmt = _in_basis(site, matrix), weight_format(site)
        found, scales, target = best_rounding(name, weight, statistics, fmt, self._options)
        values = (found.mT if _is_transposed(site) else found).to(matrix.dtype)
        learning = {"scales": scales, "target": target}
        return {"values": values, **{part: learning[part] for part in self._kept}}

    def _finish(self, site: QuantizedSite) -> None:
        """Round to nearest what no token reached, and have the whole weight count as quantized."""
        computer = _experts_at(site)
        unseen = [n for n in range(_count(site)) if n not in self._done[site.name]]
        with torch.no_grad():
            for expert in unseen:
                matrix = _matrix(site, expert)
                nearest = _nearest(_in_basis(site, matrix), weight_format(site))
                matrix.copy_(nearest["values"].mT if _is_transposed(site) else nearest["values"])
                self._done[site.name][expert] = {part: nearest[part] for part in self._kept}
        computer.frozen_weight(site.parameter).mark(site.weight)
        if unseen:
            logger.warning(
                "the calibration text sends no token to %s %s of %s: rounded to nearest; calibrate with more tokens",
                "expert" if len(unseen) == 1 else "experts",
                ", ".join(map(str, unseen)),
                site.name,
            )


def _nearest(weight: Tensor, fmt: MXFormat) -> dict[str, Tensor]:
    """Return a weight [out, in] rounded to nearest, its scales, and the weight."""
    scales = block_scales(weight, fmt, torch.ones_like(weight[0]), [0])
    of_blocks = block_layout(weight, fmt, (1,)).split(scales)[..., :1].clone()
    return {"values": rounded(weight, scales, fmt), "scales": of_blocks, "target": weight}


def _in_basis(site: QuantizedSite, matrix: Tensor) -> Tensor:
    """Return the matrix of an expert as float32 [out, in], in the basis of its transform."""
    by_outputs = matrix.mT if _is_transposed(site) else matrix
    return weight_in_basis(by_outputs.float(), _experts_at(site).operands(site.parameter), None)


def _is_transposed(site: QuantizedSite) -> bool:
    return site.input_axis == -2


def _experts_at(site: QuantizedSite) -> QuantizedExperts:
    computer = computer_of(site)
    assert isinstance(computer, QuantizedExperts)
    return computer


def _is_to_be_chosen(site: QuantizedSite) -> bool:
    frozen = _experts_at(site).frozen_weight(site.parameter)
    return site.formats.get("weight") is not None and frozen.is_possible and not frozen.is_frozen(site.weight)


def _count(site: QuantizedSite) -> int:
    return len(site.weight) if site.weight.ndim == 3 else 1


def _matrix(site: QuantizedSite, expert: int) -> Tensor:
    """Return the memory of an expert's matrix, or of a router's."""
    weight = site.weight.detach()
    return weight[expert] if weight.ndim == 3 else weight


@contextmanager
def _one_by_one(model: Any) -> Iterator[None]:
    """Have the model compute its experts one by one, as long as the context is open."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
