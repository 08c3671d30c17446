"""The report as one HTML page that needs nothing besides itself."""

import base64
import re
from collections.abc import Iterable
from html import escape

from mxlab.report.document import Block, Code, Column, Heading, Image, Items, Paragraph, Table, cell_text

STYLE = """
:root { --ink: #1c2530; --soft: #5b6673; --line: #d9dee4; --wash: #f5f7f9; --link: #0b3c6f; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 76rem; color: var(--ink); background: #fff;
  font: 16px/1.6 "Source Sans 3", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 3rem 0 0.8rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.6rem 0 0.5rem; }
p, ul { max-width: 48rem; margin: 0.7rem 0; }
li { margin: 0.3rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { columns: 2; list-style: none; margin: 1.5rem 0 0; padding: 1rem 1.2rem; background: var(--wash); }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { padding: 0.08em 0.3em; background: var(--wash); border-radius: 3px; overflow-wrap: anywhere; }
pre { padding: 0.9rem 1.1rem; background: var(--wash); border: 1px solid var(--line); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 1.4rem 0; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 1rem; padding-bottom: 0.5rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
th { border-bottom: 2px solid var(--ink); background: #fff; }
tbody tr:hover { background: var(--wash); }
.left { text-align: left; } .center { text-align: center; } .right { text-align: right; }
td.wrap { white-space: normal; min-width: 15rem; }
figure { margin: 2rem 0; }
img { display: block; width: 100%; max-width: 44rem; height: auto; }
figcaption { max-width: 44rem; color: var(--soft); font-size: 0.93rem; }
figcaption b { color: var(--ink); }
@media (max-width: 82rem) { th, td { padding: 0.3rem 0.4rem; white-space: normal; overflow-wrap: anywhere; }
  td.right { white-space: nowrap; } td.wrap { min-width: 9rem; } }
@media (max-width: 44rem) { nav ul { columns: 1; } body { padding: 1.2rem 0.9rem 3rem; }
  thead { display: none; } table, caption, tbody, tr, td { display: block; width: 100%; }
  tr { padding: 0.5rem 0; border-bottom: 2px solid var(--line); }
  td, td.right { text-align: right; border: 0; padding: 0.1rem 0; white-space: normal; overflow-wrap: anywhere; }
  td::before { content: attr(data-head); float: left; margin-right: 1rem; color: var(--soft); } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 7.5pt; } nav { display: none; }
  th, td { padding: 0.2rem 0.4rem; } figure, tr { break-inside: avoid; } h2, h3, caption { break-after: avoid; } }
"""

LONG_CELL = 48  # characters above which a cell may break into lines


def render_page(blocks: list[Block]) -> str:
    """Write blocks as a page: figures embedded, no script, nothing loaded from elsewhere."""
    title, *rest = blocks
    if not isinstance(title, Heading):
        raise TypeError("a report begins with its title")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title.text)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{_render(title)}\n{_contents(rest)}\n" + "\n".join(map(_render, rest)) + "\n</body>\n</html>\n"
    )


def _contents(blocks: Iterable[Block]) -> str:
    entries = (block.text for block in blocks if isinstance(block, Heading) and block.level == 2)
    links = (f'<li><a href="#{_anchor(text)}">{escape(text)}</a></li>' for text in entries)
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def _render(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{_anchor(text)}">{_inline(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Items(items):
            return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Image():
            return _figure(block)
        case Table():
            return _table(block)


def _figure(image: Image) -> str:
    data = base64.b64encode(image.path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(image.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{escape(image.title)}.</b> {_inline(image.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col" class="{column.align}">{escape(column.head)}</th>' for column in table.columns)
    rows = (
        "".join(_cell(cell_text(cell), column) for cell, column in zip(row, table.columns, strict=True))
        for row in table.rows
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(text: str, column: Column) -> str:
    wrap = " wrap" if len(text) > LONG_CELL else ""
    return f'<td class="{column.align}{wrap}" data-head="{escape(column.head)}">{_inline(text)}</td>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _anchor(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")
