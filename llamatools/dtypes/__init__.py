"""The dtype table: every type a tensor's weights can be stored in, by name and by ggml's number."""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import UsageError
from . import k_quants, legacy, listed, nonlinear, plain
from .base import Blocks, Decode, DType, Encode, Floats, Weights
from .plain import BF16, F16, F32

TABLE: tuple[DType, ...] = plain.TABLE + legacy.TABLE + k_quants.TABLE + nonlinear.TABLE + listed.TABLE
BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in TABLE}
BY_ID: dict[int, DType] = {dtype.id: dtype for dtype in TABLE if dtype.id is not None}


def named(name: str) -> DType:
    """The dtype of that name, in any case. Raises UsageError naming the nearest."""
    dtype = BY_NAME.get(name.upper())
    if dtype is None:
        near = get_close_matches(name.upper(), BY_NAME, n=1)
        raise UsageError(f"unknown dtype {name!r}", todo=f"Did you mean {near[0]}?" if near else None)
    return dtype


__all__ = [
    "BF16", "BY_ID", "BY_NAME", "F16", "F32", "TABLE", "Blocks", "DType", "Decode", "Encode", "Floats", "Weights",
    "named",
]  # fmt: skip
