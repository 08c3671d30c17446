"""The ``mxlab`` command."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mxlab.cli import bench
from mxlab.cli.inspect import inspect
from mxlab.cli.options import Dtype
from mxlab.compat.recipes import load_any_recipe
from mxlab.errors import MxlabError, SpecError
from mxlab.recipe import Recipe
from mxlab.recipe.mx_specs import ENVIRONMENT_VARIABLE, MxSpecs, override, parse_assignment

if TYPE_CHECKING:
    from mxlab.experiments.sweep import Summary
    from mxlab.model.conversion import Conversion

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench.app, name="bench")
app.command()(inspect)
console = Console()
stderr = Console(stderr=True)


Model = Annotated[str, typer.Option("--model", help="A hub name, a folder, or smollm2 (embedded).")]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", help="lm-eval tasks, separated by commas, or mxlab_passages (embedded, the default)."),
]
TextOption = Annotated[
    str | None,
    typer.Option("--text", help="Perplexity of a text instead: wikitext2, wikitext2_valid, pile, passages or a file."),
]
Window = Annotated[int | None, typer.Option(help="Tokens of a window of the text; 512 where none is given.")]
Stride = Annotated[int | None, typer.Option(help="Tokens from one window to the next; disjoint where none is given.")]
Windows = Annotated[int | None, typer.Option(help="The first so many windows; the whole text where none is given.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="KL divergence and top-1 agreement with the unquantized model beside it.")
]
Limit = Annotated[float | None, typer.Option(help="Rows of each task: a count, or a fraction below 1.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Rows or windows of a batch; 16 rows or 4 windows where none is given.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="What the model computes in.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")]
DataDir = Annotated[Path | None, typer.Option(help="A folder with lambada_openai.jsonl and wikitext2_test.raw.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest context of a task in tokens; 2048 where none is given.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the stage folders go.")]


def main() -> None:
    """Run the command line; what a user can put right is told in one line, with exit code 2."""
    try:
        app()
    except MxlabError as e:
        stderr.print(f"[bold red]error:[/] {_escaped(e)}", soft_wrap=True)
        sys.exit(2)


# The arguments reach the launcher as they are: behind its first one that is no option, click leaves even `--` alone.
_AS_THEY_ARE = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
    "ignore_unknown_options": True,
}


@app.command(context_settings=_AS_THEY_ARE)
def run(context: typer.Context) -> None:
    """Run another program with a quantized Llama: mxlab run [MX options] -- COMMAND ... (--help lists the options)."""
    from mxlab.hf import launch

    raise typer.Exit(launch.main(context.args))


@app.command("eval")
def evaluate(
    model: Model = "smollm2",
    tasks: Tasks = None,
    text: TextOption = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a TOML file.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override an option: --set block_size=16.")] = None,
    limit: Limit = None,
    window: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    compare: Compare = False,
    batch_size: BatchSize = None,
    dtype: DtypeOption = Dtype.bfloat16,
    device: Device = "auto",
    data_dir: DataDir = None,
    max_length: MaxLength = None,
    out: Out = Path("results"),
) -> None:
    """Evaluate one model under one recipe, on tasks or on a text; the run directory goes to OUT/<recipe>/."""
    chosen = _recipe(recipe, set_ or [])
    from mxlab.eval.settings import request_from
    from mxlab.experiments import runs

    settings = _given(
        model=model,
        tasks=tasks and _names(tasks),
        text=text,
        limit=_count(limit),
        window=window,
        stride=stride,
        windows=windows,
        compare=compare or None,
        batch_size=batch_size,
        dtype=dtype.value,
        device=device,
        max_length=max_length,
    )
    request = request_from(chosen, settings, data_dir)
    _start_logging()
    folder = runs.run(request, out / chosen.name, {**chosen.options, **_assigned(set_ or [])})
    _print_metrics(folder)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A hub name, a folder, or smollm2 (embedded).")],
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be quantized.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override an option: --set block_size=16.")] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the converted model goes.")] = None,
) -> None:
    """Put a model's weights on the grid of a recipe and save it, with recipe.toml and inventory.json."""
    if dry_run == (out is not None):
        raise SpecError("give --out FOLDER for the converted model, or --dry-run to see what a recipe does")
    chosen = _recipe(recipe, set_ or [])
    from mxlab.hf import checkpoint
    from mxlab.model.apply import prepare
    from mxlab.sources import models

    if out is None:
        conversion = prepare(models.skeleton(model, dtype.value), chosen)
    else:
        _start_logging()
        conversion = checkpoint.convert(model, chosen, dtype.value, out)
    _print_inventory(conversion)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep's TOML file, or a shipped one: ex1, ex2, baseline.")],
    model: Annotated[str | None, typer.Option(help="Instead of the file's model.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead of the file's tasks or text.")] = None,
    text: Annotated[str | None, typer.Option(help="Instead of the file's text or tasks.")] = None,
    limit: Limit = None,
    window: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    compare: Compare = False,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the file's batch size.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Instead of the file's dtype.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the file's device.")] = None,
    data_dir: DataDir = None,
    workers: Annotated[int, typer.Option(help="Processes, each with a GPU of its own.")] = 1,
    out: Out = Path("results"),
) -> None:
    """Run a grid of recipes; finished runs are skipped, a failed one is recorded (exit code 1) and the rest goes on."""
    _refuse_environment("mxlab sweep")
    _hide_inner_bars()
    from mxlab.experiments import sweep as sweeps

    settings = _given(
        model=model,
        tasks=tasks and list(_names(tasks)),
        text=text,
        limit=_count(limit),
        window=window,
        stride=stride,
        windows=windows,
        compare=compare or None,
        batch_size=batch_size,
        dtype=dtype and dtype.value,
        device=device,
    )
    chosen = sweeps.with_settings(sweeps.load_sweep(file), settings)
    _start_logging()
    with _progress() as progress:
        summary = sweeps.run_sweep(chosen, out, data_dir, progress.track, workers)
    _finish(summary, out)


