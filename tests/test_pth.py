"""torch.save's files, against torch.load; and files that are damaged, hostile or of another kind."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats.pth import MAX_PICKLE, MAX_REPEATED, read_pth
from llamatools.tensors import FileTensor

NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex32: "C32", torch.complex64: "C64",
    torch.complex128: "C128", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def weights(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """n weights of arbitrary bits."""
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (n * dtype.itemsize,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return bits.view(dtype)


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def save(value: object, folder: Path, **options: Any) -> Path:
    path = folder / "model.pth"
    torch.save(value, path, **options)
    return path


def repacked(value: object, folder: Path, change: Callable[[dict[str, bytes]], None], prefix: str = "archive/") -> Path:
    """What torch saved, its records changed, in a zip that Python's zipfile wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    archive = zipfile.ZipFile(file)
    records = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    change(records)
    path = folder / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(prefix + name, data)
    return path


def assert_equal(tensor: FileTensor, expected: torch.Tensor) -> None:
    assert (tensor.dtype.name, tensor.shape) == (NAMES[expected.dtype], tuple(expected.shape))
    assert tensor.strides == (None if expected.is_contiguous() else expected.stride())
    assert tensor.read(0, tensor.n_rows).tobytes() == as_bytes(expected)


def refusal(path: Path, kind: type[LlamatoolsError] = FormatError) -> str:
    with pytest.raises(kind) as error:
        read_pth(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = weights(24, dtype)
    path = save({"whole": base, "part": base[3:9], "matrix": base.view(4, 6).t(), "empty": base[:0]}, tmp_path)
    loaded = torch.load(path, weights_only=True)
    file = read_pth(path)
    assert list(file.tensors) == list(loaded)
    for name, tensor in file.tensors.items():
        assert_equal(tensor, loaded[name])
    assert file.file.size == path.stat().st_size
    assert file.others == {}


@st.composite
def views_of_one_storage(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    base = weights(draw(st.integers(0, 60)), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint16])))
    views = {"base": base}
    for n in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        strides = [draw(st.integers(0, 12)) for _ in shape]
        end = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
        if 0 in shape or end <= base.numel():
            room = base.numel() - (0 if 0 in shape else end)
            views[f"view{n}"] = base.as_strided(shape, strides, draw(st.integers(0, room)))
    return views


@given(views_of_one_storage())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_views_of_one_storage(tmp_path: Path, views: dict[str, torch.Tensor]) -> None:
    path = save(views, tmp_path)
    loaded = torch.load(path, weights_only=True)
    for name, tensor in read_pth(path).tensors.items():
        assert tensor.shape == tuple(loaded[name].shape)
        assert tensor.read(0, tensor.n_rows).tobytes() == as_bytes(loaded[name])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_of_a_module(protocol: int, tmp_path: Path) -> None:
    module = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(3, 5), b=torch.nn.BatchNorm1d(5)))
    module.b.register_buffer("tied", module.a.weight.data)
    path = save(module.state_dict(), tmp_path, pickle_protocol=protocol)
    file = read_pth(path)
    assert list(file.tensors) == list(module.state_dict())
    for name, expected in torch.load(path, weights_only=False).items():  # True knows protocol 2 alone
        assert_equal(file.tensors[name], expected)
    assert file.tensors["b.tied"].offset == file.tensors["a.weight"].offset
    parameters = read_pth(save(dict(module.named_parameters()), tmp_path, pickle_protocol=protocol))
    for name, parameter in module.named_parameters():
        assert_equal(parameters.tensors[name], parameter.detach())


