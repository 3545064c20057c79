"""Which dtype llama-quantize gives every tensor of models of many shapes: the answers in llama_quantize_types.txt.

Made with build b11434 of llama.cpp, whose quantize function the xllamacpp wheel lacks:

    python tests/llama_quantize_types.py LLAMA_QUANTIZE > tests/llama_quantize_types.txt

A line is the model, the options, the recipe and, after a colon, which tensors get which type (see `summary`).
`[--imatrix]` stands where the answer is the same with and without one.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf_files
from gguf_files import Tensor

ANSWERS = Path(__file__).with_suffix(".txt")
RECIPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs")
F32, F16 = 0, 1


@dataclass(frozen=True)
class Model:
    """A LLaMA's shape. fused: attn_qkv instead of three. backwards: the order of tensors in the file."""

    n_layers: int
    n_heads: int = 8
    n_kv_heads: int = 4
    dim: int = 256
    hidden_dim: int = 512
    head_dim: int = 32
    vocab_size: int = 32
    n_experts: int = 0
    tied: bool = False
    fused: bool = False
    backwards: bool = False

    def keys(self) -> dict[str, int]:
        experts = {"expert_count": self.n_experts, "expert_used_count": 2} if self.n_experts else {}
        return {
            f"llama.{key}": value
            for key, value in {
                "context_length": 128, "embedding_length": self.dim, "block_count": self.n_layers,
                "feed_forward_length": self.hidden_dim, "attention.head_count": self.n_heads,
                "attention.head_count_kv": self.n_kv_heads, "attention.key_length": self.head_dim,
                "attention.value_length": self.head_dim, "rope.dimension_count": self.head_dim,
                "vocab_size": self.vocab_size, **experts,
            }.items()
        }  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """Matrices in F16, with the fastest axis first."""
        dim, q, kv = self.dim, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        experts = (self.n_experts,) if self.n_experts else ()
        suffix = "_exps" if experts else ""
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (dim,),
            **({"attn_qkv": (dim, q + 2 * kv)} if self.fused else {"attn_q": (dim, q), "attn_k": (dim, kv)}),
            **({} if self.fused else {"attn_v": (dim, kv)}),
            "attn_output": (q, dim),
            "ffn_norm": (dim,),
            **({"ffn_gate_inp": (dim, *experts)} if experts else {}),
            "ffn_gate" + suffix: (dim, self.hidden_dim, *experts),
            "ffn_up" + suffix: (dim, self.hidden_dim, *experts),
            "ffn_down" + suffix: (self.hidden_dim, dim, *experts),
        }
        shapes = {"token_embd": (dim, self.vocab_size), "rope_freqs": (self.head_dim // 2,)}
        shapes |= {f"blk.{n}.{kind}": ne for n in range(self.n_layers) for kind, ne in layer.items()}
        shapes |= {"output_norm": (dim,)} | ({} if self.tied else {"output": (dim, self.vocab_size)})
        tensors = [Tensor(f"{name}.weight", F16 if len(ne) > 1 else F32, ne) for name, ne in shapes.items()]
        return tensors[::-1] if self.backwards else tensors


MODELS = {
    "one-layer": Model(1, 8, 8),
    "tiny-llama": Model(3, hidden_dim=768),
    "stories260k": Model(5, 8, 4, 64, 172, 8, 512),
    "nothing-divides": Model(9, 4, 1, 100, 52, 25, tied=True),
    "one-token": Model(2, vocab_size=1),
    "backwards": Model(13, 8, 2, backwards=True),
    "fused": Model(16, 8, 2, fused=True, tied=True),
    "tinyllama-1.1b": Model(22, 32, 4, head_dim=8),
    "smollm2-135m": Model(30, 9, 3, 576, 1536, 64, tied=True),
    "llama-3-8b": Model(32, 32, 8, head_dim=8),
    "llama-1-65b": Model(80, 64, 64, head_dim=4),
    "llama-2-70b": Model(80, 64, 8, head_dim=4),
    "mixtral-8x7b": Model(32, 32, 8, head_dim=8, n_experts=8, backwards=True),
    "four-experts": Model(11, 8, 4, n_experts=4),
}
OPTIONS = (
    "--pure",
    "--pure --token-embedding-type q8_0",
    "--token-embedding-type f16 --tensor-type blk\\.0\\.=q6_k",
    "--output-tensor-type q5_0",
    "--output-tensor-type q5_0 --token-embedding-type q4_0 --tensor-type weight=q8_0",
    "--tensor-type blk\\.[02]\\.attn_v=q8_0",
    "--tensor-type blk\\.1\\.=q4_1 --tensor-type (attn_v|ffn_down)=q6_k",
    "--tensor-type ffn_(gate|up)=q4_k --tensor-type blk\\.[0-3]\\.ffn=bf16",
)


def cases() -> list[tuple[str, str, str]]:
    """Model, options, recipe."""
    plain = [(model, "", recipe) for model in MODELS for recipe in RECIPES]
    return plain + [
        (model, options, recipe)
        for model in ("smollm2-135m", "llama-2-70b", "mixtral-8x7b")
        for options in OPTIONS
        # With both options and a tied embedding, the first has no effect there, and is an error here.
        if model != "smollm2-135m" or options.count("-type") < 3
        for recipe in ("q4_0", "q4_k_s", "q4_k_m", "iq4_xs")
    ]


def summary(types: Mapping[str, str]) -> str:
    """Types of tensors by name, in short: the commonest stands for all that are not listed after another.

    `Q6_K ffn_down[0-2,5]` says layers 0 to 2 and 5; without brackets it is every layer, or the only such tensor.
    """
    by_kind: dict[str, dict[int, str]] = defaultdict(dict)
    for name, type_ in types.items():
        layer, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
        by_kind[kind][int(layer or 0)] = type_
    listed: dict[str, list[str]] = defaultdict(list)
    rest = max(sorted(set(types.values())), key=list(types.values()).count)
    for kind, by_layer in sorted(by_kind.items()):
        for type_ in sorted(set(by_layer.values()) - {rest}):
            layers = sorted(layer for layer, other in by_layer.items() if other == type_)
            listed[type_].append(kind if len(layers) == len(by_layer) else f"{kind}[{ranges(layers)}]")
    return "; ".join([rest, *(f"{type_} {' '.join(kinds)}" for type_, kinds in sorted(listed.items()))])


def ranges(numbers: Sequence[int]) -> str:
    starts = [numbers[0]] + [b for a, b in pairwise(numbers) if b != a + 1]
    ends = [a for a, b in pairwise(numbers) if b != a + 1] + [numbers[-1]]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))


