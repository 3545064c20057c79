"""The closed list of names that the pickle of a checkpoint may ask for, and the plain values they stand for.

A symbol is never resolved to an object of Python's or torch's. Calling one checks the arguments and gives a plain
value: a dict, a tuple, a text, or the description of a tensor. (What each is called with: torch/_utils.py, _tensor.py
and serialization.py of torch 1.6 to 2.13.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..dtypes import BF16, F16, F32, DType, plain
from ..errors import FormatError, UnsupportedError

NOTHING_RUNS = "llamatools runs nothing from a file"
MAX_DIMS = 64  # of a tensor in torch


@dataclass(frozen=True, slots=True)
class Storage:
    """What the pickle says of a record of weights. dtype: None where it counts bytes. n_items: of dtype, or bytes."""

    dtype: DType | None
    key: str
    n_items: int

    @property
    def nbytes(self) -> int:
        return self.n_items * (1 if self.dtype is None else self.dtype.block_nbytes)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What the pickle says of a tensor: a view of a storage, nothing of which is checked against the file yet.

    shape, strides, offset: not negative; strides and offset in weights, from the storage's start.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """A name that a checkpoint may ask for.

    call: what calling it makes of the arguments; None where it is not called.
    dtype: of the storage or the torch dtype it names. is_storage: names a class of storages.
    """

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: DType | None = None
    is_storage: bool = False


def symbol(module: str, name: str) -> Symbol:
    """The symbol a pickle asks for. Raises FormatError for all that no checkpoint needs, UnsupportedError by name."""
    full = f"{module}.{name}"
    found = SYMBOLS.get(full)
    if found is not None:
        return found
    if full in UNSUPPORTED:
        what, todo = UNSUPPORTED[full]
        raise UnsupportedError(f"it holds {what} ({full}), which llamatools does not read", todo=todo)
    raise FormatError(f"the pickle asks for {full!r}, which a checkpoint has no use for", todo=NOTHING_RUNS)


def storage(persistent_id: object) -> Storage:
    """The storage that a persistent id ("storage", class, key, device, number of items) names."""
    match persistent_id:
        case ("storage", Symbol(is_storage=True) as kind, str(key), str(), int(n_items)) if _is_count(n_items):
            return Storage(kind.dtype, key, n_items)
    raise FormatError("a persistent id that is no storage's", todo=NOTHING_RUNS)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None): a typed storage's."""
    match arguments:
        case (Storage(dtype=DType() as dtype) as stored, offset, shape, strides, _, _, *metadata):
            return _view(stored, dtype, offset, shape, strides, metadata)
    raise _called_with("_rebuild_tensor_v2", "a storage, an offset, a shape, strides")


def _tensor_of_bytes(arguments: tuple[Any, ...]) -> StoredTensor:
    """_rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None)."""
    match arguments:
        case (Storage(dtype=None) as stored, offset, shape, strides, _, _, Symbol(is_storage=False) as kind, *metadata):
            if kind.dtype is None:
                raise UnsupportedError(f"it holds a tensor of {kind.name}, which llamatools does not read")
            return _view(stored, kind.dtype, offset, shape, strides, metadata)
    raise _called_with("_rebuild_tensor_v3", "an untyped storage, an offset, a shape, strides, a dtype")


