"""Matrices on a mapped file."""

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from llamatools_runtime.weights import SCRATCH, map_weights, matmul

from llamatools.dtypes import BF16, F16, F32, TABLE, DType
from llamatools.errors import FormatError, UnsupportedError
from llamatools.layout import File, Layout, PlacedTensor

DECODABLE = [dtype for dtype in TABLE if dtype.decode is not None and dtype.id is not None]


def layout_of(path: Path, dtype: DType, shape: tuple[int, ...], content: bytes, offset: int = 32) -> Layout:
    path.write_bytes(bytes(offset) + content)
    tensor = PlacedTensor("w", dtype, shape, offset, len(content))
    return Layout("test", (File(path, offset + len(content)),), (tensor,))


@pytest.mark.parametrize("dtype", DECODABLE, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_matmul_is_the_product_with_the_decoded_matrix(tmp_path, dtype, n_tokens):
    draws = np.random.default_rng(1)
    n_out, n_in = 2000, 512  # more rows than are decoded at a time
    blocks = draws.integers(0, 256, (n_out, dtype.row_nbytes(n_in)), np.uint8)
    if dtype.is_quantized or dtype.name == "F16":  # keep every float16 scale finite
        blocks &= 0xBF
    if dtype.name in ("F32", "F64", "BF16"):
        floats = draws.standard_normal((n_out, n_in))
        blocks = (floats.astype(np.float32).view("<u4") >> 16).astype("<u2") if dtype.name == "BF16" else floats
        blocks = blocks.astype(dtype.block)
    if dtype.name == "F64":
        decoded = blocks
    else:
        decoded = gguf.quants.dequantize(
            blocks if dtype.name != "BF16" else blocks.view(np.uint8), gguf.GGMLQuantizationType(dtype.id)
        ) if dtype.name not in ("F32", "F16") else blocks.view(dtype.block)  # fmt: skip
    x = draws.standard_normal((n_tokens, n_in)).astype(np.float32)
    expected = x.astype(np.float64) @ decoded.astype(np.float64).T

    matrix = map_weights(layout_of(tmp_path / "w", dtype, (n_out, n_in), blocks.tobytes()))["w"]
    found = matmul(matrix, x, float32=True)

    assert found.dtype == np.float32
    bound = 1e-6 * (np.abs(x) @ np.abs(decoded.astype(np.float64)).T)
    assert (np.abs(found - expected) <= bound).all()
    np.testing.assert_array_equal(matrix.pick(np.array([7, 0])), decoded[[7, 0]].astype(np.float32))


def test_an_unaligned_f32_matrix_gives_the_same_product(tmp_path):
    weights = np.random.default_rng(2).standard_normal((50, 64)).astype(np.float32)
    x = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)
    matrix = map_weights(layout_of(tmp_path / "w", F32, (50, 64), weights.tobytes(), offset=33))["w"]
    np.testing.assert_allclose(matmul(matrix, x), x @ weights.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_weights_stay_in_the_file(tmp_path, dtype):
    n_out, n_in = 4096, 1024
    layout = layout_of(tmp_path / "w", dtype, (n_out, n_in), bytes(n_out * dtype.row_nbytes(n_in)))
    x = np.ones((1, n_in), np.float32)
    tracemalloc.start()
    matrix = map_weights(layout)["w"]
    matmul(matrix, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * SCRATCH  # decoded all at once, the matrix would take 16
    assert not matrix.blocks.flags.writeable
    assert not matrix.blocks.flags.owndata


def test_a_vector_is_decoded_whole(tmp_path):
    layout = layout_of(tmp_path / "w", F16, (4,), np.array([1, 2, 3, 4], "<f2").tobytes())
    np.testing.assert_array_equal(map_weights(layout)["w"].vector(), np.array([1, 2, 3, 4], np.float32))


def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path):
    layout = layout_of(tmp_path / "w.gguf", F32, (4,), bytes(16))
    (tmp_path / "w.gguf").write_bytes(bytes(40))
    with pytest.raises(
        FormatError, match=r"w\.gguf: it had 48 bytes when its header was read and has 40 now\. It changed"
    ):
        map_weights(layout)


def test_a_tensor_beyond_the_end_of_the_file_is_refused(tmp_path):
    path = tmp_path / "w.gguf"
    path.write_bytes(bytes(100))
    layout = Layout("test", (File(path, 100),), (PlacedTensor("w", F32, (64,), 32, 256),))
    with pytest.raises(
        FormatError, match=r"tensor 'w': its data is bytes 32 to 288, but the file ends at 100\. The file is"
    ):
        map_weights(layout)


def test_a_dtype_without_decoder_is_refused_by_name(tmp_path):
    undecodable = next(dtype for dtype in TABLE if dtype.decode is None and dtype.block_size == 1)
    layout = layout_of(tmp_path / "w.gguf", undecodable, (4,), bytes(4 * undecodable.block_nbytes))
    with pytest.raises(UnsupportedError, match=rf"tensor 'w': weights of type {undecodable} cannot be computed with"):
        map_weights(layout)


def test_a_missing_file_is_refused(tmp_path):
    layout = layout_of(tmp_path / "w.gguf", F32, (4,), bytes(16))
    (tmp_path / "w.gguf").unlink()
    with pytest.raises(FormatError, match=r"w\.gguf: no such file or directory"):
        map_weights(layout)
