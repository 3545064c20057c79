"""What a GGUF must have, and must not have, to be run as a LLaMA."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from llamatools_runtime.load import load
from llamatools_runtime.model import frequencies
from tiny_llamas import STORIES, TINY, needs_stories, random_weights, write_gguf

from llamatools.errors import FormatError, UnsupportedError

WEIGHTS = random_weights(TINY)


def test_a_llama_is_loaded_and_its_matrices_stay_on_the_mapping(tmp_path):
    model, layout = load(write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY))
    assert model.hparams == replace(TINY, norm_eps=float(np.float32(TINY.norm_eps)))
    assert len(layout.tensors) == len(WEIGHTS)
    assert len(model.layers) == TINY.n_layers
    np.testing.assert_array_equal(model.layers[1].w2.blocks, WEIGHTS["layers.1.feed_forward.w2.weight"])
    np.testing.assert_array_equal(model.layers[2].ffn_norm, WEIGHTS["layers.2.ffn_norm.weight"])
    assert not model.output.blocks.flags.owndata


def test_a_set_of_files_is_one_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=10)
    reader = gguf.GGUFReader(write_gguf(tmp_path / "whole.gguf", WEIGHTS, TINY))
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, layout = load(tmp_path / "m-00001-of-00003.gguf")
    assert len(layout.files) == 3
    np.testing.assert_array_equal(model.tok_embeddings.blocks, WEIGHTS["tok_embeddings.weight"])
    np.testing.assert_array_equal(model.layers[2].w3.blocks, WEIGHTS["layers.2.feed_forward.w3.weight"])
    np.testing.assert_array_equal(model.output.blocks, WEIGHTS["output.weight"])


def test_a_missing_output_is_the_embedding(tmp_path):
    tied = {name: array for name, array in WEIGHTS.items() if name != "output.weight"}
    model, _ = load(write_gguf(tmp_path / "m.gguf", tied, TINY))
    assert model.output is model.tok_embeddings


def test_linear_scaling_divides_all_frequencies(tmp_path):
    plain, _ = load(write_gguf(tmp_path / "plain.gguf", WEIGHTS, TINY))
    for n, extra in enumerate(
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"llama.rope.scaling.factor": 4.0},
            {"llama.rope.scale_linear": 4.0},
        )
    ):
        scaled, _ = load(write_gguf(tmp_path / f"{n}.gguf", WEIGHTS, TINY, extra=extra))
        np.testing.assert_allclose(
            frequencies(1e4, scaled.rope_divisors), frequencies(1e4, plain.rope_divisors) / 4, rtol=1e-6
        )
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    unscaled, _ = load(write_gguf(tmp_path / "none.gguf", WEIGHTS, TINY, extra=none))
    np.testing.assert_array_equal(unscaled.rope_divisors, plain.rope_divisors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"architecture": "qwen2"},
            UnsupportedError,
            r"m\.gguf: key 'general\.architecture': the model's architecture is 'qwen2', and only 'llama' can be run",
        ),
        (
            {"extra": {"llama.expert_count": 8}},
            UnsupportedError,
            r"m\.gguf: key 'llama\.expert_count': a mixture of 8 experts, and only dense models can be run",
        ),
        (
            {"extra": {"llama.rope.scaling.type": "yarn"}},
            UnsupportedError,
            r"key 'llama\.rope\.scaling\.type': rotary embedding is scaled by 'yarn', and only 'linear' and 'none'",
        ),
        (
            {"extra": {"llama.rope.scaling.factor": "two"}},
            FormatError,
            r"m\.gguf: key 'llama\.rope\.scaling\.factor': string where float32 is required",
        ),
        (
            {"h": replace(TINY, n_kv_heads=3)},
            FormatError,
            r"m\.gguf: 8 heads cannot share 3 heads of keys and values equally",
        ),
        (
            {"h": replace(TINY, head_dim=7)},
            FormatError,
            r"m\.gguf: a head of 7 numbers does not divide into pairs to rotate",
        ),
        (
            {"h": replace(TINY, n_layers=4_000_000_000)},
            FormatError,
            r"m\.gguf: key 'llama\.block_count': 4000000000 layers, but only 30 tensors",
        ),
        (
            {"h": replace(TINY, n_layers=4)},
            FormatError,
            r"m\.gguf: tensor 'blk\.3\.attn_norm\.weight': required, but missing",
        ),
        (
            {"h": replace(TINY, hidden_dim=100)},
            FormatError,
            r"tensor 'blk\.0\.ffn_gate\.weight': its shape is \[96, 64\], but the hyperparameters ask for \[100, 64\]",
        ),
        (
            {"h": replace(TINY, n_layers=2)},
            UnsupportedError,
            r"m\.gguf: tensor 'blk\.2\.\w+\.weight': not a tensor of a plain LLaMA; leaving it out could change",
        ),
        (
            {"more_tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}},
            UnsupportedError,
            r"m\.gguf: tensor 'blk\.0\.attn_q\.bias': not a tensor of a plain LLaMA",
        ),
        (
            {"more_tensors": {"rope_freqs.weight": np.ones(3, np.float32)}},
            FormatError,
            r"tensor 'rope_freqs\.weight': its shape is \[3\], but the hyperparameters ask for \[4\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_a_plain_llama_is_refused(tmp_path, options, error, message):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, options.pop("h", TINY), **options)
    with pytest.raises(error, match=message):
        load(path)


@needs_stories
def test_other_formats_are_refused_with_what_to_do():
    with pytest.raises(UnsupportedError, match=r"stories260k: a Meta checkpoint, and only GGUF files can be run"):
        load(STORIES)


def test_a_vocabulary_that_does_not_fit_the_embedding_is_refused(tmp_path):
    extra = {"tokenizer.ggml.tokens": ["a", "b"]}
    with pytest.raises(FormatError, match=r"key 'tokenizer\.ggml\.tokens': 2 tokens, but a vocabulary of 300"):
        load(write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY, extra=extra))
