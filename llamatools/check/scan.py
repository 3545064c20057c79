"""What is wrong with the weights themselves: NaN, infinities, zeros only, scales that no model has.

Numbers are looked at as their bits: without its sign, a float is the larger the larger its bits are as an integer, and
infinity and NaN are the largest. So one maximum per chunk tells whether there is anything to count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Blocks, DType
from ..layout import Layout, PlacedTensor
from .finding import Finding

CHUNK = 4 << 20  # bytes that a thread reads at once
LARGEST = 65504.0  # the largest weight that float16 holds; a model's are thousands of times smaller

# How many times its scale a weight can be, by dtype and field of its block.
REACH: dict[str, dict[str, float]] = {
    "Q4_0": {"d": 8},
    "Q4_1": {"d": 15, "m": 1},
    "Q5_0": {"d": 16},
    "Q5_1": {"d": 31, "m": 1},
    "Q8_0": {"d": 128},
    "Q2_K": {"d": 15 * 3, "dmin": 15},
    "Q3_K": {"d": 32 * 4},
    "Q4_K": {"d": 63 * 15, "dmin": 63},
    "Q5_K": {"d": 63 * 31, "dmin": 63},
    "Q6_K": {"d": 128 * 32},
    "IQ4_NL": {"d": 127},
    "IQ4_XS": {"d": 32 * 127},
}
CODES = {
    "nan": "are NaN",
    "infinite": "are infinite",
    "huge": f"make weights beyond {LARGEST:.0f}, which float16 cannot hold",
}
INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F64": 0x7FF << 52}


@dataclass(frozen=True)
class Numbers:
    """A kind of numbers in a dtype's blocks: from blocks to their bits without signs, as unsigned integers.

    infinity: the bits of infinity, above which is NaN. limit: the bits of the largest number that is no surprise.
    """

    bits: Callable[[Blocks], NDArray[Any]]
    infinity: int
    limit: int


def numbers_of(dtype: DType) -> tuple[Numbers, ...]:
    """The floats that a dtype's blocks are made of: its weights or its scales. None for dtypes that have none."""
    if dtype.name in INFINITY:
        return (_floats(dtype.name, 1, None),)
    if dtype.name == "MXFP4":  # scales are powers of two, 2^(e - 128), and weights up to 12 times that; 255 is NaN
        return (Numbers(lambda blocks: blocks["e"], 254, 128 + int(np.log2(LARGEST / 12))),)
    return tuple(_floats("F16", reach, field) for field, reach in REACH.get(dtype.name, {}).items())


def _floats(name: str, reach: float, of: str | None) -> Numbers:
    infinity = INFINITY[name]
    unsigned = np.dtype("<u8" if name == "F64" else "<u4" if name == "F32" else "<u2")
    magnitude = unsigned.type((1 << 8 * unsigned.itemsize - 1) - 1)
    limits: dict[str, int] = {
        "F16": int(np.float16(LARGEST / reach).view("<u2")),
        "BF16": int(np.float32(LARGEST).view("<u4") >> 16),
        "F32": int(np.float32(LARGEST).view("<u4")),
        "F64": int(np.float64(LARGEST).view("<u8")),
    }

    def bits(blocks: Blocks) -> NDArray[Any]:
        found: NDArray[Any] = (blocks if of is None else blocks[of]).view(unsigned) & magnitude
        return found

    return Numbers(bits, infinity, limits[name])


@dataclass
class Seen:
    """What a tensor's numbers are: by code of a finding, how many and the first row with any; whether all are zero."""

    count: Counter[str] = field(default_factory=Counter)
    first_row: dict[str, int] = field(default_factory=dict)
    zero: bool = True

    def look(self, blocks: Blocks, start: int, kinds: tuple[Numbers, ...]) -> None:
        """Looks at rows from `start` on."""
        for kind in kinds:
            bits = kind.bits(blocks)
            largest = int(bits.max(initial=0))
            self.zero = self.zero and largest == 0
            if largest <= kind.limit and largest < kind.infinity:
                continue
            for code, odd in (
                ("nan", bits > kind.infinity),
                ("infinite", bits == kind.infinity),
                ("huge", (bits > kind.limit) & (bits < kind.infinity)),
            ):
                if n := int(np.count_nonzero(odd)):
                    self.count[code] += n
                    row = start + int(odd.reshape(len(blocks), -1).any(1).argmax())
                    self.first_row[code] = min(row, self.first_row.get(code, row))


def scan(
    layout: Layout, *, threads: int = 1, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Finding]:
    """Reads the data of every tensor, as far as the file has it, and finds what no model's weights are.

    Memory is bounded by a few megabytes a thread (more where a row is longer). on_progress: bytes read, of how many.
    """
    looked = [t for t in layout.tensors if t.source and t.end <= layout.files[t.file].size and numbers_of(t.dtype)]
    total = sum(tensor.nbytes for tensor in looked)
    done, lock = 0, Lock()

    def progress(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            on_progress(done, total)

    with ThreadPoolExecutor(threads) as pool:
        largest_first = sorted(looked, key=lambda tensor: -tensor.nbytes)
        seen = dict(zip(map(id, largest_first), pool.map(partial(_scan, progress), largest_first), strict=True))
    file = [str(file.path) for file in layout.files]
    found = [finding for tensor in looked for finding in _findings(tensor, seen[id(tensor)], file[tensor.file])]
    unknown = sorted({t.dtype.name for t in layout.tensors if not numbers_of(t.dtype)})
    if unknown:
        found.append(Finding("not-scanned", f"the data of {', '.join(unknown)} tensors were not looked into", file[0]))
    return found


def _scan(progress: Callable[[int], None], tensor: PlacedTensor) -> Seen:
    source, seen, kinds = tensor.source, Seen(), numbers_of(tensor.dtype)
    assert source is not None, "only tensors with a source are looked at"
    rows_at_once = max(1, CHUNK // max(source.row_nbytes, 1))
    for start in range(0, source.n_rows, rows_at_once):
        blocks = source.read(start, min(start + rows_at_once, source.n_rows))
        seen.look(blocks, start, kinds)
        progress(blocks.nbytes)
    return seen


def _findings(tensor: PlacedTensor, seen: Seen, file: str) -> Iterator[Finding]:
    where = f"tensor {tensor.name!r}"
    what = "scales" if tensor.dtype.is_quantized else "weights"
    for code, are in CODES.items():
        if n := seen.count[code]:
            row, span = seen.first_row[code], None
            if tensor.source and not tensor.strides:
                start = tensor.offset + row * tensor.source.row_nbytes
                span = (start, start + tensor.source.row_nbytes)
            yield Finding(code, f"{n} of its {what} {are}; see row {row}", file, where, span)
    if seen.zero and tensor.nbytes:
        yield Finding("zero-tensor", f"all of its {tensor.n_weights} weights are zero", file, where)
