"""A small LLaMA runtime that maps a GGUF file and computes from the mapping.

`run` lets a model write, `open_chat` lets it answer; `measure` tells how well one foretells a text, and how far two
are apart; `part` tells where they part, and why; `compare` proves that a file computes what its original checkpoint
computes; `report_memory` tells what running takes of memory and of the disk. The rest is for reading and for building
on: `load` gives a `Model`, `forward` its logits. model.py is the page to learn LLaMA from.
"""

from .cache import Cache
from .chat import Chat, open_chat
from .comparison import Comparison, compare
from .generation import Timing, generate
from .layers import Parting, part
from .load import load
from .memory_report import MemoryReport, report_memory
from .model import Model, forward
from .quality import CONTEXT, Quality, measure
from .quality_page import Names, write_page
from .running import RunReport, run
from .sampling import Sampler
from .tolerance import Tolerance
from .weights import Matrix, matmul

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
