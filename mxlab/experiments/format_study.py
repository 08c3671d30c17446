"""Formats side by side: one model on one text, each format in each role, a row for each.

The rows are appended to ``rows.jsonl`` as they are made, so that a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mxlab import shipped
from mxlab.checks import check_bool, check_choice, check_int, check_keys
from mxlab.errors import FormatError, MxlabError, RunError, SpecError
from mxlab.eval.request import check_name
from mxlab.eval.scorer import Predictor, Scorer, remember
from mxlab.eval.windows import sliding_windows
from mxlab.experiments import provenance
from mxlab.formats import SCALE_RULES, MXFormat
from mxlab.formats.scales import FP4_RULES
from mxlab.progress import track
from mxlab.recipe import Recipe
from mxlab.recipe.rule import Rule
from mxlab.report.study_rows import ROLES, ROWS, STUDY, UNQUANTIZED, StudyRow, read_rows
from mxlab.sources import models, texts
from mxlab.sources.devices import AUTO, DTYPES, choose_device, choose_dtype
from mxlab.sources.model_pool import ModelPool

logger = logging.getLogger("mxlab")

# Which roles of linear layers and of attentions take the format.
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "weights": (("weight",), ()),
    "activations": (("activation",), ()),
    "kv": ((), ("k", "v")),
    "all": (("weight", "activation"), ("k", "v")),
}
_EXAMPLES = {"formats": "fp4_e2m1@32", "scale_rules": "floor", "roles": "weights"}
_COLUMNS = ("perplexity", "cross_entropy", "kl_divergence", "top1_agreement")  # of a row, besides what names it


@dataclass(frozen=True)
class FormatStudy:
    """What to compare, on what.

    Attributes:
        formats: as they are written in a recipe; each is combined with every scale rule it can have.
        scale_rules: names of scale rules. A format with a floating-point scale has its own; ``mase_int`` is for
            integers.
        roles: of the decoder layers' linear layers and attentions: weights, activations, kv, or all of them.
        text, windows, window, batch_size, model, dtype: as in :class:`mxlab.eval.text.TextRequest`.
        compare: whether to give each row its divergence from the unquantized model.

    Raises:
        SpecError, FormatError: a name that is not known, or a number out of range.
    """

    formats: tuple[str, ...]
    scale_rules: tuple[str, ...] = ("floor",)
    roles: tuple[str, ...] = ROLES
    text: str = "wikitext2"
    windows: int | None = None
    window: int = 512
    batch_size: int = 4
    model: str = models.EMBEDDED
    dtype: str = AUTO
    compare: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", models.dtype_name(self.dtype))
        check_choice("dtype", self.dtype, (AUTO, *DTYPES))
        for name in ("formats", "scale_rules", "roles"):
            names = getattr(self, name)
            if not isinstance(names, tuple) or not all(isinstance(entry, str) for entry in names):
                raise SpecError(f'{name} is {names!r}: it must be a list of names, such as ["{_EXAMPLES[name]}"]')
        for name in ("model", "text"):
            check_name(name, getattr(self, name))
        if self.windows is not None:
            check_int("windows", self.windows, 1, None, "a whole number, 1 or more")
        check_int("batch_size", self.batch_size, 1, None, "a whole number, 1 or more")
        check_bool("compare", self.compare)
        for rule in self.scale_rules:
            check_choice("scale_rules", rule, SCALE_RULES)
        for role in self.roles:
            check_choice("roles", role, ROLES)
        check_int("window", self.window, 2, None, "a whole number of tokens, 2 or more")
        if not list(self.points()):
            raise SpecError("there is nothing to compare: name formats, scale_rules they can have, and roles")

    def points(self) -> Iterator[tuple[MXFormat, str]]:
        """Yield every format under every rule it can have, in every role."""
        for text in self.formats:
            for fmt in _with_rules(MXFormat.parse(text), self.scale_rules):
                for role in self.roles:
                    yield fmt, role


def load_study(path: str | Path) -> FormatStudy:
    """Return a study from a TOML file with the fields of :class:`FormatStudy`, or a shipped one by name.

    Raises:
        SpecError: no such file, not TOML, an unknown or missing key, or a value that is not what the key asks for.
    """
    values = shipped.read_toml(shipped.find("study", path), str(path))
    check_keys(values, [f.name for f in fields(FormatStudy)], str(path))
    if "formats" not in values:
        raise SpecError(f'{path}: needs formats, such as formats = ["{_EXAMPLES["formats"]}"]')
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return FormatStudy(**plain)
    except (FormatError, SpecError) as e:
        raise SpecError(f"{path}: {e}") from None


def recipe_of(fmt: MXFormat, role: str) -> Recipe:
    """Return a recipe with ``fmt`` in that role of every decoder layer, MLP and attention, and nothing else."""
    linear, attention = _ROLES[role]
    rules = [Rule(part=part, **dict.fromkeys(linear, fmt)) for part in ("mlp", "attention") if linear]  # pyright: ignore
    if attention:
        rules.append(Rule(part="attention", **dict.fromkeys(attention, fmt)))  # pyright: ignore
    return Recipe(f"{fmt.element} {role}", tuple(rules))


def run(
    study: FormatStudy,
    out: Path,
    command: str,
    data_dir: Path | None = None,
    device: str = "auto",
) -> list[StudyRow]:
    """Make every row of ``study`` that ``out`` does not hold yet; one that fails is recorded, the rest goes on.

    Raises:
        RunError: ``out`` holds another comparison, or cannot be written.
        SourceError, MetricError: the model or the text cannot be had, or the text is too short.
    """
    # What auto means belongs to the study: rows of two dtypes do not stand side by side.
    study = replace(study, dtype=choose_dtype(study.dtype, choose_device(device)))
    text = texts.load_text(study.text, data_dir)
    data = {"text_sha256": text.sha256, "model_id": models.identity(study.model)}
    document = json.dumps({**asdict(study), **data}, indent=1) + "\n"
    _check_same(out, document)
    rows = _Rows(study, text, device)
    _open(out, document, command)
    done = read_rows(out)
    known = {(row.format, row.role) for row in done if not row.error}
    points: list[tuple[MXFormat | None, str]] = [(None, ""), *study.points()]
    for fmt, role in track([p for p in points if (str(p[0] or UNQUANTIZED), p[1]) not in known], "formats"):
        row = rows.make(fmt, role)
        logger.info("%s %s: %s", row.format, row.role, row.error or f"perplexity {row.perplexity:.4g}")
        with (out / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    return read_rows(out)


class _Rows:
    """Makes one row after the other, on the same windows of the same model."""

    def __init__(self, study: FormatStudy, text: texts.CorpusText, device: str) -> None:
        pool = ModelPool()

        def lend() -> models.LoadedModel:
            return pool.load(study.model, study.dtype, device)

        loaded = lend()
        ids = texts.encode(loaded.tokenizer, text)
        windows = sliding_windows(len(ids), study.window, None, study.windows)
        reference = remember(Predictor(loaded.model)) if study.compare else None
        self._scorer = Scorer(lambda: lend().model, ids, windows, study.batch_size, reference)

    def make(self, fmt: MXFormat | None, role: str) -> StudyRow:
        """Return the row of a format in a role; of the unquantized model where there is none."""
        start = time.perf_counter()
        recipe = Recipe(UNQUANTIZED) if fmt is None else recipe_of(fmt, role)
        head: dict[str, Any] = {"format": str(fmt or UNQUANTIZED), "role": role, "recipe": recipe.hash}
        try:
            score = self._scorer.score(recipe)
        except Exception as e:  # one bad row, of whatever kind, must not end the others
            message = str(e) if isinstance(e, MxlabError) else f"{type(e).__name__}: {e}"
            return StudyRow(**head, error=message)
        means: dict[str, Any] = {name: value for name, value in score.tokens.means().items() if name in _COLUMNS}
        return StudyRow(
            **head,
            **means,
            bits_per_parameter=score.conversion.bits_per_parameter,
            tokens=score.tokens.loss.tokens,
            seconds=round(time.perf_counter() - start, 2),
        )


def _with_rules(fmt: MXFormat, rules: Iterable[str]) -> Iterator[MXFormat]:
    """Yield the format under each rule it can have; as it is where its scale has a rule of its own."""
    if fmt.scale != "e8m0":
        yield fmt
        return
    fits = {"max": False, "mase_int": fmt.element_format.is_int}
    fits |= dict.fromkeys(FP4_RULES, fmt.element == "fp4_e2m1")
    for rule in rules:
        if fits.get(rule, True):
            yield replace(fmt, scale_rule=rule)


def _check_same(out: Path, document: str) -> None:
    """Raise RunError where the folder holds another comparison, or cannot be read."""
    try:
        if (out / STUDY).exists() and (out / STUDY).read_text(encoding="utf-8") != document:
            raise RunError(f"{out} holds another comparison ({STUDY} differs): give another --out folder")
    except OSError as e:
        raise RunError(f"cannot read {out}: {e.strerror}; give another --out folder") from None


def _open(out: Path, document: str, command: str) -> None:
    """Make the folder of a comparison, once what it needs is there: a refused one leaves no folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / STUDY).write_text(document, encoding="utf-8")
        with (out / "env.jsonl").open("a", encoding="utf-8") as log:  # a line for each time it was started
            log.write(json.dumps({"command": command, **provenance.describe()}) + "\n")
    except OSError as e:
        raise RunError(f"cannot write to {out}: {e.strerror}; give another --out folder") from None
