"""Converting: what is written, byte for byte, against torch and gguf-py; and what llama.cpp says of it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from meta_checkpoints import LLAMA_2, LLAMA_3, StateDict, params_of, rope_freqs, tied, write_meta
from quantizing import tensors_of
from tiny_llamas import STORIES, TINY, needs_stories, random_weights

import llamatools
from llamatools import MetaOptions, Overrides
from llamatools.errors import FormatError, UnsupportedError, UsageError
from llamatools.plan import rope_divisors, size_label
from llamatools.provenance import recorded_digests

OPTIONS = MetaOptions(overrides=Overrides(context=64))


def state_of(seed: int = 0) -> StateDict:
    state = {name: torch.from_numpy(array) for name, array in random_weights(TINY, seed).items()}
    return state | {"rope.freqs": rope_freqs(TINY)}


def make(folder: Path, tokenizer: bytes, state: StateDict | None = None, **how: Any) -> Path:
    return write_meta(folder, state or state_of(), params_of(TINY) | how.pop("params", {}), tokenizer, **how)


def expected_names(state: StateDict) -> dict[str, torch.Tensor]:
    """GGUF's names by gguf-py's own map, which sends `rope.freqs` astray, so that it is left out here."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, TINY.n_layers)
    return {
        f"{names.get_name(name.removesuffix('.weight'))}.weight": tensor
        for name, tensor in state.items()
        if name != "rope.freqs"
    }


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("embedding_axis", [LLAMA_2, LLAMA_3])
def test_every_weight_arrives(tmp_path: Path, sentencepiece_model: bytes, n_shards: int, embedding_axis: Any) -> None:
    state = state_of()
    source = make(tmp_path / "m", sentencepiece_model, state, n_shards=n_shards, embedding_axis=embedding_axis)
    llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    written = tensors_of(tmp_path / "m.gguf")
    wanted = expected_names(state)
    assert set(written) == set(wanted)
    for name, tensor in wanted.items():
        assert written[name].tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(written[name].data, tensor.numpy()), name


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "f32", "f16", "bf16"])
def test_casts_round_as_torch_does(
    tmp_path: Path, sentencepiece_model: bytes, source_dtype: torch.dtype, dtype: str
) -> None:
    state = state_of()
    state["output.weight"][0, :4] = torch.tensor([1e-30, -1e-9, 6e4, -0.0])
    source = make(tmp_path / "m", sentencepiece_model, state, dtype=source_dtype)
    llamatools.convert(source, tmp_path / "m.gguf", dtype=dtype, options=OPTIONS)
    wanted_dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(dtype, source_dtype)
    written = tensors_of(tmp_path / "m.gguf")
    for name, tensor in expected_names(state).items():
        kept = tensor.to(source_dtype).to(torch.float32 if tensor.ndim == 1 else wanted_dtype)
        assert bytes(written[name].data) == kept.view(torch.uint8).numpy().tobytes(), name


def test_what_a_cast_loses_is_counted(tmp_path: Path, sentencepiece_model: bytes) -> None:
    state = state_of()
    state["output.weight"][0, :6] = torch.tensor([1e5, -7e4, 65504.0, 1e-9, -1e-30, 0.0])
    source = make(tmp_path / "m", sentencepiece_model, state)
    done = llamatools.convert(source, tmp_path / "m.gguf", dtype="f16", options=OPTIONS)
    assert list(done.losses) == ["output.weight"]
    assert (done.losses["output.weight"].overflows, done.losses["output.weight"].flushes) == (2, 2)


