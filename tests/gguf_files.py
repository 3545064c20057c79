"""GGUF files built field by field, so that any field can be wrong; and llama.cpp's verdict on files.

Written from the byte layout in the GGUF specification (docs/gguf.md of github.com/ggml-org/ggml), not from our writer.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
# ggml's number of a type -> weights and bytes per block, of some types.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 24: (1, 1), 27: (1, 8), 30: (1, 2)}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: object) -> bytes:
    """Kind and value, as they follow a key."""
    assert kind != STRING or isinstance(value, str | bytes)
    return struct.pack("<I", kind) + (text(value) if kind == STRING else struct.pack("<" + PACK[kind], value))  # type: ignore[arg-type]


def array(kind: int, values: Sequence[object]) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(scalar(kind, value)[4:] for value in values)


def key(name: str | bytes, value: bytes) -> bytes:
    return text(name) + value


@dataclass
class Tensor:
    """name, ggml's type, shape with the fastest axis first; offset: None for what it must be."""

    name: str | bytes
    type: int = 0
    ne: tuple[int, ...] = (32,)
    offset: int | None = None

    def nbytes(self) -> int:
        per_block, block_nbytes = BLOCKS.get(self.type, (1, 4))
        n = 1
        for axis in self.ne:
            n *= axis
        return n // per_block * block_nbytes


def pad(n: int, alignment: int) -> int:
    return -n % alignment


def build(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
    data: bool = True,
    cut: int = 0,
) -> bytes:
    """A file. data: False ends it where data would begin. cut: bytes taken off its end."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    file = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys)
    offset = 0
    for tensor in tensors:
        file += text(tensor.name) + struct.pack(f"<I{len(tensor.ne)}Q", len(tensor.ne), *tensor.ne)
        file += struct.pack("<IQ", tensor.type, offset if tensor.offset is None else tensor.offset)
        offset += tensor.nbytes() + pad(tensor.nbytes(), alignment)
    file += bytes(pad(len(file), alignment))
    if data:
        file += bytes(i % 256 for i in range(offset))
    return file[: len(file) - cut]


def some_keys(seed: int = 0) -> list[bytes]:
    """A key of every kind and an array of every kind, random bytes for text."""
    draws = random.Random(seed)
    keys = []
    for kind in PACK:
        values = [struct.unpack("<" + PACK[kind], draws.randbytes(struct.calcsize(PACK[kind])))[0] for _ in range(5)]
        keys += [key(f"my_key_{kind}", scalar(kind, values[0])), key(f"my_array_{kind}", array(kind, values))]
    keys.append(key("my_text", scalar(STRING, draws.randbytes(40))))
    keys.append(key("my_texts", array(STRING, [draws.randbytes(draws.randrange(5)) for _ in range(20)])))
    return keys


def some_tensors() -> list[Tensor]:
    shapes = ((256,), (512, 3), (256, 2, 5), (256, 1, 2, 3), (256, 7))
    return [Tensor(f"my_tensor_{n}", type_, shapes[n % len(shapes)]) for n, type_ in enumerate(BLOCKS)]


def llamacpp_accepts(folder: Path, *, with_data: bool = False) -> dict[str, bool]:
    """By name of each file of `folder`, whether llama.cpp's gguf_init_from_file takes it.

    with_data: it reads the data of the tensors, too, padding included. In a child process, since it may abort.
    """
    mode = "data" if with_data else "header"
    child = subprocess.run(
        [sys.executable, __file__, str(folder), mode], capture_output=True, text=True, errors="replace", timeout=120
    )
    if child.returncode:
        raise RuntimeError(f"llama.cpp ended with {child.returncode} on a file: {child.stderr[-2000:]}{child.stdout}")
    return {name: verdict == "yes" for name, verdict in (line.rsplit(" ", 1) for line in child.stdout.splitlines())}


def main(folder: Path, mode: str) -> None:
    """The child: a line for each file."""
    import llamacpp

    lib = llamacpp.library()
    lib.ggml_free.argtypes, lib.ggml_free.restype = [ctypes.c_void_p], None
    for path in sorted(folder.iterdir()):
        tensors = ctypes.c_void_p()
        ctx = ctypes.cast(ctypes.byref(tensors), ctypes.c_void_p) if mode == "data" else None
        print(path.name, end=" ", flush=True)
        file = lib.gguf_init_from_file(os.fsencode(path), llamacpp.GGUFInitParams(no_alloc=False, ctx=ctx))
        print("yes" if file else "no", flush=True)
        if file:
            lib.gguf_free(file)
            if mode == "data":
                lib.ggml_free(tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
