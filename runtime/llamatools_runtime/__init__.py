"""A small LLaMA runtime that maps a GGUF file and computes from the mapping.

`run` lets a model write, `open_chat` lets it answer; `measure` tells how well one foretells a text, and how far two
are apart; `part` tells where they part, and why; `compare` proves that a file computes what its original checkpoint
computes; `report_memory` tells what running takes of memory and of the disk. The rest is for reading and for building
on: `load` gives a `Model`, `forward` its logits. model.py is the page to learn LLaMA from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .load import load  # now, since the module has the function's name

if TYPE_CHECKING:
    from .cache import Cache
    from .chat import Chat, open_chat
    from .comparison import Comparison, compare
    from .generation import Timing, generate
    from .layers import Parting, part
    from .memory_report import MemoryReport, report_memory
    from .model import Model, forward
    from .quality import CONTEXT, Quality, measure
    from .quality_page import Names, write_page
    from .running import RunReport, run
    from .sampling import Sampler
    from .tolerance import Tolerance
    from .weights import Matrix, matmul

# Where each public name lives. It is imported when first asked for: what runs a model needs nothing that compares two.
_HOMES = {
    "cache": ("Cache",),
    "chat": ("Chat", "open_chat"),
    "comparison": ("Comparison", "compare"),
    "generation": ("Timing", "generate"),
    "layers": ("Parting", "part"),
    "memory_report": ("MemoryReport", "report_memory"),
    "model": ("Model", "forward"),
    "quality": ("CONTEXT", "Quality", "measure"),
    "quality_page": ("Names", "write_page"),
    "running": ("RunReport", "run"),
    "sampling": ("Sampler",),
    "tolerance": ("Tolerance",),
    "weights": ("Matrix", "matmul"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = [
    "CONTEXT",
    "Cache",
    "Chat",
    "Comparison",
    "Matrix",
    "MemoryReport",
    "Model",
    "Names",
    "Parting",
    "Quality",
    "RunReport",
    "Sampler",
    "Timing",
    "Tolerance",
    "compare",
    "forward",
    "generate",
    "load",
    "matmul",
    "measure",
    "open_chat",
    "part",
    "report_memory",
    "run",
    "write_page",
]
