"""``mxlab inspect``: the command line."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mxlab import recipe as recipes
from mxlab.errors import SpecError
from mxlab.specs import ENVIRONMENT_VARIABLE

if TYPE_CHECKING:
    from mxlab.report import document

console = Console()
stderr = Console(stderr=True)
