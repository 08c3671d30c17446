"""``mxlab run``: another program with a quantized Llama."""

from __future__ import annotations

import typer

# The arguments reach the launcher unchanged: behind its first one that is no option, click leaves even `--` alone.
AS_THEY_ARE = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
    "ignore_unknown_options": True,
}


def run(context: typer.Context) -> None:
    """Run another program with a quantized Llama: mxlab run [MX options] -- COMMAND ... (--help lists the options)."""
    from mxlab.hf import launch

    raise typer.Exit(launch.main(context.args))
