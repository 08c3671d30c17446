"""What ``--help`` says beneath a command's options: examples, and the files that come with mxlab."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from mxlab import shipped
from mxlab.cli.console import console
from mxlab.shipped import Kind

EXAMPLES: dict[str, tuple[str, ...]] = {
    "eval": (
        "mxlab eval --model smollm2 --recipe ex1 --set block_size=16",
        "mxlab eval --model meta-llama/Llama-3.2-1B --tasks lambada_openai --recipe ex2 --limit 0.25",
        "mxlab eval --recipe tier_c --text wikitext2 --data-dir DATA --compare",
    ),
    "sweep": (
        "mxlab sweep ex1 --model smollm2 --tasks mxlab_passages --limit 64",
        "mxlab sweep tiers --data-dir DATA --out results",
        "mxlab sweep mine.toml --dtype float32",
    ),
    "compare": (
        "mxlab compare formats --data-dir DATA --out formats",
        "mxlab compare mine.toml --windows 4 --dtype float32 --out mine",
    ),
    "inspect": (
        "mxlab inspect smollm2 --recipe ex1",
        "mxlab inspect smollm2 --recipe mine.toml --text wikitext2_valid --data-dir DATA --out why",
    ),
    "convert": (
        "mxlab convert --dry-run smollm2 mine.toml",
        "mxlab convert smollm2 tier_c --out smollm2-tier-c",
        "mxlab convert smollm2 ex1 --storage packed --out smollm2-mxfp4",
    ),
    "quantize": (
        "mxlab quantize smollm2 --recipe mxfp4_w4a4kv4_gptq --data-dir DATA --out smollm2-gptq",
        "mxlab quantize smollm2 --recipe mine.toml --data-dir DATA --dtype bfloat16 --out mine --resume",
        "mxlab quantize smollm2 --recipe mxfp4_w4a4kv4_best --dry-run",
    ),
    "export": (
        "mxlab export smollm2 --recipe ex1 --to compressed-tensors --weights-only --out smollm2-vllm",
        "mxlab export smollm2-gptq --to compressed-tensors --weights-only --out smollm2-vllm",
        "mxlab export smollm2 --recipe weights_only --to gguf --weights-only --out smollm2-gguf",
    ),
    "import": (
        "mxlab import smollm2-gguf/model.gguf --out smollm2-mxfp4",
        "mxlab import smollm2-vllm --out smollm2-mxfp4",
    ),
    "generate": (
        'mxlab generate smollm2 --recipe ex1 "The best thing about the sea is"',
        'mxlab generate smollm2 --recipe baseline --recipe ex2 --tokens 100 "Once upon a time"',
    ),
    "memory": (
        "mxlab memory smollm2 --recipe ex2",
        "mxlab memory smollm2 --recipe baseline --recipe ex2 --tokens 8192 --dtype bfloat16",
    ),
    "results": (
        "mxlab results results",
        "mxlab results results/ex1 --json",
    ),
    "report": ("mxlab report results --out report",),
    "demo": ("mxlab demo --out demo",),
    "doctor": (
        "mxlab doctor --data-dir DATA",
        "mxlab doctor --json",
    ),
    "bench": (
        "mxlab bench quantize --shape 1000x777 --format int8@16",
        "mxlab bench forward --recipe ex1 --dtype float32",
        "mxlab bench tables",
    ),
}
_SHIPPED: dict[str, Kind] = {
    "eval": "recipe",
    "convert": "recipe",
    "quantize": "recipe",
    "export": "recipe",
    "generate": "recipe",
    "memory": "recipe",
    "inspect": "recipe",
    "sweep": "sweep",
    "compare": "study",
}
_PLURALS: dict[Kind, str] = {"recipe": "recipes", "sweep": "sweeps", "study": "studies"}


class _Helpful:
    """Prints :func:`beneath` behind the help; typer would run the lines of an epilog together."""

    name: str | None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        super().format_help(ctx, formatter)  # pyright: ignore[reportAttributeAccessIssue]
        console.print(beneath(self.name or ""), markup=False, highlight=False, soft_wrap=True)


class HelpfulCommand(_Helpful, TyperCommand):
    """A command whose help ends with examples."""


class HelpfulGroup(_Helpful, TyperGroup):
    """A group of commands whose help ends with examples."""


def beneath(command: str) -> str:
    """Return the examples of a command, and the names of the files that it takes with what they are."""
    lines = [" Examples:", *(f"   {example}" for example in EXAMPLES[command])]
    if kind := _SHIPPED.get(command):
        found = shipped.summaries(kind)
        width = max(map(len, found))
        lines += ["", f" Shipped {_PLURALS[kind]}:", *(f"   {n:{width}}  {text}" for n, text in found.items())]
    return "\n".join([*lines, ""])


def shipped_names(kind: Kind) -> Any:
    """Return what completes the name of a shipped file; for anything else the shell completes paths."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in shipped.files(kind) if name.startswith(incomplete)]

    return complete
