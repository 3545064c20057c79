"""Planning a GGUF file: a checkpoint and a choice of dtypes become a complete layout, before any byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import names, provenance
from .checkpoint import Checkpoint, Note, RopeScaling
from .dtypes import BF16, F16, F32, DType
from .errors import FormatError, UnsupportedError, UsageError
from .formats import gguf_split, gguf_write
from .layout import File, Layout, PlacedTensor
from .metadata import Metadata, Value, parse_setting, string, u32
from .recipes import Recipe, file_type
from .tensors import ArrayTensor, Cast, FileTensor, LazyTensor
from .tokenizers import gguf_keys
from .version import __version__

SUPPORTED = (F32, F16, BF16)  # dtypes of a checkpoint's weights
MAX_SHARDS = 65535  # which `split.count` can say
NO_RECIPE = Recipe(())
COMPARED = 1 << 20  # bytes compared at once to see whether output and embedding are one


@dataclass(frozen=True)
class Plan:
    """A GGUF file, or a set of them, to be written.

    layout: complete; in its metadata zeros stand where digests will be.
    checkpoint: what its source keys are made from; None where they stand in the metadata already.
    """

    layout: Layout
    checkpoint: Checkpoint | None = None

    def headers(self, digests: provenance.Digests, source_digests: provenance.Digests) -> list[bytes]:
        """Each file's header with the digests of output and source tensors, as long as without them."""
        layout = self.layout
        metadata = dict(layout.metadata) | _provenance(self.checkpoint, layout.tensors, digests, source_digests)
        headers = _encode(metadata, layout.tensors, layout.alignment or 0, len(layout.files))
        return [header.data for header in headers]


