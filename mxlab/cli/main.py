"""Assemble the ``mxlab`` command."""

from __future__ import annotations

import sys

import typer

from mxlab.cli import bench
from mxlab.cli.compare import compare
from mxlab.cli.console import print_error
from mxlab.cli.convert import convert
from mxlab.cli.demo import demo
from mxlab.cli.doctor import doctor
from mxlab.cli.eval import evaluate
from mxlab.cli.inspect import inspect
from mxlab.cli.report import report
from mxlab.cli.run import AS_THEY_ARE, run
from mxlab.cli.sweep import sweep
from mxlab.errors import MxlabError

app = typer.Typer(
    help="Study low-precision LLMs: quantize, evaluate, sweep, inspect, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("eval")(evaluate)
for command in (sweep, compare, inspect, convert, report, demo, doctor):
    app.command()(command)
app.command(context_settings=AS_THEY_ARE)(run)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; what a user can put right is told in one line, with exit code 2."""
    try:
        app()
    except MxlabError as e:
        print_error("error:", e)
        sys.exit(2)
