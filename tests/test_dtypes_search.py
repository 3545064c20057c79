"""`search`, which spends more care on a block, against ggml's C, by the error weighted with the columns' importance."""

from __future__ import annotations

import gguf
import llamacpp
import numpy as np
import pytest
from hard_rows import edge_rows, importances, ordinary_rows, real_rows
from numpy.typing import NDArray

from llamatools import dtypes
from llamatools.dtypes import DType

Floats = NDArray[np.float32]
N_COLUMNS = 768

# By how much the weighted error of search is below that of ggml's C with the same importance, at least, where that is
# like an imatrix. The weight is the importance alone; ggml itself goes by importance * sqrt(mean square + x^2).
AT_MOST = {
    "Q4_0": 0.92, "Q4_1": 0.94, "Q5_0": 0.88, "Q5_1": 0.95, "Q4_K": 0.93, "Q5_K": 0.84, "Q6_K": 0.80, "IQ4_NL": 0.88,
    "IQ4_XS": 0.84,
}  # fmt: skip
SEARCHED = [pytest.param(dtypes.BY_NAME[name], id=name) for name in AT_MOST]


def weighted_errors(dtype: DType, blocks: NDArray[np.uint8], values: Floats, importance: Floats) -> Floats:
    """Of each row: sum of importance * squared error. Decoded by gguf-py."""
    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(dtype.id)).astype(np.float64)
    return ((decoded - values) ** 2 * importance).sum(1)


def ratios(dtype: DType, values: Floats, importance: Floats) -> Floats:
    """Of each row: error of search / error of ggml's C."""
    ours = weighted_errors(dtype, dtype.search(values, importance).view(np.uint8), values, importance)
    return ours / weighted_errors(dtype, llamacpp.quantize(dtype.id, values, importance), values, importance)


@pytest.mark.parametrize("dtype", SEARCHED)
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "bfloat16"])
def test_less_weighted_error_than_ggml(dtype: DType, kind: str) -> None:
    rows = ordinary_rows(N_COLUMNS)[kind]
    for name in ("equal", "like an imatrix", "zeros among them", "huge"):
        found = ratios(dtype, rows, importances(N_COLUMNS)[name])
        assert found.mean() < 1, name
        assert (found <= 1.1).mean() > 0.9, name  # no row is promised anything, few are any worse
    assert ratios(dtype, rows, importances(N_COLUMNS)["like an imatrix"]).mean() <= AT_MOST[dtype.name]


@pytest.mark.parametrize("dtype", SEARCHED)
def test_less_weighted_error_than_ggml_in_real_weights(dtype: DType) -> None:
    rows = real_rows("tiny-llama", N_COLUMNS)[::5]
    assert ratios(dtype, rows, importances(N_COLUMNS)["like an imatrix"]).mean() <= AT_MOST[dtype.name]


@pytest.mark.parametrize("dtype", SEARCHED)
def test_edge_rows_have_finite_scales(dtype: DType) -> None:
    rows = edge_rows(N_COLUMNS)
    for importance in importances(N_COLUMNS).values():
        decoded = dtype.decode(dtype.search(rows, importance))
        assert np.isfinite(decoded).all()
        assert (decoded[:3] == 0).all()  # rows of zeros


@pytest.mark.parametrize("dtype", SEARCHED)
def test_edge_rows_are_hardly_worse_than_ggml_makes_them(dtype: DType) -> None:
    """Those whose weights lie within what float16 scales reach."""
    rows = edge_rows(N_COLUMNS)
    rows = rows[(np.abs(rows).max(1) < 1e4) & (np.abs(rows).max(1) > 1e-3)]
    importance = importances(N_COLUMNS)["like an imatrix"]
    ours = weighted_errors(dtype, dtype.search(rows, importance).view(np.uint8), rows, importance)
    theirs = weighted_errors(dtype, llamacpp.quantize(dtype.id, rows, importance), rows, importance)
    energy = (rows.astype(np.float64) ** 2 * importance).sum(1)
    assert (ours <= 1.05 * theirs + 2e-4 * energy).all(), np.flatnonzero(ours > 1.05 * theirs + 2e-4 * energy)


@pytest.mark.parametrize("dtype", SEARCHED)
def test_columns_without_importance_are_coded_with_care_all_the_same(dtype: DType) -> None:
    """A block whose columns were never active is coded as if all were equally important."""
    rows = ordinary_rows(N_COLUMNS)["gaussian"]
    importance = np.ones(N_COLUMNS, np.float32)
    importance[:256] = 0
    some = dtype.search(rows, importance).view(np.uint8)
    equal = dtype.search(rows, np.ones(N_COLUMNS, np.float32)).view(np.uint8)
    error = (dtype.decode(some.view(dtype.block)) - rows)[:, :256].std()
    assert error < 1.02 * (dtype.decode(equal.view(dtype.block)) - rows)[:, :256].std()
    assert (dtype.search(rows, np.zeros(N_COLUMNS, np.float32)).view(np.uint8) == equal).all()
    assert (dtype.search(rows, None).view(np.uint8) == equal).all()


@pytest.mark.parametrize("dtype", SEARCHED)
def test_rows_do_not_depend_on_how_they_are_divided(dtype: DType) -> None:
    rows, importance = ordinary_rows(N_COLUMNS)["heavy tails"], importances(N_COLUMNS)["like an imatrix"]
    together = dtype.search(rows, importance)
    apart = np.concatenate([dtype.search(rows[k : k + 5], importance) for k in range(0, 37, 5)])
    assert (apart.view(np.uint8) == together.view(np.uint8)).all()


def test_where_nothing_is_to_be_searched_there_is_no_search() -> None:
    assert {dtype.name for dtype in dtypes.TABLE if dtype.search} == set(AT_MOST)
