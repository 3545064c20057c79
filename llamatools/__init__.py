"""llamatools: LLaMA model files, converted, explained, run and proven.

    import llamatools

    checkpoint = llamatools.open("llama-2-7b")                      # lazy: reads headers only
    layout = llamatools.inspect("model.gguf")                       # where every tensor lies
    findings = llamatools.findings(layout)                          # what is wrong with it, and how to mend it
    done = llamatools.convert("llama-2-7b", "model.gguf")           # aligned, whole, with digests inside
    done = llamatools.quantize("model.gguf", "small.gguf", "q4_k_m")  # 4.8 bits a weight

Every command of the command line is one call of these functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .check import Finding, findings
    from .check.difference import Difference, diff
    from .check.hashing import ModelDigests, digests
    from .check.proof import Proof, prove
    from .check.scan import scan
    from .checkpoint import Checkpoint, Hyperparameters, Note, RopeScaling, Tokenizer
    from .conversion import Conversion, convert, quantize, recipe_of
    from .dtypes import DType
    from .errors import FormatError, LlamatoolsError, SpaceError, UnsupportedError, UsageError
    from .formats.meta import MetaOptions
    from .formats.meta_params import Overrides
    from .layout import File, Layout, PlacedTensor
    from .metadata import Kind, Metadata, Value
    from .quantization import Change, QuantizeOptions
    from .recipes import Recipe, Rule
    from .recognise import inspect, open
    from .tensors import LazyTensor

# Where each public name lives. It is imported when first asked for, so that `llamatools --help` needs no numpy.
_HOMES = {
    "check": ("Finding", "findings"),
    "check.difference": ("Difference", "diff"),
    "check.hashing": ("ModelDigests", "digests"),
    "check.proof": ("Proof", "prove"),
    "check.scan": ("scan",),
    "checkpoint": ("Checkpoint", "Hyperparameters", "Note", "RopeScaling", "Tokenizer"),
    "conversion": ("Conversion", "convert", "quantize", "recipe_of"),
    "dtypes": ("DType",),
    "errors": ("FormatError", "LlamatoolsError", "SpaceError", "UnsupportedError", "UsageError"),
    "formats.meta": ("MetaOptions",),
    "formats.meta_params": ("Overrides",),
    "layout": ("File", "Layout", "PlacedTensor"),
    "metadata": ("Kind", "Metadata", "Value"),
    "quantization": ("Change", "QuantizeOptions"),
    "recipes": ("Recipe", "Rule"),
    "recognise": ("inspect", "open"),
    "tensors": ("LazyTensor",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llamatools' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = [
    "Change", "Checkpoint", "Conversion", "DType", "Difference", "File", "Finding", "FormatError", "Hyperparameters",
    "Kind", "Layout", "LazyTensor", "LlamatoolsError", "MetaOptions", "Metadata", "ModelDigests", "Note", "Overrides",
    "PlacedTensor", "Proof", "QuantizeOptions", "Recipe", "RopeScaling", "Rule", "SpaceError", "Tokenizer",
    "UnsupportedError", "UsageError", "Value", "__version__", "convert", "diff", "digests", "findings", "inspect",
    "open", "prove", "quantize", "recipe_of", "scan",
]  # fmt: skip
