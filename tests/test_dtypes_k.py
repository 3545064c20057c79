"""Q2_K to Q6_K against gguf-py, which decodes, and ggml's C, which decodes and encodes."""

from __future__ import annotations

import gguf
import llamacpp
import numpy as np
import pytest
from hard_rows import edge_rows, importances, ordinary_rows, real_rows
from numpy.typing import NDArray

from llamatools import dtypes
from llamatools.dtypes import DType

DECODED = [pytest.param(dtypes.BY_NAME[name], id=name) for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
ENCODED = [pytest.param(dtypes.BY_NAME[name], id=name) for name in ("Q4_K", "Q5_K", "Q6_K")]
N_COLUMNS = 768


def differing_bytes(dtype: DType, values: NDArray[np.float32], importance: NDArray[np.float32] | None) -> int:
    ours = dtype.encode(values, importance).view(np.uint8)
    return int((ours != llamacpp.quantize(dtype.id, values, importance)).sum())


def assert_same_bits(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """NaN equals NaN, whatever its bits; zeros of different signs differ."""
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])


@pytest.mark.parametrize("dtype", DECODED)
def test_decodes_random_blocks_as_gguf_and_ggml_do(dtype: DType) -> None:
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (100, 101 * dtype.block_nbytes), np.uint8).view(dtype.block)
    ours = dtype.decode(blocks)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.view(np.uint8), gguf.GGMLQuantizationType(dtype.id))
    np.testing.assert_array_equal(ours, expected)
    assert_same_bits(ours, llamacpp.dequantize(dtype.id, blocks.view(np.uint8), 101 * 256))


@pytest.mark.parametrize("dtype", DECODED)
def test_decodes_every_scale_as_ggml_does(dtype: DType) -> None:
    """Every float16 as d (and dmin): zeros, subnormals, infinities, NaN."""
    blocks = np.random.default_rng(4).integers(0, 256, (256, 256 * dtype.block_nbytes), np.uint8).view(dtype.block)
    blocks["d"] = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    if "dmin" in blocks.dtype.names:
        blocks["dmin"] = blocks["d"][::-1, ::-1]
    assert_same_bits(dtype.decode(blocks), llamacpp.dequantize(dtype.id, blocks.view(np.uint8), 256 * 256))


@pytest.mark.parametrize("dtype", DECODED)
def test_decodes_every_code_as_ggml_does(dtype: DType) -> None:
    """All bytes of a block but d and dmin equal, for each byte there is: every scale with every code."""
    blocks = np.zeros((256, 1), dtype.block)
    blocks.view(np.uint8)[...] = np.arange(256)[:, None]
    for field in {"d", "dmin"} & set(blocks.dtype.names):
        blocks[field] = 0.37
    assert_same_bits(dtype.decode(blocks), llamacpp.dequantize(dtype.id, blocks.view(np.uint8), 256))


@pytest.mark.parametrize("rows", ordinary_rows(N_COLUMNS).items(), ids=lambda rows: rows[0])
@pytest.mark.parametrize("dtype", ENCODED)
def test_encodes_ordinary_rows_as_ggml_does(dtype: DType, rows: tuple[str, NDArray[np.float32]]) -> None:
    assert differing_bytes(dtype, rows[1], None) == 0
    for name, importance in importances(N_COLUMNS).items():
        assert differing_bytes(dtype, rows[1], importance) == 0, name


@pytest.mark.parametrize("dtype", ENCODED)
def test_encodes_edge_rows_as_ggml_does(dtype: DType) -> None:
    for number, row in enumerate(edge_rows(N_COLUMNS)):
        assert differing_bytes(dtype, row[None], None) == 0, number
        for name, importance in importances(N_COLUMNS).items():
            assert differing_bytes(dtype, row[None], importance) == 0, (number, name)


@pytest.mark.parametrize("dtype", ENCODED)
def test_encodes_real_weights_as_ggml_does(dtype: DType) -> None:
    rows = real_rows(512)
    assert differing_bytes(dtype, rows, None) == 0
    for name, importance in importances(512).items():
        assert differing_bytes(dtype, rows, importance) == 0, name
