"""Reports on results: Markdown and CSV tables, PNG figures and one HTML page, from run directories alone.

Reads what lm-eval and mxlab wrote, ours or a published tree, and never imports torch.
"""

from dataclasses import dataclass
from pathlib import Path

from mxlab import rundir
from mxlab.errors import ReportError
from mxlab.report.document import Table, write_csv
from mxlab.report.dot_plots import draw_comparisons
from mxlab.report.figures import draw_figures
from mxlab.report.markdown import render_markdown
from mxlab.report.page import render_page
from mxlab.report.read import read_tree
from mxlab.report.sections import report

__all__ = ["ReportPaths", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report."""

    markdown: Path
    page: Path
    tables: tuple[Path, ...]
    figures: tuple[Path, ...]


def write_report(results_dir: Path, out_dir: Path) -> ReportPaths:
    """Report on every run below ``results_dir``: report.md, index.html, tables/*.csv and figs/*.png in ``out_dir``.

    Files of an earlier report are written anew. Raises ReportError where ``results_dir`` holds no run, or where
    ``out_dir`` cannot be made or is inside a run directory.
    """
    tree = read_tree(results_dir)
    _make_folders(out_dir)
    images = draw_figures(tree, out_dir / "figs")
    images |= draw_comparisons(tree, out_dir / "figs", sum(map(len, images.values())) + 1)
    blocks = report(tree, images)
    tables = {out_dir / "tables" / f"{block.slug}.csv": block for block in blocks if isinstance(block, Table)}
    for path, table in tables.items():
        write_csv(table, path)
    paths = ReportPaths(
        markdown=out_dir / "report.md",
        page=out_dir / "index.html",
        tables=tuple(tables),
        figures=tuple(image.path for drawn in images.values() for image in drawn),
    )
    paths.markdown.write_text(render_markdown(blocks, out_dir), encoding="utf-8")
    paths.page.write_text(render_page(blocks), encoding="utf-8")
    return paths


def _make_folders(out_dir: Path) -> None:
    folders = (out_dir / "figs", out_dir / "tables")
    for folder in (*folders, out_dir, *out_dir.resolve().parents):
        if rundir.metrics_files(folder):
            raise ReportError(
                f"{folder} is a run directory (it holds {rundir.METRICS}): write the report elsewhere, with -o"
            )
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReportError(f"{folder} cannot be made for the report: {error.strerror}") from None
