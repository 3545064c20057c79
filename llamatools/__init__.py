"""llamatools: LLaMA model files, converted, explained, run and proven.

    import llamatools

    checkpoint = llamatools.open("llama-2-7b")                      # lazy: reads headers only
    layout = llamatools.inspect("model.gguf")                       # where every tensor lies
    done = llamatools.convert("llama-2-7b", "model.gguf")           # aligned, whole, with digests inside

Every command of the command line is one call of these functions.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, Hyperparameters, Note, RopeScaling, Tokenizer
from .conversion import Conversion, convert
from .dtypes import DType
from .errors import FormatError, LlamatoolsError, SpaceError, UnsupportedError, UsageError
from .formats.meta import MetaOptions
from .formats.meta_params import Overrides
from .layout import File, Layout, PlacedTensor
from .metadata import Kind, Metadata, Value
from .recognise import inspect
from .recognise import open_checkpoint as open
from .tensors import LazyTensor
from .version import __version__

__all__ = [
    "Checkpoint", "Conversion", "DType", "File", "FormatError", "Hyperparameters", "Kind", "Layout", "LazyTensor",
    "LlamatoolsError", "MetaOptions", "Metadata", "Note", "Overrides", "PlacedTensor", "RopeScaling", "SpaceError",
    "Tokenizer", "UnsupportedError", "UsageError", "Value", "__version__", "convert", "inspect", "open",
]  # fmt: skip
