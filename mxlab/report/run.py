"""One run directory: the metrics as lm-eval wrote them, and the files which stand beside them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mxlab import rundir
from mxlab.errors import ReportError
from mxlab.report.document import Measured
from mxlab.report.options import Option, Options, in_order, options_of_name

T = TypeVar("T")

BASELINE = "baseline"
KL, AGREEMENT = "kl_divergence", "top1_agreement"
PERPLEXITIES = ("perplexity", "word_perplexity")  # the first which a task has is its ppl
DIGEST = 12  # digits of a data file's sha256: enough to tell files apart

DATED = re.compile(r"\d{8}_\d{6}_", re.ASCII)

# Of the hundred lines of lm-eval's pretty_env_info, those which can move a number or a time.
ENVIRONMENT_LINES = re.compile(
    r"^(?:PyTorch version|OS|Python version|CUDA runtime version|GPU models and configuration|GPU \d+"
    r"|Nvidia driver version|CPU\(s\)|Model name):.*\S",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Run:
    """A run directory. What a file did not record is None.

    ``key`` is what makes it the same run as another; empty where there is no run.json. ``options`` are the swept
    options; None where neither run.json nor the folder's name tells them. ``clamps`` maps a role (weight, activation,
    k, v) to its counts of blocks, clamped and overflowed shared scales.
    """

    stage: str
    run_id: str
    folder: Path
    key: Mapping[str, Any]
    quantized: bool | None
    options: Options | None
    tasks: tuple[str, ...]
    model: str | None
    dtype: str | None
    batch_size: str | None
    device: str | None
    clamps: Mapping[str, Mapping[str, int]]
    environment: str
    command: str | None

    @property
    def stage_folder(self) -> Path:
        """The folder of the stage: the run's parent, unless the metrics are in ``baseline/`` itself."""
        return _stage_folder(self.folder)

    @property
    def is_baseline(self) -> bool:
        """Whether the run is the unquantized model: its stage says so, unless run.json knows better."""
        return self.in_baseline_stage and not self.quantized

    @property
    def in_baseline_stage(self) -> bool:
        """Whether the run is where baselines belong."""
        return self.stage.rpartition("/")[2] == BASELINE


@dataclass(frozen=True)
class Result:
    """One task of one run: a row of the tables.

    ``eval_time_s`` and ``examples_per_s`` are those of the whole run; a speed needs the run's ``n-samples``.
    ``kl`` is the KL divergence from the unquantized model in nats per token, ``agreement`` the share of tokens on whose
    likeliest continuation both agree: evaluations of a text that compare have them. ``other_metrics`` names those of
    the task which the report does not show.
    """

    run: Run
    task: str
    data: str | None
    acc: Measured | None
    ppl: Measured | None
    kl: Measured | None
    agreement: Measured | None
    other_metrics: tuple[str, ...]
    n: int | None
    n_original: int | None
    eval_time_s: float
    examples_per_s: float | None

    @property
    def limited(self) -> bool:
        """Whether only a part of the task was evaluated."""
        return self.n is not None and self.n_original is not None and self.n < self.n_original

    @property
    def nan_metrics(self) -> tuple[str, ...]:
        """The metrics, by their column's name, which are not a number."""
        metrics = {"acc": self.acc, "ppl": self.ppl}
        return tuple(name for name, metric in metrics.items() if metric and metric.is_nan)


def read_run(folder: Path) -> list[Result]:
    """Read a directory (absolute path) which holds metrics: one result a task, from the newest file.

    Raises ReportError, which names the file and what is wrong with it, where a file cannot be read.
    """
    source = rundir.metrics_files(folder)[-1]
    metrics = _Fields(_load(source), source.name)
    samples = metrics.take("n-samples", dict) if metrics.record.get("n-samples") else {}
    counts = {task: _Fields(samples[task], f"{source.name}: n-samples of {task}") for task in samples}
    seconds = _seconds(metrics)
    speed = sum(map(_effective, counts.values())) / seconds if counts else None
    results = metrics.take("results", dict)
    run = _read_directory(folder, metrics.record)
    return [
        _result(run, task, _Fields(scores, f"{source.name}: results of {task}"), counts.get(task), seconds, speed)
        for task, scores in results.items()
    ]


def _stage_folder(folder: Path) -> Path:
    return folder if folder.name == BASELINE else folder.parent


class _Fields:
    """A JSON object which says where it stands when a key is missing or is of another type."""

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, dict):
            raise ReportError(f"{where}: not a JSON object")
        self.record: dict[str, Any] = record
        self.where = where

    def take(self, key: str, kind: type[T]) -> T:
        value = self.record.get(key)
        if not isinstance(value, kind) or value == {}:
            raise ReportError(f"{self.where}: key {key!r} is missing, empty or no {kind.__name__}")
        return value

    def number(self, key: str) -> float | None:
        """Return the number of a key, which lm-eval may have written as a string; None where it has none."""
        value = self.record.get(key)
        if value in (None, "N/A"):
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ReportError(f"{self.where}: {key!r} is {value!r}, not a number") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        return _Fields(json.loads(path.read_text(encoding="utf-8")), path.name).record
    except (OSError, ValueError) as error:
        raise ReportError(f"{path.name}: not readable as JSON ({error})") from None


def _seconds(metrics: _Fields) -> float:
    seconds = metrics.number("total_evaluation_time_seconds")
    if seconds is None or not 0 < seconds < math.inf:
        raise ReportError(f"{metrics.where}: 'total_evaluation_time_seconds' is missing or no time: {seconds}")
    return seconds


