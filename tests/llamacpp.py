"""llama.cpp's C functions, called through ctypes: the oracle for GGUF files, quantized blocks and logits.

The functions live in the shared library of the `xllamacpp` wheel. The structs below are those of `include/llama.h` and
`ggml/include/*.h` at the version of that wheel; `_check_layouts` compares the defaults that llama.cpp fills in with
what the header promises, so that another version is refused rather than misread.

llama.cpp aborts the process on some files. `load_error` therefore loads in a child process; call it first wherever a
file may be bad.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from os import PathLike, fspath
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1
LOAD_MODE_AUTO, LOAD_MODE_MMAP = -1, 1
FLASH_ATTN_AUTO, FLASH_ATTN_OFF, FLASH_ATTN_ON = -1, 0, 1
LOG_WARN, LOG_ERROR, LOG_CONT = 3, 4, 5
N_THREADS = 2

LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class ModelParams(ctypes.Structure):
    """llama_model_params"""

    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32), ("split_mode", c_int), ("load_mode", c_int), ("lazy_mode", c_int),
        ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool),
    ]  # fmt: skip


class ContextParams(ctypes.Structure):
    """llama_context_params; the library's has eight more null bytes than the public header, before the booleans"""

    _fields_ = [
        ("n_ctx", c_int32), ("n_batch", c_int32), ("n_ubatch", c_int32), ("n_seq_max", c_int32),
        ("n_rs_seq", c_int32), ("n_outputs_max", c_int32), ("n_outputs_max_per_seq", c_int32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32),
        ("ctx_type", c_int), ("rope_scaling_type", c_int), ("pooling_type", c_int), ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_int32), ("defrag_thold", c_float),
        ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int), ("type_v", c_int),
        ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("unpublished", c_void_p),
        ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool),
        ("swa_full", c_bool), ("kv_unified", c_bool),
        ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    """llama_batch; null pos and seq_id mean that tokens follow one another in sequence 0"""

    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", c_void_p),
        ("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


class GGUFInitParams(ctypes.Structure):
    """gguf_init_params"""

    _fields_ = [("no_alloc", c_bool), ("ctx", c_void_p)]


class TypeTraits(ctypes.Structure):
    """ggml_type_traits"""

    _fields_ = [
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64), ("type_size", c_size_t),
        ("is_quantized", c_bool), ("to_float", ToFloat), ("from_float_ref", c_void_p),
    ]  # fmt: skip


# name: (result, arguments)
FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_void_p, c_int32, c_bool, c_bool]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
    "ggml_quantize_init": (None, [c_int]),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "gguf_init_from_file": (c_void_p, [c_char_p, GGUFInitParams]),
    "gguf_free": (None, [c_void_p]),
    "gguf_get_version": (ctypes.c_uint32, [c_void_p]),
    "gguf_get_alignment": (c_size_t, [c_void_p]),
    "gguf_get_data_offset": (c_size_t, [c_void_p]),
    "gguf_get_n_kv": (c_int64, [c_void_p]),
    "gguf_get_key": (c_char_p, [c_void_p, c_int64]),
    "gguf_get_n_tensors": (c_int64, [c_void_p]),
    "gguf_get_tensor_name": (c_char_p, [c_void_p, c_int64]),
    "gguf_get_tensor_type": (c_int, [c_void_p, c_int64]),
    "gguf_get_tensor_offset": (c_size_t, [c_void_p, c_int64]),
    "gguf_get_tensor_size": (c_size_t, [c_void_p, c_int64]),
    "gguf_get_tensor_ne": (POINTER(c_int64), [c_void_p, c_int64]),
}

# What the headers promise of the defaults; a field elsewhere than we think would show here.
MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": LOAD_MODE_AUTO, "lazy_mode": 1,
                  "vocab_only": False, "use_extra_bufts": True, "no_host": False}  # fmt: skip
CONTEXT_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1,
                    "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1, "attention_type": -1,
                    "flash_attn_type": FLASH_ATTN_AUTO, "yarn_beta_slow": -1.0, "defrag_thold": -1.0,
                    "type_k": GGML_TYPE_F16, "type_v": GGML_TYPE_F16, "embeddings": False, "offload_kqv": True,
                    "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False}  # fmt: skip


class LlamaCppError(Exception):
    """llama.cpp refused; the message is what it logged."""


_log: list[str] = []


def _collect(level: int, text: bytes | None, _: object) -> None:
    """Keeps warnings and errors, and continuations of the last line kept."""
    line = (text or b"").decode(errors="replace")
    if level in (LOG_WARN, LOG_ERROR):
        _log.append(line)
    elif level == LOG_CONT and _log:
        _log[-1] += line


_collector = LogCallback(_collect)  # kept, as llama.cpp holds on to it


