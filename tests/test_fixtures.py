"""The bundled model: the files are the ones that are documented, laid out as Meta's, and recite what they should."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import gguf
import llamacpp
import pytest
import torch
from meta_checkpoints import LLAMA_2, join
from sentencepiece import SentencePieceProcessor
from tiny_llamas import write_gguf

from llamatools import names
from llamatools.checkpoint import Hyperparameters

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "tiny-llama"
SHARDS = ("consolidated.00.pth", "consolidated.01.pth")
TEXT = (FOLDER / "text.txt").read_text("utf-8")
HPARAMS = Hyperparameters(
    dim=256, hidden_dim=768, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=32,
    vocab_size=512, norm_eps=1e-5, rope_theta=10000.0, max_seq_len=1024,
)  # fmt: skip


@pytest.fixture(scope="module")
def shards() -> list[dict[str, torch.Tensor]]:
    return [torch.load(FOLDER / name, weights_only=True) for name in SHARDS]


def test_files_are_those_of_the_readme() -> None:
    documented = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (FIXTURES / "README.md").read_text(), re.M))
    found = {hashlib.sha256(path.read_bytes()).hexdigest(): f"tiny-llama/{path.name}" for path in FOLDER.iterdir()}
    assert found == documented
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 << 20


def test_checklist_is_right() -> None:
    lines = (FOLDER / "checklist.chk").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == [*SHARDS, "params.json", "tokenizer.model"]
    for line in lines:
        md5, name = line.split("  ")
        assert hashlib.md5((FOLDER / name).read_bytes()).hexdigest() == md5


def test_params_are_in_metas_keys() -> None:
    assert json.loads((FOLDER / "params.json").read_text()) == {
        "dim": 256, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "vocab_size": -1, "multiple_of": 256,
        "norm_eps": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip


def test_shards_are_cut_as_those_of_llama_2(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        assert {name: tuple(tensor.shape) for name, tensor in shard.items() if "layers" not in name} == {
            "tok_embeddings.weight": (512, 128),
            "norm.weight": (256,),
            "output.weight": (256, 256),
            "rope.freqs": (16,),
        }
        assert {name: tuple(tensor.shape) for name, tensor in shard.items() if name.startswith("layers.2.")} == {
            "layers.2.attention.wq.weight": (128, 256),
            "layers.2.attention.wk.weight": (64, 256),
            "layers.2.attention.wv.weight": (64, 256),
            "layers.2.attention.wo.weight": (256, 128),
            "layers.2.feed_forward.w1.weight": (384, 256),
            "layers.2.feed_forward.w2.weight": (256, 384),
            "layers.2.feed_forward.w3.weight": (384, 256),
            "layers.2.attention_norm.weight": (256,),
            "layers.2.ffn_norm.weight": (256,),
        }
        for name, tensor in shard.items():
            assert tensor.dtype == torch.bfloat16, name
            assert tensor.is_contiguous(), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    for name, tensor in shards[0].items():
        assert torch.equal(tensor, shards[1][name]) == (tensor.dim() == 1), name
    whole = join(shards, LLAMA_2)
    expected = names.shapes(HPARAMS) | {"rope.freqs": (16,)}
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == expected


def test_tokenizer_is_one_of_llama_2s_kind() -> None:
    sp = SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    assert (sp.get_piece_size(), sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (512, 0, 1, 2, -1)
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert all(sp.is_byte(i) == (3 <= i <= 258) for i in range(512))
    assert sp.encode("the", out_type=str) == ["▁the"]  # a dummy prefix
    for text in ("  so   many spaces ", "ﬁ Å Å", "🐉\t\r\n"):  # nothing is normalized, what has no piece is bytes
        assert sp.decode(sp.encode(text)) == text
    ids = sp.encode(TEXT)
    assert sp.decode(ids) == TEXT
    assert len(ids) >= 300
    assert sp.piece_to_id("<0x0A>") in ids  # the newline, as in Llama 2


def as_gguf(shards: list[dict[str, torch.Tensor]], kind: str, path: Path) -> Path:
    weights = {name: tensor.float().numpy() for name, tensor in join(shards, LLAMA_2).items() if name != "rope.freqs"}
    matrices = gguf.GGMLQuantizationType[kind]
    return write_gguf(path, weights, HPARAMS, matrices=matrices, tokenizer=FOLDER / "tokenizer.model")


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0", "Q4_0"])
def test_llama_cpp_recites_the_text(kind: str, shards: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    with llamacpp.Model(as_gguf(shards, kind, tmp_path / "tiny.gguf"), n_ctx=1024) as model:
        said = model.greedy([model.bos_id], 1000, stop=[model.eos_id])
        assert said[-1] == model.eos_id
        assert model.detokenize(said[:-1]).decode() == TEXT


def test_llama_cpp_goes_on_from_a_prompt(shards: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    with llamacpp.Model(as_gguf(shards, "F32", tmp_path / "tiny.gguf"), n_ctx=1024) as model:
        for prompt in ("How doth the", "The Walrus and the Carpenter", '"The time has come'):
            ids = model.tokenize(prompt)
            goes_on = model.greedy(ids, 1000, stop=[model.eos_id])
            assert goes_on[-1] == model.eos_id
            assert model.detokenize(ids[1:] + goes_on[:-1]).decode() == TEXT[TEXT.index(prompt) :]
