"""Putting the patched Llama into an installed transformers, and taking it out again.

``modeling_llama.py`` in transformers' Llama folder is replaced by mxlab's overlay, which imports the original; that is
kept beside it as ``modular_llama_upstream.py`` (transformers takes no file with that prefix for a model). The original
is kept before it is replaced, every file appears in one step, and taking the patch back is one rename: whenever this
is killed, transformers is either stock or patched. What a kill can leave behind is harmless, shown by :func:`status`
and removed by the next :func:`patch` or :func:`unpatch`.

transformers is found without being imported, since importing it would load the file to be replaced.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from mxlab import shipped
from mxlab.errors import PatchError

# The transformers versions the overlay was tested on.
TESTED = ("4.57.6", "5.23.0")

_TARGET = "modeling_llama.py"
_KEPT = "modular_llama_upstream.py"
_MARKER = b"# mxlab overlay of transformers/models/llama/modeling_llama.py"
_TEMPORARY = ".mxlab-"


class State(StrEnum):
    """What transformers' modeling_llama.py is."""

    STOCK = "stock"
    PATCHED = "patched"
    OTHER_VERSION = "patched by another version"
    FOREIGN = "foreign"
    BROKEN = "broken"

    @property
    def meaning(self) -> str:
        """The state in words."""
        return _MEANING[self]


_MEANING = {
    State.STOCK: f"{_TARGET} is as pip installed it",
    State.PATCHED: f"{_TARGET} is mxlab's, the original is kept as {_KEPT}",
    State.OTHER_VERSION: f"{_TARGET} is that of another mxlab, the original is kept as {_KEPT}; --patch updates it",
    State.FOREIGN: f"{_TARGET} is neither mxlab's nor what pip installed",
    State.BROKEN: f"{_TARGET} is missing, or is mxlab's without the original",
}


@dataclass(frozen=True)
class Status:
    """Where transformers is and what its Llama is; ``leftovers`` are files of interrupted runs or former versions."""

    version: str
    location: Path
    state: State
    leftovers: tuple[str, ...]
    tested: bool

    @property
    def is_sound(self) -> bool:
        """Whether transformers is stock, or patched by this mxlab."""
        return self.state in (State.STOCK, State.PATCHED)

    def __str__(self) -> str:
        text = f"transformers {self.version} in {self.location}: {self.state} ({self.state.meaning})."
        if not self.tested:
            text += f" mxlab was not tested on this version, but on {' and '.join(TESTED)}."
        if self.leftovers:
            text += f" Left over, without effect: {', '.join(self.leftovers)}."
        return text

    def to_json(self) -> str:
        """Return the fields as a JSON object, the paragraph as ``text``."""
        return json.dumps({**asdict(self), "location": str(self.location), "text": str(self)})


def status() -> Status:
    """Return what is in place.

    Raises:
        PatchError: there is no transformers, or not one that pip installed.
    """
    found = _Installation.find()
    return Status(found.version, found.package, found.state, found.leftovers, found.version in TESTED)


def patch(force: bool = False) -> str:
    """Put the overlay in place, or update it; returns a sentence that says what was done.

    Args:
        force: go on with a transformers version that was not tested, or with a file that pip did not install.

    Raises:
        PatchError: no transformers, or, without ``force``, not a tested or not a stock one; an earlier patch is
            broken; the folder cannot be written. Nothing was changed then.
    """
    found = _Installation.find()
    if found.state is State.PATCHED:
        return f"{found} is patched already{_removed(found.clean())}"
    if found.state is State.BROKEN:
        raise PatchError(found.remedy)
    if not force:
        _refuse(found)
    overlay = shipped.PATCHED_LLAMA.read_bytes()
    if found.state is State.OTHER_VERSION:
        found.write(_TARGET, overlay)
        return f"{found}: the patch is updated{_removed(found.clean())}"
    found.keep_original()
    try:
        found.write(_TARGET, overlay)
    except PatchError:
        found.clean()  # of the copy just made
        raise
    return f"{found} is patched{_removed(found.clean())}"


def unpatch() -> str:
    """Put the original back, byte for byte; returns a sentence that says what was done: nothing where it is in place.

    Raises:
        PatchError: no transformers, one that somebody else changed (leftovers are removed all the same), the original
            is missing, or the folder cannot be written.
    """
    found = _Installation.find()
    if found.state is State.BROKEN:
        raise PatchError(found.remedy)
    nothing = f"{found} is not patched ({found.state.meaning}): there is nothing to take back"
    if found.state is State.STOCK:
        return nothing + _removed(found.clean())
    if found.state is State.FOREIGN:
        raise PatchError(nothing + _removed(found.clean()))
    try:
        (found.folder / _KEPT).replace(found.folder / _TARGET)
    except OSError as e:
        raise PatchError(found.cannot_write(e)) from None
    found.clean()
    return f"{found} is as it was before the patch"


