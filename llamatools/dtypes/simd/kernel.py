"""`@kernel` and `@inlined`: the two ways to compile a function, and the one place that says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import from_dtype, njit, types

from ..compiled import FLOAT, INTEGER, READ_ONLY, Kernel, Types

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = {
    "fastmath": False,  # exact IEEE arithmetic
    "error_model": "numpy",  # division by zero gives infinity, as in C
    "boundscheck": False,
    "nogil": True,  # threads run kernels at the same time
    "_nrt": False,  # no reference counting, which would be calls in the loops; so kernels cannot make arrays
    "no_cpython_wrapper": True,  # called through ctypes or by one another; less to compile
    "no_cfunc_wrapper": True,
}


def kernel(function: Function) -> Kernel:
    """Compiles a module-level function at its first call, and keeps the result on disk."""
    return Kernel(function.__module__, function.__qualname__, njit(**_OPTIONS)(function))


def inlined(function: Function) -> Function:
    """Compiles a function into every kernel that calls it, with no call left: vectors stay in registers."""
    inlined_function: Function = njit(forceinline=True, **_OPTIONS)(function)
    return inlined_function


def compiled(dispatcher: Any, signature: Types) -> tuple[str, bytes]:
    """The symbol and the object file of a kernel for these types of arguments."""
    arguments = tuple(_numba_type(code) for code in signature)
    dispatcher.compile(arguments)
    overload = dispatcher.overloads[arguments]
    _, _, (machine_code, _) = overload.library.serialize_using_object_code()
    return overload.fndesc.llvm_func_name, machine_code


def _numba_type(code: str) -> Any:
    if code in (INTEGER, FLOAT):
        return {INTEGER: types.int64, FLOAT: types.float64}[code]
    dtype, n_axes = from_dtype(np.dtype(code[-2])), int(code[-1])
    return types.Array(dtype, n_axes, "C", readonly=code.startswith(READ_ONLY), aligned=True)
