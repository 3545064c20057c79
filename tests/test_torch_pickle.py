"""The pickle machine: plain values as Python's pickle reads them, and nothing else."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatools.dtypes import F32, plain
from llamatools.errors import FormatError, LlamatoolsError, UnsupportedError
from llamatools.formats.torch_pickle import MAX_INSTRUCTIONS, read_pickle
from llamatools.formats.torch_symbols import Storage, StoredTensor, Symbol

BEGIN = b"\x80\x02"
RUNS_NOTHING = "llamatools runs nothing from a file"

KEYS = st.text(max_size=9) | st.integers(-(1 << 59), 1 << 59)
LEAVES = st.none() | st.booleans() | st.integers(-(1 << 300), 1 << 300) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


def asked(symbol: str) -> bytes:
    """The GLOBAL instruction for a dotted symbol."""
    module, _, name = symbol.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def of_torch(value: object, protocol: int = 2) -> bytes:
    """The pickle that torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    return zipfile.ZipFile(file).read("archive/data.pkl")


def refusal(program: bytes, kind: type[LlamatoolsError] = FormatError) -> str:
    with pytest.raises(kind) as error:
        read_pickle(BEGIN + program)
    return str(error.value)


DICT, ENCODE = asked("collections.OrderedDict"), asked("_codecs.encode")
STORAGE = b"(" + text("storage") + asked("torch.FloatStorage") + text("0") + text("cpu") + b"K\x06tQ"


def tensor(shape: bytes = b"K\x02K\x03\x86", strides: bytes = b"K\x03K\x01\x86", rest: bytes = b"\x89N") -> bytes:
    return asked("torch._utils._rebuild_tensor_v2") + b"(" + STORAGE + b"K\x00" + shape + strides + rest + b"tR"