@app.command()
def compare(
    file: Annotated[str, typer.Argument(help="A comparison's TOML file, or a shipped one: formats, whole_text.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where its rows go; finished ones are kept.")],
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Score every format in every role on one text: a row each, with perplexity and KL divergence."""
    _refuse_environment("mxlab compare")
    _hide_inner_bars()
    from mxlab.experiments import format_study
    from mxlab.report.format_study import write_study

    _start_logging()
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with _progress() as progress:
        rows = format_study.run(format_study.load_study(file), out, command, data_dir, device, progress.track)
    write_study(out)
    table = Table("format", "role", "bits", "perplexity", "KL", "top-1", box=None)
    for row in rows:
        measured = (row.bits_per_parameter, row.perplexity, row.kl_divergence, row.top1_agreement)
        table.add_row(row.format, row.role, *("" if value is None else f"{value:.4g}" for value in measured))
    console.print(table)
    if failed := [row for row in rows if row.error]:
        stderr.print(f"[bold red]failed:[/] {_escaped(failed[0].error)} ({len(failed)} rows)", soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def report(
    results_dir: Annotated[Path, typer.Argument(help="A results folder: ours, or one of the published layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path("report"),
) -> None:
    """Tables, figures and one HTML page from run directories."""
    from mxlab.report import write_report

    paths = write_report(results_dir, out)
    console.print(f"report: {paths.markdown} and {paths.page}", soft_wrap=True)


@app.command()
def demo(out: Out = Path("demo")) -> None:
    """Baseline, Ex1 and Ex2 on the embedded model and passages, then the report; no network."""
    _refuse_environment("mxlab demo")
    _hide_inner_bars()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    from mxlab.experiments.demo import run_demo
    from mxlab.report import write_report

    _start_logging()
    with _progress() as progress:
        summary = run_demo(out / "results", track=progress.track)
    paths = write_report(out / "results", out / "report")
    console.print(f"report: {paths.markdown} and {paths.page}", soft_wrap=True)
    _finish(summary, out / "results")


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Say what is in place: the patch, versions, the backend, hub and data."""
    from mxlab.cli.doctor import checks

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, well, found in checks(data_dir):
        table.add_row("[green]ok[/]" if well else "[red]--[/]", name, _escaped(found))
    console.print(table)


def _recipe(name: str | None, assignments: list[str]) -> Recipe:
    """The recipe of the command line, or of MX_SPECS_JSON where none is named there; never both."""
    specs = MxSpecs.from_environment()
    if specs is not None and name is not None:
        raise SpecError(
            f"{ENVIRONMENT_VARIABLE} is set and --recipe {name} is given: that would quantize twice. Unset the "
            "variable, or leave --recipe out to evaluate under it"
        )
    recipe = specs.to_recipe("mx_specs") if specs is not None else load_any_recipe(name or "baseline")
    changed = override(recipe, _assigned(assignments))
    if assignments and not changed.rules:
        raise SpecError(f"recipe {recipe.name} quantizes nothing, so that --set {assignments[0]} has no effect")
    # A recipe that quantizes is no baseline, and must not stand among them.
    return replace(changed, name="custom") if changed.rules and not recipe.rules else changed


def _assigned(assignments: list[str]) -> dict[str, Any]:
    return dict(map(parse_assignment, assignments))


def _refuse_environment(command: str) -> None:
    if ENVIRONMENT_VARIABLE in os.environ:
        raise SpecError(f"{ENVIRONMENT_VARIABLE} is set: {command} has recipes of its own; unset it first")


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were named on the command line."""
    return {name: value for name, value in settings.items() if value is not None}


def _names(tasks: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in tasks.split(",") if name.strip())


def _count(limit: float | None) -> float | None:
    """16 rather than 16.0, so that the same limit is written in one way."""
    return int(limit) if limit is not None and limit >= 1 and limit.is_integer() else limit


def _start_logging() -> None:
    handler = RichHandler(console=stderr, show_path=False, markup=False)
    logger = logging.getLogger("mxlab")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr)


def _hide_inner_bars() -> None:
    """Leave the screen to the bar of the whole: tqdm reads this when lm-eval and transformers import it."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def _print_metrics(folder: Path) -> None:
    from mxlab.experiments.runs import read_metrics

    table = Table("task", "metric", "value", "stderr")
    for row in read_metrics(folder):
        table.add_row(*row)
    console.print(table)
    console.print(f"written: {folder}", soft_wrap=True)


def _print_inventory(conversion: Conversion) -> None:
    from mxlab.model.conversion import high_precision_rows, quantized_rows

    rows = [*quantized_rows(conversion), *high_precision_rows(conversion)]
    table = Table("module", "layers", "shape", "role", "format", "bits", box=None)
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "-"
        table.add_row(_escaped(row.name), row.layers, shape, row.role, row.format, f"{row.bits:g}")
    # Names are for copying into a recipe: wider than the screen rather than cut.
    Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table)
    left = conversion.linears_in_high_precision
    console.print(f"linear layers in high precision: {', '.join(left) or 'none'}", soft_wrap=True)
    for note in conversion.notes:
        console.print(f"note: {_escaped(note)}", soft_wrap=True)
    console.print(f"average bits per parameter: {conversion.bits_per_parameter:.4f}")


def _finish(summary: Summary, out: Path) -> None:
    console.print(f"{summary}; results in {out}", soft_wrap=True)
    if summary.failed:
        stderr.print(f"[bold red]failed runs:[/] see failures.jsonl in {out}", soft_wrap=True)
        raise typer.Exit(1)


def _escaped(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))
