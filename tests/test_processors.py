"""Compiling, caching and choosing a processor, in processes of their own; the same bytes on every processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import llvmlite.binding as llvm
import numpy as np
import pytest

from llamatools import dtypes


def lesser_tiers() -> list[str]:
    """The tiers below this machine's own, which is tested anyway."""
    host = llvm.get_host_cpu_features()
    pairs = (("avx512", "avx512vnni"), ("avx2", "avx512bw"), ("sse2", "avx2"))
    return [tier for tier, above in pairs if host.get(above)]


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process with these variables set."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("tier", lesser_tiers())
def test_primitives_on_lesser_tiers(tier: str) -> None:
    files = (path.name for path in Path(__file__).parent.glob("test_simd*.py"))
    result = child("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, LLAMATOOLS_SIMD=tier)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_tier_writes_the_same_bytes() -> None:
    """Encodes and decodes with every dtype that can, on this machine and as on lesser ones."""
    tiers = ["", *lesser_tiers()]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda tier: child("digests.py", LLAMATOOLS_SIMD=tier), tiers))
    for result in results:
        assert result.returncode == 0, result.stderr
    here, *others = (json.loads(result.stdout) for result in results)
    assert {f"{dtype} encoded" for dtype in dtypes.TABLE if dtype.encode} <= here.keys()
    assert {f"{dtype} decoded" for dtype in dtypes.TABLE if dtype.decode} <= here.keys()
    for tier, found in zip(tiers[1:], others, strict=True):
        assert found == here, tier


def test_an_unknown_tier_is_an_error() -> None:
    result = child("-c", "import llamatools.dtypes.simd", LLAMATOOLS_SIMD="mmx")
    assert "LLAMATOOLS_SIMD=mmx: unknown tier. Known are vnni, avx512, avx2, sse2" in result.stderr


def test_a_tier_of_another_kind_of_processor_is_an_error() -> None:
    code = "import platform; platform.machine = lambda: 'arm64'; import llamatools.dtypes.simd"
    result = child("-c", code, LLAMATOOLS_SIMD="sse2")
    assert "LLAMATOOLS_SIMD=sse2 is a tier of x86-64, and this is arm64. Unset it" in result.stderr


def test_a_tier_forced_too_late_is_an_error() -> None:
    code = "import numba; numba.njit(lambda: 1)(); import llamatools.dtypes.simd"
    result = child("-c", code, LLAMATOOLS_SIMD="sse2")
    assert "LLAMATOOLS_SIMD=sse2 comes too late: Numba has already compiled for this processor" in result.stderr


def test_arm64_needs_debian(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    command = [bash, str(Path(__file__).parent / "arm64" / "setup.sh"), str(tmp_path), sys.executable]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == ("apt-get: not found, and needed to fetch an arm64 Python. Run this on Debian or its kin\n")


ENCODE = """
import numpy as np
from llamatools import dtypes
ones = np.ones((1, 32), np.float32)
for name in "Q4_0", "Q5_0":
    dtype = dtypes.named(name)
    print(dtype.decode(dtype.encode(-ones, None)).sum())
"""


def test_compiling_is_announced_once_and_happens_once(tmp_path: Path) -> None:
    first, second = (child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.stderr == "compiling kernels for this processor, once ...\n"
    assert second.stderr == ""
    assert first.stdout == second.stdout == "-32.0\n-32.0\n"


def test_a_damaged_kernel_is_compiled_anew(tmp_path: Path) -> None:
    child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path))
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(kept) == 4
    for path, content in kept.items():
        path.write_bytes(content[:-1] + b"x")
    result = child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path))
    assert result.stdout == "-32.0\n-32.0\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_kernel_of_other_sources_gives_way(tmp_path: Path) -> None:
    child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path))
    kept = sorted(tmp_path.iterdir())
    kernel, _, processor, suffix = kept[0].name.rsplit(".", 3)
    outdated = kept[0].rename(tmp_path / f"{kernel}.0123456789abcdef.{processor}.{suffix}")
    child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path))
    assert not outdated.exists()
    assert sorted(tmp_path.iterdir()) == kept


def test_kept_kernels_need_no_numba(tmp_path: Path) -> None:
    child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path))
    result = child("-c", ENCODE + "import sys; print('numba' in sys.modules)", NUMBA_CACHE_DIR=str(tmp_path))
    assert result.stdout == "-32.0\n-32.0\nFalse\n"


def test_works_where_nothing_is_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = child("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert result.stderr == (
        "compiling kernels; no folder to keep them in is writable (NUMBA_CACHE_DIR can name one) ...\n"
    )
    assert result.stdout == "-32.0\n-32.0\n"


def test_kernels_leave_python_to_other_threads() -> None:
    values = np.random.default_rng(12).standard_normal((2048, 1024), np.float32)
    encode = dtypes.BY_NAME["Q4_1"].encode
    assert encode is not None
    encode(values[:1], values[0] ** 2)  # compiles
    thread = Thread(target=encode, args=(values, values[0] ** 2))
    moments = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        moments.append(time.perf_counter())
    assert np.diff(moments).max() < 0.8 * (moments[-1] - moments[0])


def test_the_table_of_dtypes_does_not_import_numba() -> None:
    code = "import sys, llamatools.dtypes as d; d.named('Q4_0').row_nbytes(64); print('numba' in sys.modules)"
    assert child("-c", code).stdout == "False\n"