def _refused(what: str) -> LlamaCppError:
    """What was logged since the log was last cleared, or `what` if that is nothing."""
    return LlamaCppError("".join(_log).strip() or what)


@cache
def library() -> ctypes.CDLL:
    """The shared library, with its functions declared and its log collected instead of printed."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # or an abort starts a debugger
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ImportError("the tests against llama.cpp need the package xllamacpp")
    (path,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_collector, None)
    _check_layouts(lib)
    lib.llama_backend_init()
    return lib


def _check_layouts(lib: ctypes.CDLL) -> None:
    for params, promised in (
        (lib.llama_model_default_params(), MODEL_DEFAULTS),
        (lib.llama_context_default_params(), CONTEXT_DEFAULTS),
    ):
        found = {field: getattr(params, field) for field in promised}
        if found != promised:
            raise ImportError(f"{type(params).__doc__} of this xllamacpp is laid out differently: {found}")


def _tokenize(
    self: Vocabulary | Model, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
) -> list[int]:
    """Ids of `text`. add_special: with BOS where the model asks for it. parse_special: `<s>` in text is BOS."""
    data = text.encode() if isinstance(text, str) else text
    ids = (c_int32 * (len(data) + 8))()
    n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), add_special, parse_special)
    if n < 0:
        raise LlamaCppError(f"{len(data)} bytes became {-n} tokens")
    return ids[:n]


class Vocabulary:
    """A GGUF's vocabulary alone; the file needs no tensors. A context manager. Raises LlamaCppError."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._lib = library()
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        _log.clear()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise _refused("llama.cpp did not load the vocabulary, and did not say why")
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_model_free(self._model)

    tokenize = _tokenize


class Model:
    """A GGUF, mapped and ready to compute on the CPU. A context manager.

    f32_cache: keys and values kept in float32 instead of float16. flash_attention: None lets llama.cpp choose.
    repack: lets llama.cpp copy the weights of some dtypes into another order, which costs memory and changes rounding.
    Raises LlamaCppError with llama.cpp's own words. Bad files may abort the process; see `load_error`.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        n_ctx: int = 512,
        n_threads: int = N_THREADS,
        f32_cache: bool = True,
        flash_attention: bool | None = False,
        repack: bool = False,
    ) -> None:
        self._context = self._model = None
        self._lib = library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        _log.clear()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise _refused("llama.cpp did not load the model, and did not say why")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos_id: int = self._lib.llama_vocab_bos(self._vocab)
        self.eos_id: int = self._lib.llama_vocab_eos(self._vocab)

        context = self._lib.llama_context_default_params()
        context.n_ctx = context.n_batch = n_ctx
        context.n_outputs_max_per_seq = 0  # as many as the batch has
        context.n_threads = context.n_threads_batch = n_threads
        context.type_k = context.type_v = GGML_TYPE_F32 if f32_cache else GGML_TYPE_F16
        context.flash_attn_type = FLASH_ATTN_AUTO if flash_attention is None else int(flash_attention)
        _log.clear()
        self._context = self._lib.llama_init_from_model(self._model, context)
        if not self._context:
            self.close()
            raise _refused("llama.cpp did not make a context, and did not say why")

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    tokenize = _tokenize

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        """Text of `ids`, without the space before its first word. special: BOS, EOS and their like are printed, too."""
        tokens = (c_int32 * len(ids))(*ids)
        n = -self._lib.llama_detokenize(self._vocab, tokens, len(ids), None, 0, not special, special)
        text = ctypes.create_string_buffer(max(n, 1))
        n = self._lib.llama_detokenize(self._vocab, tokens, len(ids), text, n, not special, special)
        return text.raw[:n]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(n_tokens, n_vocab): the logits after each of `ids`, computed as one batch from an empty cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._decode(ids)

    def greedy(self, ids: Sequence[int], n_tokens: int, stop: Collection[int] = ()) -> list[int]:
        """The `n_tokens` likeliest ids after `ids`, one at a time; ends with the first that is in `stop`."""
        chosen: list[int] = []
        row = self.logits(ids)[-1]
        while len(chosen) < n_tokens:
            chosen.append(int(row.argmax()))
            if chosen[-1] in stop or len(chosen) == n_tokens:
                break
            row = self._decode(chosen[-1:])[-1]
        return chosen

    def _decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        n = len(ids)
        batch = Batch(n_tokens=n, token=(c_int32 * n)(*ids), logits=(c_int8 * n)(*[1] * n))
        _log.clear()
        if status := self._lib.llama_decode(self._context, batch):
            raise _refused(f"llama_decode returned {status}")
        flat = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (n, self.n_vocab))
        return flat.copy()  # the buffer is reused


def load_error(path: str | PathLike[str]) -> str | None:
    """None if llama.cpp loads the file and computes one token with it; else what it said.

    Runs in a child process, so that llama.cpp may abort or crash. Takes about half a second.
    """
    child = subprocess.run(
        [sys.executable, __file__, fspath(path)], capture_output=True, text=True, errors="replace", timeout=300
    )
    if child.returncode == 0:
        return None
    said = (child.stderr or child.stdout).strip()
    if child.returncode < 0:
        said = f"{signal.Signals(-child.returncode).name}: {said}"
    return said or f"exit code {child.returncode}"


@dataclass(frozen=True)
class GGUFTensor:
    """type: ggml's number. shape: outermost first, without leading ones. offset: from the start of the data."""

    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    version: int
    alignment: int
    data_offset: int
    keys: tuple[str, ...]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | PathLike[str]) -> GGUFHeader:
    """The header as ggml's gguf_init_from_file reads it. Raises LlamaCppError with ggml's words."""
    lib = library()
    _log.clear()
    file = lib.gguf_init_from_file(os.fsencode(path), GGUFInitParams(no_alloc=True))
    if not file:
        raise _refused("ggml did not read the file, and did not say why")
    try:
        return GGUFHeader(
            lib.gguf_get_version(file),
            lib.gguf_get_alignment(file),
            lib.gguf_get_data_offset(file),
            tuple(lib.gguf_get_key(file, i).decode() for i in range(lib.gguf_get_n_kv(file))),
            {
                lib.gguf_get_tensor_name(file, i).decode(): GGUFTensor(
                    lib.gguf_get_tensor_type(file, i),
                    _shape(lib.gguf_get_tensor_ne(file, i)[:4]),
                    lib.gguf_get_tensor_offset(file, i),
                    lib.gguf_get_tensor_size(file, i),
                )
                for i in range(lib.gguf_get_n_tensors(file))
            },
        )
    finally:
        lib.gguf_free(file)


