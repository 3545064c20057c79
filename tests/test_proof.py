"""`inspect --against`: conversions that are right are proven, and each mistake is told in its own line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from imatrix_files import write_imatrix
from meta_checkpoints import LLAMA_2, LLAMA_3, tied, write_meta
from numpy.typing import NDArray
from same_models import OPTIONS, K, Q, data_of, exchange, params, state_of, write_hf
from tiny_llamas import TINY, hf_rows, random_weights, write_gguf

import llamatools
from llamatools import QuantizeOptions
from llamatools.errors import UsageError

GATE, UP, WO, EMBEDDING = (
    "blk.0.ffn_gate.weight",
    "blk.0.ffn_up.weight",
    "blk.2.attn_output.weight",
    "token_embd.weight",
)
REMEDY = ". Convert it anew"
Data = dict[str, NDArray[np.uint8]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    """Two shards, float32."""
    return write_meta(tmp_path_factory.mktemp("m") / "meta", state_of(), params(), sentencepiece_model, n_shards=2)


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    llamatools.convert(source, source.parent / "m.gguf", options=OPTIONS)
    return source.parent / "m.gguf"


@pytest.fixture(scope="module")
def quantized(converted: Path) -> Path:
    options = QuantizeOptions(pure=True)
    llamatools.quantize(converted, converted.parent / "q.gguf", "q4_0", options=options)
    return converted.parent / "q.gguf"


def lines(dest: Path, source: Path, **how: Path) -> list[str]:
    return [f"{f.code}: {f}" for f in llamatools.prove(dest, source, options=OPTIONS, **how).findings]  # type: ignore[arg-type]


def test_conversions_are_proven(
    source: Path, converted: Path, quantized: Path, tmp_path: Path, sentencepiece_model: bytes
) -> None:
    n_weights = sum(array.size for array in random_weights(TINY).values())
    proof = llamatools.prove(converted, source, options=OPTIONS)
    assert proof.proven
    assert set(proof.how.values()) == {"copied"}
    assert proof.accounted["became tensors"] == (30, n_weights)
    assert proof.accounted["buffers, left out"] == (1, 0)
    assert proof.accounted["lost"] == (0, 0)
    assert llamatools.prove(quantized, converted).proven
    proof = llamatools.prove(quantized, source, options=OPTIONS)  # in one step
    assert (proof.proven, proof.how[Q]) == (True, "F32 to Q4_0, exact rounding")
    assert llamatools.prove(converted, write_hf(tmp_path / "hf", state_of())).proven
    llama_3 = write_meta(
        tmp_path / "3", tied(state_of()), params(), sentencepiece_model,
        n_shards=4, embedding_axis=LLAMA_3, dtype=torch.bfloat16,
    )  # fmt: skip
    llamatools.convert(llama_3, tmp_path / "3.gguf", dtype="f16", options=OPTIONS)
    proof = llamatools.prove(tmp_path / "3.gguf", llama_3, options=OPTIONS)
    assert (proof.proven, proof.how[Q]) == (True, "BF16 to F16, exact rounding")
    assert proof.accounted["equal to the embedding, left out"] == (1, 300 * 64)


def test_a_file_by_gguf_py_is_proven(source: Path, tmp_path: Path) -> None:
    """Quantized by its numpy code."""
    path = write_gguf(tmp_path / "q8.gguf", random_weights(TINY), TINY, matrices=gguf.GGMLQuantizationType.Q8_0)
    assert llamatools.prove(path, source, options=OPTIONS).how[Q] == "F32 to Q8_0, exact rounding"
    assert lines(path, source) == []


def flip(data: Data) -> None:
    data["blk.1.ffn_up.weight"][5, 17 * 4] ^= 1


def reorder(name: str, n_heads: int) -> Callable[[Data], None]:
    def rows(data: Data) -> None:
        data[name][:] = data[name][hf_rows(n_heads, TINY.head_dim)]

    return rows


def undo_once_more(data: Data) -> None:
    data[Q][hf_rows(TINY.n_heads, TINY.head_dim)] = data[Q].copy()


def join(name: str, meta: str, axis: int, joined: int) -> Callable[[Data], None]:
    """The shards, cut along `axis` by torch, joined along another."""

    def rows(data: Data) -> None:
        parts = state_of()[meta].chunk(2, axis)
        data[name][:] = torch.cat(parts, joined).numpy().reshape(-1).view(np.uint8).reshape(data[name].shape)

    return rows


def value(meta: str, row: int, column: int) -> str:
    return f"0x{int(state_of()[meta].numpy()[row, column].view(np.uint32)):08x}"


FLIPPED = int(state_of()["layers.1.feed_forward.w3.weight"].numpy()[5, 17].view(np.uint32))
DAMAGES: dict[str, tuple[Callable[[Data], None], list[str]]] = {
    "one bit": (
        flip,
        [
            f"unlike-source: tensor 'blk.1.ffn_up.weight': row 5, column 17 is 0x{FLIPPED ^ 1:08x}, where the source "
            f"makes 0x{FLIPPED:08x}; 1 of its 6144 weights differ{REMEDY}"
        ],
    ),
    "two tensors exchanged": (
        lambda data: exchange(data[GATE], data[UP]),
        [
            f"unlike-source: tensor '{a}': row 0, column 0 is {value(f'layers.0.feed_forward.{y}.weight', 0, 0)}, "
            f"where the source makes {value(f'layers.0.feed_forward.{x}.weight', 0, 0)}; 6144 of its 6144 weights "
            f"differ: it holds what '{b}' should{REMEDY}"
            for a, x, b, y in ((GATE, "w1", UP, "w3"), (UP, "w3", GATE, "w1"))
        ],
    ),
    "two rows exchanged": (
        lambda data: exchange(data["output.weight"][3], data["output.weight"][7]),
        [
            f"unlike-source: tensor 'output.weight': row 3, column 0 is {value('output.weight', 7, 0)}, where the "
            f"source makes {value('output.weight', 3, 0)}; 128 of its 19200 weights differ: rows 3 and 7 are "
            f"exchanged{REMEDY}"
        ],
    ),
    "q in Hugging Face's order": (
        reorder(Q, TINY.n_heads),
        [
            f"unlike-source: tensor '{Q}': row 1, column 0 is {value('layers.0.attention.wq.weight', 2, 0)}, where the "
            f"source makes {value('layers.0.attention.wq.weight', 1, 0)}; 3072 of its 4096 weights differ: its rows "
            f"are in Hugging Face's order, where Meta's is due{REMEDY}"
        ],
    ),
    "k in Hugging Face's order": (
        reorder(K, TINY.n_kv_heads),
        [
            f"unlike-source: tensor '{K}': row 1, column 0 is {value('layers.1.attention.wk.weight', 2, 0)}, where the "
            f"source makes {value('layers.1.attention.wk.weight', 1, 0)}; 1536 of its 2048 weights differ: its rows "
            f"are in Hugging Face's order, where Meta's is due{REMEDY}"
        ],
    ),
    "q reordered though in Meta's order": (
        undo_once_more,
        [
            f"unlike-source: tensor '{Q}': row 1, column 0 is {value('layers.0.attention.wq.weight', 4, 0)}, where the "
            f"source makes {value('layers.0.attention.wq.weight', 1, 0)}; 3072 of its 4096 weights differ: its rows "
            f"were reordered from Hugging Face's order, though they were in Meta's{REMEDY}"
        ],
    ),
    "columns joined by rows": (
        join(WO, "layers.2.attention.wo.weight", 1, 0),
        [
            f"unlike-source: tensor '{WO}': row 0, column 32 is {value('layers.2.attention.wo.weight', 1, 0)}, where "
            f"the source makes {value('layers.2.attention.wo.weight', 0, 32)}; 4032 of its 4096 weights differ: its 2 "
            f"shards were joined by rows, where they are parts of columns{REMEDY}"
        ],
    ),
    "the embedding joined by rows": (
        join(EMBEDDING, "tok_embeddings.weight", LLAMA_2, 0),
        [
            f"unlike-source: tensor '{EMBEDDING}': row 0, column 32 is {value('tok_embeddings.weight', 1, 0)}, where "
            f"the source makes {value('tok_embeddings.weight', 0, 32)}; 19136 of its 19200 weights differ: its 2 "
            f"shards were joined by rows, where they are parts of columns{REMEDY}"
        ],
    ),
    "rows joined by columns": (
        join(GATE, "layers.0.feed_forward.w1.weight", 0, 1),
        [
            f"unlike-source: tensor '{GATE}': row 1, column 0 is {value('layers.0.feed_forward.w1.weight', 48, 0)}, "
            f"where the source makes {value('layers.0.feed_forward.w1.weight', 1, 0)}; 6016 of its 6144 weights "
            f"differ: its 2 shards were joined by columns, where they are parts of rows{REMEDY}"
        ],
    ),
    "rows moved round": (
        lambda data: data[UP].__setitem__(slice(10, 13), np.roll(data[UP][10:13], 1, 0)),
        [
            f"unlike-source: tensor '{UP}': row 10, column 0 is {value('layers.0.feed_forward.w3.weight', 12, 0)}, "
            f"where the source makes {value('layers.0.feed_forward.w3.weight', 10, 0)}; 192 of its 6144 weights "
            f"differ: row 10 holds what row 12 should and 2 more are of other places, 0 of none{REMEDY}"
        ],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_mistake_has_its_line(source: Path, converted: Path, tmp_path: Path, damage: str) -> None:
    path = Path(shutil.copy(converted, tmp_path / "bad.gguf"))
    change, expected = DAMAGES[damage]
    change(data_of(path))
    assert lines(path, source) == expected


def test_a_tensor_quantized_from_another(quantized: Path, source: Path, converted: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(quantized, tmp_path / "bad.gguf"))
    data = data_of(path)
    data[GATE][:] = data["blk.1.ffn_gate.weight"]
    data["output.weight"][4, 20] ^= 128
    expected = [
        f"unlike-source: tensor '{GATE}': row 0, block 0 (columns 0 to 32) is not what the source makes; 192 of its "
        f"192 blocks differ: it holds what 'blk.1.ffn_gate.weight' should{REMEDY}",
        "unlike-source: tensor 'output.weight': row 4, block 1 (columns 32 to 64) is not what the source makes; 1 of "
        f"its 600 blocks differ{REMEDY}",
    ]
    assert sorted(lines(path, source)) == sorted(expected)
    assert sorted(lines(path, converted)) == sorted(expected)


def test_coverage_both_ways(source: Path, tmp_path: Path) -> None:
    weights = dict(random_weights(TINY))
    del weights["layers.1.attention.wv.weight"]
    weights["layers.2.attention.wo.weight"] = weights["layers.2.attention.wo.weight"].reshape(128, 32)
    extra = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", weights, TINY, more_tensors=extra)
    assert lines(path, source) == [
        f"unlike-source: tensor '{WO}': shape 128x32, where the source makes 64x64: its 2 shards were joined along the "
        f"wrong axis{REMEDY}",
        "not-in-source: tensor 'blk.0.attn_q.bias': F32 64, of which the source has nothing. It is of another model",
        "not-in-file: tensor 'blk.1.attn_v.weight': the source has it as F32 32x64, and this file does not. It is not "
        "of this source, or lost on the way",
    ]
    assert llamatools.prove(path, source, options=OPTIONS).accounted["lost"] == (1, 32 * 64)


@pytest.mark.parametrize("rounding", ["exact", "search"])
def test_with_an_imatrix(converted: Path, tmp_path: Path, rounding: str) -> None:
    names = [GATE, UP, "blk.2.ffn_gate.weight"]
    imatrix = write_imatrix(tmp_path / "i.dat", dict.fromkeys(names, 64))
    path = tmp_path / "q.gguf"
    llamatools.quantize(converted, path, "q4_0", options=QuantizeOptions(imatrix, rounding, pure=True))
    proof = llamatools.prove(path, converted, imatrix=imatrix)
    assert proof.proven
    assert proof.how[GATE] == f"F32 to Q4_0, {rounding} rounding by the imatrix"
    assert proof.how[Q] == "F32 to Q4_0, exact rounding"
    if rounding == "search":
        names.append("output.weight")
        assert proof.how["output.weight"] == "F32 to Q4_0, search rounding by the head's derived importance"
    found = lines(path, converted)
    assert [line.partition(" row")[0] for line in found] == [f"unproven: tensor '{name}':" for name in names]
    assert all(
        line.endswith("it was quantized with an imatrix, which is not given. Name the imatrix with --imatrix")
        for line in found
    )


def test_what_cannot_be_made_anew(tmp_path: Path) -> None:
    embedding = np.ones((4, 256), np.float32)
    source = write_gguf(tmp_path / "m.gguf", {"tok_embeddings.weight": embedding}, TINY)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "other")
    writer.add_tensor(EMBEDDING, np.zeros((4, 84), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert lines(tmp_path / "q.gguf", source) == [
        f"unproven: tensor '{EMBEDDING}': F32 of the source cannot be made Q2_K here, so that nothing can be compared. "
        "Use --diff, which tells how far they are apart"
    ]


def test_hugging_faces_order_cannot_be_known_without_a_config(converted: Path, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", state_of()) / "model.safetensors"
    with pytest.raises(UsageError, match="--against: there is no config.json beside .*, which tells the order of rows"):
        llamatools.prove(converted, path)
