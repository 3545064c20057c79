"""Every dtype that decodes or encodes, against gguf-py, which decodes, and ggml's C, which decodes and encodes."""

from __future__ import annotations

import gguf
import llamacpp
import numpy as np
import pytest
from hard_rows import edge_rows, importances, ordinary_rows, real_rows
from numpy.typing import NDArray

from llamatools import dtypes
from llamatools.dtypes import BF16, F16, F32, DType
from llamatools.dtypes.kernels import sum_of_squares

GGML = [dtype for dtype in dtypes.TABLE if dtype.id is not None and dtype.name != "F64"]
DECODED = [pytest.param(dtype, id=dtype.name) for dtype in GGML if dtype.decode]
DECODED_BLOCKS = [pytest.param(dtype, id=dtype.name) for dtype in GGML if dtype.decode and dtype.is_quantized]
ENCODED = [pytest.param(dtype, id=dtype.name) for dtype in GGML if dtype.encode]
ENCODED_BLOCKS = [pytest.param(dtype, id=dtype.name) for dtype in GGML if dtype.encode and dtype.is_quantized]
N_COLUMNS = 768
SUBNORMAL = np.float32(1e-45)

Floats = NDArray[np.float32]


def differing_bytes(dtype: DType, values: Floats, importance: Floats | None) -> int:
    ours = dtype.encode(values, importance).view(np.uint8)
    return int((ours != llamacpp.quantize(dtype.id, values, importance)).sum())


def assert_decodes_as_ggml_does(dtype: DType, blocks: NDArray) -> None:
    """NaN equals NaN, whatever its bits; zeros of different signs differ."""
    ours = dtype.decode(blocks)
    theirs = llamacpp.dequantize(dtype.id, blocks.view(np.uint8), blocks.shape[1] * dtype.block_size)
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])


def test_all_that_should_be_are_decoded_and_encoded() -> None:
    encoded = {
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K",
        "IQ4_NL", "IQ4_XS", "MXFP4",
    }  # fmt: skip
    assert {param.id for param in ENCODED} == encoded
    assert {param.id for param in DECODED} == encoded | {"Q2_K", "Q3_K"}


@pytest.mark.parametrize("dtype", DECODED)
def test_decodes_random_blocks_as_gguf_and_ggml_do(dtype: DType) -> None:
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (100, 101 * dtype.block_nbytes), np.uint8).view(dtype.block)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.view(np.uint8), gguf.GGMLQuantizationType(dtype.id))
    np.testing.assert_array_equal(dtype.decode(blocks), expected)
    if dtype is not F32:  # which ggml has no function for
        assert_decodes_as_ggml_does(dtype, blocks)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_decodes_all_there_is_as_ggml_does(dtype: DType) -> None:
    assert_decodes_as_ggml_does(dtype, np.arange(65536, dtype=np.uint16).view(dtype.block).reshape(1, -1))


@pytest.mark.parametrize("dtype", DECODED_BLOCKS)
def test_decodes_every_scale_as_ggml_does(dtype: DType) -> None:
    """Every float16 as d (and dmin or m), or every exponent: zeros, subnormals, infinities, NaN."""
    blocks = np.random.default_rng(4).integers(0, 256, (256, 256 * dtype.block_nbytes), np.uint8).view(dtype.block)
    patterns = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for field, scales in (("d", patterns), ("dmin", patterns[::-1, ::-1]), ("m", patterns[::-1, ::-1])):
        if field in blocks.dtype.names:
            blocks[field] = scales.view(np.float16)
    if "e" in blocks.dtype.names:
        blocks["e"] = np.arange(256)
    assert_decodes_as_ggml_does(dtype, blocks)


@pytest.mark.parametrize("dtype", DECODED_BLOCKS)
def test_decodes_every_code_as_ggml_does(dtype: DType) -> None:
    """All bytes of a block but d, dmin, m and e equal, for each byte there is: every scale with every code."""
    blocks = np.zeros((256, 1), dtype.block)
    blocks.view(np.uint8)[...] = np.arange(256)[:, None]
    for field in {"d", "dmin", "m"} & set(blocks.dtype.names):
        blocks[field] = 0.37
    if "e" in blocks.dtype.names:
        blocks["e"] = 125
    assert_decodes_as_ggml_does(dtype, blocks)


@pytest.mark.parametrize("rows", ordinary_rows(N_COLUMNS).items(), ids=lambda rows: rows[0])
@pytest.mark.parametrize("dtype", ENCODED)
def test_encodes_ordinary_rows_as_ggml_does(dtype: DType, rows: tuple[str, Floats]) -> None:
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
@pytest.mark.parametrize("model", ["stories260k", "tiny-llama"])
def test_encodes_real_weights_as_ggml_does(dtype: DType, model: str) -> None:
    rows = real_rows(model, N_COLUMNS)
    assert differing_bytes(dtype, rows, None) == 0
    for name in ("equal", "like an imatrix"):
        assert differing_bytes(dtype, rows, importances(N_COLUMNS)[name]) == 0, name


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rounds_every_kind_of_float_as_ggml_does(dtype: DType) -> None:
    """Random bits: subnormals and infinities among them. NaN, of which ggml's builds keep different bits, stays NaN."""
    values = np.random.default_rng(8).integers(0, 2**32, (64, 4096), np.uint32).view(np.float32)
    values[0, :4] = np.inf, -np.inf, SUBNORMAL, -SUBNORMAL
    nan = np.isnan(values)
    assert np.isnan(dtype.decode(dtype.encode(values, None)))[nan].all()
    assert differing_bytes(dtype, np.where(nan, np.float32(0), values), None) == 0


