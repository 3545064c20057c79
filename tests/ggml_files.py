"""Files in llama.cpp's formats before GGUF, built field by field, so that any field can be wrong.

Written from llama.cpp's own reader of them (convert_llama_ggml_to_gguf.py) and from its history, not from our reader.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

# Format -> magic and version.
HEADS = {
    "ggml": (0x67676D6C, None),
    "ggmf v1": (0x67676D66, 1),
    "ggjt v1": (0x67676A74, 1),
    "ggjt v2": (0x67676A74, 2),
    "ggjt v3": (0x67676A74, 3),
}

# Weights and bytes of a block by the type's number: of the first formats, of ggjt v2, and of ggjt v3.
FIRST = {0: (1, 4), 1: (1, 2), 2: (32, 20), 3: (32, 24)}
V1 = FIRST | {4: (16, 10), 5: (16, 12), 6: (32, 22), 7: (32, 24), 8: (32, 36)}
V2 = FIRST | {6: (32, 22), 7: (32, 24), 8: (32, 36)}
V3 = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
}  # fmt: skip
# Of a llama.cpp built with LLAMA_QKK_64 (k_quants.h of that time).
BY_64 = V3 | {10: (64, 24), 11: (64, 28), 12: (64, 38), 13: (64, 46), 14: (64, 54)}
BLOCKS = {"ggml": FIRST, "ggmf v1": V1, "ggjt v1": V1, "ggjt v2": V2, "ggjt v3": V3}

FILLING = bytes(range(251))


@dataclass
class Tensor:
    """name, number of the type, shape with the fastest axis first."""

    name: str | bytes
    type: int = 0
    ne: tuple[int, ...] = (64,)

    def nbytes(self, format: str) -> int:
        weights, nbytes = BLOCKS[format].get(self.type, (1, 4))
        n = 1
        for axis in self.ne:
            n *= axis
        return n // weights * nbytes


def llama(type_: int = 0, *, n_vocab: int = 5, dim: int = 256, hidden: int = 512, n_layers: int = 1) -> list[Tensor]:
    """A LLaMA's tensors, matrices of that type, in the order in which they were written then."""
    tensors = [
        Tensor("tok_embeddings.weight", type_, (dim, n_vocab)),
        Tensor("norm.weight", 0, (dim,)),
        Tensor("output.weight", type_, (dim, n_vocab)),
    ]
    for n in range(n_layers):
        tensors += [Tensor(f"layers.{n}.attention.w{x}.weight", type_, (dim, dim)) for x in "qkvo"]
        tensors += [
            Tensor(f"layers.{n}.attention_norm.weight", 0, (dim,)),
            Tensor(f"layers.{n}.feed_forward.w1.weight", type_, (dim, hidden)),
            Tensor(f"layers.{n}.feed_forward.w2.weight", type_, (hidden, dim)),
            Tensor(f"layers.{n}.feed_forward.w3.weight", type_, (dim, hidden)),
            Tensor(f"layers.{n}.ffn_norm.weight", 0, (dim,)),
        ]
    return tensors


@dataclass
class Built:
    """A file, and where each tensor's data begin in it."""

    data: bytes
    offsets: list[int] = field(default_factory=list)


def build(
    format: str,
    tensors: Sequence[Tensor],
    vocabulary: Sequence[tuple[bytes, float]] = tuple((b"token %d" % n, -n / 2) for n in range(5)),
    *,
    magic: int | None = None,
    version: int | None = None,
    n_vocab: int | None = None,
    dim: int = 256,
    n_layers: int = 1,
    ftype: int = 1,
    byte_order: str = "<",
) -> Built:
    """A file in `format`; magic, version and n_vocab only to contradict it."""
    numbers = [HEADS[format][0] if magic is None else magic]
    number = HEADS[format][1] if version is None else version
    numbers += [] if number is None else [number]
    numbers += [len(vocabulary) if n_vocab is None else n_vocab, dim, 256, 8, n_layers, dim // 8, ftype]
    file = struct.pack(f"{byte_order}{len(numbers)}I", *numbers)
    for text, score in vocabulary:
        file += struct.pack("<I", len(text)) + text
        if format != "ggml":
            file += struct.pack("<f", score)
    offsets = []
    for tensor in tensors:
        name = tensor.name.encode() if isinstance(tensor.name, str) else tensor.name
        file += struct.pack("<3I", len(tensor.ne), len(name), tensor.type)
        file += struct.pack(f"<{len(tensor.ne)}I", *tensor.ne) + name
        if format.startswith("ggjt"):
            file += bytes(-len(file) % 32)
        offsets.append(len(file))
        nbytes = tensor.nbytes(format)
        file += (FILLING * (nbytes // len(FILLING) + 1))[:nbytes]
    return Built(file, offsets)
