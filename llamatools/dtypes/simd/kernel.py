"""`@kernel` and `@inlined`: the two ways to compile a function, and the one place that says how.

Kernels are cached on disk where anything is writable (beside the module, else in the user's cache folder, else in
NUMBA_CACHE_DIR if that is set), and compiled in every process where nothing is.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache, NullCache

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = {
    "fastmath": False,  # exact IEEE arithmetic
    "error_model": "numpy",  # division by zero gives infinity, as in C
    "boundscheck": False,
    "nogil": True,  # threads run kernels at the same time
    "_nrt": False,  # no reference counting, which would be calls in the loops; so kernels cannot make arrays
    "no_cfunc_wrapper": True,  # only Python and other kernels call them; less to compile
}


def kernel(function: Function) -> Function:
    """Compiles a module-level function at its first call, and keeps the result on disk."""
    compiled = njit(**_OPTIONS)(function)
    try:
        compiled._cache = _KeptOnDisk(function)
    except RuntimeError:  # no folder is writable
        compiled._cache = _KeptInMemory()
    kernel_function: Function = compiled
    return kernel_function


def inlined(function: Function) -> Function:
    """Compiles a function into every kernel that calls it, with no call left: vectors stay in registers."""
    inlined_function: Function = njit(forceinline=True, no_cpython_wrapper=True, **_OPTIONS)(function)
    return inlined_function


class _KeptOnDisk(FunctionCache):
    """Numba's cache, which by itself would not notice a change in the functions that a kernel inlines."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _digest_of_sources()

    def load_overload(self, signature: Any, context: Any) -> Any:
        found = None
        # FunctionCache's own would first load all that the compiler knows: a quarter of a second in every process.
        with self._guard_against_spurious_io_errors():
            found = self._load_overload(signature, context)
        if found is None:
            _announce("compiling kernels for this processor, once ...")
        return found

    def save_overload(self, signature: Any, compiled: Any) -> None:
        with suppress(OSError):  # a full disk costs the next run a compilation, not this run its result
            super().save_overload(signature, compiled)


class _KeptInMemory(NullCache):
    def load_overload(self, signature: Any, context: Any) -> None:
        _announce("compiling kernels; no folder to keep them in is writable (NUMBA_CACHE_DIR can name one) ...")


@cache
def _announce(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@cache
def _digest_of_sources() -> str:
    """SHA-256 of the source of every kernel, block layout and module of this layer."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
