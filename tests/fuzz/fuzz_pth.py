"""Fuzzing the .pth reader with atheris: whatever the bytes are, only a LlamatoolsError may escape, quickly.

    pip install atheris                                   (CPython up to 3.13; not a dependency of `make test`)
    python tests/fuzz/fuzz_pth.py -max_total_time=300     (libFuzzer's options; a folder to keep the corpus may follow)

The input's first byte chooses what is fuzzed: the pickle alone, a pickle inside of a sound zip, or a whole file. The
seeds come from torch.save. A crash leaves crash-* in the current folder; give that file as argument to run it again.
"""

from __future__ import annotations

import io
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llamatools"]):
    from llamatools.errors import LlamatoolsError
    from llamatools.formats.pth import read_pth
    from llamatools.formats.torch_pickle import read_pickle

MODEL = Path(tempfile.mkdtemp(prefix="fuzz-pth-")) / "model.pth"
WHOLE_FILE, IN_A_ZIP, PICKLE = range(3)
MAX_READ = 1 << 20  # bytes of a tensor that is read


def run(data: bytes) -> None:
    if not data:
        return
    kind, data = data[0] % 3, data[1:]
    try:
        if kind == PICKLE:
            read_pickle(data)
            return
        MODEL.write_bytes(zipped(data) if kind == IN_A_ZIP else data)
        for tensor in read_pth(MODEL).tensors.values():
            str(tensor)
            if tensor.nbytes <= MAX_READ:
                tensor.read(0, tensor.n_rows)
    except LlamatoolsError as error:
        if "\n" in str(error):
            raise ValueError("an error of several lines") from error


def zipped(pickle: bytes) -> bytes:
    """The pickle in a sound file with storages of 0 to 3 times 24 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickle)
        archive.writestr("x/version", b"3")
        for key in range(4):
            archive.writestr(f"x/data/{key}", bytes(24 * key))
    return file.getvalue()


def seeds(folder: Path) -> None:
    """What torch saves of small dicts, as a first corpus."""
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    values = [
        {"a": torch.zeros(0), "b": torch.ones(6), "c": torch.ones(12).view(3, 4).t()},
        {
            "p": torch.nn.Parameter(torch.ones(2)),
            "u": torch.ones(3, dtype=torch.uint16),
            "n": {"e": 1.5, "s": ["x", None]},
        },
        {
            "model": module.state_dict(),
            "d": torch.device("cuda:0"),
            "s": torch.Size([1]),
            "t": torch.float16,
            "y": b"z",
        },
    ]
    for n, value in enumerate(values):
        for protocol in (2, 4):
            file = io.BytesIO()
            torch.save(value, file, pickle_protocol=protocol)
            pickle = zipfile.ZipFile(file).read("archive/data.pkl")
            for kind, data in ((WHOLE_FILE, file.getvalue()), (IN_A_ZIP, pickle), (PICKLE, pickle)):
                (folder / f"seed-{n}-{protocol}-{kind}").write_bytes(bytes([kind]) + data)


def main() -> None:
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-pth-corpus-"))
    seeds(corpus)
    atheris.Setup([*sys.argv, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
