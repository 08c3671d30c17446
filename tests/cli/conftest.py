"""The mxlab command, run in the process of the tests."""

import logging
import sys

import pytest

from mxlab.cli import main as cli


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What the command changes in its process: the logger, and the environment."""
    logger = logging.getLogger("mxlab")
    kept = logger.level, list(logger.handlers), logger.propagate
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("MX_SPECS_JSON", raising=False)
    yield
    level, logger.handlers, logger.propagate = kept
    logger.setLevel(level)


@pytest.fixture
def mxlab(monkeypatch, capfd):
    """Runs the command in this process; returns its exit code and what it printed and complained."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mxlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capfd.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return call
