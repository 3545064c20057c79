"""From a GGUF's layout to a model on its mapping: everything that a LLaMA needs is there, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamatools import inspect
from llamatools.checkpoint import Hyperparameters
from llamatools.dtypes import Floats
from llamatools.errors import FormatError, UnsupportedError, in_file
from llamatools.layout import Layout
from llamatools.metadata import Kind, Metadata
from llamatools.names import (
    EMBEDDING,
    LAYER_TENSORS,
    NORM,
    OUTPUT,
    ROPE_FACTORS,
    hparams_from_gguf,
    meta_to_gguf,
    shapes,
)

from .model import Layer, Model
from .weights import Matrix, map_weights


def load(path: Path | str, *, float32: bool = False) -> tuple[Model, Layout]:
    """Maps a GGUF file and checks that it is a LLaMA. Costs the time of reading its header.

    float32: it computes without rounding activations to eight bits, and caches keys and values in float32.

    Raises FormatError for a damaged file or one whose tensors are not those of a LLaMA of its hyperparameters, and
    UnsupportedError for another architecture, mixtures of experts, unknown scalings of rotary embedding and dtypes
    that cannot be decoded.
    """
    layout = inspect(path).sound()
    if not layout.format.startswith("GGUF"):
        raise UnsupportedError(f"a {layout.format}, and only GGUF files can be run", file=path, todo="Convert it first")
    return model_of(layout, float32=float32), layout


def model_of(layout: Layout, *, float32: bool = False) -> Model:
    """The model that a GGUF's layout describes. Raises as `load`."""
    with in_file(layout.files[0].path):
        hparams, linear_factor = check(layout)
        weights = map_weights(layout, float32=float32)
        layers = tuple(layer_of(weights, n) for n in range(hparams.n_layers))
        return assemble(hparams, weights, layers, linear_factor, float32=float32)


def check(layout: Layout) -> tuple[Hyperparameters, float]:
    """Its hyperparameters and its factor of linear rotary scaling, if it is a LLaMA. Raises as `load`."""
    linear_factor = _check_kind(layout.metadata)
    hparams = hparams_from_gguf(layout.metadata)
    _check_hparams(hparams, layout)
    _check_tensors(hparams, layout)
    return hparams, linear_factor


def _check_kind(metadata: Metadata) -> float:
    """Refuses what computes otherwise than a plain LLaMA. Returns the factor of linear rotary scaling, 1 for none."""

    architecture = _get(metadata, "general.architecture", Kind.STRING, "llama")  # if missing, the next check says so
    if architecture != "llama":
        raise UnsupportedError(
            f"the model's architecture is {architecture!r}, and only 'llama' can be run",
            where="key 'general.architecture'",
        )
    n_experts = _get(metadata, "llama.expert_count", Kind.UINT32, 0)
    if n_experts:
        raise UnsupportedError(
            f"a mixture of {n_experts} experts, and only dense models can be run", where="key 'llama.expert_count'"
        )
    # As in llama.cpp: linear where the type is not said, and the factor is also found under its old name.
    scaling = _get(metadata, "llama.rope.scaling.type", Kind.STRING, "linear")
    old_factor = _get(metadata, "llama.rope.scale_linear", Kind.FLOAT32, 0.0)
    factor = _get(metadata, "llama.rope.scaling.factor", Kind.FLOAT32, old_factor)
    if scaling not in ("linear", "none"):
        raise UnsupportedError(
            f"rotary embedding is scaled by {scaling!r}, and only 'linear' and 'none' can be run",
            where="key 'llama.rope.scaling.type'",
            todo="The scaling of Llama 3.1 is stored as the tensor 'rope_freqs.weight' instead",
        )
    return float(factor) if scaling == "linear" and factor else 1.0


def _get(metadata: Metadata, key: str, kind: Kind, default: Any) -> Any:
    value = metadata.get(key)
    if value is not None and value.kind is not kind:
        raise FormatError(f"{value.kind} where {kind} is required", where=f"key {key!r}")
    return default if value is None else value.data


def _check_hparams(h: Hyperparameters, layout: Layout) -> None:
    if h.n_heads % h.n_kv_heads:
        raise FormatError(f"{h.n_heads} heads cannot share {h.n_kv_heads} heads of keys and values equally")
    if h.head_dim % 2:
        raise FormatError(f"a head of {h.head_dim} numbers does not divide into pairs to rotate")
    if h.n_layers > len(layout.tensors):  # also keeps a hostile count from becoming a long list of names
        raise FormatError(
            f"{h.n_layers} layers, but only {len(layout.tensors)} tensors", where="key 'llama.block_count'"
        )
    tokens = _get(layout.metadata, "tokenizer.ggml.tokens", Kind.ARRAY, None)
    if tokens is not None and len(tokens) != h.vocab_size:
        raise FormatError(
            f"{len(tokens)} tokens, but a vocabulary of {h.vocab_size}", where="key 'tokenizer.ggml.tokens'"
        )


def _check_tensors(h: Hyperparameters, layout: Layout) -> None:
    """Every tensor of a LLaMA must be there with its shape, and no other: a bias left out would change the output."""
    expected = {meta_to_gguf(name): shape for name, shape in shapes(h).items()}
    expected[ROPE_FACTORS] = (h.head_dim // 2,)
    found = {tensor.name: tensor.shape for tensor in layout.tensors}
    for name, shape in expected.items():
        if name not in found:
            if name not in (meta_to_gguf(OUTPUT), ROPE_FACTORS):
                raise FormatError("required, but missing", where=f"tensor {name!r}")
        elif found[name] != shape:
            raise FormatError(
                f"its shape is {list(found[name])}, but the hyperparameters ask for {list(shape)}",
                where=f"tensor {name!r}",
            )
    for name in found.keys() - expected.keys():
        raise UnsupportedError(
            "not a tensor of a plain LLaMA; leaving it out could change the output", where=f"tensor {name!r}"
        )


def layer_of(weights: Mapping[str, Matrix], n: int) -> Layer:
    """Layer n, with the vectors decoded (they are small) and the matrices as they are."""

    def fields() -> Iterator[tuple[str, Matrix | Floats]]:
        for tensor in LAYER_TENSORS:  # such as "attention.wq.weight", whose field is wq
            weight = weights[meta_to_gguf(f"layers.{n}.{tensor}")]
            yield tensor.split(".")[-2], weight.vector() if len(weight.shape) == 1 else weight

    return Layer(**dict(fields()))  # type: ignore[arg-type]


def assemble(
    h: Hyperparameters,
    weights: Mapping[str, Matrix],
    layers: Sequence[Layer],
    linear_factor: float = 1.0,
    *,
    float32: bool = False,
) -> Model:
    """The model of these layers and of the tensors beside them."""
    embeddings = weights[meta_to_gguf(EMBEDDING)]
    divisors = weights[ROPE_FACTORS].vector() if ROPE_FACTORS in weights else np.ones(h.head_dim // 2, np.float32)
    output = meta_to_gguf(OUTPUT)
    return Model(
        hparams=h,
        tok_embeddings=embeddings,
        layers=layers,
        norm=weights[meta_to_gguf(NORM)].vector(),
        output=weights.get(output, embeddings),
        rope_divisors=divisors * np.float32(linear_factor),
        float32=float32,
    )
