"""``mxlab eval``: evaluate one model under one recipe."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from mxlab.cli.console import console, loading_libraries, print_line, progress, start_logging
from mxlab.cli.options import (
    BatchSizeOption,
    BosOption,
    CompareOption,
    DataDirOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LimitOption,
    MaxLengthOption,
    ModelOption,
    OutOption,
    RecipeOption,
    ReferenceOption,
    SetOption,
    Storage,
    StorageOption,
    StrideOption,
    TasksOption,
    TextOption,
    WindowOption,
    WindowsOption,
    given,
    row_limit,
    task_names,
    text_settings,
)
from mxlab.cli.recipes import assigned, chosen_recipe
from mxlab.cli.records import print_json, read_records, results_alone


def evaluate(
    model: ModelOption = "smollm2",
    tasks: TasksOption = None,
    text: TextOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    limit: LimitOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    windows: WindowsOption = None,
    compare: CompareOption = False,
    reference: ReferenceOption = None,
    bos: BosOption = False,
    batch_size: BatchSizeOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    storage: StorageOption = Storage.grid,
    data_dir: DataDirOption = None,
    max_length: MaxLengthOption = None,
    as_json: JsonOption = False,
    out: OutOption = Path("results"),
) -> None:
    """Evaluate one model under one recipe, on tasks or on a text; the run directory goes to OUT/<recipe>/."""
    chosen = chosen_recipe(recipe, set_ or [], model)
    start_logging()
    with results_alone(as_json), progress():
        with loading_libraries():
            from mxlab.eval.settings import request_from
            from mxlab.experiments import runs

        settings = given(
            model=model,
            tasks=task_names(tasks),
            limit=row_limit(limit),
            batch_size=batch_size,
            dtype=dtype.value,
            device=device,
            storage=storage.value,
            max_length=max_length,
        )
        of_text = text_settings(text, window, stride, windows, compare, bos, reference)
        request = request_from(chosen, settings | of_text, data_dir)
        folder = runs.run(request, out / chosen.name, {**chosen.options, **assigned(set_ or [])})
    if as_json:
        print_json(read_records([folder])[0])
        return
    table = Table("task", "metric", "value", "stderr")
    for row in runs.read_metrics(folder):
        table.add_row(*row)
    console.print(table)
    print_line(f"written: {folder}")
