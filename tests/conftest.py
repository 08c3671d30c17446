"""Fixtures shared by the tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# The same examples on every run, and no limit on the time of one: a slow machine is not a failure.
settings.register_profile("mxlab", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("mxlab")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the repository: the material in it is not published")
    return folder
