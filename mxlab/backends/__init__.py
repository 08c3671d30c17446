"""Implementations of the numerics; :mod:`mxlab.numerics` chooses one."""
