"""The proof passes for what is right, and fails for each way of being wrong."""

import json
import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
from llamatools_runtime import compare
from llamatools_runtime.comparison import passage
from llamatools_runtime.tolerance import EXACT, ROUNDED, tolerance_for
from tiny_llamas import (
    STORIES,
    TINY,
    checkpoint_of,
    hf_rows,
    needs_stories,
    random_weights,
    rope_divisors,
    stories,
    write_gguf,
)

from llamatools.checkpoint import RopeScaling
from llamatools.dtypes import BF16, F16, F32, TABLE, named
from llamatools.errors import FormatError, UsageError

SCALED = replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, old_context=64))
WEIGHTS = random_weights(TINY)
IDS = np.random.default_rng(1).integers(0, TINY.vocab_size, TINY.max_seq_len).tolist()
KINDS = gguf.GGMLQuantizationType


def factors(h):
    return {"rope_freqs.weight": rope_divisors(h, h.rope_scaling)}


def with_rows(rows_of_name):
    """The weights with some matrices' rows in another order."""
    return {name: array[rows] if (rows := rows_of_name(name)) is not None else array for name, array in WEIGHTS.items()}


def test_an_unchanged_model_passes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY)
    comparison = compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS)
    assert comparison.passed
    assert comparison.tolerance.dtype is None
    assert comparison.relative_difference < 5e-5
    assert comparison.top1 == 1
    assert comparison.n_tokens == 128
    assert comparison.tokenizers_compared is False
    assert comparison.n_tensors == len(WEIGHTS)


def test_scaled_rotary_embedding_passes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, SCALED, more_tensors=factors(SCALED))
    assert compare(path, checkpoint_of(WEIGHTS, SCALED, path=tmp_path), ids=IDS).passed


def hf_permuted(name):
    if name.endswith("wq.weight"):
        return hf_rows(TINY.n_heads, TINY.head_dim)
    return hf_rows(TINY.n_kv_heads, TINY.head_dim) if name.endswith("wk.weight") else None


def only_keys_permuted(name):
    return hf_rows(TINY.n_kv_heads, TINY.head_dim) if name.endswith("wk.weight") else None


def embedding_joined_wrongly():
    """Cut in two along columns, as before Llama 3, and joined along rows, as since."""
    embedding = WEIGHTS["tok_embeddings.weight"]
    joined = np.concatenate(np.split(embedding, 2, axis=1)).reshape(embedding.shape)
    return {**WEIGHTS, "tok_embeddings.weight": joined}


# name -> (weights and hyperparameters that the wrong file has, those of the original, first layer where it shows)
PLANTED = {
    "q and k in Hugging Face's order": (with_rows(hf_permuted), TINY, TINY, 0),
    "only k in Hugging Face's order": (with_rows(only_keys_permuted), TINY, TINY, 0),
    "embedding joined on the wrong axis": (embedding_joined_wrongly(), TINY, TINY, 0),
    "rope_theta of another family": (WEIGHTS, replace(TINY, rope_theta=500000.0), TINY, 0),
    "norm_eps of another family": (WEIGHTS, replace(TINY, norm_eps=1e-6), TINY, 0),
    "rope factors dropped": (WEIGHTS, TINY, SCALED, 0),
    "w1 and w3 exchanged": (
        {**WEIGHTS, **{f"layers.1.feed_forward.w{a}.weight": WEIGHTS[f"layers.1.feed_forward.w{b}.weight"]
                       for a, b in ((1, 3), (3, 1))}}, TINY, TINY, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("weights", "hparams", "original", "layer"), PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_caught_by_the_logits(tmp_path, weights, hparams, original, layer):
    path = write_gguf(tmp_path / "m.gguf", weights, hparams)
    comparison = compare(path, checkpoint_of(WEIGHTS, original, path=tmp_path), ids=IDS)
    assert not comparison.passed
    assert comparison.relative_difference > 2 * EXACT
    assert comparison.parted_at == layer
    assert all(len(line) <= 80 for line in comparison.lines())


@pytest.mark.parametrize(
    ("file_scaling", "constant"),
    [(None, "rotary pair 3 turns 0.001 a token, not"), (RopeScaling(8.0), "rotary pair 3 turns 0.000")],
    ids=["dropped", "8 for 32"],
)
def test_wrong_rope_factors_are_caught_where_the_text_is_too_short_to_tell(tmp_path, file_scaling, constant):
    """One token, at position 0, where nothing is turned: the logits agree, the frequencies do not."""
    original = replace(TINY, rope_scaling=RopeScaling(32.0))
    file_hparams = replace(TINY, rope_scaling=file_scaling)
    more = {} if file_scaling is None else factors(file_hparams)
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, file_hparams, more_tensors=more)
    comparison = compare(path, checkpoint_of(WEIGHTS, original, path=tmp_path), ids=IDS[:1])
    assert comparison.relative_difference < EXACT
    assert comparison.constants[0].startswith(constant)
    assert not comparison.passed


def test_a_wrong_norm_eps_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, replace(TINY, norm_eps=1e-6))
    comparison = compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS[:4])
    assert comparison.constants == ("norm_eps is 1e-06, in the original 1e-05",)
    assert not comparison.passed


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_the_same_precision_must_agree_as_well_as_f32(tmp_path, dtype):
    weights = {
        name: dtype.decode(dtype.encode(array.reshape(-1, array.shape[-1]), None)).reshape(array.shape)
        for name, array in WEIGHTS.items()
    }
    original = checkpoint_of(weights, TINY, dtype, path=tmp_path)
    for kind in (KINDS[dtype.name], KINDS.F32):
        comparison = compare(
            write_gguf(tmp_path / f"{kind.name}.gguf", weights, TINY, matrices=kind), original, ids=IDS
        )
        assert comparison.passed
        assert comparison.tolerance.dtype is None
        assert comparison.relative_difference < 5e-5