@pytest.mark.parametrize("alignment", [32, 64, 4096, 1 << 21])
def test_alignment_holds_for_every_tensor_and_llama_cpp_loads(
    tmp_path: Path, sentencepiece_model: bytes, alignment: int
) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    done = llamatools.convert(source, tmp_path / "m.gguf", alignment=alignment, options=OPTIONS)
    assert all(tensor.data_offset % alignment == 0 for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert (tmp_path / "m.gguf").stat().st_size == done.layout.size
    assert llamacpp.load_error(tmp_path / "m.gguf") is None


@pytest.mark.parametrize("alignment", [0, 1, 16, 48, 1 << 22])
def test_alignments_that_cannot_be(tmp_path: Path, sentencepiece_model: bytes, alignment: int) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    with pytest.raises(UsageError, match=rf"^--align: {alignment} is no power of two from 32 to 2097152"):
        llamatools.convert(source, tmp_path / "m.gguf", alignment=alignment, options=OPTIONS)


def test_same_bytes_for_any_number_of_threads(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model, n_shards=2, dtype=torch.float16)
    files = []
    for threads in (1, 2, 7):
        llamatools.convert(source, tmp_path / f"{threads}.gguf", dtype="f32", threads=threads, options=OPTIONS)
        files.append((tmp_path / f"{threads}.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


def test_dry_run_plans_the_very_file(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    planned = llamatools.convert(source, tmp_path / "m.gguf", dry_run=True, options=OPTIONS)
    assert not (tmp_path / "m.gguf").exists()
    assert not planned.written
    done = llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [(t.name, t.offset, t.nbytes) for t in planned.layout.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert planned.layout.size == (tmp_path / "m.gguf").stat().st_size == done.layout.size
    assert planned.memory < 100 << 20


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_output_is_left_out(tmp_path: Path, sentencepiece_model: bytes, stored: bool) -> None:
    source = make(tmp_path / "m", sentencepiece_model, tied(state_of(), stored=stored), n_shards=2)
    done = llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    assert "output.weight" not in tensors_of(tmp_path / "m.gguf")
    note = next(note for note in done.notes if note.what == "output")
    assert ("byte for byte" in note.reason) is stored
    assert ("output.weight" in done.layout.dropped) is stored
    assert llamacpp.load_error(tmp_path / "m.gguf") is None


def test_one_differing_bit_is_not_tied(tmp_path: Path, sentencepiece_model: bytes) -> None:
    state = tied(state_of())
    state["output.weight"].view(torch.int32)[-1, -1] ^= 1
    source = make(tmp_path / "m", sentencepiece_model, state)
    llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    assert "output.weight" in tensors_of(tmp_path / "m.gguf")


def test_digests_of_output_and_sources(tmp_path: Path, sentencepiece_model: bytes) -> None:
    state = state_of()
    source = make(tmp_path / "m", sentencepiece_model, state, n_shards=2)
    llamatools.convert(source, tmp_path / "m.gguf", dtype="bf16", options=OPTIONS)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    layout = llamatools.inspect(tmp_path / "m.gguf")
    recorded = recorded_digests(layout.metadata)
    assert set(recorded) == {tensor.name for tensor in reader.tensors}
    for tensor, placed in zip(reader.tensors, layout.tensors, strict=True):
        assert recorded[tensor.name].sha256 == hashlib.sha256(tensor.data.tobytes()).hexdigest()
        assert not recorded[tensor.name].is_stale(placed)

    names = reader.get_field("llamatools.source.tensors").contents()
    digests = reader.get_field("llamatools.source.sha256").contents()
    shards = [torch.load(source / f"consolidated.{n:02}.pth", weights_only=True) for n in range(2)]
    wanted = {
        f"consolidated.{n:02}.pth:{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for n, shard in enumerate(shards)
        for name, tensor in shard.items()
        if name != "rope.freqs"
    }
    assert dict(zip(names, digests, strict=True)) == wanted
    files = dict(
        zip(
            reader.get_field("llamatools.source.files").contents(),
            reader.get_field("llamatools.source.sizes").contents(),
            strict=True,
        )
    )
    assert files == {path.name: path.stat().st_size for path in source.iterdir()}


def test_metadata_has_the_types_that_llama_cpp_demands(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    options = MetaOptions(overrides=Overrides(context=99), chat_template="{{ evil() }}")
    settings = {
        "general.license": "mit",
        "llama.rope.freq_base": "12345",
        "my.count": "uint32:7",
        "my.flag": "bool:true",
    }
    llamatools.convert(source, tmp_path / "m.gguf", options=options, name="A name", settings=settings, alignment=64)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    T = gguf.GGUFValueType
    for key, kind, value in (
        ("general.architecture", T.STRING, "llama"),
        ("general.name", T.STRING, "A name"),
        ("general.license", T.STRING, "mit"),
        ("general.alignment", T.UINT32, 64),
        ("general.file_type", T.UINT32, 0),
        ("llama.context_length", T.UINT32, 99),
        ("llama.embedding_length", T.UINT32, TINY.dim),
        ("llama.block_count", T.UINT32, TINY.n_layers),
        ("llama.feed_forward_length", T.UINT32, TINY.hidden_dim),
        ("llama.attention.head_count", T.UINT32, TINY.n_heads),
        ("llama.attention.head_count_kv", T.UINT32, TINY.n_kv_heads),
        ("llama.attention.layer_norm_rms_epsilon", T.FLOAT32, np.float32(1e-5)),
        ("llama.rope.freq_base", T.FLOAT32, 12345.0),
        ("llama.rope.dimension_count", T.UINT32, TINY.head_dim),
        ("llama.vocab_size", T.UINT32, TINY.vocab_size),
        ("tokenizer.ggml.model", T.STRING, "llama"),
        ("tokenizer.ggml.bos_token_id", T.UINT32, 1),
        ("tokenizer.ggml.add_bos_token", T.BOOL, True),
        ("tokenizer.chat_template", T.STRING, "{{ evil() }}"),
        ("my.count", T.UINT32, 7),
        ("my.flag", T.BOOL, True),
    ):
        assert fields[key].types == [kind], key
        assert fields[key].contents() == value, key


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("general.alignment", "64", "--set general.alignment: this key follows from the model and cannot be set"),
        ("tokenizer.ggml.tokens", "x", "this key follows from the model and cannot be set"),
        ("llamatools.version", "x", "this key follows from the model and cannot be set"),
        ("llama.context_length", "many", "--set llama.context_length: 'many' is no uint32"),
        ("llama.context_length", "-1", "'-1' is no uint32"),
        ("llama.rope.freq_base", "x", "'x' is no float32"),
        ("tokenizer.ggml.add_bos_token", "1", "'1' is no bool"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, sentencepiece_model: bytes, key: str, text: str, message: str) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    with pytest.raises(UsageError, match=message):
        llamatools.convert(source, tmp_path / "m.gguf", settings={key: text}, options=OPTIONS)


def test_scaled_rope_is_stored_as_divisors(tmp_path: Path, tiktoken_model: bytes) -> None:
    state = state_of()
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name] = torch.randn(556, TINY.dim)
    params = {"use_scaled_rope": True, "rope_theta": 500000.0}
    source = make(tmp_path / "m", tiktoken_model, state, params=params, n_shards=2, embedding_axis=LLAMA_3)
    done = llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    written = tensors_of(tmp_path / "m.gguf")["rope_freqs.weight"]
    assert written.data.shape == (TINY.head_dim // 2,)
    assert next(note.value for note in done.notes if note.what == "rope_factor") == "8"
    assert llamacpp.load_error(tmp_path / "m.gguf") is None


# The published configurations' divisors, computed by Hugging Face's and llama.cpp's own code: first index, values.
DIVISORS = [
    (128, 8, 29, [1.207484, 1.553415, 2.026313, 2.69453, 3.684253, 5.257327, 8.0]),
    (64, 32, 15, [1.651329, 3.292262, 9.666729, 32.0]),
    (128, 32, 29, [1.234937, 1.651329, 2.27666, 3.292262, 5.171596, 9.666729, 32.0]),
]


@pytest.mark.parametrize(("head_dim", "factor", "first", "values"), DIVISORS)
def test_divisors_of_the_published_models(head_dim: int, factor: float, first: int, values: list[float]) -> None:
    divisors = rope_divisors(head_dim, 500000.0, llamatools.RopeScaling(factor))
    assert np.all(divisors[:first] == 1)
    np.testing.assert_allclose(divisors[first : first + len(values)], values, rtol=1e-6)
    assert np.all(divisors[first + len(values) - 1 :] == factor)


def test_sizes_as_people_say_them() -> None:
    labels = [size_label(n) for n in (17, 260_032, 1_100_048_384, 6_738_415_616, 70_553_706_496)]
    assert labels == ["17", "260K", "1.1B", "6.74B", "70.6B"]


def test_replicated_tensors_must_agree(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model, n_shards=2)
    shard = torch.load(source / "consolidated.01.pth", weights_only=True)
    shard["norm.weight"][3] += 1
    torch.save(shard, source / "consolidated.01.pth")
    message = (
        r"tensor 'norm.weight': shards 0 and 1 must hold the same, but differ from byte 1\d of row 0 on. The shards"
    )
    with pytest.raises(FormatError, match=message):
        llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_weights_of_other_types_are_refused(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="F64 weights are not supported, only F32, F16, BF16"):
        llamatools.convert(source, tmp_path / "m.gguf", options=OPTIONS)


def test_requests_that_cannot_be_met(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    with pytest.raises(UsageError, match="--dtype: unknown dtype 'f8'. One of auto, f32, f16, bf16"):
        llamatools.convert(source, tmp_path / "m.gguf", dtype="f8")
    with pytest.raises(UsageError, match="--threads: 0 threads cannot do the work"):
        llamatools.convert(source, tmp_path / "m.gguf", threads=0)
    with pytest.raises(UsageError, match="params.json: is both source and destination"):
        llamatools.convert(source, source / "params.json", force=True)
    (source / "tokenizer.model").unlink()
    with pytest.raises(FormatError, match="no tokenizer.model in it or one folder up. Name it with --tokenizer"):
        llamatools.convert(source, tmp_path / "n.gguf", options=OPTIONS)


def test_a_full_disk_leaves_nothing(tmp_path: Path, sentencepiece_model: bytes) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    done = subprocess.run(
        [sys.executable, "-m", "llamatools", "convert", str(source), str(tmp_path / "m.gguf")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == f"{tmp_path / 'm.gguf'}: file too large"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


SLOW = """
import sys, time
from llamatools import tensors
read = tensors.FileTensor.read
def slow(*args):
    time.sleep(0.3)  # longer than this test takes to notice
    return read(*args)
tensors.FileTensor.read = slow
from llamatools.cli import main
main()
"""


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted; nothing was left behind"),
        (signal.SIGTERM, 143, "terminated; nothing was left behind"),
    ],
)
def test_an_interruption_leaves_nothing(
    tmp_path: Path, sentencepiece_model: bytes, sent: signal.Signals, code: int, said: str
) -> None:
    source = make(tmp_path / "m", sentencepiece_model)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", str(source), str(tmp_path / "m.gguf"), "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while len(os.listdir(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors.splitlines()[-1] == said
    assert os.listdir(tmp_path) == ["m"]


@needs_stories
def test_the_same_file_from_any_cut_of_stories(tmp_path: Path) -> None:
    """The bytes of the tensors do not tell how the checkpoint was cut."""
    state = torch.load(STORIES / "consolidated.00.pth", weights_only=True)
    params = {"dim": 64, "multiple_of": 4, "n_heads": 8, "n_kv_heads": 4, "n_layers": 5, "norm_eps": 1e-05}
    tokenizer = (STORIES / "tokenizer.model").read_bytes()
    whole = llamatools.convert(STORIES, tmp_path / "whole.gguf", options=OPTIONS).layout
    for n_shards in (2, 4):
        for axis in (LLAMA_2, LLAMA_3):
            source = write_meta(
                tmp_path / f"{n_shards}-{axis}", state, params, tokenizer, n_shards=n_shards, embedding_axis=axis
            )
            cut = llamatools.convert(source, tmp_path / "cut.gguf", options=OPTIONS, force=True).layout
            a = [
                t.source.read(0, t.source.n_rows).tobytes()
                for t in llamatools.inspect(tmp_path / "whole.gguf").tensors
                if t.source
            ]
            b = [
                t.source.read(0, t.source.n_rows).tobytes()
                for t in llamatools.inspect(tmp_path / "cut.gguf").tensors
                if t.source
            ]
            assert [t.name for t in whole.tensors] == [t.name for t in cut.tensors]
            assert a == b