def _shape(ne: list[int]) -> tuple[int, ...]:
    while len(ne) > 1 and ne[-1] == 1:
        ne = ne[:-1]
    return tuple(reversed(ne))


def row_nbytes(type_id: int, n_columns: int) -> int:
    """Bytes of a row of `n_columns` weights in ggml's type number `type_id`."""
    traits = library().ggml_get_type_traits(type_id).contents
    if n_columns % traits.blck_size:
        raise ValueError(f"rows of {n_columns} do not divide into {traits.type_name.decode()} blocks")
    return int(n_columns // traits.blck_size * traits.type_size)


def quantize(type_id: int, rows: NDArray[np.float32], imatrix: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """ggml_quantize_chunk: (n_rows, n_columns) float32 -> (n_rows, row_nbytes) bytes.

    imatrix: (n_columns,) importance of each column; some types require one.
    """
    lib = library()
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_columns = rows.shape
    blocks = np.zeros((n_rows, row_nbytes(type_id, n_columns)), np.uint8)
    weights = None
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, np.float32)
        if imatrix.shape != (n_columns,):
            raise ValueError(f"importance for {imatrix.shape} columns, where rows have {n_columns}")
        weights = imatrix.ctypes.data
    elif lib.ggml_quantize_requires_imatrix(type_id):
        raise ValueError(f"ggml type {type_id} requires an importance matrix")
    lib.ggml_quantize_init(type_id)
    written = lib.ggml_quantize_chunk(type_id, rows.ctypes.data, blocks.ctypes.data, 0, n_rows, n_columns, weights)
    if written != blocks.nbytes:
        raise LlamaCppError(f"ggml wrote {written} bytes where {blocks.nbytes} were expected")
    return blocks


def dequantize(type_id: int, blocks: NDArray[np.uint8], n_columns: int) -> NDArray[np.float32]:
    """to_float of ggml's type traits: (n_rows, row_nbytes) bytes -> (n_rows, n_columns) float32."""
    blocks = np.ascontiguousarray(blocks).view(np.uint8)
    if blocks.shape[1:] != (row_nbytes(type_id, n_columns),):
        raise ValueError(f"rows of {blocks.shape[1:]} bytes, where {row_nbytes(type_id, n_columns)} are needed")
    to_float = library().ggml_get_type_traits(type_id).contents.to_float
    if not to_float:
        raise ValueError(f"ggml does not decode its type {type_id}")
    rows = np.empty((len(blocks), n_columns), np.float32)
    to_float(blocks.ctypes.data, rows.ctypes.data, rows.size)
    return rows


if __name__ == "__main__":  # the child of load_error
    try:
        with Model(sys.argv[1], n_ctx=32) as model:
            model.logits([max(model.bos_id, 0)])
    except LlamaCppError as error:
        sys.exit(str(error))
