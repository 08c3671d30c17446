"""``mxlab bench``: the command line of the benchmarks."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from mxlab.cli.console import console, print_table, progress
from mxlab.cli.options import DeviceOption
from mxlab.errors import SourceError
from mxlab.progress import Steps


class _AllByDefault(TyperGroup):
    """``mxlab bench`` alone, or with options, is ``mxlab bench all``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] != ["--help"] and (not args or args[0].startswith("-")):
            args = ["all", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_AllByDefault,
    help="Time quantization against the unquantized twin, and write what was measured. Alone: all of it.",
    pretty_exceptions_enable=False,
)
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the JSON files go.")]
Results = Annotated[Path, typer.Option("--results", help="Where the JSON files lie.")]
Repeats = Annotated[int | None, typer.Option(help="Rounds in which all twins take their turn.")]
Warmup = Annotated[int | None, typer.Option(help="Calls of each twin before the first round.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with.")]
DataDir = Annotated[Path | None, typer.Option(help="A folder with lambada_openai.jsonl; else the embedded passages.")]
Model = Annotated[
    str | None, typer.Option("--model", help="A hub name, a folder, smollm2, llama-1b-random or random-tiny.")
]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16, float16; repeatable.")]
Numerics = Annotated[list[str] | None, typer.Option("--numerics", help="exact, microxcaling; repeatable.")]
Recipes = Annotated[list[str] | None, typer.Option("--recipe", help="A recipe's name or TOML file; repeatable.")]
Batch = Annotated[int | None, typer.Option(help="Rows of a batch.")]

RESULTS = Path("bench/results")


@app.command("all")
def everything(data_dir: DataDir = None, device: DeviceOption = "auto", out: Out = RESULTS) -> None:
    """Every benchmark in its standard settings."""
    from mxlab.bench.settings import TextSettings
    from mxlab.bench.suite import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        reads_text = issubclass(benchmark.settings, TextSettings)
        _run(name, out, device=device, **({"data_dir": data_dir} if reads_text else {}))


