"""How long `llamatools inspect` takes for a GGUF shaped like a 70B model, and for a sparse one of a terabyte.

    python tests/bench/inspecting.py [FOLDER]

Whole processes, the median of nine, beside one that only imports numpy. Headers are by gguf-py; data are holes.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is timed has its bytecode, as an installed package has
N_LAYERS, N_TOKENS, N_MERGES = 80, 128_256, 280_147


def model(path: Path, kind: gguf.GGMLQuantizationType, scale: int) -> Path:
    """scale: how many times a 70B model's width."""
    dim, hidden, kv = 8192 * scale, 28672 * scale, 1024 * scale
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 8192), (writer.add_embedding_length, dim), (writer.add_block_count, N_LAYERS),
        (writer.add_feed_forward_length, hidden), (writer.add_head_count, 64 * scale),
        (writer.add_head_count_kv, 8 * scale), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 128), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "llama-bpe"), (writer.add_token_list, [f"t{n:x}" for n in range(N_TOKENS)]),
        (writer.add_token_types, [1] * N_TOKENS),
        (writer.add_token_merges, [f"a{n:x} b{n:x}" for n in range(N_MERGES)]),
        (writer.add_bos_token_id, 128_000), (writer.add_eos_token_id, 128_001),
    ):  # fmt: skip
        add(value)  # type: ignore[operator]
    layer = {
        "attn_norm": (dim,), "attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, dim),
        "ffn_norm": (dim,), "ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_TOKENS, dim)}
    shapes |= {f"blk.{n}.{name}.weight": shape for n in range(N_LAYERS) for name, shape in layer.items()}
    shapes |= {"output_norm.weight": (dim,), "output.weight": (N_TOKENS, dim)}
    size = 0
    for name, shape in shapes.items():
        dtype = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        block_size, block_nbytes = gguf.GGML_QUANT_SIZES[dtype]
        n_weights = 1
        for axis in shape:
            n_weights *= axis
        stored = gguf.quant_shape_to_byte_shape(shape, dtype)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_weights // block_size * block_nbytes, dtype)
        size += n_weights // block_size * block_nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = -(-path.stat().st_size // 32) * 32
        file.truncate(start + size)
        file.seek(start + size - 4096)
        file.write(b"\x01" * 4096)  # the file is not one that was never filled
    return path


def seconds(*command: str) -> tuple[float, float]:
    """Median of wall and of processor time."""
    walls, cpus = [], []
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    for _ in range(9):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls), statistics.median(cpus)


def main(folder: Path) -> None:
    q4_k, f32 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.F32
    print(f"{'':<26}{'wall s':>8}{'CPU s':>8}")
    print("{:<26}{:8.2f}{:8.2f}".format("import numpy", *seconds("-c", "import numpy")))
    for name, kind, scale in (("70B, Q4_K", q4_k, 1), ("1.1 TB, F32", f32, 2)):
        path = model(folder / "model.gguf", kind, scale)
        label = f"{name} ({path.stat().st_size / 1e9:,.0f} GB)"
        print("{:<26}{:8.2f}{:8.2f}".format(label, *seconds("-m", "llamatools", "inspect", str(path))))
        path.unlink()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        main(Path(folder))
