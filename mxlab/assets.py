"""Files that come with mxlab: the recipes, the sweeps, the patched Llama, the evaluation tasks.

In a checkout they lie where a reader looks for them, at the top level; a wheel carries them inside the package.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TASKS = PACKAGE / "tasks"
_PACKED = PACKAGE / "_packed"
_ROOT = _PACKED if _PACKED.is_dir() else PACKAGE.parent
PATCHED_LLAMA = _ROOT / "modeling_llama.py"


def recipes() -> list[Path]:
    """The shipped recipes, one TOML file each."""
    return sorted((_ROOT / "recipes").glob("*.toml"))


def comparisons() -> list[Path]:
    """The shipped comparisons of formats, one TOML file each."""
    return sorted((_ROOT / "recipes" / "comparisons").glob("*.toml"))


def sweeps() -> list[Path]:
    """The shipped sweeps, one TOML file each."""
    return sorted((_ROOT / "recipes" / "sweeps").glob("*.toml"))
