"""The report from its title to its appendices, as blocks."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mxlab.report import tables
from mxlab.report.comparability import (
    Difference,
    compare_with_nearest,
    identical_groups,
    identity_sentence,
    metrics_text,
)
from mxlab.report.document import Block, Code, Heading, Image, Items, Paragraph
from mxlab.report.read import Tree
from mxlab.report.run import Result, Run

Images = Mapping[str, Sequence[Image]]

# The numbers of the tables, in the order of the report; each stage has one of its own below that of the sweeps.
HEADLINE, SWEEPS, UNKNOWN, CLAMPS, FAILURES = "12345"


def report(tree: Tree, images: Images) -> list[Block]:
    """Return all of a tree's report; ``images`` are its figures by stage."""
    return [
        Heading(1, "Microscaling (MX) quantization: results"),
        Paragraph(_overview(tree)),
        *_headline(tree),
        *_sweeps(tree, images),
        *_comparability(tree),
        *_identical(tree),
        *_clamps(tree),
        *_incomplete(tree),
        *_environments(tree),
        *_commands(tree),
    ]


def _overview(tree: Tree) -> str:
    counts = [f"{tables.stage_title(stage)} ({_count(tree.of_stage(stage))})" for stage in tree.stages]
    models = sorted({result.run.model for result in tree.results if result.run.model})
    return (
        f"Read from `{tree.name}`: {', '.join(counts) or 'no complete run'}. "
        f"Model: {_listed(models)}. Task: {_listed(tree.tasks)}. "
        "Every number comes from a `metrics_*.json` as lm-eval wrote it; `tables/*.csv` hold all digits."
    )


def _headline(tree: Tree) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Headline results")]
    if not tree.results:
        return [*blocks, Paragraph("No run is complete: see Incomplete runs.")]
    note = (
        "examples/sec = n_effective / total_evaluation_time_seconds, with n_effective summed over the tasks of a run. "
        "Of equal accuracies the one with the shorter evaluation time is shown."
    )
    others = sorted({name for result in tree.results for name in result.other_metrics})
    unseen = [Paragraph(f"Other metrics, not shown: {', '.join(others)}.")] if others else []
    return [*blocks, tables.headline_table(tree, HEADLINE), *unseen, Paragraph(note)]


def _sweeps(tree: Tree, images: Images) -> list[Block]:
    blocks: list[Block] = []
    single = tables.single_runs(tree)
    swept = [stage for stage in tree.stages if tree.swept(stage) and stage not in single]
    for number, stage in enumerate(swept, start=1):
        found = tables.sweep_tables(tree, stage, f"{SWEEPS}.{number}")
        blocks.append(Heading(2, re.sub(r"^ex(\d+)$", r"Exercise \1", stage)))
        blocks += found or [Paragraph(f"The options of its runs are unknown: see Table {UNKNOWN}.")]
        blocks += images.get(stage, ())
    if single:
        blocks.append(Heading(2, "Recipes compared"))
        blocks.append(tables.single_runs_table(tree, single, f"{SWEEPS}.{len(swept) + 1}"))
    unknown = tables.unknown_table(tree, UNKNOWN)
    if unknown:
        blocks += [
            Heading(2, "Runs of unknown configuration"),
            Paragraph(
                "These runs are in no sweep table: neither a `run.json` nor the name of their folder gives the options."
            ),
            unknown,
        ]
    return blocks


def _comparability(tree: Tree) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Comparability")]
    if not tree.baselines:
        return [
            *blocks,
            Paragraph("Without a readable baseline run nothing can be compared with the unquantized model."),
        ]
    groups: defaultdict[tuple[str, tuple[Difference, ...]], list[Result]] = defaultdict(list)
    verdicts: dict[tuple[Difference, ...], str] = {}
    for result in tree.results:
        comparison = compare_with_nearest(result, tree.baselines)
        if comparison and not result.run.is_baseline:
            groups[result.run.stage, comparison.differences].append(result)
            verdicts[comparison.differences] = comparison.verdict
    items = [
        f"{_who(tree, results)}: {verdicts[differences]}: {'; '.join(difference.text for difference in differences)}."
        if differences
        else f"{_who(tree, results)}: comparable with the baseline in speed and accuracy."
        for (_, differences), results in groups.items()
    ]
    compared = Items(tuple(items)) if items else Paragraph("There are no other runs to compare.")
    return [*blocks, *(Paragraph(_setting(baseline)) for baseline in tree.baselines), compared]


