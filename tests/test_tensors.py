"""Lazy tensors, against torch and numpy: views of every shape, joined, replicated and cast, by any range of rows."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamatools import strided
from llamatools.dtypes import BF16, F16, F32, DType, named
from llamatools.errors import FormatError, UnsupportedError
from llamatools.tensors import (
    ArrayTensor,
    Cast,
    Concat,
    FileTensor,
    LazyTensor,
    Replicated,
    SourceFile,
    Witness,
    read_floats,
)

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
OFFSET = 24  # bytes before the storage, in every file here
ANY_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def weights(shape: tuple[int, ...], dtype: str = "F32", seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(TORCH[dtype])


def stored(view: torch.Tensor, folder: Path, dtype: DType = F32) -> FileTensor:
    """The storage of a torch tensor in a file, and the tensor as a view of that file."""
    path = folder / "weights"
    everything = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    path.write_bytes(bytes(OFFSET) + as_bytes(everything))
    file = SourceFile(path, path.stat().st_size)
    offset = OFFSET + view.storage_offset() * view.element_size()
    return FileTensor("t", dtype, tuple(view.shape), file, offset, view.stride())


def written(tensor: torch.Tensor, path: Path, dtype: DType = F32) -> FileTensor:
    """A contiguous torch tensor in a file of its own."""
    path.write_bytes(as_bytes(tensor))
    return FileTensor("t", dtype, tuple(tensor.shape), SourceFile(path, path.stat().st_size), 0)


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """(n_rows, row length)."""
    n_rows = int(np.prod(tensor.shape[:-1], dtype=int))
    return tensor.reshape(n_rows, tensor.shape[-1] if tensor.ndim else 1)


def assert_reads(lazy: LazyTensor, expected: torch.Tensor, start: int = 0, stop: int | None = None) -> None:
    rows = rows_of(expected)[start:stop]
    blocks = lazy.read(start, lazy.n_rows if stop is None else stop)
    assert blocks.shape == tuple(rows.shape)
    assert blocks.dtype == lazy.dtype.block
    assert blocks.flags.c_contiguous
    assert blocks.tobytes() == as_bytes(rows)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Any view: axes in any order, sliced, stepped over, repeated, of length 1 or 0."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    view = weights(tuple(shape), draw(st.sampled_from(list(TORCH))))
    view = view.permute(draw(st.permutations(range(view.ndim))))
    for axis in range(view.ndim):
        low = draw(st.integers(0, view.shape[axis]))
        high = draw(st.integers(low, view.shape[axis]))
        index = (slice(None),) * axis + (slice(low, high, draw(st.integers(1, 3))),)
        view = view[index]
    if draw(st.booleans()):
        view = view.unsqueeze(draw(st.integers(0, view.ndim)))
        view = view.expand([draw(st.sampled_from([1, 3])) if n == 1 else n for n in view.shape])
    return view


@given(views(), st.data())
@ANY_FOLDER
def test_any_view_by_any_rows(tmp_path: Path, view: torch.Tensor, data: st.DataObject) -> None:
    dtype = named({v: k for k, v in TORCH.items()}[view.dtype])
    tensor = stored(view, tmp_path, dtype)
    assert_reads(tensor, view)
    if view.ndim:
        start = data.draw(st.integers(0, tensor.n_rows))
        stop = data.draw(st.integers(start, tensor.n_rows))
        assert_reads(tensor, view, start, stop)
        for row in range(tensor.n_rows):
            assert_reads(tensor, view, row, row + 1)


@given(views(), st.sampled_from([1, 8, 64]), st.sampled_from([0, 16]), st.sampled_from([0, 100]))
@ANY_FOLDER
def test_any_view_in_small_pieces(tmp_path: Path, view: torch.Tensor, span: int, gap: int, ahead: int) -> None:
    """With limits so low that views of a few weights are cut as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "SPAN", span)
        patch.setattr(strided, "GAP", gap)
        patch.setattr(strided, "AHEAD", ahead)
        tensor = stored(view, tmp_path, named({v: k for k, v in TORCH.items()}[view.dtype]))
        assert_reads(tensor, view)
        for row in range(0, tensor.n_rows, 2):
            assert_reads(tensor, view, row, min(row + 2, tensor.n_rows))


@pytest.mark.parametrize("axes", [(3, 1, 0, 2), (1, 2, 3, 0), (0, 2, 3, 1), (2, 3, 1, 0)])
def test_every_range_of_rows(axes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strided, "AHEAD", 0)
    view = weights((2, 3, 4, 2)).permute(axes)
    tensor = stored(view, tmp_path)
    for start in range(tensor.n_rows):
        for stop in range(start, tensor.n_rows + 1):
            assert_reads(tensor, view, start, stop)


