"""``mxlab demo``: the whole of it, without a network."""

from __future__ import annotations

from pathlib import Path

from mxlab import environment
from mxlab.cli.console import loading_libraries, print_line, progress, start_logging
from mxlab.cli.options import OutOption, refuse_mx_specs
from mxlab.cli.sweep import finish


def demo(out: OutOption = Path("demo")) -> None:
    """Run the baseline, Ex1 and Ex2 on the embedded model and passages, then the report; no network."""
    refuse_mx_specs("mxlab demo")
    environment.go_offline()
    start_logging()
    with progress():
        with loading_libraries():
            from mxlab.experiments.demo import run_demo
            from mxlab.progress import Steps
            from mxlab.report import write_report

        summary = run_demo(out / "results")
        with Steps("report"):
            paths = write_report(out / "results", out / "report")
    print_line(f"report: {paths.markdown} and {paths.page}")
    finish(summary, out / "results")
