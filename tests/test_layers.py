"""Every known mistake, planted in a trained model, is named; what is only rounded is not called a mistake."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from llamatools_runtime.diagnosis import hugging_face_rows
from llamatools_runtime.layers import part, spelled
from llamatools_runtime.oracle import Oracle
from tiny_llamas import TINY, checkpoint_of, hf_rows, random_weights, rope_divisors, write_gguf

import llamatools
from llamatools.checkpoint import RopeScaling
from llamatools.dtypes import named
from llamatools.errors import UnsupportedError, UsageError
from llamatools.tensors import read_floats

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
OPTIONS = llamatools.MetaOptions(overrides=llamatools.Overrides(context=256))
ORIGINAL = llamatools.open(FIXTURE, OPTIONS)
H = ORIGINAL.hparams
WEIGHTS = {
    name: read_floats(tensor, 0, tensor.n_rows).reshape(tensor.shape) for name, tensor in ORIGINAL.tensors.items()
}
IDS = list(range(280, 360))  # of the words that are common; an embedding is cut at 300
WQ, WK, EMBEDDING = "attention.wq.weight", "attention.wk.weight", "tok_embeddings.weight"


def written(path, weights=WEIGHTS, hparams=H, **options):
    return write_gguf(path, weights, hparams, tokenizer=FIXTURE / "tokenizer.model", **options)


def changed(make, *ends):
    """The weights, those whose names end so remade."""
    return {name: make(array) if name.endswith(ends) else array for name, array in WEIGHTS.items()}


def joined_by_rows(array, n):
    """n shards of columns, joined as though they were of rows."""
    return np.concatenate(np.split(array, n, axis=1)).reshape(array.shape)


def joined_by_columns(array, n):
    return np.concatenate(np.split(array, n, axis=0), axis=1).reshape(array.shape)


def rounded_to(name, array):
    dtype = named(name)
    return dtype.decode(dtype.encode(np.ascontiguousarray(array), None)).reshape(array.shape)


def shifted(array):
    """A row lost: from 300 on, each row is that of the id after it."""
    return np.concatenate([array[:300], array[301:], array[-1:]])


def permuted(array):
    """wq or wk in Hugging Face's order."""
    return array[hf_rows(len(array) // H.head_dim, H.head_dim)]


KINDS = gguf.GGMLQuantizationType
SCALED = RopeScaling(8.0, 1.0, 4.0, old_context=1024)

# what is wrong -> (the file's weights, its hyperparameters, what the report says of it, the first tensor that differs)
PLANTED = {
    "q and k in the other row order": (
        changed(permuted, WQ, WK), H, KINDS.F32,
        "attn_q and attn_k of layers 0 to 2: rows are in Hugging Face's order, the other's in Meta's",
        "blk.0.attn_q.weight",
    ),
    "q and k in the other row order, rounded": (
        changed(permuted, WQ, WK), H, KINDS.Q8_0,
        "attn_q and attn_k of layers 0 to 2: rows are in Hugging Face's order, the other's in Meta's",
        "blk.0.attn_q.weight",
    ),
    "k permuted as of all query heads": (
        changed(lambda w: w[hf_rows(H.n_heads, len(w) // H.n_heads)], "attention.wk.weight"), H, KINDS.F32,
        "attn_k of layers 0 to 2: rows are in Hugging Face's order as of 8 heads, where there are 4, "
        "the other's in Meta's",
        "blk.0.attn_k.weight",
    ),
    "another rope_theta": (
        WEIGHTS, replace(H, rope_theta=500000.0), KINDS.F32, "rope_theta is 500000, the other's 10000", None,
    ),
    "another norm_eps": (WEIGHTS, replace(H, norm_eps=1e-6), KINDS.F32, "norm_eps is 1e-06, the other's 1e-05", None),
    "embedding rows shifted": (
        changed(shifted, "tok_embeddings.weight"), H, KINDS.F32,
        "token_embd: row n holds the other's row n + 1, from row 300 on",
        "token_embd.weight",
    ),
    "embedding shards on the wrong axis": (
        changed(lambda w: joined_by_rows(w, 2), "tok_embeddings.weight"), H, KINDS.F32,
        "token_embd: 2 shards were joined by rows, where they are parts of columns",
        "token_embd.weight",
    ),
    "wo's shards on the wrong axis": (
        changed(lambda w: joined_by_rows(w, 4), "layers.1.attention.wo.weight"), H, KINDS.F32,
        "attn_output of layer 1: 4 shards were joined by rows, where they are parts of columns",
        "blk.1.attn_output.weight",
    ),
    "w1's shards on the wrong axis, rounded": (
        changed(lambda w: joined_by_columns(w, 2), "feed_forward.w1.weight"), H, KINDS.Q5_1,
        "ffn_gate of layers 0 to 2: 2 shards were joined by columns, where they are parts of rows",
        "blk.0.ffn_gate.weight",
    ),
    "one tensor badly quantized": (
        changed(lambda w: rounded_to("Q4_0", w), "layers.1.feed_forward.w3.weight"), H, KINDS.Q8_0,
        "ffn_up of layer 1: badly quantized: as Q8_0, its weights are off by 8.",
        "blk.1.ffn_up.weight",
    ),
    "one tensor badly quantized, within what its type explains": (
        changed(lambda w: 1.25 * w, "layers.1.feed_forward.w3.weight"), H, KINDS.Q4_0,
        "ffn_up of layer 1: badly quantized: as Q4_0, its weights are off by 2",
        None,
    ),
    "weights of another layer": (
        changed(lambda w: WEIGHTS["layers.0.feed_forward.w2.weight"], "layers.2.feed_forward.w2.weight"), H, KINDS.F16,
        "ffn_down of layer 2: weights are not the other's: off by 1",
        "blk.2.ffn_down.weight",
    ),
    "another norm": (
        changed(lambda w: 1.01 * w, "layers.1.ffn_norm.weight"), H, KINDS.F32,
        "ffn_norm of layer 1: weights are not the other's: off by 1.0%",
        "blk.1.ffn_norm.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("weights", "hparams", "kind", "cause", "first"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_named(tmp_path, weights, hparams, kind, cause, first):
    found = part(written(tmp_path / "m.gguf", weights, hparams, matrices=kind), ORIGINAL, ids=IDS)
    lines = [line for line in unfolded(found) if line.startswith("cause: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"cause: {cause}")
    assert (found.first.name if found.first else None) == first
    assert not found.same
    assert all(len(line) <= 80 for line in found.lines())


def unfolded(found):
    return "\n".join(found.lines()).replace("\n       ", " ").split("\n")


FACTORS = {"rope_freqs.weight": rope_divisors(H, SCALED)}


@pytest.mark.parametrize(
    ("own", "others", "cause"),
    [
        ({}, FACTORS, "rope factors are missing: the other slows 9 pairs from 7 on by up to 8"),
        (FACTORS, {}, "rope factors that the other has not slow 9 pairs from 7 on by up to 8"),
        (
            {"rope_freqs.weight": np.where(np.arange(16) < 7, 1, 2).astype(np.float32)}, FACTORS,
            "rope factors are others: 9 pairs from 7 on slowed by up to 2, not 8",
        ),
    ],
    ids=["missing", "too many", "others"],
)  # fmt: skip
def test_rope_factors_are_compared_and_the_difference_grows_with_position(tmp_path, own, others, cause):
    other = written(tmp_path / "other.gguf", more_tensors=others)
    found = part(written(tmp_path / "m.gguf", more_tensors=own), llamatools.open(other))
    (line,) = (line for line in unfolded(found) if line.startswith("cause: "))
    assert line.startswith(f"cause: {cause}; the difference grows with position: ")
    early, late = (float(line.split(before)[1].split()[0]) for before in ("position: ", "tokens, "))
    assert 0 < early < late / 3
    assert found.first is None


@pytest.mark.parametrize(
    ("make", "ends", "cause"),
    [
        (
            permuted, (WQ, WK),
            "attn_q and attn_k of layers 0 to 2: rows are in Meta's order, the other's in Hugging Face's",
        ),
        (
            lambda w: joined_by_columns(w, 2), ("layers.1.feed_forward.w2.weight",),
            "ffn_down of layer 1: the other's 2 shards were joined by columns, where they are parts of rows",
        ),
        (shifted, (EMBEDDING,), "token_embd: row n holds the other's row n - 1, from row 301 on"),
    ],
    ids=["order", "axis", "shift"],
)  # fmt: skip
def test_mistakes_of_the_other_are_named_too(tmp_path, make, ends, cause):
    wrong = written(tmp_path / "wrong.gguf", changed(make, *ends))
    found = part(written(tmp_path / "m.gguf"), llamatools.open(wrong), ids=IDS)
    assert [line for line in unfolded(found) if line.startswith("cause")] == [f"cause: {cause}"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"])
def test_a_sound_pair_has_no_causes(tmp_path, kind):
    path = written(tmp_path / "m.gguf", matrices=KINDS[kind])
    for against in (ORIGINAL, llamatools.open(path), llamatools.open(written(tmp_path / "exact.gguf"))):
        found = part(path, against, ids=IDS)
        assert found.same, found.lines()
    assert found.lines()[-1] == "every matrix makes the same of the same, as far as its types allow"
    assert len(found.lines()) == 2 + H.n_layers + 1


def test_k_quants_are_sound(tmp_path):
    """Their types differ from tensor to tensor, and none is compared with those of another."""
    written(tmp_path / "m.gguf")
    llamatools.quantize(tmp_path / "m.gguf", tmp_path / "q.gguf", "q4_k_m")
    found = part(tmp_path / "q.gguf", ORIGINAL)
    assert found.causes == ()
    assert found.n_tokens == 256


def test_the_same_input_gives_what_torch_gives(tmp_path):
    weights = changed(lambda w: np.float32(1.01) * w, "layers.1.feed_forward.w3.weight", "layers.1.attention.wq.weight")
    ids = list(range(20, 60))
    found = part(written(tmp_path / "m.gguf", weights), ORIGINAL, ids=ids)
    outputs = {tensor.name: tensor.output for tensor in found.tensors}
    changes = {name: output for name, output in outputs.items() if output > 1e-5}
    assert changes == pytest.approx({"blk.1.attn_q.weight": 0.01, "blk.1.ffn_up.weight": 0.01}, rel=1e-3)

    def hidden_states(weights):
        return list(Oracle(checkpoint_of(weights, H)).hidden_states(ids))

    apart = [
        np.linalg.norm(own - other) / np.linalg.norm(other)
        for own, other in zip(hidden_states(weights), hidden_states(WEIGHTS), strict=True)
    ]
    assert found.states[0] == 0
    assert found.states[1:] == pytest.approx(apart, rel=1e-2, abs=1e-5)


def test_rows_in_hugging_faces_order():
    np.testing.assert_array_equal(hugging_face_rows(24, 3), hf_rows(3, 8))


def test_names_of_neighbours_are_spelled_together():
    names = (
        "token_embd.weight",
        *(f"blk.{n}.attn_{x}.weight" for n in (0, 1, 2, 5) for x in "qk"),
        "blk.7.ffn_up.weight",
    )
    assert spelled(names) == "token_embd; attn_q and attn_k of layers 0 to 2, 5; ffn_up of layer 7"


def test_a_report_as_json(tmp_path):
    wrong = written(tmp_path / "m.gguf", changed(permuted, WQ), replace(H, norm_eps=1e-6))
    found = json.loads(json.dumps(part(wrong, ORIGINAL, prompt="Beware the Jabberwock").as_dict(), allow_nan=False))
    assert found["first"] == "blk.0.attn_q.weight"
    assert found["same"] is False
    assert [cause["code"] for cause in found["causes"]] == ["norm-eps", "row-order"]
    assert found["causes"][1]["tensors"] == [f"blk.{n}.attn_q.weight" for n in range(3)]
    assert len(found["states"]) == 4
    assert len(found["tensors"]) == 3 + 9 * 3
    assert found["tokens"] < 30


def test_weights_of_nothing_are_compared_too(tmp_path):
    nothing = written(tmp_path / "zeros.gguf", changed(np.zeros_like, "layers.1.attention.wv.weight"))
    found = part(written(tmp_path / "m.gguf"), llamatools.open(nothing))
    assert found.first.name == "blk.1.attn_v.weight"
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["tensors"]


def test_models_of_two_shapes_are_refused(tmp_path):
    other = write_gguf(tmp_path / "other.gguf", random_weights(TINY), TINY)
    with pytest.raises(UsageError, match=r"m\.gguf: dim is 256, the other's 64\. These are two different models"):
        part(written(tmp_path / "m.gguf"), llamatools.open(other))


def test_without_any_vocabulary_ids_are_needed(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    with pytest.raises(UsageError, match=r"m\.gguf: neither model has a vocabulary to cut a text into tokens"):
        part(path, llamatools.open(path))
    assert part(path, llamatools.open(path), ids=[1, 2, 3]).same


def test_a_hugging_face_folder_is_refused(tmp_path):
    path = written(tmp_path / "m.gguf")
    other = replace(ORIGINAL, scheme="hf", path=Path("hf-model"))
    with pytest.raises(
        UnsupportedError, match=r"hf-model: neither a GGUF file nor a Meta checkpoint, which .*\. Convert"
    ):
        part(path, other)