def ask(tool: str, model: Path, options: str, recipe: str) -> dict[str, str]:
    """What llama-quantize says it would do: name -> type."""
    command = [tool, "--dry-run", *options.split(), str(model), recipe]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    line = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = +(\S+), size = .*?(?:\((\S+)\))?\n")
    return {name: (after or before).upper() for name, before, after in line.findall(said.stdout + said.stderr)}


def write_model(model: Model, path: Path) -> None:
    """A GGUF whose data is a hole."""
    keys = [gguf_files.key("general.architecture", gguf_files.scalar(gguf_files.STRING, "llama"))]
    keys += [gguf_files.key(key, gguf_files.scalar(gguf_files.U32, value)) for key, value in model.keys().items()]
    epsilon = gguf_files.scalar(gguf_files.F32, 1e-5)
    keys.append(gguf_files.key("llama.attention.layer_norm_rms_epsilon", epsilon))
    tensors = model.tensors()
    header = gguf_files.build(keys, tensors, data=False)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(t.nbytes() + gguf_files.pad(t.nbytes(), 32) for t in tensors))


def write_imatrix(path: Path) -> None:
    """An imatrix in its older form, of one entry for no tensor."""
    path.write_bytes(struct.pack("<ii7siif", 1, 7, b"nothing", 1, 1, 1.0))


def main(tool: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        imatrix = Path(folder) / "imatrix.dat"
        write_imatrix(imatrix)
        for name, model in MODELS.items():
            write_model(model, Path(folder) / name)
        for name, options, recipe in cases():
            matrices = {tensor.name for tensor in MODELS[name].tensors() if len(tensor.ne) > 1}
            answers = []
            for weighted in ("", f"--imatrix {imatrix}"):
                types = ask(tool, Path(folder) / name, f"{options} {weighted}", recipe)
                assert all(type_ == "F32" for tensor, type_ in types.items() if tensor not in matrices)
                answers.append(summary({tensor: type_ for tensor, type_ in types.items() if tensor in matrices}))
                assert len(types) == len(MODELS[name].tensors())
            words = " ".join([name, *options.split(), recipe])
            if answers[0] == answers[1]:
                print(f"{words} [--imatrix]: {answers[0]}")
            else:
                print(f"{words}: {answers[0]}\n{words} --imatrix: {answers[1]}")


if __name__ == "__main__":
    main(sys.argv[1])
