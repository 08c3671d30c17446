"""``mxlab bench``: the command line of the benchmarks."""

from __future__ import annotations

import inspect
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mxlab.cli.console import console, loading_libraries, print_table, progress
from mxlab.cli.help import HelpfulGroup
from mxlab.cli.options import DeviceOption
from mxlab.errors import SourceError


class _AllByDefault(HelpfulGroup):
    """``mxlab bench`` alone, or with options, is ``mxlab bench all``; a shell completes the names of all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and args[:1] != ["--help"] and (not args or args[0].startswith("-")):
            args = ["all", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_AllByDefault,
    help="Time quantization against the unquantized model, and write what was measured. Alone: all of it.",
    pretty_exceptions_enable=False,
)
RESULTS = Path("bench/results")
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the JSON files go.")]
Results = Annotated[Path, typer.Option("--results", help="The folder of the JSON files.")]
DataDir = Annotated[Path | None, typer.Option(help="A folder with lambada_openai.jsonl; else the embedded passages.")]
Model = Annotated[
    str | None, typer.Option("--model", help="A hub name, a folder, smollm2, llama-1b-random or random-tiny.")
]
OneDtype = Annotated[str | None, typer.Option("--dtype", help="What the model computes in.")]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16, float16; repeatable.")]
Numerics = Annotated[list[str] | None, typer.Option("--numerics", help="exact, microxcaling; repeatable.")]
Recipes = Annotated[list[str] | None, typer.Option("--recipe", help="A recipe's name or TOML file; repeatable.")]
Batch = Annotated[int | None, typer.Option(help="Rows of a batch.")]
Limit = Annotated[int | None, typer.Option(help="Rows.")]


def _effort(
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds in which all contenders take their turn.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Calls of each contender before the first round.")] = None,
    device: DeviceOption = "auto",
    out: Out = RESULTS,
) -> None:
    """Carry the options of every benchmark; never called."""


def _benchmark(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make ``mxlab bench NAME`` of a function without a body, whose parameters are fields of the workload.

    The command takes the parameters of :func:`_effort` as well. What is not given is left to the workload.
    """

    def command_of(own: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            _run(name, **given)

        parts = [inspect.signature(function, eval_str=True) for function in (own, _effort)]
        merged = [parameter for part in parts for parameter in part.parameters.values()]
        setattr(command, "__signature__", inspect.Signature(merged))  # noqa: B010
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
        return app.command(name, help=own.__doc__)(command)

    return command_of


@app.command("all")
def everything(data_dir: DataDir = None, device: DeviceOption = "auto", out: Out = RESULTS) -> None:
    """Run every benchmark in its standard settings."""
    with progress(), loading_libraries():
        from mxlab.bench.suite import BENCHMARKS
        from mxlab.bench.workload import TextWorkload

    for name, workload in BENCHMARKS.items():
        given = {"data_dir": data_dir} if issubclass(workload, TextWorkload) else {}
        _run(name, out=out, device=device, **given)


@_benchmark("quantize")
def quantize(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="Such as 2048x576; repeatable.")] = None,
    dtypes: Dtypes = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="fp6_e2m3, or with a block size fp4_e2m1@32; repeatable.")
    ] = None,
    blocks: Annotated[list[int] | None, typer.Option("--block", help="Block size; repeatable.")] = None,
    numerics: Numerics = None,
    values: Annotated[str | None, typer.Option(help="auto (activations where they have the shape) or random.")] = None,
    copy_gib: Annotated[
        float | None, typer.Option(help="Size of a tensor to compare with the copy bandwidth on; GPU: 1.")
    ] = None,
) -> None:
    """Quantize a tensor, against tensor.clone()."""


@_benchmark("linear")
def linear(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="In x out: 576x1536; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Rows of the input; repeatable.")] = None,
    dtypes: Dtypes = None,
    recipe: Annotated[str | None, typer.Option(help="Its formats for q_proj are taken.")] = None,
    numerics: Numerics = None,
) -> None:
    """Call one linear layer, against the same torch.nn.Linear."""


@_benchmark("forward")
def forward(
    model: Model = None,
    recipes: Recipes = None,
    numerics: Numerics = None,
    dtypes: Dtypes = None,
    attentions: Annotated[list[str] | None, typer.Option("--attention", help="eager, sdpa; repeatable.")] = None,
    batch: Batch = None,
    tokens: Annotated[int | None, typer.Option(help="Longest row; length of random rows.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Run a forward pass over rows of LAMBADA, against the unquantized model."""


@_benchmark("generate")
def generate(
    model: Model = None,
    recipes: Recipes = None,
    numerics: Numerics = None,
    dtypes: Dtypes = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Generate greedily at batch 1, against the unquantized model."""


@_benchmark("decode")
def decode(
    model: Model = None,
    recipes: Recipes = None,
    dtypes: Dtypes = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the text before.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Add one token at a time behind a long text, against the unquantized model."""


@_benchmark("llama.cpp")
def llama_cpp(
    model: Model = None,
    recipe: Annotated[str | None, typer.Option(help="Its weights are compared, which ggml must have.")] = None,
    dtype: OneDtype = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens that are read at once.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens one by one.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Read a prompt and decode, against llama.cpp (where llama-cpp-python is installed) with the same weights."""


@_benchmark("lm-eval")
def lm_eval(
    model: Model = None,
    recipes: Recipes = None,
    limit: Limit = None,
    batch: Batch = None,
    dtype: OneDtype = None,
    data_dir: DataDir = None,
) -> None:
    """Run lm-eval on a few rows, against the baseline."""


@_benchmark("memory")
def memory(
    model: Model = None, recipes: Recipes = None, limit: Limit = None, dtype: OneDtype = None, data_dir: DataDir = None
) -> None:
    """Take the peak memory of an evaluation in a fresh process, against the baseline."""


@_benchmark("convert")
def convert(model: Model = None, recipes: Recipes = None, dtypes: Dtypes = None) -> None:
    """Convert fresh copies of a model (mxlab.apply)."""


@_benchmark("import")
def import_() -> None:
    """Import mxlab in fresh processes."""


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
    """Write Markdown tables of everything in the JSON files."""
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
    with progress():
        with loading_libraries():
            from mxlab.bench import suite
            from mxlab.bench.results import make_folder, write

        make_folder(out)
        workload = suite.BENCHMARKS[name].of(device, **given)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns at every run that the model is loaded already
        document = suite.perform(name, workload, _command())
    _show(document, suite.is_disturbed(document))
    path, replaced = write(document, out, suite.file_name(document))
    console.print(f"{'replaced' if replaced else 'written'}: {path}\n", soft_wrap=True)


def _command() -> str:
    """Return the command as it was given, without the folder of the reader's data."""
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