@dataclass(frozen=True)
class _Installation:
    """An installed transformers; ``recorded`` is the checksum of its modeling_llama.py that pip wrote down."""

    version: str
    package: Path
    recorded: str | None

    def __str__(self) -> str:
        return f"transformers {self.version} in {self.package}"

    @classmethod
    def find(cls) -> _Installation:
        """Return the transformers that this interpreter would import; raise PatchError where pip installed none."""
        spec = find_spec("transformers")
        if spec is None or spec.origin is None:
            raise PatchError(
                f"transformers is not installed for {sys.executable}: install it there "
                f"(pip install transformers=={TESTED[-1]}), or name another interpreter"
            )
        package = Path(spec.origin).parent
        try:
            installed = distribution("transformers")
        except PackageNotFoundError:
            raise PatchError(_not_from_pip(package)) from None
        if Path(str(installed.locate_file("transformers"))).resolve() != package.resolve():
            raise PatchError(_not_from_pip(package))
        rows = csv.reader((installed.read_text("RECORD") or "").splitlines())
        recorded = {row[0]: row[1] for row in rows if len(row) > 1}
        return cls(installed.version, package, recorded.get(f"transformers/models/llama/{_TARGET}"))

    @property
    def folder(self) -> Path:
        """Where the Llama files are."""
        return self.package / "models" / "llama"

    @cached_property
    def state(self) -> State:
        """What modeling_llama.py was when it was first asked for."""
        content = _read(self.folder / _TARGET)
        if content is None:
            return State.BROKEN
        if content.startswith(_MARKER):
            original = _read(self.folder / _KEPT)
            if original is None or original.startswith(_MARKER):
                return State.BROKEN
            return State.PATCHED if content == shipped.PATCHED_LLAMA.read_bytes() else State.OTHER_VERSION
        return State.STOCK if self._is_pips(content) else State.FOREIGN

    @property
    def leftovers(self) -> tuple[str, ...]:
        """Files in the folder that neither pip nor a complete patch put there, relative to it."""
        files = list(self.folder.glob(f"{_TEMPORARY}*"))
        target, kept = _read(self.folder / _TARGET), _read(self.folder / _KEPT)
        if target is not None and not target.startswith(_MARKER):
            files += self.folder.glob(f"__pycache__/{Path(_KEPT).stem}.*")
            # pip's file beside a foreign one may be the only copy there is.
            if kept is not None and (self._is_pips(target) or not self._is_pips(kept)):
                files.append(self.folder / _KEPT)
        return tuple(sorted(str(f.relative_to(self.folder)) for f in files))

    @property
    def remedy(self) -> str:
        """What to do about a broken patch."""
        return (
            f"in {self.folder}, {State.BROKEN.meaning}, so that it can be neither patched nor "
            f"restored: pip install --force-reinstall --no-deps transformers=={self.version}"
        )

    def keep_original(self) -> None:
        """Copy modeling_llama.py, times and mode included, to where the overlay looks for it."""
        content = _read(self.folder / _TARGET)
        # Read once, checked and written from memory: another process may have patched in between.
        if content is None or content.startswith(_MARKER):
            raise PatchError(f"{self.folder / _TARGET} was changed by another program just now: try again")
        self.write(_KEPT, content, keep_times=True)

    def write(self, name: str, content: bytes, keep_times: bool = False) -> None:
        """Make ``content`` the file called ``name``, in one step, with the mode of modeling_llama.py.

        Always a new file: pip and uv may hard-link the old one to a cache or to other environments.
        """
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            (shutil.copystat if keep_times else shutil.copymode)(self.folder / _TARGET, temporary)
            os.replace(temporary, self.folder / name)  # noqa: PTH105 (temporary is a str)
        except OSError as e:
            raise PatchError(self.cannot_write(e)) from None
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def clean(self) -> list[str]:
        """Remove the leftovers, as far as that is possible; return what was removed."""
        removed = []
        for name in self.leftovers:
            with suppress(OSError):
                (self.folder / name).unlink()
                removed.append(name)
        return removed

    def cannot_write(self, error: OSError) -> str:
        """Return a message for an operation of the file system that failed."""
        return (
            f"cannot write in {self.folder}: {error.strerror or error}; transformers is as it was. Make room or get "
            "the right to write there, or install transformers into a virtual environment of your own"
        )

    def _is_pips(self, content: bytes) -> bool:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        return self.recorded == f"sha256={digest}"


def _refuse(found: _Installation) -> None:
    if found.version not in TESTED:
        raise PatchError(
            f"{found}: mxlab was tested on {' and '.join(TESTED)}; install one "
            f"of these (pip install transformers=={TESTED[-1]}), or use --force to patch all the same"
        )
    if found.state is State.FOREIGN:
        raise PatchError(
            f"{found.folder / _TARGET} is not what pip installed: somebody else changed it. Put the original back "
            f"(pip install --force-reinstall --no-deps transformers=={found.version}), or use --force to patch on top"
        )


def _not_from_pip(package: Path) -> str:
    return f"the transformers in {package} was not installed by pip, so that it cannot be checked: install it with pip"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise PatchError(f"cannot read {path}: {e.strerror or e}") from None


def _removed(leftovers: list[str]) -> str:
    return f"; removed what an earlier run left: {', '.join(leftovers)}" if leftovers else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Patch, unpatch or report; return 0 done, sound; 1 for --status of an unsound transformers; 2 on an error."""
    parser = argparse.ArgumentParser(prog="python -m mxlab.hf.patch", description=(__doc__ or "").split("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--patch", action="store_true", help="put the patched Llama in place")
    action.add_argument("--unpatch", action="store_true", help="put the original back")
    action.add_argument("--status", action="store_true", help="say what is in place")
    parser.add_argument("--force", action="store_true", help="patch an untested version or a changed file")
    parser.add_argument("--json", action="store_true", help="the status as JSON")
    options = parser.parse_args(argv)
    try:
        if options.status:
            found = status()
            print(found.to_json() if options.json else found)
            return 0 if found.is_sound else 1
        print(patch(options.force) if options.patch else unpatch())
        return 0
    except PatchError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
