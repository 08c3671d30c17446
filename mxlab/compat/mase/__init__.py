"""MASE's TOML files as recipes. Read ``recipe`` (a file), ``selectors`` (one table of it), ``formats`` (its keys)."""

from mxlab.compat.mase.recipe import MaseConfig, load

__all__ = ["MaseConfig", "load"]
