"""Choices that more than one command offers."""

from enum import StrEnum


class Dtype(StrEnum):
    """The dtypes a model can compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