@given(VALUES, st.integers(2, 5))
@settings(deadline=None)
def test_plain_values_are_what_was_pickled(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    read, end = read_pickle(data + b"anything")
    assert end == len(data)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_shared_values_stay_shared(protocol: int) -> None:
    shared = [1]
    read, _ = read_pickle(pickle.dumps({"a": shared, "b": shared, **{str(i): i for i in range(400)}}, protocol))
    assert read["a"] is read["b"]
    assert read["399"] == 399


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves(protocol: int) -> None:
    value = OrderedDict(
        weight=torch.nn.Parameter(torch.zeros(2, 3).t()),
        new=torch.zeros(4, dtype=torch.uint16)[1:],
        shape=torch.Size([1, 2]),
        device=torch.device("cuda:1"),
        any_device=torch.device("cuda"),
        dtype=torch.float16,
        bytes=b"\xff\x00" * 400,
    )
    value["weight"].note = "attributes go unread"
    value["plain"] = torch.zeros(())
    value["plain"].note = {"a": 1}
    read, _ = read_pickle(of_torch(value, protocol))
    assert list(read) == list(value)
    assert read["weight"] == StoredTensor(Storage(F32, "0", 6), F32, 0, (3, 2), (1, 3))
    assert read["new"] == StoredTensor(Storage(None, "1", 8), plain.U16, 1, (3,), (1,))
    assert read["plain"] == StoredTensor(Storage(F32, "2", 1), F32, 0, (), ())
    assert (read["shape"], read["device"], read["any_device"]) == ((1, 2), "cuda:1", "cuda")
    assert isinstance(read["dtype"], Symbol)
    assert read["dtype"].name == "torch.float16"
    assert read["bytes"] == value["bytes"]


def test_metadata_of_a_state_dict_is_dropped() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    data = of_torch(module.state_dict())
    assert any(op.name == "BUILD" for op, _, _ in pickletools.genops(data))
    read, _ = read_pickle(data)
    assert type(read) is OrderedDict
    assert list(read) == list(module.state_dict())
    assert not vars(read)


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"w": [x]}}, lambda x: OrderedDict(w=(1, x))])
def test_a_command_is_named_and_not_run(protocol: int, wrap: Any, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    data = pickle.dumps(wrap(Runs(os.system, f"touch {canary}")), protocol)
    with pytest.raises(FormatError) as error:
        read_pickle(data)
    assert str(error.value) == (
        f"the pickle asks for 'posix.system', which a checkpoint has no use for. {RUNS_NOTHING}"
    )
    assert not canary.exists()
    pickle.loads(data)  # the same bytes do harm where they are trusted
    assert canary.exists()


@pytest.mark.parametrize(
    "symbol",
    [
        "builtins.eval", "__builtin__.exec", "builtins.getattr", "os.system", "subprocess.Popen", "torch.load",
        "pkgutil.resolve_name", "torch.hub.load", "torch.jit.load", "torch.serialization.load", "_io.BytesIO",
        "collections.defaultdict", "copyreg._reconstructor", "numpy.core.multiarray._reconstruct", "torch._tensor.os",
        "torch._utils.os.system",
        "torch._utils._rebuild_tensor_v2.__globals__", "collections.OrderedDict.__init__", "torch.FloatStorage.x",
        "torch.nn.modules.linear.Linear", ".", "torch.",
    ],
)  # fmt: skip
def test_symbols_outside_of_the_list(symbol: str) -> None:
    module, _, name = symbol.rpartition(".")
    expected = f"the pickle asks for {symbol!r}, which a checkpoint has no use for. {RUNS_NOTHING}"
    assert refusal(asked(symbol) + b".") == expected
    assert refusal(text(module) + text(name) + b"\x93.") == expected


@pytest.mark.parametrize(
    ("program", "made"),
    [
        (b"(" + text("true") + b"ios\nsystem\n.", " of os.system (INST)"),
        (b"(" + asked("collections.OrderedDict") + b"o.", " (OBJ)"),
        (asked("collections.OrderedDict") + b")\x81.", " (NEWOBJ)"),
        (asked("collections.OrderedDict") + b")}\x92.", " (NEWOBJ_EX)"),
        (b"\x82\x01.", " (EXT1)"),
        (b"\x83\x01\x00.", " (EXT2)"),
        (b"\x84\x01\x00\x00\x00.", " (EXT4)"),
        (b"Pos\n.", " (PERSID)"),
    ],
)
def test_instructions_that_make_objects(program: bytes, made: str) -> None:
    assert refusal(program) == f"the pickle makes an object{made}, which a checkpoint has no use for. {RUNS_NOTHING}"


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (b"}", "dict"),
        (b"]", "list"),
        (b")", "tuple"),
        (asked("torch.float32"), "torch.float32"),
        (asked("collections.OrderedDict"), "collections.OrderedDict"),
        (tensor(), "tensor"),
        (STORAGE, "storage"),
        (text("x"), "text"),
        (b"N", "None"),
    ],
)
def test_only_ordered_dicts_get_state(target: bytes, kind: str) -> None:
    """BUILD reaches attributes and __setstate__ in other readers."""
    assert refusal(target + b"}b.") == f"it gives state to a {kind}. {RUNS_NOTHING}"
    assert refusal(asked("collections.OrderedDict") + b")R" + target + b"\x85b.").startswith("it gives state to a")