def test_mxfp4_rounds_logarithms_as_ggml_does() -> None:
    """Of the floats next below and above every power of two, whose logarithms round to the power, or do not."""
    ulps = np.arange(-100, 8)
    powers = np.arange(-124, 128)[:, None]
    largest = (np.float64(2) ** powers * (1 + ulps * 2.0**-24 * np.where(ulps < 0, 1, 2))).astype(np.float32)
    values = np.zeros((largest.size, 32), np.float32)
    values[:, 5] = largest.ravel()
    values[:, 6:] = largest.reshape(-1, 1) * np.linspace(-1, 1, 26, dtype=np.float32)
    assert differing_bytes(dtypes.named("MXFP4"), values, None) == 0


@pytest.mark.parametrize("dtype", ENCODED_BLOCKS)
def test_what_cannot_be_scaled_becomes_zeros(dtype: DType) -> None:
    """Weights so small that one over the scale overflows: C converts infinities and NaN, which is undefined."""
    values = np.zeros((1, 256), np.float32)
    values[0, ::3] = [SUBNORMAL * (k % 5 - 2) for k in range(86)]
    for importance in (None, np.ones(256, np.float32)):
        decoded = dtype.decode(dtype.encode(values, importance))
        np.testing.assert_array_equal(decoded, np.zeros_like(values))


@pytest.mark.parametrize("dtype", ENCODED_BLOCKS)
def test_takes_whatever_arrays_numpy_has(dtype: DType) -> None:
    values = ordinary_rows(256)["gaussian"]
    expected = dtype.encode(values, None)
    wide = np.zeros((37, 512), np.float32)
    wide[:, ::2] = values
    assert (dtype.encode(wide[:, ::2], None) == expected).all()
    unaligned = np.zeros(values.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(values.shape)
    unaligned[...] = values
    assert (dtype.encode(unaligned, None) == expected).all()
    mapped = np.frombuffer(expected.tobytes(), dtype.block).reshape(expected.shape)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(dtype.decode(mapped), dtype.decode(expected))


@pytest.mark.parametrize("dtype", ENCODED_BLOCKS)
def test_bfloat16_is_encoded_as_it_is(dtype: DType) -> None:
    """To the bytes that its float32 would give; rows of bfloat16 have many weights that are largest with both signs."""
    importance = importances(N_COLUMNS)["like an imatrix"]
    encodes = [dtype.encode, dtype.search] if dtype.search else [dtype.encode]
    for rows in [*ordinary_rows(N_COLUMNS, n_rows=5).values(), edge_rows(N_COLUMNS)]:
        halves = BF16.encode(rows, None)
        values = BF16.decode(halves)
        assert dtype.encode(halves, None).tobytes() == dtype.encode(values, None).tobytes()
        for encode in encodes:
            assert encode(halves, importance).tobytes() == encode(values, importance).tobytes()


@pytest.mark.parametrize("dtype", ENCODED_BLOCKS)
def test_what_encoding_lost_is_what_decoding_shows(dtype: DType) -> None:
    for rows in [*ordinary_rows(N_COLUMNS, n_rows=45).values()]:
        halves = BF16.encode(rows, None)
        for weights, values in ((rows, rows), (halves, BF16.decode(halves))):
            blocks = dtype.encode(values, None)
            theirs = llamacpp.dequantize(dtype.id, blocks.view(np.uint8), N_COLUMNS)
            errors = np.square(theirs.astype(np.float64) - values).reshape(-1, dtype.block_size).sum(axis=1)
            squares, all_errors, worst, where = dtype.compare(weights, blocks)
            np.testing.assert_allclose(squares, np.square(values, dtype=np.float64).sum(), rtol=1e-5)
            np.testing.assert_allclose(all_errors, errors.sum(), rtol=1e-5)
            np.testing.assert_allclose([worst, errors[int(where) // dtype.block_size]], errors.max(), rtol=1e-5)


@pytest.mark.parametrize("n_weights", [1, 15, 16, 17, 31, 4096, 5000])
def test_every_weight_counts_among_the_squares(n_weights: int) -> None:
    values = np.random.default_rng(6).standard_normal((1, n_weights), np.float32)
    np.testing.assert_allclose(sum_of_squares(values), np.square(values, dtype=np.float64).sum(), rtol=1e-6)
    values[0, -1] = np.nan
    assert np.isnan(sum_of_squares(values))
    assert np.isnan(sum_of_squares(BF16.encode(values, None)))
