"""Where the fields of a block lie, as constants that kernels can use."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from ..base import DType


def offsets(dtype: DType) -> Any:
    """The byte offset of each field of the dtype's block, under the field's name, and nbytes, the bytes of a block."""
    places = {name: field[1] for name, field in (dtype.block.fields or {}).items()}
    places["nbytes"] = dtype.block_nbytes
    # Numba takes what a module's tuple holds as constants.
    return namedtuple("offsets", places)(**places)