def test_a_checkpoint_of_training(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save(
        {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": [torch.ones(2), (torch.zeros(1), 0.5)],
            "epoch": 3, "loss": -1.5, "note": "naïve", "nothing": None, "done": True, "shape": torch.Size([7]),
            "dtype": torch.bfloat16, "device": torch.device("cuda:0"), "raw": b"\x00\xff", "seed": 1 << 70, "empty": {},
        },
        tmp_path,
    )  # fmt: skip
    file = read_pth(path)
    loaded = torch.load(path, weights_only=True)
    assert_equal(file.tensors["model.weight"], loaded["model"]["weight"])
    assert_equal(file.tensors["optimizer.state.1.exp_avg"], loaded["optimizer"]["state"][1]["exp_avg"])
    assert_equal(file.tensors["history.0"], torch.ones(2))
    assert_equal(file.tensors["history.1.0"], torch.zeros(1))
    others = {name: value for name, value in file.others.items() if not name.startswith("optimizer.")}
    assert others == {
        "history.1.1": 0.5, "epoch": 3, "loss": -1.5, "note": "naïve", "nothing": None, "done": True, "shape.0": 7,
        "dtype": "torch.bfloat16", "device": "cuda:0", "raw": b"\x00\xff", "seed": 1 << 70,
    }  # fmt: skip
    assert file.others["optimizer.param_groups.0.lr"] == 0.25


def test_location_of_another_device_does_not_matter(tmp_path: Path) -> None:
    def on_cuda(records: dict[str, bytes]) -> None:
        assert b"X\x03\x00\x00\x00cpu" in records["data.pkl"]
        records["data.pkl"] = records["data.pkl"].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")

    assert_equal(read_pth(repacked({"a": weights(5)}, tmp_path, on_cuda)).tensors["a"], weights(5))


def test_a_file_of_older_torch_has_fewer_records(tmp_path: Path) -> None:
    def older(records: dict[str, bytes]) -> None:
        for name in ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"):
            del records[name]

    assert_equal(read_pth(repacked({"a": weights(5)}, tmp_path, older, prefix="any name/")).tensors["a"], weights(5))


def test_tensors_beyond_4_gib_are_found_and_nothing_is_read(tmp_path: Path) -> None:
    with torch.serialization.skip_data():  # torch leaves holes where the data belong
        path = save({"a": torch.empty(5 << 30, dtype=torch.uint8), "b": torch.ones(3)}, tmp_path)
    offset = torch._C.PyTorchFileReader(str(path)).get_record_offset("data/1")
    with open(path, "r+b") as data:
        data.seek(offset)
        data.write(as_bytes(torch.ones(3)))
    tracemalloc.start()
    try:
        file = read_pth(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert file.tensors["b"].offset == offset > 5 << 30
    assert_equal(file.tensors["b"], torch.load(path, mmap=True, weights_only=True)["b"])


def test_a_shard_of_70b_has_its_tensors(tmp_path: Path) -> None:
    path = save({f"layers.{i}.part{j}.weight": weights(6).view(2, 3) for i in range(80) for j in range(9)}, tmp_path)
    assert len(read_pth(path).tensors) == 720


def test_torch_is_not_needed(tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from llamatools.formats.pth import read_pth\n"
        f"print(read_pth(Path({str(path)!r})).tensors['a'].read(0, 1))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[[1. 1.]]\n"


# ---- What is refused ----


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.pth")
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<!doctype html><html>", "a web page of 21 bytes, not a model"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16060617592\n",
            "a file of 16060617592 bytes",
        ),
        (bytes(1000), "its first 512 bytes are zeros"),
        (b"\x7fELF....", "not a zip file as torch.save writes it: it begins with b'\\x7fELF....'"),
        (b"7z\xbc\xaf\x27\x1c", "not a zip file as torch.save writes it"),
        (pickle.dumps({"a": 1}), "a bare pickle, not a zip file as torch.save writes it"),
    ],
)
def test_other_files(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    assert message in refusal(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_files_before_torch_1_6(protocol: int, tmp_path: Path) -> None:
    path = save({"a": weights(3)}, tmp_path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert refusal(path, UnsupportedError) == (
        "a file of torch.save before version 1.6, which is no zip. "
        "Save it again with torch 1.6 or later: torch.save(torch.load(f, weights_only=True), g)"
    )


def test_tar(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "a tar archive, perhaps of torch before 0.2. Save it again" in refusal(path, UnsupportedError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path)
    assert "belongs to a TorchScript archive, which is a program" in refusal(path, UnsupportedError)


def test_a_whole_module_is_a_program(tmp_path: Path) -> None:
    assert refusal(save(torch.nn.Linear(2, 3), tmp_path)) == (
        "the pickle asks for 'torch.nn.modules.linear.Linear', which a checkpoint has no use for. "
        "llamatools runs nothing from a file"
    )


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_command_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    path = save({"a": weights(3), "b": Runs(canary)}, tmp_path)
    assert refusal(path).startswith("the pickle asks for 'posix.system', which a checkpoint has no use for.")
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [(torch.ones(3), "tensor"), ([torch.ones(3)], "list"), ("text", "text"), (None, "None"), (3, "whole number")],
)
def test_what_is_no_dict(value: object, kind: str, tmp_path: Path) -> None:
    assert refusal(save(value, tmp_path)) == f"it holds a {kind}, not a dict of tensors. Save the model's state_dict()"


def test_a_storage_is_no_tensor(tmp_path: Path) -> None:
    assert "value 'a': is a storage, not a tensor" in refusal(
        save({"a": weights(3).untyped_storage()}, tmp_path), UnsupportedError
    )


def test_names_must_differ(tmp_path: Path) -> None:
    assert refusal(save({"a": {"b": weights(3)}, "a.b": 1}, tmp_path)) == "two of its values are called 'a.b'"
    assert refusal(save({"a": {1: 1, "1": weights(3)}}, tmp_path)) == "two of its values are called 'a.1'"


def test_repetition_is_bounded(tmp_path: Path) -> None:
    deep: Any = {"a": 1}
    for _ in range(31):
        deep = {"a": deep}
    assert list(read_pth(save(deep, tmp_path)).others) == [".".join("a" * 32)]
    assert "dicts and lists lie more than 32 deep in each other" in refusal(save({"a": deep}, tmp_path))
    cycle: dict[str, Any] = {"n": "x" * 99}
    cycle["a"] = cycle
    assert "more than 32 deep" in refusal(save(cycle, tmp_path))
    laughs: Any = [1] * 10
    for _ in range(20):
        laughs = [laughs] * 10
    path = save({"a": laughs}, tmp_path)
    size = len(zipfile.ZipFile(path).read("model/data.pkl"))
    assert refusal(path) == f"a pickle of {size} bytes that repeats itself to more than {size} values"
    shared = {"k" * 900: weights(3)}
    assert len(read_pth(save({str(i): shared for i in range(9)}, tmp_path)).tensors) == 9


def test_length_of_names_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamatools.formats.pth.MAX_NAMES", 2000)
    shared = {"k" * 900: weights(3)}
    assert "repeats itself to more than 5 values" in refusal(save({str(i): shared for i in range(9)}, tmp_path))


def replace(record: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        assert records[record].count(old) == 1
        records[record] = records[record].replace(old, new)

    return change


def put(record: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda records: records.update({record: data})


def drop(record: str) -> Callable[[dict[str, bytes]], None]:
    return lambda records: records.pop(record) and None


SHAPE = b"K\x00K\x04K\x06\x86q\x08K\x06K\x01\x86"  # offset 0, shape (4, 6), strides (6, 1), as torch pickles them


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (put("data/0", bytes(92)), FormatError,
         "tensor 'w': its storage should have 96 bytes, but record 'data/0' has 92"),
        (put("data/0", bytes(100)), FormatError,
         "tensor 'w': its storage should have 96 bytes, but record 'data/0' has 100"),
        (drop("data/0"), FormatError, "tensor 'w': its storage, record 'data/0', is missing"),
        (replace("data.pkl", SHAPE, SHAPE.replace(b"K\x00K\x04", b"K\x01K\x04")), FormatError,
         "tensor 'w': it ends at byte 100 of its storage, which has 96 bytes"),
        (replace("data.pkl", SHAPE, SHAPE.replace(b"K\x04K\x06", b"K\x05K\x06")), FormatError, "it ends at byte 120"),
        (replace("data.pkl", SHAPE, SHAPE.replace(b"K\x06K\x01", b"K\x07K\x01")), FormatError, "it ends at byte 108"),
        (replace("data.pkl", SHAPE, SHAPE.replace(b"K\x04K\x06", b"K\x00\x8a\x08" + bytes(7) + b"\x7f")), FormatError,
         f"tensor 'w': no tensor can have the shape [0, {127 << 56}]"),
        (replace("data.pkl", SHAPE, b"K\x00J\xff\xff\xff\x7fK\x01\x86q\x08K\x00K\x00\x86"), FormatError,
         f"tensor 'w': it repeats the 96 bytes of its storage to {4 * (2**31 - 1)} bytes. "
         f"Tensors that repeat their weights are read up to {MAX_REPEATED} bytes"),
        (replace("data.pkl", b"FloatStorage", b"LongStorage"), FormatError,
         "tensor 'w': its storage should have 192 bytes, but record 'data/0' has 96"),
        (put("data.pkl", b"\x80\x02}.\x80\x02}."), FormatError, "4 bytes follow the end of the pickle"),
        (put("data.pkl", b""), FormatError, "it does not begin as a pickle of protocol 2 to 5"),
        (drop("data.pkl"), FormatError, "record 'data.pkl' is missing. It is not a checkpoint as torch.save writes it"),
        (drop("version"), FormatError, "record 'version' is missing"),
        (put("version", b"11\n"), UnsupportedError, "record 'version': is '11'; versions 1 to 10 are known"),
        (put("version", b"\xff"), UnsupportedError, "record 'version': is 'ÿ'; versions"),
        (put("version", b"1" * 17), FormatError, "record 'version': has 17 bytes; at most 16 are expected"),
        (put("byteorder", b"big"), UnsupportedError, "record 'byteorder': is 'big'; only little-endian weights are"),
        (put("extra.py", b"import os"), FormatError, "a checkpoint has no record 'extra.py'"),
        (put("data/x", b""), FormatError, "a checkpoint has no record 'data/x'"),
    ],
)  # fmt: skip
def test_damaged_contents(
    change: Callable[[dict[str, bytes]], None], kind: type[LlamatoolsError], message: str, tmp_path: Path
) -> None:
    assert message in refusal(repacked({"w": weights(24).view(4, 6)}, tmp_path, change), kind)


def test_a_stride_that_is_never_taken_may_be_anything(tmp_path: Path) -> None:
    base = weights(24)
    path = save({"w": base.as_strided((1, 4, 3), (2**61, 6, 2))}, tmp_path)
    tensor = read_pth(path).tensors["w"]
    assert tensor.strides == (2**61, 6, 2)
    assert tensor.read(0, 4).tobytes() == as_bytes(torch.load(path, weights_only=True)["w"])


def test_a_pickle_larger_than_any(tmp_path: Path) -> None:
    path = repacked({}, tmp_path, put("data.pkl", bytes(MAX_PICKLE + 1)))
    assert f"a pickle of {MAX_PICKLE + 1} bytes; at most {MAX_PICKLE} are read" in refusal(path)


def test_the_pickle_is_checked_by_its_crc(tmp_path: Path) -> None:
    path = save({"weight": weights(3)}, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"weight", b"weighs"))
    assert "record 'data.pkl': its CRC-32 is" in refusal(path)
    torch.serialization.set_crc32_options(False)
    try:
        assert list(read_pth(save({"weight": weights(3)}, tmp_path)).tensors) == ["weight"]
    finally:
        torch.serialization.set_crc32_options(True)


def test_truncated_names_both_sizes(tmp_path: Path) -> None:
    path = save({"a": weights(5000), "b": weights(5000), "n": 3}, tmp_path)
    path.write_bytes(path.read_bytes()[:30000])
    message = refusal(path)
    needed = int(message.split()[6])
    assert 40000 < needed < 40500  # the weights, and the pickle before them
    assert message == (
        f"its tensors make it at least {needed} bytes long, but the file ends at 30000. "
        "The file is probably truncated; copy or download it again"
    )


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = save({"a": weights(5), "b": {"c": weights(2), "d": 3}}, tmp_path)
    data = path.read_bytes()
    cut = tmp_path / "cut.pth"
    for n in range(len(data)):
        cut.write_bytes(data[:n])
        with pytest.raises(LlamatoolsError):
            read_pth(cut)


def read_all(path: Path) -> None:
    for tensor in read_pth(path).tensors.values():
        if tensor.nbytes < 1 << 20:
            tensor.read(0, tensor.n_rows)


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    random_ = random.Random(613)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    file = io.BytesIO()
    torch.serialization.set_crc32_options(False)  # so that damage of the pickle gets past its checksum
    try:
        torch.save({"model": module.state_dict(), "t": weights(12).view(3, 4).t(), "u": weights(3, torch.uint16)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    data = file.getvalue()
    pickled = torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl")
    start = data.index(pickled)
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "model.pth"
    for _ in range(1500):
        damaged = bytearray(data)
        # half of the damage hits the pickle, a quarter the zip directory
        low, high = random_.choice(
            [(start, start + len(pickled))] * 2 + [(len(data) - 1800, len(data)), (0, len(data))]
        )
        for _ in range(random_.choice([1, 1, 1, 2, 5])):
            at = random_.randrange(low, high)
            match random_.randrange(3):
                case 0:
                    damaged[at] = random_.randrange(256)
                case 1:
                    damaged[at] ^= 1 << random_.randrange(8)
                case 2:
                    other = random_.randrange(low, high)
                    n = random_.randrange(1, 9)
                    damaged[at : at + n] = damaged[other : other + n].ljust(n, b"\0")
        path.write_bytes(damaged)
        try:
            read_all(path)
            outcomes["read"] += 1
        except LlamatoolsError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 150