def test_items_of_dicts_only() -> None:
    for target, kind in (
        (b"]", "list"),
        (STORAGE, "storage"),
        (asked("torch.Tensor"), "torch.Tensor"),
        (tensor(), "tensor"),
    ):
        assert f"it sets an item of a {kind}" in refusal(target + b"K\x00K\x00s.")
        assert f"it sets an item of a {kind}" in refusal(target + b"(K\x00K\x00u.")
    for target, kind in ((b"}", "dict"), (b")", "tuple"), (tensor(), "tensor")):
        assert f"it appends to a {kind}" in refusal(target + b"K\x00a.")
        assert f"it appends to a {kind}" in refusal(target + b"(K\x00e.")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}K\x01K\x02\x86K\x00s.", "byte 10 of the pickle: a tuple as key of a dict; a state dict's keys are texts"),
        (b"}G" + bytes(8) + b"Ns.", "a float as key of a dict"),
        (b"}\x88Ns.", "a bool as key of a dict"),
        (b"}\x8a\x08" + bytes(7) + b"\x20Ns.", "a whole number as key of a dict"),
        (b"}" + text("k" * 1000) + b"Ns.", "a key of 1000 characters; at most 999 are read"),
        (b"}" + (text("k") + b"N") + b"s" + text("k") + b"Ns.", "the key 'k' comes twice in one dict"),
        (b"}(K\x01u.", "a key without a value"),
        (b"}Ns.", "it takes a value from an empty stack"),
        (b"N\x86.", "it takes a value from an empty stack"),
        (b"Na.", "it takes a value from an empty stack"),
        (b"(NR.", "it takes a value from an empty stack"),
        (b"q\x00.", "it takes a value from an empty stack"),
        (b"u.", "it goes back to a mark that it never made"),
        (b"h\x07.", "byte 2 of the pickle: it recalls value 7, which it never stored"),
        (b"j\x07\x00\x00\x00.", "it recalls value 7, which it never stored"),
        (b"NN.", "values are left over at its end"),
        (b"(N.", "values are left over at its end"),
        (b"X\x03\x00\x00\x00abc", "the pickle ends at byte 10, but goes on to byte 11"),
        (b"X\xff\xff\xff\xffabc", "the pickle ends at byte 10, but goes on to byte 4294967302"),
        (b"\x95" + bytes(7) + b"\x10N.", f"the pickle ends at byte 13, but goes on to byte {11 + (1 << 60)}"),
        (b"X\x01\x00\x00\x00\xff.", "a text that is not UTF-8"),
        (b"2.", "instruction 0x32, which no checkpoint needs"),
        (b"I1\n.", "instruction 0x49, which no checkpoint needs"),
        (b"c" + b"a" * 1000 + b"\n", "a symbol's name of more than 999 bytes"),
        (text("a" * 1000) + text("b") + b"\x93.", "a symbol's name of more than 999 bytes"),
        (b"NN\x93.", "it asks for a symbol whose name is no text. " + RUNS_NOTHING),
        (text("x") + b")R.", "it calls 'text'. " + RUNS_NOTHING),
        (asked("torch.float32") + b")R.", "it calls 'torch.float32'. " + RUNS_NOTHING),
        (DICT + b"]R.", "it calls 'collections.OrderedDict' with no tuple of at most 8 values"),
        (DICT + b"(NNNNNNNNNtR.", "with no tuple of at most 8 values. " + RUNS_NOTHING),
        (DICT + b"]\x85R.", "OrderedDict is not called with nothing. " + RUNS_NOTHING),
        (asked("torch.Size") + b"NN\x86\x85R.", "Size is not called with a tuple of whole numbers"),
        (asked("torch.device") + b"K\x00\x85R.", "device is not called with a name, and perhaps a number"),
        (asked("__builtin__.bytes") + b"N\x85R.", "bytes is not called with nothing. " + RUNS_NOTHING),
        (ENCODE + text("x") + text("rot13") + b"\x86R.", "encode is not called with a text of Latin-1"),
        (ENCODE + text("\u20ac") + text("latin1") + b"\x86R.", "encode is not called with a text of Latin-1"),
        (asked("torch._utils._rebuild_parameter") + b"NNN\x87R.", "_rebuild_parameter is not called with a tensor"),
        (tensor(rest=b"\x89N}" + text("x") + b"\x88s"), "_rebuild_tensor is not called with a dict of flags, if any"),
        (tensor(rest=b""), "_rebuild_tensor_v2 is not called with a storage, an offset, a shape, strides"),
        (tensor(shape=b"]"), "a tensor's shape and strides are not two tuples of one length"),
        (tensor(shape=b"K\x02\x85"), "a tensor's shape and strides are not two tuples of one length"),
        (tensor(shape=b"K\x02J\xff\xff\xff\xff\x86"), "are not all whole numbers from 0 to 2**63 - 1"),
        (tensor(strides=b"K\x02J\xff\xff\xff\xff\x86"), "are not all whole numbers from 0 to 2**63 - 1"),
        (tensor(shape=b"K\x02\x88\x86"), "are not all whole numbers from 0 to 2**63 - 1"),
        (tensor(shape=b"K\x02\x8a\x09" + bytes(8) + b"\x01\x86"), "are not all whole numbers from 0 to 2**63 - 1"),
        (
            tensor(shape=b"(" + b"K\x01" * 65 + b"t", strides=b"(" + b"K\x01" * 65 + b"t"),
            "a tensor of 65 dimensions; torch has at most 64",
        ),
        (
            asked("torch._utils._rebuild_tensor_v3") + b"(" + STORAGE + b"K\x00))\x89N" + asked("torch.bool") + b"tR.",
            "_rebuild_tensor_v3 is not called with an untyped storage, an offset, a shape, strides, a dtype",
        ),
        (
            asked("torch._tensor._rebuild_from_type_v2") + b"(" + DICT + asked("torch.Tensor") + b")}tR.",
            "_rebuild_from_type_v2 is not called with a tensor's function, torch.Tensor, its arguments and state",
        ),
    ],
)  # fmt: skip
def test_malformed(program: bytes, message: str) -> None:
    assert message in refusal(program)


