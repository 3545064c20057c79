"""Which processor Numba compiles for: the host, or a lesser one that LLAMATOOLS_SIMD names (for tests).

Forcing changes what LLVM itself may emit, so a forced process runs what the lesser processor would run. Numba keys its
cache by the same name and features, so tiers never share compiled code.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache

import llvmlite.binding as llvm
from numba import config
from numba.core.registry import cpu_target

from ...errors import UsageError

VARIABLE = "LLAMATOOLS_SIMD"

# tier of x86-64: LLVM's name of a processor that has it and nothing better
TIERS = {"vnni": "cascadelake", "avx512": "skylake-avx512", "avx2": "haswell", "sse2": "x86-64"}


def apply_forced_target() -> None:
    """Makes Numba compile for the tier that LLAMATOOLS_SIMD names, if it names one.

    Raises UsageError for an unknown tier, on another kind of processor than x86-64, and where Numba has been used
    before and its choice stands.
    """
    tier = os.environ.get(VARIABLE)
    if not tier:
        return
    if tier not in TIERS:
        raise UsageError(f"{VARIABLE}={tier}: unknown tier", todo=f"Known are {', '.join(TIERS)}")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise UsageError(f"{VARIABLE}={tier} is a tier of x86-64, and this is {platform.machine()}", todo="Unset it")
    config.CPU_NAME, config.CPU_FEATURES = TIERS[tier], ""  # no features but those of that processor
    if target()[2]:  # what Numba settled on at its first use
        raise UsageError(f"{VARIABLE}={tier} comes too late: Numba has already compiled for this processor")


def target() -> tuple[str, str, str]:
    """LLVM's triple, processor and features, as Numba's code generator uses them."""
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, processor, features


# What decides between two ways to the same bits: a generic function and the instruction that shows in its assembly when
# the target has the feature. Feature lists are not to be trusted (on macOS and arm64 LLVM reports few), and a wrong
# guess kills the process in the code generator; compiling generic code and reading the result never fails.
_PROBES = {
    "half": (
        "define <8 x float> @{0}(<8 x half> %a) {{ %r = fpext <8 x half> %a to <8 x float>\n ret <8 x float> %r }}",
        "vcvtph2ps|fcvtl",
    ),
    "avx2": (
        "define <32 x i8> @{0}(<32 x i8> %a, <32 x i8> %b) {{ %r = add <32 x i8> %a, %b\n ret <32 x i8> %r }}",
        "vpaddb.*ymm",
    ),
    "avx512": (
        "define <64 x i8> @{0}(<64 x i8> %a, <64 x i8> %b) {{ %r = add <64 x i8> %a, %b\n ret <64 x i8> %r }}",
        "vpaddb.*zmm",
    ),
    "vnni": (
        "define i32 @{0}(<64 x i8> %a, <64 x i8> %b) {{ %x = zext <64 x i8> %a to <64 x i32>\n "
        "%y = sext <64 x i8> %b to <64 x i32>\n %p = mul <64 x i32> %x, %y\n "
        "%r = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %p)\n ret i32 %r }}",
        "vpdpbusd.*zmm",
    ),
    "sdot": (
        "define i32 @{0}(<16 x i8> %a, <16 x i8> %b) {{ %x = sext <16 x i8> %a to <16 x i32>\n "
        "%y = sext <16 x i8> %b to <16 x i32>\n %p = mul <16 x i32> %x, %y\n "
        "%r = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %p)\n ret i32 %r }}",
        r"\tsdot\t",
    ),
}
_DECLARATIONS = "\n".join(f"declare i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32>)" for n in (16, 64))


@cache
def features() -> frozenset[str]:
    """What the target can do: of half, avx2, avx512, vnni, neon, sdot. Asked while compiling; takes 10 ms once."""
    triple, processor, flags = target()
    probes = "\n".join(code.format(f"probe_{name}") for name, (code, _) in _PROBES.items())
    module = llvm.parse_assembly(f'target triple = "{triple}"\n{probes}\n{_DECLARATIONS}\n')
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=flags, opt=3)
    labels = re.split(r"^_?probe_(\w+):", machine.emit_assembly(module), flags=re.MULTILINE)
    bodies = dict(zip(labels[1::2], labels[2::2], strict=True))
    found = {name for name, (_, shows) in _PROBES.items() if re.search(shows, bodies[name])}
    if triple.startswith(("aarch64", "arm64")):
        found.add("neon")
    return frozenset(found)
