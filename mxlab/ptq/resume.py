"""Keep what has been computed so far, so that a quantization that was killed goes on where it was.

A folder beside the result holds one file of tensors for each step, and what they belong to: a fingerprint of the model,
the tokens, the recipe and the code. Each file is written under another name and renamed when it is whole. Torch writes
tensors as they lie in memory, where safetensors would hold all of them a second time.

Tensors that are kept are used from their file, which is mapped into memory: the system reads what is needed, and drops
it where memory is short. So the weights of linear layers that are done need not stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mxlab.errors import RunError
from mxlab.numerics.fingerprints import fingerprints
from mxlab.ptq.calibration import Windows
from mxlab.recipe import Recipe

_RECORD = "fingerprint.json"
_SUFFIX, _PARTIAL = ".pt", ".partial"

logger = logging.getLogger("mxlab")


def describe(model: Any, recipe: Recipe, windows: Windows, code: str) -> dict[str, Any]:
    """Return what decides the bits of a quantized model, as plain values.

    Args:
        model: before it is converted.
        recipe: the recipe.
        windows: the calibration text.
        code: the version of mxlab, with a digest of its files.
    """
    numbers = fingerprints(list(model.state_dict().values()))
    tokens = b"".join(ids.cpu().numpy().tobytes() for ids in (windows.ids, windows.rest))
    shapes = repr((windows.ids.shape, windows.rest.shape, windows.held_out)).encode()
    return {
        "model": hashlib.sha256(repr(numbers).encode()).hexdigest(),
        "config": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
        "dtype": str(model.dtype),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "text": hashlib.sha256(tokens + shapes).hexdigest(),
        "recipe": recipe.to_toml(),
        "code": code,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


class Progress:
    """The steps that are done; without a folder nothing is kept.

    Args:
        folder: where they are kept; None for nowhere.
        belongs_to: what decides their values.
        resume: whether to go on with what is there; else it is thrown away.
    """

    def __init__(
        self, folder: Path | None = None, belongs_to: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        self._folder = folder
        if folder is None:
            return
        wanted = dict(belongs_to or {})
        if folder.exists() and any(folder.iterdir()) and self._is_kept(folder, wanted, resume):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = (folder / _RECORD).with_suffix(_PARTIAL)
            partial.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
            partial.replace(folder / _RECORD)
        except OSError as e:
            raise RunError(f"cannot write to {folder}: {e}") from e

    def _is_kept(self, folder: Path, wanted: dict[str, Any], resume: bool) -> bool:
        """Return whether a run can go on with what is in the folder; else clear it."""
        found = _read(folder / _RECORD)
        if found is None and any(file.suffix != _PARTIAL for file in folder.iterdir()):
            raise RunError(f"{folder} is in the way, and holds no unfinished quantization: move it elsewhere")
        if found is None:  # a run was killed before it had begun
            return False
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if resume and not changed:
            logger.info("going on with the %d steps in %s", len(list(folder.glob(f"*{_SUFFIX}"))), folder)
            return True
        reason = f"was made with another {', '.join(changed)}" if changed else "is not to be resumed (--resume)"
        logger.warning("what is in %s %s: starting over", folder, reason)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == _RECORD):  # the record at last
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        return False

    def load(self, step: str) -> dict[str, Tensor] | None:
        """Return the tensors of a step that is done, mapped from their file; None where it is not.

        Writing to them changes a copy in memory, never the file.
        """
        if self._folder is None or not (path := self._path(self._folder, step)).exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as e:
            logger.warning("cannot read %s (%s): computing it again", path, e)
            return None

    def keep(self, step: str, tensors: Mapping[str, Tensor | None]) -> Mapping[str, Tensor]:
        """Keep the tensors of a step, and return them as :meth:`load` does; those that are None are left out.

        Raises:
            RunError: they cannot be written.
        """
        present = {name: t for name, t in tensors.items() if t is not None}
        if self._folder is None:
            return present
        path = self._path(self._folder, step)
        partial = path.with_suffix(_PARTIAL)
        try:
            with partial.open("wb") as file:  # ours, so that a full disk is an OSError
                torch.save({name: _alone(t) for name, t in present.items()}, file)
            partial.replace(path)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise RunError(f"cannot write {path}: {e}; what is done is kept, go on with --resume") from e
        return self.load(step) or present

    def recipe(self, step: str, find: Callable[[], Recipe]) -> Recipe:
        """Return the recipe that was kept of a step, or else what ``find`` returns, and keep that.

        Raises:
            RunError: as :meth:`keep`.
        """
        if (kept := self.load(step)) is not None:
            return Recipe.from_toml(bytes(kept["toml"].tolist()).decode())
        found = find()
        self.keep(step, {"toml": torch.tensor(list(found.to_toml().encode()), dtype=torch.uint8)})
        return found

    @staticmethod
    def _path(folder: Path, step: str) -> Path:
        return folder / f"{step}{_SUFFIX}"


def _alone(x: Tensor) -> Tensor:
    """Return a tensor on the CPU without what else its memory holds, which torch would write as well."""
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