def _effective(count: _Fields) -> int:
    effective = count.take("effective", int)
    if effective < 1:
        raise ReportError(f"{count.where}: 'effective' is {effective}: no example was evaluated")
    return effective


def _result(run: Run, task: str, scores: _Fields, count: _Fields | None, seconds: float, speed: float | None) -> Result:
    """Return one task's row. A group of tasks has scores, but no count of its own."""
    perplexity = next((name for name in PERPLEXITIES if _measured(scores, name)), PERPLEXITIES[0])
    return Result(
        run=run,
        task=task,
        data=_digest(run.key.get("data"), task),
        acc=_measured(scores, "acc"),
        ppl=_measured(scores, perplexity),
        kl=_measured(scores, KL),
        agreement=_measured(scores, AGREEMENT),
        other_metrics=_other_metrics(scores.record, ("acc", perplexity, KL, AGREEMENT)),
        n=count and count.take("effective", int),
        n_original=count and count.take("original", int),
        eval_time_s=seconds,
        examples_per_s=speed,
    )


def _measured(scores: _Fields, metric: str) -> Measured | None:
    value = scores.number(f"{metric},none")
    return None if value is None else Measured(value, scores.number(f"{metric}_stderr,none"))


def _other_metrics(scores: Mapping[str, Any], shown: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the other metrics, with their filter where they have one: ``exact_match (strict-match)``."""
    split = (key.partition(",") for key in scores if "," in key and "_stderr," not in key)
    others = ((name, kind) for name, _, kind in split if (name, kind) not in [(metric, "none") for metric in shown])
    return tuple(name if kind == "none" else f"{name} ({kind})" for name, kind in others)


def _digest(data: Any, task: str) -> str | None:
    """Return the data of a task in run.json's key, a map from tasks to digests: the beginning of the digest."""
    digest = _text(data.get(task) if isinstance(data, dict) else data)
    return digest and digest[:DIGEST]


def _read_directory(folder: Path, metrics: dict[str, Any]) -> Run:
    record = _read_record(folder / rundir.RECORD)
    key = record.get("key") or {}
    config = _Fields(metrics.get("config") or {}, "config of the metrics").record
    dtype = _text(config.get("model_dtype") or key.get("dtype"))
    return Run(
        stage=record["stage"] if record else _stage_folder(folder).name,
        run_id=folder.name,
        folder=folder,
        key=key,
        quantized=record.get("quantized"),
        options=_options(folder.name, record),
        tasks=tuple(sorted(metrics["results"])),
        model=_text(key.get("model") or metrics.get("model_name")),
        dtype=dtype and dtype.removeprefix("torch."),
        batch_size=_text(config.get("batch_size") or key.get("batch_size")),
        device=_device(_text(config.get("device")), str(metrics.get("pretty_env_info"))),
        clamps=record.get("scale_clamps") or {},
        environment=_environment(folder / rundir.ENVIRONMENT_TEXT, metrics),
        command=_read_if_there(folder / rundir.COMMAND),
    )


def _read_record(path: Path) -> dict[str, Any]:
    """Read run.json, checked as far as it is used; empty for a tree of another origin, which lacks it."""
    if not path.exists():
        return {}
    record = _load(path)
    if record.get("schema") != rundir.SCHEMA:
        raise ReportError(f"{path.name}: schema is {record.get('schema')!r}, this report reads {rundir.SCHEMA}")
    fields = _Fields(record, path.name)
    fields.take("stage", str)
    if record.get("quantized") is not None:
        fields.take("quantized", bool)
    for key in ("options", "key", "scale_clamps"):
        _Fields(record.get(key) or {}, f"{path.name}: {key}")
    for role, counts in (record.get("scale_clamps") or {}).items():
        for count in ("blocks", "clamped", "overflowed"):
            _Fields(counts, f"{path.name}: scale_clamps of {role}").take(count, int)
    return record


def _options(name: str, record: dict[str, Any]) -> Options | None:
    if "options" in record:
        return in_order({key: _scalar(value) for key, value in (record["options"] or {}).items()})
    return options_of_name(name)


def _scalar(value: Any) -> Option:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)


def _text(value: Any) -> str | None:
    """Return a recorded setting as text: lm-eval writes a batch size as "32", run.json as 32."""
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


def _device(name: str | None, environment: str) -> str | None:
    """Return the device and, where it is known, which one: "cuda:0" alone would call two GPUs the same."""
    if name is None:
        return None
    pattern = r"Model name: *(.+)" if name.startswith("cpu") else r"GPU 0: *([^(\n]+)"
    found = re.search(pattern, environment)
    return f"{name} ({found[1].strip()})" if found else name


def _environment(path: Path, metrics: dict[str, Any]) -> str:
    """Return env.txt, else the metrics' own account; without the date, so that equal environments are equal."""
    text = _read_if_there(path)
    if text is not None:
        return "\n".join(line for line in text.splitlines() if not line.startswith("date:"))
    lines = [match[0] for match in ENVIRONMENT_LINES.finditer(str(metrics.get("pretty_env_info")))]
    fields = metrics | (metrics.get("config") or {})
    for key in ("transformers_version", "lm_eval_version", "model_dtype", "device"):
        lines.append(f"{key}: {fields.get(key, 'not recorded')}")
    return "\n".join(lines)


def _read_if_there(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
