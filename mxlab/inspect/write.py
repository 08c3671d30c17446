"""An inspection as files: JSON with everything, CSV tables, figures, and a page that shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mxlab.inspect import figures, tables
from mxlab.inspect.inspection import Inspection
from mxlab.inspect.parts import GROUPS
from mxlab.inspect.remaining import Remaining
from mxlab.report.document import Block, Heading, Image, Items, Paragraph, write_csv
from mxlab.report.markdown import render_markdown

SCHEMA = 1
WORST = 5  # layers, and operands of each role, that the page and the screen show

_COST_WORDS = (
    "`ce` is cross-entropy, `kl` the KL divergence from the unquantized model, both in nats per token; errors are "
    "those of the difference, token by token. `alone`: only this part is quantized, beyond the unquantized model. "
    "`saved`: the whole recipe beyond the recipe without this part. Shares are of what the whole recipe costs and "
    "need not add up to 100 %: the interaction is what the whole costs beyond the sum of its parts alone. A dash: "
    "the logits were not numbers."
)
_STATISTICS_WORDS = (
    "Operands are those of the unquantized model. SQNR is 10 log10(sum of x² / sum of (x - Q(x))²), a dash where "
    "nothing changed; the outlier ratio is the largest magnitude over the root mean square. Saturated elements lie "
    "beyond the largest one times the scale, flushed ones became zero; their noise is their part of the sum of (x - "
    "Q(x))². Clamped blocks want a smaller scale than there is, lost elements became NaN because theirs would be "
    "too large."
)


_REMAINING_WORDS = (
    "`ce` is cross-entropy, `kl` the KL divergence from the unquantized model, both in nats per token: what the "
    "quantized model loses beyond the same model with this part left unquantized, its operands in the basis of their "
    "transform, its weight that of the unquantized model. Errors are those of the difference, token by token. The "
    "other weights were chosen to make up for the part, which may therefore seem to save nothing; shares need not add "
    "up to 100 %."
)


def write_remaining(found: Remaining, origin: Mapping[str, Any], folder: Path) -> None:
    """Write ``inspection.json``, the tables and ``inspection.md`` of a quantized model into ``folder``.

    ``origin`` says of which models and text, as plain values.
    """
    document = {"schema": SCHEMA, **origin, **found.to_dict()}
    (folder / "inspection.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    listed = [*(tables.remainders(found, group) for group in GROUPS), tables.positions(found)]
    for table in listed:
        write_csv(table, folder / f"{table.slug}.csv")
    windows, window = found.rows
    what = (
        f"{windows} windows of {window} tokens of {origin['text']['name']}; {origin['dtype']}. Cross-entropy of the "
        f"unquantized model: {found.cross_entropy:.4f} nats per token."
    )
    title = Heading(1, f"What {origin['model']} under {found.recipe.name} still loses")
    page: list[Block] = [title, Paragraph(what), Paragraph(_REMAINING_WORDS), *listed]
    (folder / "inspection.md").write_text(render_markdown(page, folder), encoding="utf-8")


def write_inspection(inspection: Inspection, origin: Mapping[str, Any], folder: Path) -> None:
    """Write ``inspection.json``, the tables, the figures and ``inspection.md`` into ``folder``.

    ``origin`` says of which model and text the inspection is, as plain values.
    """
    document = {"schema": SCHEMA, **origin, **inspection.to_dict()}
    (folder / "inspection.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    costs = (tables.costs(inspection, group) for group in GROUPS)
    for table in (*costs, tables.kinds(inspection), tables.operands(inspection)):
        write_csv(table, folder / f"{table.slug}.csv")
    blocks = _page(inspection, origin, figures.draw(inspection, folder))
    (folder / "inspection.md").write_text(render_markdown(blocks, folder), encoding="utf-8")


def _page(inspection: Inspection, origin: Mapping[str, Any], images: Sequence[Image]) -> list[Block]:
    return [
        Heading(1, f"{origin['model']} under {inspection.recipe.name}"),
        Paragraph(_what(inspection, origin)),
        *([Items(inspection.notes)] if inspection.notes else []),
        Heading(2, "What the parts cost"),
        Paragraph(_COST_WORDS),
        tables.costs(inspection, "role"),
        tables.costs(inspection, "projection"),
        tables.costliest(inspection, "layer", WORST),
        images[1],
        Heading(2, "What the formats do"),
        Paragraph(_STATISTICS_WORDS),
        tables.kinds(inspection),
        tables.worst_operands(inspection, WORST),
        images[0],
        images[2],
    ]


def _what(inspection: Inspection, origin: Mapping[str, Any]) -> str:
    windows, window = inspection.rows
    found = inspection.sensitivity
    return (
        f"{windows} windows of {window} tokens of {origin['text']['name']}, {found.tokens} predicted; "
        f"{origin['dtype']}, {inspection.recipe.numerics} numerics. Cross-entropy of the unquantized model: "
        f"{found.cross_entropy:.4f} nats per token."
    )