@app.command()
def quantize(
    shape: Annotated[list[str] | None, typer.Option(help="Such as 2048x576; repeatable.")] = None,
    dtype: Dtypes = None,
    format_: Annotated[
        list[str] | None, typer.Option("--format", help="fp6_e2m3, or with a block size fp4_e2m1@32; repeatable.")
    ] = None,
    block: Annotated[list[int] | None, typer.Option(help="Block size; repeatable.")] = None,
    numerics: Numerics = None,
    threads: Threads = None,
    values: Annotated[str | None, typer.Option(help="auto (activations where they have the shape) or random.")] = None,
    copy_gib: Annotated[
        float | None, typer.Option(help="Size of a tensor to compare with the copy bandwidth on; GPU: 1.")
    ] = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """Quantizing a tensor, against tensor.clone()."""
    settings = {"shapes": shape, "dtypes": dtype, "formats": format_, "blocks": block, "numerics": numerics}
    more = {"threads": threads, "values": values, "copy_gib": copy_gib, "repeats": repeats, "warmup": warmup}
    _run("quantize", out, device=device, **settings, **more)


@app.command()
def linear(
    shape: Annotated[list[str] | None, typer.Option(help="In x out, such as 576x1536; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Rows of the input; repeatable.")] = None,
    dtype: Dtypes = None,
    recipe: Annotated[str | None, typer.Option(help="Its formats for q_proj are taken.")] = None,
    numerics: Numerics = None,
    threads: Threads = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """One linear layer, against the same torch.nn.Linear."""
    settings = {"shapes": shape, "tokens": tokens, "dtypes": dtype, "recipe": recipe, "numerics": numerics}
    _run("linear", out, device=device, **settings, threads=threads, repeats=repeats, warmup=warmup)


@app.command()
def forward(
    model: Model = None,
    recipe: Recipes = None,
    numerics: Numerics = None,
    dtype: Dtypes = None,
    attention: Annotated[list[str] | None, typer.Option(help="eager, sdpa; repeatable.")] = None,
    batch: Batch = None,
    tokens: Annotated[int | None, typer.Option(help="Longest row; length of random rows.")] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """A forward pass over rows of LAMBADA, against the unquantized model."""
    settings = {"recipes": recipe, "numerics": numerics, "dtypes": dtype, "attentions": attention}
    more = {"batch": batch, "tokens": tokens, "data_dir": data_dir, "threads": threads}
    _run("forward", out, device=device, model=model, repeats=repeats, warmup=warmup, **settings, **more)


@app.command()
def generate(
    model: Model = None,
    recipe: Recipes = None,
    numerics: Numerics = None,
    dtype: Dtypes = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens.")] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """Greedy generation at batch 1, against the unquantized model."""
    settings = {"recipes": recipe, "numerics": numerics, "dtypes": dtype, "tokens": tokens, "data_dir": data_dir}
    _run("generate", out, device=device, model=model, threads=threads, repeats=repeats, warmup=warmup, **settings)


@app.command("lm-eval")
def lm_eval(
    model: Model = None,
    recipe: Recipes = None,
    limit: Annotated[int | None, typer.Option(help="Rows.")] = None,
    batch: Batch = None,
    dtype: Annotated[str | None, typer.Option(help="What the model computes in.")] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """A short lm-eval run, against the baseline."""
    settings = {"recipes": recipe, "limit": limit, "batch": batch, "dtype": dtype, "data_dir": data_dir}
    _run("lm-eval", out, device=device, model=model, threads=threads, repeats=repeats, warmup=warmup, **settings)


@app.command()
def convert(
    model: Model = None,
    recipe: Recipes = None,
    dtype: Dtypes = None,
    threads: Threads = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """mxlab.apply on fresh copies of a model."""
    settings = {"recipes": recipe, "dtypes": dtype, "threads": threads, "repeats": repeats, "warmup": warmup}
    _run("convert", out, device=device, model=model, **settings)


@app.command("import")
def import_(repeats: Repeats = None, warmup: Warmup = None, out: Out = RESULTS) -> None:
    """Import mxlab in fresh processes."""
    _run("import", out, device="cpu", repeats=repeats, warmup=warmup)


@app.command()
def plot(
    results: Results = RESULTS, out: Annotated[Path, typer.Option("--out", "-o", help="A folder.")] = Path("figs")
) -> None:
    """Draw bench_quantize.png and bench_forward.png from the JSON files."""
    from mxlab.bench import figures
    from mxlab.bench.results import read

    for path in figures.draw(read(results), out):
        console.print(f"written: {path}", soft_wrap=True)


@app.command()
def tables(
    results: Results = RESULTS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file; else the screen.")] = None,
) -> None:
    """Markdown tables of everything in the JSON files."""
    from mxlab.bench.results import read
    from mxlab.bench.tables import markdown

    text = markdown(read(results))
    if out is None:
        typer.echo(text)
    else:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
        except OSError as e:
            raise SourceError(f"cannot write the tables to {out}: {e.strerror}; name another file (--out)") from None


def _run(name: str, out: Path, device: str, **given: Any) -> None:
    """Perform a benchmark, show it, write it."""
    with progress(), Steps(f"bench {name}") as steps:
        from mxlab.bench import suite
        from mxlab.bench.results import make_folder, write

        make_folder(out)
        settings = suite.BENCHMARKS[name].settings.of(device, **given)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns at every run that the model is loaded already
        document = suite.perform(name, settings, _command(), lambda case: steps.advance())
    _show(document, suite.is_disturbed(document))
    path, replaced = write(document, out, suite.file_name(document))
    console.print(f"{'replaced' if replaced else 'written'}: {path}\n", soft_wrap=True)


def _command() -> str:
    """The command as it was given, but for where the reader's data lies."""
    words = ["mxlab", *sys.argv[1:]]
    return shlex.join(
        "DATA" if before == "--data-dir" else word for before, word in zip(["", *words], words, strict=False)
    )


def _show(document: dict[str, Any], is_disturbed: bool) -> None:
    from mxlab.bench.tables import grid

    found = grid(document, hidden=("values",))
    table = Table(*map(escape, found.heads), title=f"{document['benchmark']} on {document['measured on']}", box=SIMPLE)
    for cells, met in zip(found.rows, found.marks, strict=True):
        *others, last = map(escape, cells)
        color = "" if met is None else "[green]" if met else "[red]"
        table.add_row(*others, f"{color}{last}")
    print_table(table)
    if found.common:
        console.print(f"All rows: {escape(found.common)}", soft_wrap=True)
    for failure in document["failures"]:
        console.print(f"[yellow]not measured:[/] {escape(failure)}", soft_wrap=True)
    if is_disturbed:
        load = document["load"]
        console.print(
            f"[yellow]not quiet:[/] other processes used {load['busy cores before']} cores before and "
            f"{load['busy cores after']} after the measurement; measure again on a quiet machine",
            soft_wrap=True,
        )
