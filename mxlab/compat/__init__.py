"""Other projects' interfaces: :func:`enable` lets scripts written for microxcaling find ``mx`` here."""

from mxlab.compat.alias import disable, enable

__all__ = ["disable", "enable"]
