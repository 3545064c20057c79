"""A model file as one page for a browser, which needs nothing else: no network, no library.

What comes from a file is data, in JSON that the page's script shows as text; it never becomes HTML. The page's own
policy lets no script run but that one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .check import Finding
from .check.extents import MEANINGS, extents
from .check.residency import PAGE, Residency, residency
from .draft import Draft, check_destination
from .errors import LlamatoolsError, printable
from .layout import Layout
from .overview import facts, verdict
from .views import finding_json

TEMPLATE = Path(__file__).with_name("page.html")
BUCKETS = 4096  # parts of a file whose residency is drawn, at most


def write_page(layout: Layout, findings: Sequence[Finding], destination: Path, *, force: bool = False) -> None:
    """Writes the page as a file that appears when it is whole. Raises as `Draft`."""
    check_destination(destination, [file.path for file in layout.files], force=force)
    data = page(layout, findings).encode()
    with Draft(destination, len(data), force=force) as draft:
        draft.write(data, 0)
        draft.publish()


def page(layout: Layout, findings: Sequence[Finding]) -> str:
    """The page's text."""
    template = TEMPLATE.read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # "<" could end the script element. The data go in last, so that nothing in them is replaced.
    data = json.dumps(page_data(layout, findings), separators=(",", ":")).replace("<", "\\u003c")
    before, after = template.replace("SCRIPT_DIGEST", digest).split("PAGE_DATA")
    return before + data + after


def page_data(layout: Layout, findings: Sequence[Finding]) -> dict[str, Any]:
    """What the page shows. Tensors are [name, dtype, shape, file, offset, bytes, alignment, part in memory or null];
    extents are [start, stop, kind, the tensor's index or -1]."""
    index = {id(tensor): n for n, tensor in enumerate(layout.tensors)}
    resident, reason = _resident(layout)
    return {
        "facts": [[label, printable(text)] for label, text in facts(layout)],
        "verdict": verdict(findings),
        "findings": [finding_json(finding) for finding in findings],
        "dtypes": [dtype.name for dtype in layout.nbytes_by_dtype()],
        "meanings": MEANINGS,
        "no_residency": reason,
        "files": [
            {
                "name": printable(file.path.name),
                "nbytes": file.size,
                "extents": [
                    [part.start, part.stop, part.kind, index[id(part.tensor)] if part.tensor else -1]
                    for part in extents(layout, n)
                ],
                **(_buckets(resident[n], file.size) if resident else {}),
            }
            for n, file in enumerate(layout.files)
        ],
        "tensors": [
            [
                printable(tensor.name),
                tensor.dtype.name,
                list(tensor.shape),
                tensor.file,
                tensor.offset,
                tensor.nbytes,
                tensor.alignment,
                _part(*resident[tensor.file].pages(tensor)) if resident and layout.stopped_at is None else None,
            ]
            for tensor in layout.tensors
        ],
    }


def _resident(layout: Layout) -> tuple[list[Residency], str | None]:
    """The residency of each file, or why it is not known."""
    try:
        return [residency(file.path) for file in layout.files], None
    except LlamatoolsError as error:
        return [], printable(error.what)


def _buckets(resident: Residency, size: int) -> dict[str, Any]:
    """bucket: bytes of each part of the file; resident: percent of each that are in the page cache."""
    bucket = PAGE
    while bucket * BUCKETS < size:
        bucket *= 2
    edges = (bucket * np.arange(-(-size // bucket) + 1, dtype=np.int64)).clip(None, size)
    return {
        "bucket": bucket,
        "in_memory": resident.between(0, size),
        "resident": np.ceil(100 * resident.shares(edges)).astype(int).tolist(),
    }


def _part(n_pages: int, n_resident: int) -> float:
    return round(n_resident / n_pages, 4) if n_pages else 0.0