@pytest.mark.parametrize(
    "kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q5_1, KINDS.Q4_0], ids=lambda kind: kind.name
)
def test_rounding_passes_within_its_own_bound_and_not_within_a_finer_one(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY, matrices=kind)
    comparison = compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS)
    assert comparison.passed
    assert comparison.tolerance.dtype == kind.name
    assert comparison.relative_difference > EXACT

    wrong = write_gguf(tmp_path / "wrong.gguf", with_rows(hf_permuted), TINY, matrices=kind)
    comparison = compare(wrong, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS)
    assert not comparison.passed
    assert {tensor.name.split(".")[2] for tensor in comparison.unfaithful} == {"attn_q", "attn_k"}


@needs_stories
@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16], ids=lambda kind: kind.name)
def test_stories260k_passes_on_the_built_in_passage(tmp_path, kind):
    weights, hparams = stories()
    path = write_gguf(tmp_path / "m.gguf", weights, hparams, matrices=kind, tokenizer=STORIES / "tokenizer.model")
    comparison = compare(path, replace(checkpoint_of(weights, hparams), path=STORIES))
    assert comparison.passed, comparison.lines()
    assert comparison.n_tokens == 512
    assert comparison.tokenizers_compared
    assert comparison.relative_difference < {"F32": 1e-5, "F16": 1e-2, "BF16": 5e-2}[kind.name]
    assert all(len(line) <= 80 for line in comparison.lines())


@needs_stories
def test_another_tokenizer_in_the_file_fails(tmp_path):
    weights, hparams = stories()
    extra = {"tokenizer.ggml.add_space_prefix": False}
    path = write_gguf(tmp_path / "m.gguf", weights, hparams, tokenizer=STORIES / "tokenizer.model", extra=extra)
    comparison = compare(path, replace(checkpoint_of(weights, hparams), path=STORIES), prompt="Lily saw a dog.")
    assert comparison.relative_difference < EXACT
    assert comparison.tokenizers.startswith("differ at token 1 of 7: ")
    assert not comparison.passed
    assert comparison.lines()[0] == "FAILED: 7 tokens against the original"


@needs_stories
def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    weights, hparams = stories()
    path = write_gguf(tmp_path / "m.gguf", weights, hparams, tokenizer=STORIES / "tokenizer.model")
    with pytest.raises(UsageError, match=r"m\.gguf: a prompt of 1001 tokens, but the model's context is 512"):
        compare(path, replace(checkpoint_of(weights, hparams), path=STORIES), prompt="a" * 1000)


