"""Kernels as machine code: compiled by Numba once, kept on disk, from there loaded by LLVM alone.

Importing Numba takes longer than everything else that a command imports, and its own cache needs it imported. So the
machine code of a kernel is kept as an object file, which LLVM loads within milliseconds, and called through ctypes,
which lets other threads of Python run meanwhile. Numba is imported only where a kernel is not yet kept.

A file holds, in its first line, the SHA-256 of all that follows; then, in a line, the name of the function; then the
object file. Its name tells the kernel, the types it was compiled for, what sources it was made of and for which
processor. Files lie in NUMBA_CACHE_DIR if that is set, else beside the kernel's module, else in the user's cache
folder, whichever can be written first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

# What a kernel is called with: integers, floats, and arrays, such as "f1", or "rf1" if it may only be read: of dtype
# code f, along 1 axis.
Types = tuple[str, ...]
INTEGER, FLOAT, READ_ONLY = "int", "float", "r"

_compiling = Lock()


class Kernel:
    """A compiled function of contiguous arrays, integers and floats, which returns nothing.

    module, name: where it is. dispatcher: what Numba made of it; None where the module was not imported for it.
    """

    def __init__(self, module: str, name: str, dispatcher: Any = None) -> None:
        self.module, self.name, self.dispatcher = module, name, dispatcher
        self._loaded: dict[Types, Any] = {}

    def __call__(self, *arguments: Any) -> None:
        types = tuple([_type_of(argument) for argument in arguments])
        function = self._loaded.get(types) or self._load(types)
        flat: list[Any] = [_nowhere, _nowhere]
        for argument in arguments:
            if isinstance(argument, np.ndarray):  # as Numba's struct of an array; owner and parent are not looked at
                address = argument.__array_interface__["data"][0]
                flat += (None, None, argument.size, argument.itemsize, address, *argument.shape, *argument.strides)
            else:
                flat.append(argument)
        if function(*flat):
            raise RuntimeError(f"{self.module}.{self.name} failed")

    def address(self, types: Types) -> int:
        """Where the machine code for these types is, for kernels that call it (simd/atomics.py)."""
        function = self._loaded.get(types) or self._load(types)
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def of_integers(self, n: int) -> Callable[..., object]:
        """The kernel as a function of n integers and nothing else, whose call takes a microsecond."""
        return partial(self._load((INTEGER,) * n), _nowhere, _nowhere)

    def _load(self, types: Types) -> Any:
        with _compiling:
            if types not in self._loaded:
                symbol, machine_code = _kept(self.module, self.name, types) or self._compile(types)
                self._loaded[types] = _prototype(types)(_add_to_process(symbol, machine_code))
            return self._loaded[types]

    def _compile(self, types: Types) -> tuple[str, bytes]:
        """The symbol and the object file of the kernel, which are kept from now on."""
        folder = next(_writable(self.module), None)
        _announce("compiling kernels for this processor, once ..." if folder else NOWHERE_TO_KEEP)
        source = self if self.dispatcher is not None else getattr(import_module(self.module), self.name)
        symbol, machine_code = import_module("llamatools.dtypes.simd.kernel").compiled(source.dispatcher, types)
        if folder is not None:
            with suppress(OSError):  # a full disk costs the next run a compilation, not this run its result
                _keep(folder / _file_name(self.module, self.name, types), symbol, machine_code)
        return symbol, machine_code


NOWHERE_TO_KEEP = "compiling kernels; no folder to keep them in is writable (NUMBA_CACHE_DIR can name one) ..."
_nowhere = (ctypes.c_void_p * 8)()  # where kernels put their result, which is None, and the error they never have


def _type_of(argument: Any) -> str:
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return f"{'' if argument.flags.writeable else READ_ONLY}{argument.dtype.char}{argument.ndim}"
    return FLOAT if isinstance(argument, float) else INTEGER


def _prototype(types: Types) -> Any:
    """The C type of a kernel: Numba's calling convention for functions that are called by others."""
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    arguments: list[Any] = []
    for code in types:
        if code in (INTEGER, FLOAT):
            arguments.append(ctypes.c_int64 if code == INTEGER else ctypes.c_double)
        else:
            arguments += (pointer, pointer, size, size, pointer, *(2 * int(code[-1]) * [size]))
    return ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, *arguments)


def _add_to_process(symbol: str, machine_code: bytes) -> int:
    """The address of a function after its object file is loaded, for good."""
    import llvmlite.binding as llvm

    engine().add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine().finalize_object()
    address: int = engine().get_function_address(symbol)
    return address


@cache
def engine() -> Any:
    """LLVM's, for functions that are for this processor and for as long as the process lives."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _kept(module: str, name: str, types: Types) -> tuple[str, bytes] | None:
    """What `_keep` kept, if it is there and whole."""
    file_name = _file_name(module, name, types)
    for folder in _folders(module):
        with suppress(OSError):
            digest, _, rest = (folder / file_name).read_bytes().partition(b"\n")
            if digest.decode("ascii", "replace") == _sha256(rest):
                symbol, _, machine_code = rest.partition(b"\n")
                return symbol.decode(), machine_code
    return None


def _keep(path: Path, symbol: str, machine_code: bytes) -> None:
    rest = symbol.encode() + b"\n" + machine_code
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(_sha256(rest).encode() + b"\n" + rest)
    part.replace(path)
    kernel, sources, _, _ = path.name.rsplit(".", 3)
    for other in path.parent.glob(f"{kernel}.*.o"):
        if other.name.split(".")[-3] != sources:  # made of sources that are no more
            other.unlink(missing_ok=True)


def _file_name(module: str, name: str, types: Types) -> str:
    folder = _folder_of(module)
    return f"{module.rsplit('.', 1)[-1]}.{name}-{'-'.join(types)}.{_sources(folder)}.{_processor()}.o"


@cache
def _folder_of(module: str) -> Path:
    loaded = sys.modules.get(module)
    origin = loaded.__file__ if loaded else getattr(find_spec(module), "origin", None)  # which does not import it
    assert origin, "a kernel is in a file"
    return Path(origin).parent


@cache
def _sources(folder: Path) -> str:
    """A digest of everything that a kernel of a module in `folder` may be made of."""
    own = Path(__file__).parent
    return _sha256(b"".join(path.read_bytes() for path in sorted({*own.rglob("*.py"), *folder.glob("*.py")})))[:16]


@cache
def _processor() -> str:
    """A digest of what decides about machine code besides its source: processor, compiler and what overrides them."""
    import llvmlite
    import llvmlite.binding as llvm

    forced = [os.environ.get(name) for name in ("LLAMATOOLS_SIMD", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    host = (llvm.get_default_triple(), llvm.get_host_cpu_name(), sorted(llvm.get_host_cpu_features().items()))
    numba = find_spec("numba")  # which does not import it
    compiler = Path(numba.origin).with_name("_version.py").read_text() if numba and numba.origin else None
    facts = (host, forced, compiler, llvm.llvm_version_info, llvmlite.__version__)
    return _sha256(repr(facts).encode())[:16]


def _sha256(data: bytes) -> str:
    from hashlib import sha256  # which takes longer to import than looking at a file takes, and has no use there

    return sha256(data).hexdigest()


def _folders(module: str) -> Iterator[Path]:
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        yield Path(named)
        return
    yield _folder_of(module) / "__pycache__"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamatools"


def _writable(module: str) -> Iterator[Path]:
    for folder in _folders(module):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                yield folder


@cache
def _announce(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