def plan_gguf(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: DType | None = None,
    alignment: int = gguf_write.DEFAULT_ALIGNMENT,
    name: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Plan:
    """The GGUF file that `checkpoint` becomes.

    dtype: of every matrix; None keeps each one's own. Tensors of one dimension become F32 in any case, since llama.cpp
    aborts on others. alignment: of every tensor, a power of two from 32 to 2 MiB.
    settings: metadata keys to set, as text; see `metadata.parse_setting`.
    Raises FormatError where the checkpoint lacks what a GGUF needs, UnsupportedError for weights of other types,
    UsageError for an alignment or a setting that cannot be.
    """
    hparams = checkpoint.hparams
    if hparams is None:
        raise FormatError("no hyperparameters: a GGUF cannot be made from tensors alone", todo="Name the whole folder")
    if checkpoint.tokenizer is None:
        raise FormatError("no tokenizer.model in it or one folder up", todo="Name it with --tokenizer")
    notes = checkpoint.notes
    dropped = dict(checkpoint.dropped)
    sources = dict(checkpoint.tensors)
    if names.OUTPUT not in sources:
        notes += (Note("output", "tied", f"there is no {names.OUTPUT}; {names.EMBEDDING} serves for both"),)
    elif _same_bytes(sources[names.OUTPUT], sources[names.EMBEDDING]):
        notes += (Note("output", "tied", f"{names.OUTPUT} equals {names.EMBEDDING} byte for byte and is omitted"),)
        dropped[names.OUTPUT] = f"equals {names.EMBEDDING} byte for byte"
        del sources[names.OUTPUT]
    outputs = {names.meta_to_gguf(meta): _as_dtype(tensor, dtype) for meta, tensor in sources.items()}
    if hparams.rope_scaling:
        divisors = rope_divisors(hparams.head_dim, hparams.rope_theta, hparams.rope_scaling)
        outputs[names.ROPE_FACTORS] = ArrayTensor(names.ROPE_FACTORS, F32, divisors)

    n_weights = sum(tensor.n_weights for tensor in checkpoint.tensors.values() if tensor.name not in dropped)
    if name is None:
        family = next((note.value for note in notes if note.what == "family"), "LLaMA")
        name = f"{family} {size_label(n_weights)}"
        notes += (Note("name", name, "family and size; the files do not say", "--name"),)
    metadata = {
        "general.architecture": string("llama"),
        "general.type": string("model"),
        "general.name": string(name),
        "general.size_label": string(size_label(n_weights)),
        "general.file_type": u32(_file_type(outputs.values())),
        **names.hparams_to_gguf(hparams),
        **gguf_keys.to_metadata(checkpoint.tokenizer),
    }
    metadata |= {key: parse_setting(key, text, metadata.get(key)) for key, text in (settings or {}).items()}

    layout = Layout(
        format="",
        files=(),
        tensors=tuple(PlacedTensor(key, t.dtype, t.shape, 0, t.nbytes, source=t) for key, t in outputs.items()),
        metadata=metadata,
        hparams=hparams,
        tokenizer=checkpoint.tokenizer,
        notes=notes,
        dropped=dropped,
    )
    return placed(layout, destination, alignment, replace(checkpoint, dropped=dropped))


def placed(layout: Layout, destination: Path, alignment: int, checkpoint: Checkpoint | None = None) -> Plan:
    """The plan for a GGUF file with the layout's tensors and metadata, provenance added.

    checkpoint: see Plan. Raises what `encode_header` does.
    """
    return _placed(layout, [destination], [0] * len(layout.tensors), alignment, checkpoint)


def split(plan: Plan, nbytes: int) -> Plan:
    """The plan as a set of files of at most `nbytes` bytes each, in the order of tensors, none of which is cut.

    They are called PREFIX-00001-of-0000N.gguf where the plan's file is PREFIX.gguf. What fits into one file stays it.
    The first file may have no tensors.
    Raises UsageError where the first header, or a tensor with its header, is larger.
    """
    layout = plan.layout
    if layout.size <= nbytes:
        return plan
    alignment, where = layout.alignment or gguf_write.DEFAULT_ALIGNMENT, "--split-size"
    keys = gguf_split.shard_keys(0, 1, 0, alignment)
    first, later = (
        gguf_write.encode_header(metadata, [], alignment).data_offset
        for metadata in ({**layout.metadata, **keys}, keys)
    )
    if first > nbytes:
        what = f"the header alone takes {first} bytes, more than the {nbytes} of a file"
        raise UsageError(what, where=where, todo="Choose a larger size")
    shard, header, data, shard_of = 0, first, 0, []
    for tensor in layout.tensors:
        entry, size = gguf_write.entry_nbytes(tensor.name, tensor.shape), gguf_write.padded(tensor.nbytes, alignment)
        if gguf_write.padded(header + entry, alignment) + data + size > nbytes:
            shard, header, data = shard + 1, later, 0
        header, data = header + entry, data + size
        needed = gguf_write.padded(header, alignment) + data
        if needed > nbytes:
            what = f"tensor {tensor.name!r} takes a file of {needed} bytes, more than {nbytes}, and is not cut"
            raise UsageError(what, where=where, todo="Choose a larger size")
        shard_of.append(shard)
    count = shard + 1
    if count > MAX_SHARDS:
        what = f"{nbytes} bytes a file make {count} files, where {MAX_SHARDS} can be counted"
        raise UsageError(what, where=where, todo="Choose a larger size")
    path = layout.files[0].path
    prefix = path.name.removesuffix(".gguf")
    paths = [path.with_name(gguf_split.shard_name(prefix, n, count)) for n in range(count)]
    return _placed(layout, paths, shard_of, alignment, plan.checkpoint)


def _placed(
    layout: Layout, paths: Sequence[Path], file_of: Sequence[int], alignment: int, checkpoint: Checkpoint | None
) -> Plan:
    """file_of: for each tensor, which of the files it lies in."""
    metadata = dict(layout.metadata) | _provenance(checkpoint, layout.tensors, {}, {})
    if gguf_write.ALIGNMENT_KEY in metadata:
        metadata[gguf_write.ALIGNMENT_KEY] = u32(alignment)
    tensors = [replace(tensor, file=file) for tensor, file in zip(layout.tensors, file_of, strict=True)]
    headers = _encode(metadata, tensors, alignment, len(paths))
    offsets = [iter(header.offsets) for header in headers]
    layout = replace(
        layout,
        format="GGUF v3",
        files=tuple(File(path, header.file_size) for path, header in zip(paths, headers, strict=True)),
        tensors=tuple(replace(tensor, offset=next(offsets[tensor.file])) for tensor in tensors),
        metadata=metadata,
        alignment=alignment,
        data_offset=headers[0].data_offset if len(headers) == 1 else None,
    )
    return Plan(layout, checkpoint)


def _as_dtype(tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    wanted = F32 if len(tensor.shape) == 1 else dtype or tensor.dtype
    if tensor.dtype not in SUPPORTED:
        raise UnsupportedError(
            f"{tensor.dtype} weights are not supported, only {', '.join(map(str, SUPPORTED))}",
            where=f"tensor {tensor.name!r}",
        )
    return tensor if wanted is tensor.dtype else Cast(tensor, wanted)


def _same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    step = max(1, COMPARED // max(a.row_nbytes, 1))
    ranges = ((start, min(start + step, a.n_rows)) for start in range(0, a.n_rows, step))
    return all(a.read(*rows).tobytes() == b.read(*rows).tobytes() for rows in ranges)


def rope_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> NDArray[np.float32]:
    """What scaled RoPE divides each pair's angle by, (head_dim / 2,), as `rope_freqs.weight` stores it.

    Formula: llama-models, models/llama3/model.py, apply_scaling; turned from frequencies into divisors.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # radians per token
    wavelength = 2 * np.pi / frequency  # tokens per turn
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.old_context
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)  # 0: stretch by factor, 1: keep
    return (1 / ((1 - blend) / scaling.factor + blend)).astype(np.float32)


def size_label(n_weights: int) -> str:
    """The number of weights as people say it: 260K, 1.1B, 70.6B."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n_weights >= size:
            return f"{n_weights / size:.3g}{unit}"
    return str(n_weights)


def _file_type(tensors: Iterable[LazyTensor]) -> int:
    weights: Counter[DType] = Counter()
    for tensor in tensors:
        weights[tensor.dtype] += tensor.n_weights
    return file_type(NO_RECIPE, weights)


def _provenance(
    checkpoint: Checkpoint | None,
    tensors: Sequence[PlacedTensor],
    digests: provenance.Digests,
    source_digests: provenance.Digests,
) -> dict[str, Value]:
    keys = provenance.tensor_keys(tensors, digests)
    if checkpoint is not None:
        leaves = [leaf for t in tensors if t.source for leaf in t.source.leaves() if isinstance(leaf, FileTensor)]
        keys |= provenance.source_keys(checkpoint, leaves, source_digests)
    return {**keys, provenance.VERSION: string(__version__)}


def _encode(
    metadata: Metadata, tensors: Sequence[PlacedTensor], alignment: int, n_files: int
) -> list[gguf_write.Header]:
    """The headers of the file, or of the shards of a set, of which the first has all keys."""
    entries: list[list[gguf_write.Entry]] = [[] for _ in range(n_files)]
    for tensor in tensors:
        entries[tensor.file].append((tensor.name, tensor.dtype, tensor.shape))
    if n_files == 1:
        return [gguf_write.encode_header(metadata, entries[0], alignment)]
    keys = [gguf_split.shard_keys(n, n_files, len(tensors), alignment) for n in range(n_files)]
    keys[0] = {**metadata, **keys[0]}
    return [gguf_write.encode_header(own, part, alignment) for own, part in zip(keys, entries, strict=True)]
