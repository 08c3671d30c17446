"""The tables of an inspection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mxlab.inspect.inspection import Inspection
from mxlab.inspect.operands import Operand
from mxlab.inspect.remaining import Remaining
from mxlab.inspect.sensitivity import Cost, Estimate, Part
from mxlab.inspect.statistics import Statistics
from mxlab.report.document import Cell, Column, Measured, Table

_COSTS = (
    Column("ce_alone", measured=True),
    Column("kl_alone", measured=True),
    Column("ce_share_%"),
    Column("kl_share_%"),
    Column("ce_saved", measured=True),
    Column("kl_saved", measured=True),
)
_STATISTICS = (
    "sqnr_db",
    "relative_error_%",
    "amax",
    "outlier_ratio",
    "saturated_%",
    "flushed_%",
    "saturated_noise_%",
    "flushed_noise_%",
    "clamped_%",
    "lost_%",
)


def costs(inspection: Inspection, group: str) -> Table:
    """List what the parts of a group cost, what they cost together beyond that, and what the whole costs."""
    found = inspection.sensitivity
    interaction = Part(group, "interaction", found.interactions[group], None)
    whole = Part(group, "whole recipe", found.whole, found.whole)
    title = f"What each {group} costs, in nats per token"
    return _costs(f"{group}s", title, group, [*found.of(group), interaction, whole], found.whole)


def costliest(inspection: Inspection, group: str, count: int) -> Table:
    """Return the parts of a group that cost most alone, by KL divergence; first those whose logits are not numbers."""
    found = inspection.sensitivity
    parts = sorted(found.of(group), key=lambda p: p.alone.kl.value if p.alone else float("inf"), reverse=True)[:count]
    title = f"The {len(parts)} {group}s that cost most, in nats per token"
    return _costs(f"worst_{group}s", title, group, parts, found.whole)


def remainders(found: Remaining, group: str) -> Table:
    """List what each part of a group is to blame for in what a quantized model loses, the most first."""
    parts = sorted(found.of(group), key=lambda part: part.saved.kl.value, reverse=True)
    named = [(part.name, part.saved) for part in parts]
    title = f"What leaving one {group} unquantized saves, in nats per token"
    return _remainders(f"{group}s", title, group, [*named, ("whole model", found.whole)], found.whole)


def positions(found: Remaining) -> Table:
    """List what the tokens at each place of a window lose."""
    title = "What is lost at each place of a window, in nats per token"
    return _remainders("positions", title, "place", found.positions, None)


def _remainders(slug: str, title: str, head: str, costs: Sequence[tuple[str, Cost]], whole: Cost | None) -> Table:
    columns = [Column(head, align="left"), Column("ce", measured=True), Column("kl", measured=True)]
    rows = [(name, _measured(cost.cross_entropy), _measured(cost.kl)) for name, cost in costs]
    if whole is not None:
        columns.append(Column("kl_share_%"))
        rows = [(*row, _share(cost.kl, whole.kl)) for row, (_, cost) in zip(rows, costs, strict=True)]
    return Table(slug, title, tuple(columns), tuple(rows))


def operands(inspection: Inspection) -> Table:
    """List every operand."""
    return _statistics("operands", "What the formats do to every operand", ["module"], map(_row, inspection.operands))


def worst_operands(inspection: Inspection, count: int) -> Table:
    """List the operands with the lowest SQNR, of each role."""
    rows = [_row(operand) for role in inspection.roles for operand in inspection.worst(role, count)]
    return _statistics("worst_operands", f"The {count} operands of each role with the lowest SQNR", ["module"], rows)


def kinds(inspection: Inspection) -> Table:
    """Return the operands of all layers together."""
    found = inspection.by(lambda o: (o.projection, o.role, o.format))
    return _statistics(
        "operand_kinds", "What the formats do to the operands of all layers", ["projection"], found.items()
    )


def _costs(slug: str, title: str, group: str, parts: Iterable[Part], whole: Cost | None) -> Table:
    columns = (Column(group, align="left"), *_COSTS)
    return Table(slug, title, columns, tuple(_cost_row(part, whole) for part in parts))


def _cost_row(part: Part, whole: Cost | None) -> tuple[Cell, ...]:
    alone, saved = part.alone, part.saved
    return (
        part.name,
        alone and _measured(alone.cross_entropy),
        alone and _measured(alone.kl),
        alone and whole and _share(alone.cross_entropy, whole.cross_entropy),
        alone and whole and _share(alone.kl, whole.kl),
        saved and _measured(saved.cross_entropy),
        saved and _measured(saved.kl),
    )


def _measured(estimate: Estimate) -> Measured:
    return Measured(estimate.value, estimate.stderr)


def _share(part: Estimate, whole: Estimate) -> float | None:
    """Return a share in percent; none of what costs nothing."""
    return _rounded(100 * part.value / whole.value) if whole.value > 0 else None


def _statistics(
    slug: str, title: str, keys: Sequence[str], rows: Iterable[tuple[tuple[str, str, str], Statistics]]
) -> Table:
    heads = [Column(name, align="left") for name in (*keys, "role", "format")]
    columns = (*heads, *map(Column, _STATISTICS))
    return Table(slug, title, columns, tuple((*key, *_cells(found)) for key, found in rows))


def _row(operand: Operand) -> tuple[tuple[str, str, str], Statistics]:
    return (operand.module, operand.role, operand.format), operand.statistics


def _cells(found: Statistics) -> list[Cell]:
    summary = found.summary()
    values = (summary[name] if name in summary else _percent(summary[name.removesuffix("_%")]) for name in _STATISTICS)
    return [None if value is None else _rounded(value) for value in values]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _rounded(value: float) -> float:
    """Round to four digits: what is printed is what a file holds."""
    return float(f"{value:.4g}")
