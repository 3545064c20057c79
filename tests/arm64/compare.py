"""compare.py ARM64_PYTHON: runs digests.py natively and on arm64, prints per dtype and kernel whether the bytes agree.

Exits with 1 where any differ. The dtypes are dealt out to as many processes as there are processors: under qemu, what
takes the time is compiling.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamatools import dtypes

TESTS = Path(__file__).parents[1]


def digests(python: str, names: list[str]) -> dict[str, str]:
    """What digests.py, run by that Python on this source, says of these dtypes."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [python, str(TESTS / "digests.py"), *names]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(result.stdout)
    return found


def main(arm64_python: str) -> None:
    names = [dtype.name for dtype in dtypes.TABLE if dtype.encode or dtype.decode]
    n_processes = min(os.cpu_count() or 1, len(names))
    hands = [names[k::n_processes] for k in range(n_processes)]
    here = digests(sys.executable, names)
    with ThreadPoolExecutor(n_processes) as pool:
        there = {k: v for found in pool.map(lambda hand: digests(arm64_python, hand), hands) for k, v in found.items()}
    assert here.keys() == there.keys()
    different = [what for what in here if here[what] != there[what]]
    for what in here:
        print("different" if what in different else "same     ", what)
    print(f"arm64: {len(here) - len(different)} of {len(here)} kernels write the bytes of this machine")
    sys.exit(bool(different))


if __name__ == "__main__":
    main(sys.argv[1])
