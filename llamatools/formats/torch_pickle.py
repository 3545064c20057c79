"""The pickle of a checkpoint, read by a small machine of its own: it builds plain values, and runs nothing.

A pickle is a program for a stack machine. This one knows the instructions that torch.save needs for dicts of tensors,
and the symbols of torch_symbols.py; at any other it stops with an error. It makes dicts, lists, tuples, texts, numbers
and descriptions of tensors, at most one per instruction and none much larger than the bytes it was made from, so memory
is bounded by the pickle's size. (Instructions: CPython's Lib/pickletools.py.)
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ..errors import FormatError
from .torch_symbols import NOTHING_RUNS, Storage, StoredTensor, Symbol, storage, symbol

MAX_INSTRUCTIONS = 4_000_000  # 35 for each tensor of a plain state dict
MAX_NAME = 999  # bytes of a symbol's or module's name, characters of a key
MAX_KEY_BITS = 60  # of a whole number as key: Python's hashes of larger ones can be made to collide
MAX_ARGUMENTS = 8  # of a call; _rebuild_tensor_v3 takes so many
PROTOCOLS = range(2, 6)


def read_pickle(data: bytes) -> tuple[Any, int]:
    """The value of the pickle at the start of `data`, and where the pickle ends.

    Values are None, bool, int, float, str, bytes, tuple, list, dict, torch_symbols.StoredTensor, Storage or Symbol.
    They may share parts, and lists and dicts may hold themselves.
    Raises FormatError for a malformed or hostile pickle, UnsupportedError for kinds of tensors that are not read.
    """
    machine = _Machine(data)
    try:
        return machine.run(), machine.at
    except FormatError as error:
        if error.todo != NOTHING_RUNS:  # of a hostile pickle, what it asks for matters and not where
            error.where = f"byte {machine.started} of the pickle"
        raise


class _Machine:
    """at: the next byte to read. started: where the instruction began. below: the stacks below each mark.

    bytes_made: in all byte strings that were spelled as texts; torch spells each once.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.started = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.bytes_made = 0

    def run(self) -> Any:
        if len(self.data) < 2 or self.data[0] != PROTO or self.data[1] not in PROTOCOLS:
            raise FormatError("it does not begin as a pickle of protocol 2 to 5")
        self.at = 2
        for _ in range(MAX_INSTRUCTIONS):
            self.started = self.at
            code = self.byte()
            if code == STOP:
                value = self.pop()
                if self.stack or self.below:
                    raise FormatError("values are left over at its end")
                return value
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise _unknown(self, code)
            instruction(self)
        raise FormatError(f"more than {MAX_INSTRUCTIONS} instructions, which no checkpoint needs")

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise FormatError(f"the pickle ends at byte {len(self.data)}, but goes on to byte {self.at}")
        return self.data[start : self.at]

    def byte(self) -> int:
        if self.at == len(self.data):
            raise FormatError(f"the pickle ends at byte {self.at}, but goes on to byte {self.at + 1}")
        self.at += 1
        return self.data[self.at - 1]

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        """The next line, a module's or a symbol's name."""
        name, newline, _ = self.data[self.at : self.at + MAX_NAME + 1].partition(b"\n")
        self.take(len(name) + 1)
        if not newline:
            raise FormatError(f"a symbol's name of more than {MAX_NAME} bytes")
        return _text(name)

    def pop(self) -> Any:
        if not self.stack:
            raise FormatError("it takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise FormatError("it takes a value from an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.below:
            raise FormatError("it goes back to a mark that it never made")
        values, self.stack = self.stack, self.below.pop()
        return values

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise FormatError(f"it recalls value {index}, which it never stored")
        self.stack.append(self.memo[index])


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    """An instruction that pushes what `make` returns."""

    def instruction(machine: _Machine) -> None:
        value = make(machine)  # may leave another stack in place
        machine.stack.append(value)

    return instruction


def _text(data: bytes) -> str:
    try:
        return str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise FormatError("a text that is not UTF-8") from None


def _mark(machine: _Machine) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _tuple(n: int) -> Callable[[_Machine], object]:
    def make(machine: _Machine) -> tuple[Any, ...]:
        if len(machine.stack) < n:
            raise FormatError("it takes a value from an empty stack")
        values = tuple(machine.stack[len(machine.stack) - n :])
        del machine.stack[len(machine.stack) - n :]
        return values

    return make


def _append(machine: _Machine) -> None:
    _extend(machine, [machine.pop()])


def _extend(machine: _Machine, values: list[Any]) -> None:
    target = machine.top()
    if type(target) is not list:
        raise FormatError(f"it appends to a {kind_of(target)}")
    target.extend(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set(machine, [key, value])


def _set(machine: _Machine, pairs: list[Any]) -> None:
    target = machine.top()
    if not isinstance(target, dict):
        raise FormatError(f"it sets an item of a {kind_of(target)}")
    if len(pairs) % 2:
        raise FormatError("a key without a value")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if type(key) is not str and not (type(key) is int and key.bit_length() <= MAX_KEY_BITS):
            raise FormatError(f"a {kind_of(key)} as key of a dict; a state dict's keys are texts")
        if type(key) is str and len(key) > MAX_NAME:
            raise FormatError(f"a key of {len(key)} characters; at most {MAX_NAME} are read")
        if key in target:
            raise FormatError(f"the key {key!r} comes twice in one dict")
        target[key] = value


def _global(machine: _Machine) -> Symbol:
    return symbol(machine.line(), machine.line())


def _stack_global(machine: _Machine) -> Symbol:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise FormatError("it asks for a symbol whose name is no text", todo=NOTHING_RUNS)
    if max(len(name), len(module)) > MAX_NAME:
        raise FormatError(f"a symbol's name of more than {MAX_NAME} bytes")
    return symbol(module, name)


def _reduce(machine: _Machine) -> object:
    arguments, function = machine.pop(), machine.pop()
    if not isinstance(function, Symbol) or function.call is None:
        raise FormatError(f"it calls {kind_of(function)!r}", todo=NOTHING_RUNS)
    if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
        raise FormatError(
            f"it calls {function.name!r} with no tuple of at most {MAX_ARGUMENTS} values", todo=NOTHING_RUNS
        )
    value = function.call(arguments)
    if isinstance(value, bytes):
        machine.bytes_made += len(value)
        if machine.bytes_made > len(machine.data):
            raise FormatError("its values take more bytes than it has")
    return value


def _build(machine: _Machine) -> None:
    """State for an object. Only module.state_dict() needs it, for the versions in `_metadata`; they are dropped."""
    state, target = machine.pop(), machine.top()
    if type(target) is not OrderedDict or not isinstance(state, dict):
        raise FormatError(f"it gives state to a {kind_of(target)}", todo=NOTHING_RUNS)


def _frame(machine: _Machine) -> None:
    """The next n bytes belong together, which helps those who read from a pipe."""
    n = machine.number(U8)
    if n > len(machine.data) - machine.at:
        raise FormatError(f"the pickle ends at byte {len(machine.data)}, but goes on to byte {machine.at + n}")


def kind_of(value: object) -> str:
    """The kind of a value, for errors; never the value, which may be endless."""
    return value.name if isinstance(value, Symbol) else KINDS.get(type(value), type(value).__name__)


def _unknown(machine: _Machine, code: int) -> FormatError:
    if code in OBJECT_MAKERS:
        name = OBJECT_MAKERS[code]
        asked = f" of {machine.line()}.{machine.line()}" if name == "INST" else ""
        return FormatError(
            f"the pickle makes an object{asked} ({name}), which a checkpoint has no use for", todo=NOTHING_RUNS
        )
    return FormatError(f"instruction 0x{code:02x}, which no checkpoint needs")


KINDS = {str: "text", int: "whole number", type(None): "None", Storage: "storage", StoredTensor: "tensor"}
U2, U4, U8, I4, F8 = (struct.Struct(code) for code in ("<H", "<I", "<Q", "<i", ">d"))
PROTO, STOP = 0x80, ord(".")
OBJECT_MAKERS = {
    ord("i"): "INST", ord("o"): "OBJ", 0x81: "NEWOBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
    ord("P"): "PERSID",
}  # fmt: skip
INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("N"): _push(lambda m: None),  # NONE
    0x88: _push(lambda m: True),  # NEWTRUE
    0x89: _push(lambda m: False),  # NEWFALSE
    ord("K"): _push(lambda m: m.byte()),  # BININT1
    ord("M"): _push(lambda m: m.number(U2)),  # BININT2
    ord("J"): _push(lambda m: m.number(I4)),  # BININT
    0x8A: _push(lambda m: int.from_bytes(m.take(m.byte()), "little", signed=True)),  # LONG1
    ord("G"): _push(lambda m: m.number(F8)),  # BINFLOAT
    ord("X"): _push(lambda m: _text(m.take(m.number(U4)))),  # BINUNICODE
    0x8C: _push(lambda m: _text(m.take(m.byte()))),  # SHORT_BINUNICODE
    ord("B"): _push(lambda m: m.take(m.number(U4))),  # BINBYTES
    ord("C"): _push(lambda m: m.take(m.byte())),  # SHORT_BINBYTES
    ord("}"): _push(lambda m: {}),  # EMPTY_DICT
    ord("]"): _push(lambda m: []),  # EMPTY_LIST
    ord(")"): _push(_tuple(0)),  # EMPTY_TUPLE
    0x85: _push(_tuple(1)),  # TUPLE1
    0x86: _push(_tuple(2)),  # TUPLE2
    0x87: _push(_tuple(3)),  # TUPLE3
    ord("("): _mark,  # MARK
    ord("t"): _push(lambda m: tuple(m.pop_to_mark())),  # TUPLE
    ord("a"): _append,  # APPEND
    ord("e"): lambda m: _extend(m, m.pop_to_mark()),  # APPENDS
    ord("s"): _set_item,  # SETITEM
    ord("u"): lambda m: _set(m, m.pop_to_mark()),  # SETITEMS
    ord("c"): _push(_global),  # GLOBAL
    0x93: _push(_stack_global),  # STACK_GLOBAL
    ord("R"): _push(_reduce),  # REDUCE
    ord("Q"): _push(lambda m: storage(m.pop())),  # BINPERSID
    ord("b"): _build,  # BUILD
    ord("q"): lambda m: m.remember(m.byte()),  # BINPUT
    ord("r"): lambda m: m.remember(m.number(U4)),  # LONG_BINPUT
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    ord("h"): lambda m: m.recall(m.byte()),  # BINGET
    ord("j"): lambda m: m.recall(m.number(U4)),  # LONG_BINGET
    0x95: _frame,  # FRAME
}
