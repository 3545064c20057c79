"""tokenizer.json: what the tokenizers library wrote, read and held against the library; and damage."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXT
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

import llamatools
from llamatools.errors import FormatError, UnsupportedError
from llamatools.tokenizers.hf_json import LLAMA_3, from_json

CUTS = {
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def trained(pre: str = "llama-bpe") -> Library:
    """A byte-level vocabulary with special tokens before and behind it, as the library makes it."""
    library = Library(models.BPE(ignore_merges=pre == "llama-bpe"))
    steps = CUTS[pre]
    library.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    library.add_tokens([AddedToken("<tool>", special=False)])
    begin = library.token_to_id("<|begin_of_text|>")
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]),
        ]
    )
    return library


CONFIG = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": {"content": "<|end_of_text|>", "lstrip": False},
    "pad_token": "<pad>",
    "unk_token": None,
    "chat_template": "{{ messages }}",
}


@pytest.mark.parametrize("pre", CUTS)
def test_a_vocabulary_by_the_library(pre: str) -> None:
    library = trained(pre)
    spec = json.loads(library.to_str())
    tokenizer = from_json(spec, CONFIG)
    n = library.get_vocab_size()
    assert (tokenizer.model, tokenizer.pre, tokenizer.scores) == ("gpt2", pre, None)
    assert list(tokenizer.tokens) == [library.id_to_token(i) for i in range(n)]
    added = library.get_added_tokens_decoder()
    assert tokenizer.types.tolist() == [
        (3 if added[i].special else 4) if i in added else 1  # GGUF's control, user-defined, normal
        for i in range(n)
    ]
    assert tokenizer.special == {
        role: library.token_to_id(text)
        for role, text in (
            ("bos", "<|begin_of_text|>"),
            ("eos", "<|end_of_text|>"),
            ("padding", "<pad>"),
            ("eot", "<|eot_id|>"),
        )
    }
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
    assert library.encode("a").ids[0] == tokenizer.special["bos"]
    assert tokenizer.chat_template == "{{ messages }}"
    # The merges are the library's: built into another one, they cut every text alike.
    merges = [tuple(merge.split(" ")) for merge in tokenizer.merges]
    again = Library(models.BPE(library.get_vocab(with_added_tokens=False), merges, ignore_merges=pre == "llama-bpe"))
    again.pre_tokenizer = library.pre_tokenizer
    for text in (*TEXT, "jumps over 12345 ünïcödé 🐲\n\n"):
        assert again.encode(text).ids == library.encode(text, add_special_tokens=False).ids


def test_merges_of_the_older_spelling_and_ends_of_a_text() -> None:
    spec = json.loads(trained().to_str())
    wanted = from_json(spec, CONFIG)
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    del spec["model"]["ignore_merges"]  # older still
    assert from_json(spec, CONFIG).merges == wanted.merges
    library = trained()
    ids = [(text, library.token_to_id(text)) for text in ("<|begin_of_text|>", "<|end_of_text|>")]
    library.post_processor = processors.TemplateProcessing(single="$A <|end_of_text|>", special_tokens=ids)
    tokenizer = from_json(json.loads(library.to_str()), CONFIG)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, True)
    assert not from_json(json.loads(library.to_str()), {}).add_eos  # nothing says what ends a text


def test_a_folder_with_tokenizer_json(tmp_path: Path) -> None:
    save_file({"w": np.zeros(2, np.float16)}, tmp_path / "model.safetensors")
    library = trained()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    layout = llamatools.inspect(tmp_path)
    assert layout.tokenizer is not None
    assert len(layout.tokenizer.tokens) == library.get_vocab_size()
    assert [file.path.name for file in layout.files] == ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    library.normalizer = normalizers.NFC()
    library.save(str(tmp_path / "tokenizer.json"))
    layout = llamatools.inspect(tmp_path)
    assert layout.tokenizer is None
    assert layout.notes[-1].reason == "tokenizer.json: it normalizes text, which GGUF cannot say"
    (tmp_path / "tokenizer_config.json").write_text("{")
    [problem] = llamatools.inspect(tmp_path).problems
    assert str(problem).startswith(f"{tmp_path / 'tokenizer_config.json'}: it is no JSON")


Change = Callable[[dict[str, Any]], object]
# What is changed, and what is then said.
UNSUPPORTED: dict[str, tuple[Change, str]] = {
    "unigram": (
        lambda spec: spec["model"].update(type="Unigram"),
        "a vocabulary of type 'Unigram', where 'BPE' is",
    ),
    "sentencepiece": (
        lambda spec: spec["model"].update(byte_fallback=True),
        "a vocabulary with byte_fallback True cannot be read from tokenizer.json",
    ),
    "suffix": (
        lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
        "with end_of_word_suffix '</w>' can",
    ),
    "cut": (
        lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation"}),
        "a pre_tokenizer (Punctuation, Split, ByteLevel) for which llamatools knows no name of llama.cpp's",
    ),
    "cut elsewhere": (
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="a|b"),
        "a pre_tokenizer (Split, ByteLevel) for which",
    ),
    "no cut": (lambda spec: spec.update(pre_tokenizer=None), "a pre_tokenizer (None) for which"),
    "merges ignored": (
        lambda spec: spec["model"].update(ignore_merges=False),
        "ignore_merges is False, which 'llama-bpe' is not in llama.cpp",
    ),
}
DAMAGED: dict[str, tuple[Change, str]] = {
    "no model": (lambda spec: spec.pop("model"), "key 'model': an object is required"),
    "no merges": (lambda spec: spec["model"].pop("merges"), "key 'merges': a list is required"),
    "merge": (lambda spec: spec["model"]["merges"].append(["a"]), "['a'] is no pair of texts"),
    "merge of numbers": (lambda spec: spec["model"]["merges"].insert(0, [1, 2]), "merge 0: [1, 2] is no pair of texts"),
    "step": (
        lambda spec: spec["pre_tokenizer"]["pretokenizers"].append(1),
        "a step of pretokenizers: an object",
    ),
    "added": (lambda spec: spec["added_tokens"].insert(0, "x"), "added token 0: an object is required"),
    "id": (lambda spec: spec["model"]["vocab"].update(x="y"), "vocabulary: 'x' has id 'y', where a text and a"),
    "id shared": (lambda spec: spec["model"]["vocab"].update(new=0), "id 0: '<pad>' and 'new' share it"),
    "id left out": (lambda spec: spec["model"]["vocab"].update(new=9999), "313 tokens, but none has id 312"),
    "role": (
        lambda spec: spec["added_tokens"][1].update(content="new"),
        "tokenizer_config.json, key 'bos_token': '<|begin_of_text|>' is no token",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED | DAMAGED)
def test_refused(case: str) -> None:
    change, said = (UNSUPPORTED | DAMAGED)[case]
    spec = copy.deepcopy(SPEC)
    change(spec)
    with pytest.raises(UnsupportedError if case in UNSUPPORTED else FormatError, match=re.escape(said)):
        from_json(spec, CONFIG)


def test_too_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamatools.tokenizers.hf_json.MAX_TOKENS", 5)
    with pytest.raises(FormatError, match="313 tokens, where 5 are allowed"):
        from_json(SPEC, CONFIG)


SPEC = json.loads(trained().to_str())
