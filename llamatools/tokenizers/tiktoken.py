"""`tokenizer.model` of Llama 3: tiktoken's text, a line for each token: its bytes in base64, a space, its rank.

A rank is both the token's id and its priority in merging. GGUF wants the merges instead, pairs in order of priority:
they are every split of a token into two tokens, in order of the token's rank and then of the halves' ranks.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace

import numpy as np

from ..checkpoint import CONTROL, NORMAL, Tokenizer
from ..errors import FormatError

MAX_TOKENS = 1 << 20
MAX_TOKEN_NBYTES = 1024
N_SPECIAL = 256  # ids after the ranks that Llama 3 sets aside

# The special tokens with a name, by their place after the ranks; the rest are `<|reserved_special_token_N|>` in order.
# Names as Hugging Face's files of each release have them; the ids agree with Meta's.
NAMED = {
    "3": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    },
    "3.1": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    },
}
ROLES = {
    "<|begin_of_text|>": "bos",
    "<|end_of_text|>": "eos",
    "<|eot_id|>": "eot",
    "<|eom_id|>": "eom",
    "<|finetune_right_pad_id|>": "padding",
}


def _printable_bytes() -> dict[int, str]:
    """GPT-2's spelling: a printable character for each byte, itself where it is one (openai/gpt-2, encoder.py)."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in itself)
    return {byte: chr(byte) for byte in itself} | {byte: chr(256 + n) for n, byte in enumerate(others)}


SPELLING = _printable_bytes()
_TO_SPELLING = str.maketrans({chr(byte): text for byte, text in SPELLING.items()})


def spelled(token: bytes) -> str:
    """A token's bytes in GPT-2's printable spelling."""
    return token.decode("latin-1").translate(_TO_SPELLING)


def read_tiktoken(data: bytes, *, era: str = "3") -> Tokenizer:
    """The vocabulary of a Llama 3 model. era: "3", or "3.1" for later ones, whose special tokens have other names.

    Raises FormatError naming the line.
    """
    ranks = _read_ranks(data)
    n = len(ranks)
    named = NAMED[era]
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(N_SPECIAL))
    special = [named.get(place) or next(reserved) for place in range(N_SPECIAL)]
    return Tokenizer(
        model="gpt2",
        pre="llama-bpe",
        tokens=[*map(spelled, ranks), *special],
        scores=None,
        types=np.repeat(np.array([NORMAL, CONTROL], np.int32), [n, N_SPECIAL]),
        merges=recover_merges(ranks),
        special={ROLES[text]: n + place for place, text in named.items() if text in ROLES},
    )


def with_instruct(tokenizer: Tokenizer) -> Tokenizer:
    """The vocabulary of a model that takes turns: the id that ends a turn ends the text, where there is one."""
    eot = tokenizer.special.get("eot")
    if tokenizer.model != "gpt2" or eot is None:
        return tokenizer
    return replace(tokenizer, special={**tokenizer.special, "eos": eot})


def recover_merges(ranks: dict[bytes, int]) -> list[str]:
    """The merges, "left right" in GPT-2's spelling, in the order in which tiktoken would do them."""
    spelling = {token: spelled(token) for token in ranks}
    merges = []
    for token in ranks:
        if len(token) > 1:
            pairs = []
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in ranks and right in ranks:
                    pairs.append((ranks[left], ranks[right], left, right))
            pairs.sort()
            merges += [f"{spelling[left]} {spelling[right]}" for _, _, left, right in pairs]
    return merges


def _read_ranks(data: bytes) -> dict[bytes, int]:
    """Token -> rank, in order of ranks, which must be 0, 1, 2 and so on."""
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    if len(lines) > MAX_TOKENS:
        raise FormatError(f"{len(lines)} lines, where {MAX_TOKENS} tokens are allowed")
    for n, line in enumerate(lines):
        where = f"line {n + 1}"
        encoded, space, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not (token and space and rank.isdigit()):
            raise FormatError("not a token in base64, a space and a rank", where=where)
        if len(token) > MAX_TOKEN_NBYTES:
            raise FormatError(f"a token of {len(token)} bytes, where {MAX_TOKEN_NBYTES} are allowed", where=where)
        if int(rank[:9]) != n or len(rank) > 9:
            raise FormatError(f"rank {rank[:9].decode()}, where {n} should follow", where=where)
        if token in ranks:
            raise FormatError(f"the token of line {ranks[token] + 1} again", where=where)
        ranks[token] = n
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FormatError(
            f"{256 - len(missing)} of the 256 single bytes are tokens; byte {missing[0]} is not",
            todo="The file is truncated",
        )
    return ranks
