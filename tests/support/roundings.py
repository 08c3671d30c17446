"""The roundings that each of the numerics has."""

from mxlab.formats import NUMERICS, roundings_of

NUMERICS_AND_ROUNDINGS = [(numerics, rounding) for numerics in NUMERICS for rounding in roundings_of(numerics)]