def _setting(baseline: Result) -> str:
    run = baseline.run
    settings = {
        "model": run.model,
        "dtype": run.dtype,
        "data": baseline.data,
        "n": baseline.n if not baseline.limited else f"{baseline.n} of {baseline.n_original}",
        "batch size": run.batch_size,
        "device": run.device,
    }
    recorded = (f"{name} {value}" for name, value in settings.items() if value is not None)
    return f"Baseline {_name(run)} on `{baseline.task}`: {', '.join(recorded)}."


def _identical(tree: Tree) -> list[Block]:
    groups = identical_groups(tree.results)
    heading = Heading(2, "Numerically identical runs")
    if not groups:
        return [heading, Paragraph("No two runs of a stage have the same accuracy and perplexity to the last bit.")]
    why = (
        "Accuracy and perplexity of these runs agree to the last bit. This is expected of runs which differ only in "
        "scale_bits, if every shared scale fits into the smaller number of bits; scales that do not are counted below."
    )
    items = (f"{tables.stage_title(group[0].run.stage)}: {_identity(group)}." for group in groups)
    return [heading, Paragraph(why), Items(tuple(items))]


def _identity(group: Sequence[Result]) -> str:
    return f"{identity_sentence(group)} ({metrics_text(group[0])})"


def _clamps(tree: Tree) -> list[Block]:
    heading = Heading(3, "Clamped shared scales")
    table = tables.clamps_table(tree, CLAMPS)
    if table is None:
        return [heading, Paragraph("Not recorded: no `run.json` counts them.")]
    meaning = (
        "Blocks whose shared scale fell below the range of scale_bits (clamped to its lowest value) or above it "
        "(overflowed)."
    )
    missing = [run for run in tree.runs if not (run.clamps or run.is_baseline)]
    lacking = [Paragraph(f"Not recorded: {_listed([_name(run) for run in missing])}.")] if missing else []
    return [heading, Paragraph(meaning), table, *lacking]


def _incomplete(tree: Tree) -> list[Block]:
    heading = Heading(2, "Incomplete runs")
    table = tables.failures_table(tree, FAILURES)
    items = [f"`{incomplete.folder}`: {incomplete.why}." for incomplete in tree.incomplete]
    items += [f"{note}." for note in tree.superseded]
    blocks = [*([Items(tuple(items))] if items else []), *([table] if table else [])]
    blocks = blocks or [Paragraph("None: every run directory holds one readable metrics file.")]
    return [heading, *blocks, *([Paragraph(_retried(tree.retried))] if tree.retried else [])]


def _retried(number: int) -> str:
    if number == 1:
        return "1 failure is left out: its run succeeded when it was started again."
    return f"{number} failures are left out: their runs succeeded when they were started again."


def _environments(tree: Tree) -> list[Block]:
    groups: defaultdict[str, list[Run]] = defaultdict(list)
    for run in tree.runs:
        groups[run.environment].append(run)
    blocks: list[Block] = [Heading(2, "Appendix A: Environments")]
    for environment, runs in groups.items():
        blocks += [Paragraph(f"{_runs_by_stage(tree, runs)}:"), Code(environment or "empty env.txt")]
    return blocks


def _commands(tree: Tree) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Appendix B: Commands")]
    for stage in tree.stages:
        runs = [run for run in tree.runs if run.stage == stage]
        commands = (f"# {run.run_id}\n{run.command or '# not recorded'}" for run in runs)
        blocks += [Heading(3, tables.stage_title(stage)), Code("\n\n".join(commands))]
    return blocks


def _who(tree: Tree, results: Sequence[Result]) -> str:
    """Return the runs of some results of one stage: all of them by their number, a part by name."""
    return _runs_by_stage(tree, list({result.run.folder: result.run for result in results}.values()))


def _runs_by_stage(tree: Tree, runs: Sequence[Run]) -> str:
    return "; ".join(
        _runs_of_stage([run for run in tree.runs if run.stage == stage], [run for run in runs if run.stage == stage])
        for stage in dict.fromkeys(run.stage for run in runs)
    )


def _runs_of_stage(every: Sequence[Run], some: Sequence[Run]) -> str:
    title = tables.stage_title(every[0].stage)
    if len(some) < len(every):
        return f"{title}, {len(some)} of {len(every)} runs ({_listed([f'`{run.run_id}`' for run in some])})"
    return f"{title}, all {len(every)} runs" if len(every) > 1 else title


def _name(run: Run) -> str:
    return f"`{run.stage}`" if run.folder == run.stage_folder else f"`{run.stage}/{run.run_id}`"


def _count(results: Iterable[Result]) -> str:
    number = len({result.run.folder for result in results})
    return f"{number} run" if number == 1 else f"{number} runs"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "not recorded"