@pytest.mark.parametrize(
    ("view", "contiguous"),
    [
        (weights((4, 6)), True),
        (weights((4, 6))[1:3], True),
        (weights((4, 6))[:, :1][:1], True),
        (weights((4, 6))[:, 2], False),
        (weights((4, 6)).t(), False),
        (weights((4, 1)).t(), True),
        (weights((4, 6))[:, :3], False),
        (weights((1, 6)).expand(4, 6), False),
        (weights((4, 0)).t(), True),
        (weights(()), True),
    ],
)
def test_strides_are_kept_only_where_they_matter(view: torch.Tensor, contiguous: bool, tmp_path: Path) -> None:
    assert view.is_contiguous() == contiguous
    assert stored(view, tmp_path).strides == (None if contiguous else view.stride())


def test_sizes_of_a_tensor(tmp_path: Path) -> None:
    tensor = stored(weights((3, 4, 32)), tmp_path)
    assert (tensor.n_weights, tensor.row_length, tensor.n_rows, tensor.row_nbytes, tensor.nbytes) == (
        384,
        32,
        12,
        128,
        1536,
    )
    scalar = stored(weights(()), tmp_path)
    assert (scalar.n_weights, scalar.row_length, scalar.n_rows, scalar.nbytes) == (1, 1, 1, 4)
    empty = stored(weights((3, 0)), tmp_path)
    assert (empty.n_weights, empty.n_rows, empty.nbytes) == (0, 3, 0)
    assert repr(tensor) == "<FileTensor t F32 [3, 4, 32]>"
    assert tensor.leaves() == (tensor,)


def transposed(tmp_path: Path) -> tuple[FileTensor, np.ndarray[Any, Any]]:
    weights = np.arange(4096 * 4096, dtype="<u4").astype("<u2").reshape(4096, 4096)
    path = tmp_path / "weights"
    weights.tofile(path)
    return FileTensor("t", BF16, (4096, 4096), SourceFile(path, weights.nbytes), 0, (1, 4096)), weights.T


def test_a_transpose_is_read_about_once_and_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, expected = transposed(tmp_path)
    assert tensor._strided
    n_read = 0
    read = tensor._strided._read

    def counted(buffer: memoryview, offset: int) -> None:
        nonlocal n_read
        n_read += len(buffer)
        read(buffer, offset)

    monkeypatch.setattr(tensor._strided, "_read", counted)
    tracemalloc.start()
    try:
        for start in range(0, 4096, 32):
            assert np.array_equal(tensor.read(start, start + 32), expected[start : start + 32])
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_read <= 5 * expected.nbytes  # once for each 8 MiB of the 32 MiB
    assert peak < 16 << 20
    assert kept < 1 << 20


def test_far_bytes_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.truncate(64 << 30)  # a hole
    tensor = FileTensor("t", BF16, (4, 64), SourceFile(path, 64 << 30), 0, (1, 1 << 29))  # 1 GiB from weight to weight
    assert not tensor.read(0, 4).any()


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    tensor = stored(weights((4, 6)), tmp_path)
    tensor.file.path.write_bytes(bytes(OFFSET + 30))
    with pytest.raises(FormatError) as error:
        tensor.read(1, 3)
    assert str(error.value) == (
        f"{tensor.file.path}: bytes 48 to 96 were asked for, but the file now ends at 54. It changed while it was read"
    )
    tensor.file.close()
    tensor.file.path.unlink()
    with pytest.raises(FormatError, match=r"weights: no such file or directory"):
        tensor.read(0, 1)


class Told(Witness):
    def __init__(self) -> None:
        self.reads: list[tuple[FileTensor, bytes]] = []
        self.casts: list[tuple[bytes, bytes, DType, int]] = []

    def read(self, tensor: FileTensor, blocks: Any) -> None:
        self.reads.append((tensor, blocks.tobytes()))

    def encoded(self, values: Any, blocks: Any, dtype: DType, start: int) -> None:
        self.casts.append((values.tobytes(), blocks.tobytes(), dtype, start))


@given(st.data(), st.sampled_from([0, -1]))
@ANY_FOLDER
def test_concat(tmp_path: Path, data: st.DataObject, axis: Literal[0, -1]) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    tensors, parts = [], []
    for n in range(data.draw(st.integers(1, 3))):
        shape[axis] = data.draw(st.integers(0, 4))
        tensors.append(weights(tuple(shape), seed=n))
        parts.append(written(tensors[-1], tmp_path / f"part{n}"))
    joined = Concat("t", parts, axis)
    expected = torch.cat(tensors, dim=axis)
    assert joined.shape == tuple(expected.shape)
    assert joined.leaves() == tuple(parts)
    start = data.draw(st.integers(0, joined.n_rows))
    assert_reads(joined, expected, start, data.draw(st.integers(start, joined.n_rows)))
    assert_reads(joined, expected)


