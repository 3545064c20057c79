"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 against gguf-py, which decodes, and ggml's C, which encodes."""

from __future__ import annotations

import gguf
import llamacpp
import numpy as np
import pytest
from hard_rows import edge_rows, importances, ordinary_rows, real_rows
from numpy.typing import NDArray

from llamatools import dtypes
from llamatools.dtypes import DType

LEGACY = [pytest.param(dtypes.BY_NAME[name], id=name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
N_COLUMNS = 288


def differing_bytes(dtype: DType, values: NDArray[np.float32], importance: NDArray[np.float32] | None) -> int:
    ours = dtype.encode(values, importance).view(np.uint8)
    return int((ours != llamacpp.quantize(dtype.id, values, importance)).sum())


@pytest.mark.parametrize("dtype", LEGACY)
def test_decodes_random_blocks_as_gguf_does(dtype: DType) -> None:
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (100, 101 * dtype.block_nbytes), np.uint8).view(dtype.block)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.view(np.uint8), gguf.GGMLQuantizationType(dtype.id))
    np.testing.assert_array_equal(dtype.decode(blocks), expected)  # NaN equals NaN, whatever its bits


@pytest.mark.parametrize("dtype", LEGACY)
def test_decodes_every_scale_as_ggml_does(dtype: DType) -> None:
    """Every float16 as the scale (and minimum): zeros, subnormals, infinities, NaN."""
    blocks = np.random.default_rng(4).integers(0, 256, (256, 256 * dtype.block_nbytes), np.uint8).view(dtype.block)
    blocks["d"] = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    if "m" in blocks.dtype.names:
        blocks["m"] = blocks["d"][::-1, ::-1]
    ours, theirs = dtype.decode(blocks), llamacpp.dequantize(dtype.id, blocks.view(np.uint8), 256 * 32)
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])  # signs of zeros, too


@pytest.mark.parametrize("rows", ordinary_rows(N_COLUMNS).items(), ids=lambda rows: rows[0])
@pytest.mark.parametrize("dtype", LEGACY)
def test_encodes_ordinary_rows_as_ggml_does(dtype: DType, rows: tuple[str, NDArray[np.float32]]) -> None:
    assert differing_bytes(dtype, rows[1], None) == 0
    for name, importance in importances(N_COLUMNS).items():
        assert differing_bytes(dtype, rows[1], importance) == 0, name


@pytest.mark.parametrize("dtype", LEGACY)
def test_encodes_edge_rows_as_ggml_does(dtype: DType) -> None:
    for number, row in enumerate(edge_rows(N_COLUMNS)):
        assert differing_bytes(dtype, row[None], None) == 0, number
        for name, importance in importances(N_COLUMNS).items():
            assert differing_bytes(dtype, row[None], importance) == 0, (number, name)


@pytest.mark.parametrize("dtype", LEGACY)
def test_encodes_real_weights_as_ggml_does(dtype: DType) -> None:
    rows = real_rows(64)
    assert differing_bytes(dtype, rows, None) == 0
    for name, importance in importances(64).items():
        assert differing_bytes(dtype, rows, importance) == 0, name


@pytest.mark.parametrize("dtype", LEGACY)
def test_what_cannot_be_scaled_becomes_zero_codes(dtype: DType) -> None:
    """Weights so small that one over the scale overflows: C converts infinities and NaN, which is undefined."""
    values = np.zeros((1, 32), np.float32)
    values[0, ::3] = [np.float32(1e-45) * (k % 5 - 2) for k in range(11)]
    for importance in (None, np.ones(32, np.float32)):
        decoded = dtype.decode(dtype.encode(values, importance))
        np.testing.assert_array_equal(decoded, np.zeros_like(values))


@pytest.mark.parametrize("dtype", LEGACY)
def test_takes_whatever_arrays_numpy_has(dtype: DType) -> None:
    values = ordinary_rows(64)["gaussian"]
    expected = dtype.encode(values, None)
    wide = np.zeros((37, 128), np.float32)
    wide[:, ::2] = values
    assert (dtype.encode(wide[:, ::2], None) == expected).all()
    unaligned = np.zeros(values.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(values.shape)
    unaligned[...] = values
    assert (dtype.encode(unaligned, None) == expected).all()
    mapped = np.frombuffer(expected.tobytes(), dtype.block).reshape(expected.shape)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(dtype.decode(mapped), dtype.decode(expected))
