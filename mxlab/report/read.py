"""A results tree: its runs, and what looks like a run and is not."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxlab import rundir
from mxlab.errors import ReportError
from mxlab.report.options import options_rank
from mxlab.report.run import DATED, Result, Run, read_run

RUN_FILES = (rundir.COMMAND, rundir.ENVIRONMENT_TEXT, rundir.RECORD, rundir.LOG)
LOG_TAIL = 160  # characters of a log's last line: enough for an exception, not for a progress bar's history


@dataclass(frozen=True)
class Incomplete:
    """A directory that should be a run, and why it is not."""

    folder: str
    why: str


@dataclass(frozen=True)
class Failure:
    """A line of failures.jsonl: a run which a sweep could not finish. Older lines have no key."""

    folder: str
    label: str
    error: str
    time: str
    key: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tree:
    """Everything found under a results folder, sorted: baseline, ex1, ex2, then the other stages by name.

    Within a stage the results stand in the order of their options. ``failures`` are those which stand; ``retried``
    counts those whose run was completed after all.
    """

    name: str
    results: tuple[Result, ...]
    incomplete: tuple[Incomplete, ...]
    failures: tuple[Failure, ...]
    retried: int
    superseded: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """The run directories, each once."""
        return list({result.run.folder: result.run for result in self.results}.values())

    @property
    def stages(self) -> list[str]:
        """The stages which hold a run, in the order of the tree."""
        return list(dict.fromkeys(result.run.stage for result in self.results))

    @property
    def tasks(self) -> list[str]:
        """The tasks of the tree by name."""
        return sorted({result.task for result in self.results})

    @property
    def baselines(self) -> list[Result]:
        """The results of the unquantized model."""
        return [result for result in self.results if result.run.is_baseline]

    def of_stage(self, stage: str) -> list[Result]:
        """Return the results of one stage."""
        return [result for result in self.results if result.run.stage == stage]

    def swept(self, stage: str) -> list[Result]:
        """Return the results of one stage besides the baseline."""
        return [result for result in self.of_stage(stage) if not result.run.is_baseline]


def read_tree(root: Path) -> Tree:
    """Read every run below a folder; directories whose name starts with "." are left out.

    Raises ReportError where the folder is missing or holds nothing that looks like a run.
    """
    if not root.is_dir():
        raise ReportError(f"{root} is no folder. {_REMEDY}")
    root = root.resolve()
    folders = list(_walk(root))
    holders = [folder for folder in folders if rundir.metrics_files(folder)]
    results: list[Result] = []
    incomplete = [_without_metrics(folder, root) for folder in folders if _lacks_metrics(folder, holders)]
    for folder in holders:
        try:
            results += read_run(folder)
        except ReportError as error:
            incomplete.append(Incomplete(_relative(folder, root), f"unusable: {error}"))
    failures = [(folder, failure) for folder in folders for failure in _failures(folder, root)]
    finished = [(result.run.stage_folder, _lasting(result.run.key)) for result in results]
    standing = tuple(f for folder, f in failures if not f.key or (folder, _lasting(f.key)) not in finished)
    if not (results or incomplete or failures):
        raise ReportError(f"{root} holds no run: no {rundir.METRICS} in it or in a folder below it. {_REMEDY}")
    return Tree(
        name=root.name,
        results=tuple(sorted(_label_stages(results, root), key=_order)),
        incomplete=tuple(incomplete),
        failures=standing,
        retried=len(failures) - len(standing),
        superseded=tuple(note for folder in holders for note in _superseded(folder, root)),
    )


_REMEDY = (
    "A results folder has a folder for each stage (baseline, ex1, ex2, ...), which holds run directories with "
    f"{rundir.METRICS} as lm-eval writes them: make one with `mxlab demo` or `mxlab sweep`."
)


def _lasting(key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of a run without the versions of code and model: what failed may have been mended since."""
    return {name: value for name, value in key.items() if name not in ("code", "revision")}


def _walk(root: Path) -> Iterator[Path]:
    for folder, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(folder)


def _relative(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder != root else root.name


def _lacks_metrics(folder: Path, holders: list[Path]) -> bool:
    """Return whether a folder looks like a run without being one; a stage folder which holds runs may keep notes."""
    if any(holder.is_relative_to(folder) for holder in holders):
        return False
    return DATED.match(folder.name) is not None or any((folder / name).is_file() for name in RUN_FILES)


def _without_metrics(folder: Path, root: Path) -> Incomplete:
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())) or "nothing"
    why = f"no `{rundir.METRICS}`; it holds {files}"
    log = folder / "output.log"
    if log.is_file():
        lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
        why += f"; its log ends with: {lines[-1][-LOG_TAIL:]}"
    return Incomplete(_relative(folder, root), why)


def _superseded(folder: Path, root: Path) -> list[str]:
    *older, newest = rundir.metrics_files(folder)
    if not older:
        return []
    others = ", ".join(f"`{path.name}`" for path in older)
    return [f"`{_relative(folder, root)}` holds {len(older) + 1} metrics files: `{newest.name}` is used, not {others}"]


def _failures(folder: Path, root: Path) -> Iterator[Failure]:
    path = folder / rundir.FAILURES
    if not path.is_file():
        return
    where = _relative(folder, root)
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield Failure(where, str(record["label"]), str(record["error"]), str(record["time"]), record.get("key"))
        except (ValueError, KeyError, TypeError):
            yield Failure(where, f"{rundir.FAILURES}, line {number}", f"unreadable line: {line}", "")


def _label_stages(results: list[Result], root: Path) -> list[Result]:
    """Keep the stages of several experiments in one tree apart: their names become paths where they clash."""
    homes: defaultdict[str, set[Path]] = defaultdict(set)
    for result in results:
        homes[result.run.stage].add(result.run.stage_folder)
    return [
        replace(result, run=replace(result.run, stage=_stage_path(result.run, root)))
        if len(homes[result.run.stage]) > 1
        else result
        for result in results
    ]


def _stage_path(run: Run, root: Path) -> str:
    parts = run.stage_folder.relative_to(root).parts if run.stage_folder.is_relative_to(root) else ()
    return "/".join(parts if parts and parts[-1] == run.stage else (*parts, run.stage))


def _order(result: Result) -> tuple[object, ...]:
    stage = result.run.stage
    rank = 0 if result.run.is_baseline else 1 if re.search(r"(?:^|/)ex\d+$", stage) else 2
    return rank, stage, options_rank(result.run.options), result.run.run_id, result.task
