"""What `convert` and `quantize` did, or would do: printed, and written as the file of --report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .printing import print_json, print_table

if TYPE_CHECKING:
    from ..conversion import Conversion


def check_report(path: Path | None, model: Path) -> None:
    if path is not None:
        from ..reports import check_report

        check_report(path, model)


def write_report(done: Conversion, path: Path | None) -> None:
    if path is not None:
        from ..reports import write_report

        write_report(done, path)


def print_conversion(done: Conversion, dest: Path, as_json: bool) -> None:
    from .. import reports, views

    layout = done.layout
    for line in done.verified:
        print(f"verified  {line}", file=sys.stderr)
    for line in done.mended:
        print(f"mended    {line}", file=sys.stderr)
    for line in views.note_lines(layout.notes):
        print(f"derived   {line}", file=sys.stderr)
    for tensor, reason in layout.dropped.items():
        print(f"left out  {printable(tensor)}: {reason}", file=sys.stderr)
    for tensor, loss in done.losses.items():
        print(f"lost      {tensor}: {loss.overflows} weights overflowed, {loss.flushes} became 0", file=sys.stderr)
    if done.changes:
        for line in reports.lines(done):
            print(line, file=sys.stderr)
    if as_json:
        facts: dict[str, Any] = views.as_json(layout)
        facts |= {"written": done.written, "threads": done.threads, "buffer_nbytes": done.memory}
        facts["mended"] = list(done.mended)
        facts["losses"] = {name: vars(loss) for name, loss in done.losses.items()}
        if done.changes:
            facts["quantized"] = reports.as_json(done)
        print_json(facts)
    elif done.written:
        if done.changes:
            print_table(reports.table(done.changes))
        rate = layout.size / max(done.seconds, 1e-9) / 1e6
        size = f"{views.human_bytes(layout.size)}, {len(layout.tensors)} tensors"
        written = dest if len(layout.files) == 1 else f"{layout.files[0].path} and {len(layout.files) - 1} more"
        print(f"{written}: {layout.format}, {size}, in {done.seconds:.1f} s ({rate:,.0f} MB/s)", file=sys.stderr)
    else:
        print_table(views.tensor_table(layout))
        if layout.data_offset is not None:
            print(f"header    bytes 0 to {layout.data_offset}")
            print(f"data      bytes {layout.data_offset} to {layout.size}, tensors aligned to {layout.alignment}")
        for file in layout.files:
            print(f"disk      {file.size:,} bytes for {file.path}")
        print(f"memory    {views.human_bytes(done.memory)} of buffers at most, for {done.threads} threads")
