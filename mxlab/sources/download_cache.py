"""The folder where mxlab keeps what it can make again: the embedded model converted, pages cut from WikiText."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from mxlab import environment, rundir
from mxlab.errors import SourceError


def get(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cached folder ``name``; where it is missing, ``make`` fills one, which takes its place when whole.

    Raises:
        SourceError: the cache folder cannot be written.
    """
    target = environment.cache_folder() / name
    if target.is_dir():
        return target
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(rundir.partial(target.parent))
        except OSError as e:
            raise SourceError(
                f"cannot write to the cache folder {environment.cache_folder()}: {e.strerror}; set "
                f"{environment.CACHE} to another folder"
            ) from None
        try:
            make(temporary)
            _rename(temporary, target)
        except OSError as e:
            raise SourceError(
                f"cannot fill the cache folder {target}: {e}; make room, or set {environment.CACHE} to another folder"
            ) from e
    return target


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have been quicker
            raise
