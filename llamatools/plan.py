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
from .errors import FormatError, UnsupportedError
from .formats import gguf_write
from .layout import File, Layout, PlacedTensor
from .metadata import Metadata, Value, parse_setting, string, u32
from .tensors import ArrayTensor, Cast, FileTensor, LazyTensor
from .tokenizers import gguf_keys
from .version import __version__

# general.file_type, a label only: llama.cpp's LLAMA_FTYPE_* by the dtype that most weights have.
FILE_TYPES = {F32: 0, F16: 1, BF16: 32}
COMPARED = 1 << 20  # bytes compared at once to see whether output and embedding are one


@dataclass(frozen=True)
class Plan:
    """A GGUF file to be written.

    layout: complete; in its metadata zeros stand where digests will be.
    checkpoint: what its source keys are made from; None where they stand in the metadata already.
    """

    layout: Layout
    checkpoint: Checkpoint | None = None

    def header(self, digests: provenance.Digests, source_digests: provenance.Digests) -> bytes:
        """The header with the digests of output and source tensors in it, as long as without them."""
        metadata = dict(self.layout.metadata) | _provenance(
            self.checkpoint, self.layout.tensors, digests, source_digests
        )
        return _encode(metadata, self.layout.tensors, self.layout.alignment or 0).data


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
    metadata = dict(layout.metadata) | _provenance(checkpoint, layout.tensors, {}, {})
    header = _encode(metadata, layout.tensors, alignment)
    layout = replace(
        layout,
        format="GGUF v3",
        files=(File(destination, header.file_size),),
        tensors=tuple(replace(t, offset=at, file=0) for t, at in zip(layout.tensors, header.offsets, strict=True)),
        metadata=metadata,
        alignment=alignment,
        data_offset=header.data_offset,
    )
    return Plan(layout, checkpoint)


def _as_dtype(tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    wanted = F32 if len(tensor.shape) == 1 else dtype or tensor.dtype
    if tensor.dtype not in FILE_TYPES:
        raise UnsupportedError(
            f"{tensor.dtype} weights are not supported, only {', '.join(map(str, FILE_TYPES))}",
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
    return FILE_TYPES[weights.most_common(1)[0][0]]


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


def _encode(metadata: Metadata, tensors: Sequence[PlacedTensor], alignment: int) -> gguf_write.Header:
    return gguf_write.encode_header(metadata, [(t.name, t.dtype, t.shape) for t in tensors], alignment)