@pytest.mark.parametrize(
    "identity",
    [
        b"N",
        text("os.system"),
        b")",
        b"(" + text("module") + asked("torch.FloatStorage") + text("0") + text("cpu") + b"K\x06t",
        b"(" + text("storage") + text("torch.FloatStorage") + text("0") + text("cpu") + b"K\x06t",
        b"(" + text("storage") + asked("torch.float32") + text("0") + text("cpu") + b"K\x06t",
        b"(" + text("storage") + asked("torch.FloatStorage") + b"K\x00" + text("cpu") + b"K\x06t",
        b"(" + text("storage") + asked("torch.FloatStorage") + text("0") + text("cpu") + b"J\xff\xff\xff\xfft",
        b"(" + text("storage") + asked("torch.FloatStorage") + text("0") + text("cpu") + b"\x88t",
    ],
)
def test_persistent_ids_are_storages_only(identity: bytes) -> None:
    assert refusal(identity + b"Q.") == f"a persistent id that is no storage's. {RUNS_NOTHING}"


def test_it_begins_as_a_pickle() -> None:
    for data in (b"", b"\x80", b"\x80\x01N.", b"\x80\x06N.", b"(lp0\n.", b"N."):
        with pytest.raises(FormatError, match="it does not begin as a pickle of protocol 2 to 5"):
            read_pickle(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda: torch.eye(3).to_sparse(),
            r"a sparse tensor \(.*\), which llamatools does not read. Save tensor.to_dense",
        ),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a tensor quantized by torch"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: torch.zeros(2, device="meta"), "a tensor without weights"),
        (
            lambda: torch.zeros(2, dtype=torch.complex64).conj(),
            "it holds a tensor that is stored conjugated or negated",
        ),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "stored conjugated or negated"),
        (
            lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
            "it holds a tensor of torch.bits8, which llamatools",
        ),
    ],
)
def test_tensors_that_are_not_read(value: Any, message: str) -> None:
    data = of_torch({"a": value()})
    with pytest.raises(UnsupportedError, match=message):
        read_pickle(data)


def test_quantized_storages_and_other_devices_are_refused_by_name() -> None:
    assert "weights quantized by torch (torch.QInt8Storage)" in refusal(asked("torch.QInt8Storage"), UnsupportedError)
    for name in ("wrapper_subclass", "device_tensor_from_numpy", "device_tensor_from_cpu_tensor"):
        assert name in refusal(asked(f"torch._utils._rebuild_{name}"), UnsupportedError)


class Subclass(torch.Tensor):
    pass


def test_tensor_subclasses_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"the pickle asks for '.*Subclass'"):
        read_pickle(of_torch({"a": torch.zeros(2).as_subclass(Subclass)}))


def test_nothing_is_expanded() -> None:
    """Billion laughs: each list holds the one before ten times."""
    program = b"]q\x00" + b"".join(b"(" + b"h%c" % i * 10 + b"tq%c" % (i + 1) for i in range(100))
    tracemalloc.start()
    try:
        value, _ = read_pickle(BEGIN + b"(" + program + b"t.")
        assert len(value) == 101
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_large_announcements_take_no_memory() -> None:
    many_bytes = asked("_codecs.encode") + b"q\x00" + text("a" * 1000) + b"q\x01" + text("latin1") + b"q\x02\x86R"
    bomb = many_bytes + b"h\x00h\x01h\x02\x86R" * 1000
    tracemalloc.start()
    try:
        assert "its values take more bytes than it has" in refusal(b"(" + bomb + b"t.")
        for program in (
            b"X\xff\xff\xff\xff",
            b"B\xff\xff\xff\xff",
            b"\x8b\xff\xff\xff\x7f",
            b"r\xff\xff\xff\xff",
            b"Nr\xff\xff\xff\xff0",
        ):
            refusal(program)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_depth_is_no_recursion() -> None:
    value, _ = read_pickle(BEGIN + b")" + b"\x85" * 20_000 + b".")
    assert "a tuple as key" in refusal(b"})" + b"\x85" * 20_000 + b"Ns.")
    assert "it calls 'tuple'" in refusal(b")" + b"\x85" * 20_000 + b")R.")
    del value


def test_number_of_instructions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamatools.formats.torch_pickle.MAX_INSTRUCTIONS", 1000)
    assert MAX_INSTRUCTIONS == 4_000_000
    assert "more than 1000 instructions, which no checkpoint needs" in refusal(b"]" * 2000)
