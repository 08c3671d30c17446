"""The algorithms that a recipe may ask for, as data. Nothing here needs torch.

``[algorithms.gptq]`` of a recipe of mxlab's holds the options of :class:`Gptq`, ``[algorithms.calibration]`` those of
:class:`Calibration`. The tables of a file of MASE's are kept as they are (:mod:`mxlab.compat.mase`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from mxlab.checks import check_choice, check_int, check_keys
from mxlab.errors import FormatError, SpecError
from mxlab.formats import SCALE_RULES
from mxlab.recipe.transform import Transform, parse_transform

Order = Literal["activation", "index"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class Calibration:
    """The windows that statistics are taken from.

    Attributes:
        text: a text's name, or its file (:func:`mxlab.sources.texts.load_text`).
        samples: windows that the statistics are taken from.
        length: tokens of a window.
        held_out: further windows, by which the algorithms choose among their options.
        seed: decides which windows of the text these are.
    """

    text: str = "wikitext2_valid"
    samples: int = 32
    length: int = 512
    held_out: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2), ("held_out", 1), ("seed", 0)):
            check_int(name, getattr(self, name), least, 2**31, f"a whole number from {least}")


@dataclass(frozen=True)
class Gptq:
    """Quantize the weights one input after the other, each time making up in the others for the error.

    Attributes:
        order: of the inputs: those with the largest activations first, or as they come. Blocks stay where they are.
        damping: what is added to the diagonal of the Hessian, as parts of its mean; of several, what leaves the
            smallest error on the windows held out.
        correction: how far the targets go from what the weights compute of the quantized model's activations (0) to
            what they compute of the unquantized model's (1); of several, what leaves the smallest error likewise.
        search: exponents tried for the scale of each block, relative to that of the format's rule; of several, scales
            that are floating-point numbers are tried 3/2 as large as well.

    Source: Frantar et al., "GPTQ", 2022; Li et al., "GPTAQ", 2025, for the correction.
    """

    order: Order = "activation"
    damping: tuple[float, ...] = (0.01,)
    correction: tuple[float, ...] = (0.0,)
    search: tuple[int, ...] = (-1, 0, 1)

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        for name in ("damping", "correction", "search"):
            values = getattr(self, name)
            listed = tuple(values) if isinstance(values, list | tuple) else (values,)
            if not listed or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in listed):
                raise FormatError(f"{name} is {values!r}: it must be a number, or a list of numbers")
            object.__setattr__(self, name, listed)
        if min(self.damping) <= 0:
            raise FormatError(f"damping is {self.damping}: it must be above 0")
        if not all(0 <= value <= 1 for value in self.correction):
            raise FormatError(f"correction is {self.correction}: it lies between 0 and 1")

    @property
    def corrects(self) -> bool:
        """Whether a layer's target may depend on what the unquantized model computes."""
        return max(self.correction) > 0


@dataclass(frozen=True)
class Learning:
    """What gradients move, and how far.

    Attributes:
        steps: how often everything moves.
        batch: windows that a step is taken from.
        rate: of the weights at its highest, in parts of their block's scale a step.
        transform_rate: of the transforms that were fitted, in parts of the size of their elements.
        check: steps from one look at the windows held out to the next.
    """

    steps: int = 80
    batch: int = 2
    rate: float = 1e-3
    transform_rate: float = 1e-3
    check: int = 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int):
                check_int(field.name, value, 1, 2**31, "a whole number from 1")
            elif not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
                raise FormatError(f"{field.name} is {value!r}: it must be a number from 0 to below 1")


@dataclass(frozen=True)
class Reconstruction(Learning):
    """Learn the weights of each decoder layer on their grid, so that it computes what the unquantized one does.

    Source: :mod:`mxlab.ptq.reconstruction`.
    """


@dataclass(frozen=True)
class Distillation(Learning):
    """Learn the weights on their grid, and the gains of the norms, end to end from the unquantized model.

    Attributes:
        vector_rate: of the gains of the norms and the biases.

    Source: :mod:`mxlab.ptq.distillation`.
    """

    vector_rate: float = 1e-4


@dataclass(frozen=True)
class Search:
    """Choose the transform of every layer, in place of those that the rules give, and scale rules.

    Attributes:
        transforms: the candidates: ``none``, or as a rule spells them. Those that do not fit a layer are left out.
        rules: scale rules that are tried for activations, K and V beside those of their formats; a format that does
            not know one is left alone.
        tokens: of the calibration text, by which assignments are compared.

    Source: :mod:`mxlab.ptq.search`.
    """

    transforms: tuple[str, ...] = ("none", "hadamard@32", "hadamard@64", "hadamard", "wush@32")
    rules: tuple[str, ...] = ()
    tokens: int = 4096

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, 2, 2**31, "a whole number from 2")
        if not isinstance(self.rules, list | tuple):
            raise FormatError(f"rules is {self.rules!r}: it must be a list of scale rules")
        for rule in self.rules:
            check_choice("rules", rule, SCALE_RULES)
        object.__setattr__(self, "rules", tuple(self.rules))
        values = self.transforms
        if not isinstance(values, list | tuple) or not values or not all(isinstance(v, str) for v in values):
            raise FormatError(f"transforms is {values!r}: it must be a list of their names")
        object.__setattr__(self, "transforms", tuple(values))
        self.candidates  # noqa: B018 - raises where one cannot be read

    @property
    def candidates(self) -> tuple[Transform | None, ...]:
        """The transforms; None for none."""
        return tuple(None if name == "none" else parse_transform(name) for name in self.transforms)


TABLES: dict[str, type] = {
    "calibration": Calibration,
    "search": Search,
    "gptq": Gptq,
    "reconstruction": Reconstruction,
    "distillation": Distillation,
}


def read_table(name: str, values: Mapping[str, Any], source: str) -> Any:
    """Return the options in a table of mxlab's own.

    Raises:
        SpecError: an unknown key, or a value that is not what the key asks for.
    """
    kind = TABLES[name]
    check_keys(values, [f.name for f in fields(kind)], source)
    try:
        return kind(**values)
    except (FormatError, SpecError) as e:
        raise SpecError(f"{source}: {e}") from None