def test_concat_tells_of_every_part_once_in_order(tmp_path: Path) -> None:
    parts = [written(weights((3, 2), seed=n), tmp_path / f"part{n}") for n in range(2)]
    for axis in (0, -1):
        told = Told()
        Concat("t", parts, axis).read(1, 2, told)
        expected = parts[:1] if axis == 0 else parts
        assert told.reads == [(part, part.read(1, 2).tobytes()) for part in expected]


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    one = written(weights((3, 2)), tmp_path / "one")
    for other in (written(weights((3, 3)), tmp_path / "b"), written(weights((3, 2), "F16"), tmp_path / "c", F16)):
        with pytest.raises(FormatError) as error:
            Concat("t", [one, other], 0)
        assert str(error.value) == (
            f"tensor 't': one shard has F32 [3, 2], another {other.dtype} {list(other.shape)}, which cannot be joined"
        )
        with pytest.raises(FormatError) as error:
            Replicated("t", [one, other])
        assert str(error.value) == (
            "tensor 't': every shard must hold the same, but one has F32 [3, 2] and another "
            f"{other.dtype} {list(other.shape)}"
        )


def test_replicated(tmp_path: Path) -> None:
    tensor = weights((5, 3))
    tensor[1, 1] = float("nan")  # equal as bytes, though not as a number
    same = Replicated("t", [written(tensor, tmp_path / str(n)) for n in range(3)])
    assert_reads(same, tensor)
    assert_reads(same, tensor, 1, 4)
    told = Told()
    same.read(0, 5, told)
    assert len(told.reads) == 3

    damaged = tensor.clone()
    damaged[3, 2] += 1
    parts = [written(t, tmp_path / f"d{n}") for n, t in enumerate((tensor, tensor, damaged))]
    assert_reads(Replicated("t", parts), tensor, 0, 3)
    position = next(
        i for i, (a, b) in enumerate(zip(as_bytes(tensor[2:]), as_bytes(damaged[2:]), strict=True)) if a != b
    )
    with pytest.raises(FormatError) as error:
        Replicated("t", parts).read(2, 5)
    assert str(error.value) == (
        f"tensor 't': shards 0 and 2 must hold the same, but differ from byte {position} of row 2 on. "
        "The shards are damaged or of different models"
    )


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_cast(source: str, target: str, tmp_path: Path) -> None:
    tensor = weights((7, 33), source) * 300  # some overflow float16
    lazy = Cast(written(tensor, tmp_path / "weights", named(source)), named(target))
    assert_reads(lazy, tensor.to(TORCH[target]))
    assert_reads(lazy, tensor.to(TORCH[target]), 2, 5)
    told = Told()
    lazy.read(2, 5, told)
    assert told.reads == [(lazy.parts[0], as_bytes(tensor[2:5]))]
    assert told.casts == [(as_bytes(tensor[2:5].float()), as_bytes(tensor[2:5].to(TORCH[target])), named(target), 2)]
    assert torch.equal(torch.from_numpy(read_floats(lazy.parts[0])), tensor.float())
    assert torch.equal(torch.from_numpy(read_floats(lazy.parts[0], 2, 5)), tensor[2:5].float())


def test_what_cannot_be_cast(tmp_path: Path) -> None:
    whole_numbers = written(weights((3, 32), "I64"), tmp_path / "i", named("I64"))
    with pytest.raises(UnsupportedError, match="tensor 't': I64 weights cannot be converted to F32"):
        Cast(whole_numbers, F32)
    with pytest.raises(UnsupportedError, match="tensor 't': nothing can be converted to I64 here"):
        Cast(written(weights((3, 32)), tmp_path / "f"), named("I64"))
    with pytest.raises(UnsupportedError, match="tensor 't': I64 weights cannot be decoded"):
        read_floats(whole_numbers)


def test_computed_tensor() -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4)
    assert_reads(ArrayTensor("t", F32, array), torch.from_numpy(array).float(), 1, 3)
    assert_reads(ArrayTensor("t", F32, np.float32([5])), torch.tensor([5.0]))


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.t()])
def test_threads_read_one_tensor(make: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    view = make(weights((200, 200)))
    tensor = stored(view, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: assert_reads(tensor, view, row, row + 1), range(200)))
