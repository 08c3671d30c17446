"""Assemble the ``mxlab`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import mxlab
from mxlab.cli import bench
from mxlab.cli.compare import compare
from mxlab.cli.console import print_error
from mxlab.cli.convert import convert
from mxlab.cli.demo import demo
from mxlab.cli.doctor import doctor
from mxlab.cli.eval import evaluate
from mxlab.cli.export import export
from mxlab.cli.generate import generate
from mxlab.cli.help import HelpfulCommand
from mxlab.cli.import_ import import_
from mxlab.cli.inspect import inspect
from mxlab.cli.memory import memory
from mxlab.cli.quantize import quantize
from mxlab.cli.report import report
from mxlab.cli.results import results
from mxlab.cli.run import AS_THEY_ARE, run
from mxlab.cli.sweep import sweep
from mxlab.errors import MxlabError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("eval", cls=HelpfulCommand)(evaluate)
app.command("import", cls=HelpfulCommand)(import_)
for command in (sweep, compare, inspect, convert, quantize, export, generate, memory, results, report, demo, doctor):
    app.command(cls=HelpfulCommand)(command)
app.command(context_settings=AS_THEY_ARE)(run)
app.add_typer(bench.app, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mxlab {mxlab.__version__}")
        raise typer.Exit


@app.callback()
def study(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Study low-precision LLMs: quantize, evaluate, sweep, inspect, report."""


def main() -> None:
    """Run the command line; what a user can put right is told in one line, with exit code 2."""
    try:
        app()
    except MxlabError as e:
        print_error("error:", e)
        sys.exit(2)