def test_models_of_two_shapes_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY)
    other = replace(TINY, n_layers=2)
    with pytest.raises(
        UsageError, match=r"m\.gguf: n_layers is 3, in the checkpoint 2\. These are two different models"
    ):
        compare(path, checkpoint_of(random_weights(other), other, path=tmp_path), ids=IDS)


def test_without_any_tokenizer_a_text_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY)
    with pytest.raises(UsageError, match="neither the file nor the checkpoint has a tokenizer to cut a text"):
        compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path))


def test_a_file_that_computes_nan_is_an_error(tmp_path):
    damaged = {name: array.copy() for name, array in WEIGHTS.items()}
    damaged["layers.1.attention.wo.weight"][0, 0] = np.nan
    path = write_gguf(tmp_path / "m.gguf", damaged, TINY)
    with pytest.raises(FormatError, match=r"m\.gguf: layer 1: NaN or infinity first appears here"):
        compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS)


def test_weights_of_zero_are_compared_too(tmp_path):
    zeros = {name: np.zeros_like(array) for name, array in WEIGHTS.items()}
    same = compare(write_gguf(tmp_path / "z.gguf", zeros, TINY), checkpoint_of(zeros, TINY, path=tmp_path), ids=IDS)
    assert same.passed
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY)
    other = compare(path, checkpoint_of(zeros, TINY, path=tmp_path), ids=IDS)
    assert not other.passed
    assert json.loads(json.dumps(other.as_dict(), allow_nan=False))["relative_difference"] is None


def test_every_dtype_that_can_be_computed_with_has_a_bound():
    computable = {dtype.name for dtype in TABLE if dtype.decode is not None} - {"F64"}  # which nothing is rounded to
    assert computable <= ROUNDED.keys()


@pytest.mark.parametrize(
    ("pairs", "dtype"),
    [
        ([("F32", "F32"), ("F32", "BF16"), ("F32", "F16"), ("F64", "F32")], None),
        ([("F32", "F32"), ("BF16", "BF16"), ("F16", "F16")], None),
        ([("F32", "F32"), ("F16", "BF16")], "F16"),
        ([("BF16", "F16")], "BF16"),
        ([("F32", "F64")], "F32"),
        ([("F16", "F32"), ("Q4_0", "F32"), ("Q8_0", "F32")], "Q4_0"),
    ],
)
def test_the_coarsest_rounding_sets_the_bound(pairs, dtype):
    tolerance = tolerance_for((named(file), named(original)) for file, original in pairs)
    assert tolerance.dtype == dtype
    assert (tolerance.logits, tolerance.divergence) == (
        (EXACT, None) if dtype is None else (None, ROUNDED[dtype].divergence)
    )


def test_a_comparison_can_be_written_as_json(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WEIGHTS, TINY)
    comparison = compare(path, checkpoint_of(WEIGHTS, TINY, F32, path=tmp_path), ids=IDS)
    found = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert found["passed"] is True
    assert found["tolerance"] == {"dtype": None, "logits": EXACT, "divergence": None, "states": EXACT}
    assert len(found["state_differences"]) == 3


def test_the_passage_is_long_enough():
    assert len(passage().split()) >= 256


def test_one_weight_that_changed_is_found(tmp_path):
    """Too little for the logits to tell, but the file says F32, which holds every bit."""
    changed = {name: array.copy() for name, array in WEIGHTS.items()}
    changed["layers.1.feed_forward.w3.weight"][5, 7] *= 1.00001
    path = write_gguf(tmp_path / "m.gguf", changed, TINY)
    comparison = compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS)
    assert comparison.relative_difference < EXACT
    assert [tensor.name for tensor in comparison.unfaithful] == ["blk.1.ffn_up.weight"]
    assert not comparison.passed


def test_a_tensor_of_another_shape_is_not_the_originals(tmp_path):
    wider = replace(TINY, hidden_dim=128)
    path = write_gguf(tmp_path / "m.gguf", random_weights(wider), wider)
    comparison = compare(path, checkpoint_of(WEIGHTS, TINY, path=tmp_path), ids=IDS)
    assert any(math.isinf(tensor.error) for tensor in comparison.unfaithful)
    assert all(len(line) <= 80 for line in comparison.lines())
