"""Evaluation tasks by name, and where their data comes from.

``lambada_openai`` and ``wikitext`` read files of a data folder where one is given, under the same names and with
lm-eval's own metrics; every other task, and those two without a folder, come from the hub. ``mxlab_passages`` is
embedded. Nothing ever takes another's place.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

from mxlab.checks import suggestion
from mxlab.errors import SourceError
from mxlab.sources import download_cache
from mxlab.sources.texts import PASSAGES_FILE

PASSAGES = "mxlab_passages"
_LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
# A line of one equals sign on either side; sub-headings have spaced-out ones: `` = = Part = = ``.
_PAGE_TITLE = re.compile(r" *= (?!=).*(?<!=) = *")


@dataclass(frozen=True)
class _Local:
    """A task of lm-eval's whose test split can be a file of a data folder."""

    yaml: str  # lm-eval's own definition, below its tasks folder
    file: str
    field: str  # what each of its rows holds
    rows: Callable[[str], list[str]] | None = None  # cuts the file's text; None: the file is JSON lines


def wikitext_pages(text: str) -> list[str]:
    """Return the pages of raw WikiText as the hub's data set has them.

    A page starts at each top-level title line, `` = Title = ``; the line break before it belongs to no page. Text
    before the first title is a page of its own, unless it is blank.

    Raises:
        ValueError: there is no title line.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _PAGE_TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    if len(pages) == 1:
        raise ValueError("holds no WikiText page: one starts at a line like ' = Title = '")
    return [page for lines in pages if (page := "\n".join(lines)).strip()]


LOCAL = {
    "lambada_openai": _Local("lambada/lambada_openai.yaml", "lambada_openai.jsonl", "text"),
    "wikitext": _Local("wikitext/wikitext.yaml", "wikitext2_test.raw", "page", wikitext_pages),
}


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: their names, the manager that serves them to lm-eval, and a digest of each local data file."""

    names: tuple[str, ...]
    manager: TaskManager
    digests: dict[str, str]


class _LoadedManager(TaskManager):
    """Serves the tasks it loaded once, so that data is missing before a model is loaded, not after."""

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._loaded = super().load(list(names))

    def load(self, *_: Any, **__: Any) -> Any:
        return self._loaded


def digests(names: Sequence[str], data_dir: Path | None) -> dict[str, str]:
    """Return the sha256 of the data file behind each task; ``hub`` for those that come from there.

    Raises:
        SourceError: a file is missing from the data folder.
    """
    files = {name: _file(name, data_dir) for name in names}
    return {name: _sha256(file) if file else "hub" for name, file in files.items()}


def load_tasks(names: Sequence[str], data_dir: Path | None = None) -> Tasks:
    """Return the tasks of these names, data included.

    Raises:
        SourceError: an unknown task, a missing or unreadable file, or a hub that cannot be reached.
    """
    definitions = {name: _definition(name, file) for name in names if (file := _file(name, data_dir))}
    folder = _definitions_folder(definitions)
    others = [name for name in names if name not in definitions]
    try:
        manager = _LoadedManager(names, include_path=_include(folder, others), include_defaults=_needs_all(others))
    except KeyError as e:
        raise SourceError(_unknown(str(e.args[0]) if e.args else str(e), names)) from e
    except Exception as e:  # whatever datasets, its HTTP client or lm-eval raise
        raise SourceError(_unreachable(names, definitions, e)) from e
    return Tasks(tuple(names), manager, digests(names, data_dir))


def _file(name: str, data_dir: Path | None) -> Path | None:
    """Return the local data file of a task, or None where it comes from the hub."""
    if name == PASSAGES:
        return PASSAGES_FILE
    if data_dir is None or name not in LOCAL:
        return None
    file = data_dir / LOCAL[name].file
    if not file.is_file():
        raise SourceError(
            f"{file} is missing: the task {name} reads {LOCAL[name].file} of the data folder; put it there, or leave "
            "--data-dir out to read the hub's"
        )
    return file


def _definition(name: str, file: Path) -> dict[str, Any]:
    """Return lm-eval's own task with ``file`` as its test split."""
    local = LOCAL.get(name, LOCAL["lambada_openai"])  # the passages are scored as LAMBADA is
    return {
        "include": str(_LM_EVAL_TASKS / local.yaml),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "dataset_kwargs": {"data_files": {"test": str(_json_lines(local, file))}},
    }


def _json_lines(local: _Local, file: Path) -> Path:
    """Return the JSON lines that the task reads: ``file`` itself, looked through, or the rows of its text, cached.

    A byte order mark is no content: lm-eval would stumble over it, and reads a copy without.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        is_marked = file.read_bytes().startswith(codecs.BOM_UTF8)
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"cannot read {file}: {e}") from None
    if not text.strip():
        raise SourceError(f"{file} is empty")
    try:
        if local.rows is None:
            _check_lines(text, local.field)
            if not is_marked:
                return file
            lines = text
        else:
            lines = "".join(json.dumps({local.field: row}) + "\n" for row in local.rows(text))
    except ValueError as e:
        raise SourceError(f"{file} {e}") from None

    def write(folder: Path) -> None:
        (folder / "test.jsonl").write_text(lines, encoding="utf-8")

    return download_cache.get(f"data/{hashlib.sha256(lines.encode()).hexdigest()[:16]}", write) / "test.jsonl"


def _check_lines(text: str, field: str) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"is not valid JSON in line {number}: {e.msg} at column {e.colno}") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"holds no object with a text under {field!r} in line {number}")


def _definitions_folder(definitions: dict[str, dict[str, Any]]) -> Path | None:
    """Return a cached folder that holds the definitions as YAML files, which is what lm-eval reads."""
    if not definitions:
        return None
    texts = {name: yaml.safe_dump(definition, sort_keys=False) for name, definition in definitions.items()}

    def write(folder: Path) -> None:
        for name, text in texts.items():
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    return download_cache.get(f"tasks/{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}", write)


def _include(definitions: Path | None, others: Sequence[str]) -> list[str]:
    """Return the folders lm-eval has to scan: scanning all of its own takes ten seconds."""
    known = [] if _needs_all(others) else [(_LM_EVAL_TASKS / LOCAL[name].yaml).parent for name in others]
    return [str(folder) for folder in [*known, definitions] if folder is not None]


def _needs_all(others: Sequence[str]) -> bool:
    return any(name not in LOCAL for name in others)


def _unknown(message: str, names: Sequence[str]) -> str:
    known = [PASSAGES, *LOCAL]
    near = "".join(suggestion(name, known) for name in names if name not in known)
    return f"no such task: {message}; `lm_eval ls tasks` lists lm-eval's, {PASSAGES} is embedded{near}"


def _unreachable(names: Sequence[str], definitions: dict[str, Any], error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    missing = [name for name in names if name not in definitions]
    if not missing:
        return f"cannot read the data of {', '.join(names)}: {type(error).__name__}: {first_line}"
    return (
        f"cannot load the data of {', '.join(missing)} from the Hugging Face hub: {type(error).__name__}: "
        f"{first_line}. Check the network; or give a folder with {' or '.join(t.file for t in LOCAL.values())} "
        f"(--data-dir); or evaluate on the embedded passages (--tasks {PASSAGES})"
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
