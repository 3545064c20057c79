"""`tokenizer.json` of a Hugging Face folder: byte-level BPE vocabularies, as Llama 3 and SmolLM have them.

    model          {"type": "BPE", "vocab": {text: id}, "merges": ["left right"] or [[left, right]]}
    added_tokens   [{"id", "content", "special"}], some of which are in the vocabulary, too
    pre_tokenizer  how text is cut before merging, which GGUF states by a name of llama.cpp's
    post_processor what begins and ends a text

Which tokens begin and end a text stands in tokenizer_config.json. Source: the tokenizers library, tokenizers/src/models
and pre_tokenizers. A vocabulary of SentencePiece's kind is refused: its scores are in tokenizer.model only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..checkpoint import CONTROL, NORMAL, USER_DEFINED, Tokenizer
from ..errors import FormatError, UnsupportedError
from .tiktoken import ROLES

MAX_TOKENS = 1 << 20

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of cutting text, each a type and the settings that matter -> llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], ...], str] = {
    (("Split", LLAMA_3, "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
    (("Digits", True), ("ByteLevel", False, True)): "smollm",
    (("ByteLevel", False, True),): "gpt-2",
}
WHOLE_WORDS = {"llama-bpe"}  # where llama.cpp takes a word that is a token whole, whatever the merges
ROLE_KEYS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# What would change how text is cut into tokens, with the only values that GGUF can say.
PLAIN = {"byte_fallback": (False, None), "continuing_subword_prefix": ("", None), "end_of_word_suffix": ("", None)}


def from_json(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    """The vocabulary in tokenizer.json and tokenizer_config.json (empty where there is none), as parsed.

    Raises FormatError for what is damaged, UnsupportedError for a vocabulary of another kind.
    """
    model = _part(tokenizer, "model", dict)
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"a vocabulary of type {model['type']!r}, where 'BPE' is read")
    for key, values in PLAIN.items():
        if model.get(key) not in values:
            raise UnsupportedError(f"a vocabulary with {key} {model[key]!r} cannot be read from tokenizer.json")
    if tokenizer.get("normalizer") is not None:
        raise UnsupportedError("it normalizes text, which GGUF cannot say")
    pre = _pre_tokenizer(tokenizer)
    if model.get("ignore_merges", pre in WHOLE_WORDS) != (pre in WHOLE_WORDS):
        raise UnsupportedError(f"ignore_merges is {model['ignore_merges']!r}, which {pre!r} is not in llama.cpp")
    texts, types = _tokens(_part(model, "vocab", dict), _part(tokenizer, "added_tokens", list, []))
    ids = {text: id_ for id_, text in enumerate(texts)}
    special = {role: ids[text] for text, role in ROLES.items() if role not in ("bos", "eos") and text in ids}
    for key, role in ROLE_KEYS.items():
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None:
            if not isinstance(text, str) or text not in ids:
                raise FormatError(f"{text!r} is no token", where=f"tokenizer_config.json, key {key!r}")
            special[role] = ids[text]
    first, last = _ends(tokenizer.get("post_processor"))
    template = config.get("chat_template")
    return Tokenizer(
        model="gpt2",
        pre=pre,
        tokens=texts,
        scores=None,
        types=types,
        merges=_merges(_part(model, "merges", list)),
        special=special,
        add_bos=first is not None and ids.get(first) == special.get("bos", -1),
        add_eos=last is not None and ids.get(last) == special.get("eos", -1),
        add_space_prefix=False,
        chat_template=template if isinstance(template, str) else None,
    )


def _part(value: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    part = value.get(key, default)
    if not isinstance(part, kind):
        raise FormatError(f"{'an object' if kind is dict else 'a list'} is required", where=f"key {key!r}")
    return part


def _steps(value: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or post-processor, those inside of sequences one by one."""
    for step in _part(value, inner, list) if isinstance(value, dict) and value.get("type") == "Sequence" else [value]:
        if not isinstance(step, dict):
            raise FormatError("an object is required", where=f"a step of {inner}")
        yield step


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of how text is cut before merging."""
    steps: list[tuple[Any, ...]] = []
    for step in _steps(tokenizer.get("pre_tokenizer") or {}, "pretokenizers"):
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            steps.append((kind, str(regex), str(step.get("behavior")), step.get("invert") is True))
        elif kind == "Digits":
            steps.append((kind, step.get("individual_digits") is True))
        elif kind == "ByteLevel":
            prefix, regex = step.get("add_prefix_space", True), step.get("use_regex", True)
            steps.append((kind, prefix is not False, regex is not False))
        else:
            steps.append((str(kind),))
    pre = PRE_TOKENIZERS.get(tuple(steps))
    if pre is None:
        listed = ", ".join(step[0] for step in steps)
        raise UnsupportedError(f"a pre_tokenizer ({listed}) for which llamatools knows no name of llama.cpp's")
    return pre


def _tokens(vocab: Mapping[str, Any], added: list[Any]) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int32]]]:
    """The text of every id and its type. Raises FormatError unless ids are 0, 1, 2 and so on, each with one text."""
    n = len(vocab) + len(added)
    if n > MAX_TOKENS:
        raise FormatError(f"{n} tokens, where {MAX_TOKENS} are allowed")
    texts: dict[int, str] = {}
    types: dict[int, int] = {}
    entries: list[tuple[Any, Any, int]] = [(text, id_, NORMAL) for text, id_ in vocab.items()]
    for n, token in enumerate(added):
        if not isinstance(token, dict):
            raise FormatError("an object is required", where=f"added token {n}")
        entries.append((token.get("content"), token.get("id"), CONTROL if token.get("special") else USER_DEFINED))
    for text, id_, type_ in entries:
        if not isinstance(text, str) or type(id_) is not int:
            raise FormatError(f"{text!r} has id {id_!r}, where a text and a number are required", where="vocabulary")
        if texts.setdefault(id_, text) != text:
            raise FormatError(f"{texts[id_]!r} and {text!r} share it", where=f"id {id_}")
        types[id_] = type_
    missing = next((id_ for id_ in range(len(texts)) if id_ not in texts), None)
    if missing is not None:
        raise FormatError(f"{len(texts)} tokens, but none has id {missing}", where="vocabulary")
    order = range(len(texts))
    return [texts[id_] for id_ in order], np.array([types[id_] for id_ in order], np.int32)


def _merges(merges: list[Any]) -> list[str]:
    """The merges as GGUF has them, "left right"; spaces are never in either, since bytes are spelled printably."""
    spelled = []
    for n, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(half, str) and half for half in pair):
            raise FormatError(f"{merge!r} is no pair of texts", where=f"merge {n}")
        spelled.append(f"{pair[0]} {pair[1]}")
    return spelled


def _ends(processor: Any) -> tuple[str | None, str | None]:
    """The special tokens that are put before and behind a text."""
    first, last = None, None
    for step in _steps(processor or {}, "processors"):
        if step.get("type") == "TemplateProcessing" and (pieces := _part(step, "single", list)):
            first, last = _special(pieces[0]), _special(pieces[-1])
    return first, last


def _special(piece: Any) -> str | None:
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    text = token.get("id") if isinstance(token, dict) else None
    return text if isinstance(text, str) else None
