"""mxlab: study low-precision LLMs.

``import mxlab`` is quick: what needs torch is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mxlab import _moved, _registration

if TYPE_CHECKING:
    from mxlab.formats import ElementFormat, MXFormat
    from mxlab.hf.quantizer import MXConfig
    from mxlab.model.apply import apply
    from mxlab.model.conversion import Conversion
    from mxlab.numerics import quantize, quantize_, round_elementwise
    from mxlab.recipe import Recipe
    from mxlab.recipe.mx_specs import MxSpecs
    from mxlab.recipe.rule import Rule

__version__ = "0.1.0"

_HOME = {
    "Conversion": "mxlab.model.conversion",
    "ElementFormat": "mxlab.formats",
    "MXConfig": "mxlab.hf.quantizer",
    "MXFormat": "mxlab.formats",
    "MxSpecs": "mxlab.recipe.mx_specs",
    "Recipe": "mxlab.recipe",
    "Rule": "mxlab.recipe.rule",
    "apply": "mxlab.model.apply",
    "quantize": "mxlab.numerics",
    "quantize_": "mxlab.numerics",
    "round_elementwise": "mxlab.numerics",
}

__all__ = [
    "Conversion",
    "ElementFormat",
    "MXConfig",
    "MXFormat",
    "MxSpecs",
    "Recipe",
    "Rule",
    "apply",
    "quantize",
    "quantize_",
    "round_elementwise",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mxlab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_moved.install()
_registration.install()