def _view(
    stored: Storage, dtype: DType, offset: object, shape: object, strides: object, metadata: list[Any]
) -> StoredTensor:
    match metadata:
        case [] | [None]:
            pass
        case [dict() as bits] if bits.keys() <= {"conj", "neg"}:  # whoever reads is to conjugate or negate the weights
            if any(bits.values()):
                raise UnsupportedError(
                    "it holds a tensor that is stored conjugated or negated",
                    todo="Save tensor.resolve_conj().resolve_neg()",
                )
        case _:
            raise _called_with("_rebuild_tensor", "a dict of flags, if anything, at the end")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise FormatError("a tensor's shape and strides are not two tuples of one length")
    if len(shape) > MAX_DIMS:
        raise FormatError(f"a tensor of {len(shape)} dimensions; torch has at most {MAX_DIMS}")
    if not _is_count(offset) or not all(map(_is_count, shape + strides)):
        raise FormatError("a tensor's offset, shape and strides are not all whole numbers from 0 to 2**63 - 1")
    return StoredTensor(stored, dtype, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    """_rebuild_parameter(tensor, requires_grad, hooks), or _with_state: the same and the Python attributes."""
    match arguments:
        case (StoredTensor() as tensor, _, _) | (StoredTensor() as tensor, _, _, _):
            return tensor
    raise _called_with("_rebuild_parameter", "a tensor")


def _with_attributes(arguments: tuple[Any, ...]) -> StoredTensor:
    """_rebuild_from_type_v2(function, type, arguments, state): a tensor with Python attributes, or of another class."""
    match arguments:
        case (Symbol() as function, Symbol(name="torch.Tensor"), tuple() as inner, _):
            if function.call in (_tensor, _tensor_of_bytes):
                return function.call(inner)
    raise _called_with("_rebuild_from_type_v2", "a tensor's function, torch.Tensor, its arguments and state")


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[object, object]:
    if arguments:
        raise _called_with("OrderedDict", "nothing")
    return OrderedDict()


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    match arguments:
        case (tuple() as shape,) if len(shape) <= MAX_DIMS and all(map(_is_count, shape)):
            return shape
    raise _called_with("Size", "a tuple of whole numbers")


def _device(arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    raise _called_with("device", "a name, and perhaps a number")


def _bytes(arguments: tuple[Any, ...]) -> bytes:
    """_codecs.encode(text, "latin1"): how protocol 2 spells bytes."""
    match arguments:
        case (str(text), "latin1"):
            try:
                return text.encode("latin1")
            except UnicodeEncodeError:
                pass
    raise _called_with("encode", "a text of Latin-1 characters")


def _no_bytes(arguments: tuple[Any, ...]) -> bytes:
    """bytes(): how protocol 2 spells b""."""
    if arguments:
        raise _called_with("bytes", "nothing")
    return b""


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _called_with(name: str, wanted: str) -> FormatError:
    return FormatError(f"{name} is not called with {wanted}", todo=NOTHING_RUNS)


STORAGES = {
    "Float": F32, "Half": F16, "BFloat16": BF16, "Double": plain.F64, "Char": plain.I8, "Short": plain.I16,
    "Int": plain.I32, "Long": plain.I64, "Byte": plain.U8, "Bool": plain.BOOL, "ComplexFloat": plain.C64,
    "ComplexDouble": plain.C128,
}  # fmt: skip

# torch's name -> the table's. None: known by name only, so that a tensor of it is refused by name.
DTYPES: dict[str, DType | None] = {
    "float32": F32, "float16": F16, "bfloat16": BF16, "float64": plain.F64, "int8": plain.I8, "int16": plain.I16,
    "int32": plain.I32, "int64": plain.I64, "uint8": plain.U8, "uint16": plain.U16, "uint32": plain.U32,
    "uint64": plain.U64, "bool": plain.BOOL, "complex32": plain.C32, "complex64": plain.C64, "complex128": plain.C128,
    "float8_e4m3fn": plain.F8_E4M3, "float8_e5m2": plain.F8_E5M2, "float8_e4m3fnuz": plain.F8_E4M3FNUZ,
    "float8_e5m2fnuz": plain.F8_E5M2FNUZ, "float8_e8m0fnu": plain.F8_E8M0, "float4_e2m1fn_x2": None, "bits8": None,
    "bits16": None, "bits1x8": None, "bits2x4": None, "bits4x2": None,
}  # fmt: skip

SYMBOLS = {
    known.name: known
    for known in (
        Symbol("collections.OrderedDict", _ordered_dict),
        Symbol("torch._utils._rebuild_tensor_v2", _tensor),
        Symbol("torch._utils._rebuild_tensor_v3", _tensor_of_bytes),
        Symbol("torch._utils._rebuild_parameter", _parameter),
        Symbol("torch._utils._rebuild_parameter_with_state", _parameter),
        Symbol("torch._tensor._rebuild_from_type_v2", _with_attributes),
        Symbol("torch.Tensor"),
        Symbol("torch.Size", _size),
        Symbol("torch.device", _device),
        Symbol("_codecs.encode", _bytes),
        Symbol("__builtin__.bytes", _no_bytes),
        Symbol("torch.storage.UntypedStorage", is_storage=True),
        *(Symbol(f"torch.{name}Storage", dtype=dtype, is_storage=True) for name, dtype in STORAGES.items()),
        *(Symbol(f"torch.{name}", dtype=dtype) for name, dtype in DTYPES.items()),
    )
}

_DEQUANTIZE = "Save tensor.dequantize()"
UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": ("a sparse tensor", "Save tensor.to_dense()"),
    "torch._utils._rebuild_qtensor": ("a tensor quantized by torch", _DEQUANTIZE),
    **{
        f"torch.{name}Storage": ("weights quantized by torch", _DEQUANTIZE)
        for name in ("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")
    },
    "torch._utils._rebuild_nested_tensor": ("a nested tensor", "Save its parts, tensor.unbind()"),
    "torch._utils._rebuild_meta_tensor_no_storage": ("a tensor without weights", "Save it from a device that has them"),
    "torch._utils._rebuild_wrapper_subclass": ("a tensor of a class of its own", "Save plain tensors"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": ("a tensor of another device", "Save tensor.cpu()"),
    "torch._utils._rebuild_device_tensor_from_numpy": ("a tensor of another device", "Save tensor.cpu()"),
}
