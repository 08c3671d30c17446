"""The folder where mxlab keeps what it can make again: the embedded model converted, pages cut from WikiText."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from mxlab import rundir
from mxlab.errors import SourceError

ENVIRONMENT_VARIABLE = "MXLAB_CACHE"


def folder() -> Path:
    """``$MXLAB_CACHE``, else ``~/.cache/mxlab`` (or below ``$XDG_CACHE_HOME``)."""
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mxlab"


def get(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder ``name``; where it is missing, ``make`` fills an empty one, which then takes its place whole.

    Raises:
        SourceError: the cache folder cannot be written.
    """
    target = folder() / name
    if target.is_dir():
        return target
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(rundir.partial(target.parent))
        except OSError as e:
            raise SourceError(
                f"cannot write to the cache folder {folder()}: {e.strerror}; set {ENVIRONMENT_VARIABLE} to "
                "another folder"
            ) from None
        try:
            make(temporary)
            _rename(temporary, target)
        except OSError as e:
            raise SourceError(
                f"cannot fill the cache folder {target}: {e}; make room, or set {ENVIRONMENT_VARIABLE} to "
                "another folder"
            ) from e
    return target


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have been quicker
            raise
