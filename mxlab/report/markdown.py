"""The report as Markdown."""

from collections.abc import Iterable
from pathlib import Path

from mxlab.report.document import Block, Code, Column, Heading, Image, Items, Paragraph, Table, cell_text

RULES = {"left": "---", "center": ":---:", "right": "---:"}


def render_markdown(blocks: Iterable[Block], folder: Path) -> str:
    """Write blocks as GitHub's Markdown; figures are linked relative to ``folder``."""
    return "\n\n".join(_render(block, folder) for block in blocks) + "\n"


def _render(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_inline(text)}"
        case Paragraph(text):
            return _inline(text)
        case Items(items):
            return "\n".join(f"- {_inline(item)}" for item in items)
        case Code(text):
            return _fenced(text)
        case Image(path, title, caption):
            return f"**{title}**\n\n![{title}]({path.relative_to(folder).as_posix()})\n\n{_inline(caption)}"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    rows = [
        [column.head for column in table.columns],
        *([_cell(cell_text(cell)) for cell in row] for row in table.rows),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"**{table.title}**", "", lines[0], _rule(table.columns), *lines[1:]])


def _rule(columns: Iterable[Column]) -> str:
    return f"|{'|'.join(RULES[column.align] for column in columns)}|"


def _cell(text: str) -> str:
    return _inline(text).replace("|", r"\|")


def _inline(text: str) -> str:
    """Return one line in which "<" is no tag: an error message may hold both."""
    return " ".join(text.split()).replace("<", "&lt;")


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
