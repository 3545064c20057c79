"""Files that change while a model runs from them: one line and an exit code, and no word that it did not mean."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llamatools_runtime import Cache, comparison, forward, generate, guard, layers, load, measure
from llamatools_runtime.sampling import Sampler

import llamatools
from llamatools import MetaOptions, Overrides, convert
from llamatools.errors import FormatError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "fixtures" / "tiny-llama"
COMPILING = "compiling kernels for this processor, once ...\n"  # what the first run of all says
POEM = (TINY / "text.txt").read_text()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard") / "tiny.gguf"
    convert(TINY, path, options=MetaOptions(overrides=Overrides(context=1024)))
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "model.gguf"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncate_by_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 4))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


def run_and_change(model: Path, change: Callable[[Path], None]) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "llamatools", "run", model, "--max-tokens", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    first = process.stdout.read(5)  # it runs
    change(model)
    out, err = process.communicate(timeout=60)
    return process.returncode, (first + out).decode(), err.decode().replace(COMPILING, "")


@pytest.mark.parametrize("change", [truncate, truncate_by_a_byte, overwrite])
def test_a_file_that_changes_ends_the_run(model: Path, change: Callable[[Path], None]) -> None:
    code, out, err = run_and_change(model, change)
    assert code == 3
    assert err.startswith(f"{model}: ")
    assert err.endswith(f". {guard.REMEDY}\n")
    assert err.count("\n") == 1
    assert POEM.startswith(out)
    assert len(out) < len(POEM)


@pytest.mark.parametrize("change", [replace, remove])
def test_a_file_of_another_name_now_is_still_the_same_file(model: Path, change: Callable[[Path], None]) -> None:
    code, out, _ = run_and_change(model, change)
    assert (code, out.strip()) == (0, POEM.strip())


LOSE_A_PAGE = """
import os, sys, threading
import numpy as np
from llamatools_runtime import Cache, forward, guard, load
model = load(sys.argv[1])[0]
other = load(sys.argv[2])[0] if len(sys.argv) > 2 else None
guard.arm()
os.truncate(sys.argv[1], 0)
thread = threading.Thread(target=forward, args=(model, np.arange(9), Cache.of(model.hparams, 9)))
thread.start()
thread.join()
print("still alive")
"""


def test_a_lost_page_is_one_line_and_a_code(model: Path, original: Path) -> None:
    command = [sys.executable, "-c", LOSE_A_PAGE, model]
    gone = "a part of it is gone: it was truncated while it was in use, or its disk fails"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.replace(COMPILING, "") == f"{model}: {gone}. {guard.REMEDY}\n"
    shutil.copy(original, model)
    done = subprocess.run([*command, original], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, f"{model} or {original}: {gone}. {guard.REMEDY}\n")


LOSE_PAGES_AT_ONCE = """
import mmap, os, sys, threading
from pathlib import Path
import numpy as np
from llamatools_runtime import guard
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    guard.watch(mapping, Path(sys.argv[1]), file.fileno())
guard.arm()
os.truncate(sys.argv[1], 0)
pages = np.frombuffer(mapping, np.uint8)
together = threading.Barrier(8)
for _ in range(8):
    threading.Thread(target=lambda: (together.wait(), np.bitwise_xor.reduce(pages))).start()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_threads_that_lose_pages_at_once_say_it_once(tmp_path: Path, attempt: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", LOSE_PAGES_AT_ONCE, path], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


def test_what_changed_is_told(model: Path) -> None:
    loaded, _ = load(model)
    size = model.stat().st_size
    guard.check()
    os.truncate(model, size + 1)
    with pytest.raises(FormatError) as raised:
        guard.check()
    assert str(raised.value) == (
        f"{model}: it changed while it was in use: it had {size} bytes and has {size + 1} now. {guard.REMEDY}"
    )
    os.truncate(model, size)
    with pytest.raises(FormatError, match=r"model.gguf: it was written to while it was in use\. "):
        list(generate(loaded, [1], Sampler(), max_tokens=1))


def test_a_file_is_watched_as_long_as_it_is_in_use(model: Path) -> None:
    gc.collect()  # models of other tests
    before = len(os.listdir("/dev/fd"))
    loaded, layout = load(model)
    forward(loaded, np.array([1]), Cache.of(loaded.hparams, 1))
    overwrite(model)
    with pytest.raises(FormatError, match="was written to"):
        guard.check()
    del loaded, layout
    gc.collect()
    guard.check()
    assert len(os.listdir("/dev/fd")) == before


def test_what_is_measured_is_of_one_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match=r"model.gguf: it was written to while it was in use\. "):
        measure(model, TINY / "text.txt", context=64, on_chunk=lambda *_: overwrite(model))
    for module, what in ((comparison, comparison.compare), (layers, layers.part)):

        def forward_and_overwrite(*arguments: Any, **options: Any) -> Any:
            result = forward(*arguments, **options)
            overwrite(model)
            return result

        monkeypatch.setattr(module, "forward", forward_and_overwrite)
        with pytest.raises(FormatError, match=r"model.gguf: it was written to while it was in use\. "):
            what(model, llamatools.open(TINY))
