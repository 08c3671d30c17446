"""Find out whether the transform that a rule asks for fits a site."""

from __future__ import annotations

from collections.abc import Iterable

from mxlab.errors import ConversionError, FormatError
from mxlab.model.sites import Site
from mxlab.numerics.hadamard import check_size
from mxlab.recipe import Rule
from mxlab.recipe.transform import Derotated, Hadamard, Transform


def transform_of(site: Site, rules: Iterable[Rule | None]) -> Transform | None:
    """Return the transform of a site's operands under its rules, one for each phase; None where there is none.

    Raises:
        ConversionError: none of that size fits the site, or the phases have different ones.
    """
    given = {rule.transform for rule in rules if rule}
    if len(given) > 1:
        raise ConversionError(f"{site.name}: the phases of generation have different transforms; give both the same")
    transform = given.pop()
    if transform is not None:
        check_fit(site, transform)
    return transform


def check_fit(site: Site, transform: Transform) -> None:
    """Raise ConversionError unless the operands of a site can be transformed so; of an unknown shape anything may."""
    if not site.shape:
        return
    length = site.shape[-1] if site.kind == "attention" else site.shape[site.input_axis]
    if isinstance(transform, Hadamard | Derotated):
        try:
            check_size(transform.size, length)
        except FormatError as e:
            raise ConversionError(f"{site.name}: {e}") from None
    elif length % transform.size or site.kind != "linear":
        raise ConversionError(
            f"{site.name}: {transform} is for linear layers with a multiple of {transform.size} inputs; this is "
            f"{site.kind} with {length}: give it another transform"
        )
