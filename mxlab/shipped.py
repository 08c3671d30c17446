"""Find the files that come with mxlab (recipes, sweeps, studies, the patched Llama), and TOML files by name or path.

In a checkout they are where a reader looks for them, at the top level; a wheel carries them inside the package.
"""

import itertools
import tomllib
from pathlib import Path
from typing import Any, Literal

from mxlab.checks import suggestion
from mxlab.errors import SpecError

Kind = Literal["recipe", "sweep", "study"]

PACKAGE = Path(__file__).resolve().parent
_PACKED = PACKAGE / "_packed"
_ROOT = _PACKED if _PACKED.is_dir() else PACKAGE.parent
_BYTE_ORDER_MARK = "\ufeff"  # Windows' editors write it first; TOML and its readers do not know it
PATCHED_LLAMA = _ROOT / "modeling_llama.py"

_FOLDERS: dict[Kind, Path] = {
    "recipe": _ROOT / "recipes",
    "sweep": _ROOT / "recipes" / "sweeps",
    "study": _ROOT / "recipes" / "studies",
}


def files(kind: Kind) -> dict[str, Path]:
    """Return the shipped files of one kind by name, in alphabetical order."""
    return {path.stem: path for path in sorted(_FOLDERS[kind].glob("*.toml"))}


def summaries(kind: Kind) -> dict[str, str]:
    """Return the first sentence of the comment that each shipped file of one kind begins with, by name."""
    return {name: _first_sentence(path.read_text(encoding="utf-8")) for name, path in files(kind).items()}


def _first_sentence(text: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines).partition(". ")[0].removesuffix(".")


def find(kind: Kind, name: str | Path) -> Path:
    """Return the file that ``name`` means: a shipped one by its name, else a path.

    Raises:
        SpecError: there is no such file; the message lists the shipped names.
    """
    shipped = files(kind)
    path = shipped.get(str(name), Path(name))
    if not path.is_file():
        raise SpecError(
            f"no {kind} {str(name)!r}: give a TOML file or one of {', '.join(shipped)}{suggestion(name, shipped)}"
        )
    return path


def read_toml(file: Path, source: str) -> dict[str, Any]:
    """Return the values in a TOML file. Raises SpecError where it cannot be read; ``source`` names it there."""
    try:
        return parse_toml(file.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"cannot read {source}: {e}") from None


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Return the values in a TOML text. Raises SpecError where it is not TOML; ``source`` names it there."""
    try:
        return tomllib.loads(text.removeprefix(_BYTE_ORDER_MARK))
    except tomllib.TOMLDecodeError as e:
        raise SpecError(f"{source} is not valid TOML: {e}") from None
