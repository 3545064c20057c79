"""How models were taught that a conversation is written: a table, and which row of it a model's vocabulary asks for.

A template that comes with a model is a program, and is never run. It is looked at for strings that tell which of the
known formats it makes.

Sources: Llama 2, Code Llama: facebookresearch/llama and meta-llama/codellama, generation.py (chat_completion and, for
the 70B, dialog_prompt_tokens). Llama 3: llama-models, models/llama3/chat_format.py. Mistral: mistral-common, the
instruct tokenizers of version 1 and of 2 and 3. ChatML: openai-python, chatml.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamatools.checkpoint import Tokenizer
from llamatools.errors import UsageError

Items = tuple[str, ...]


@dataclass(frozen=True)
class ChatFormat:
    """The format of conversations that a model was trained on.

    start: before everything. turn: what the user says, up to where the reply begins. with_system: the same for a first
    turn with instructions for the whole conversation. end: what follows a reply. Each is a row of items: a token of the
    vocabulary, if it is one of `marks`, else text, cut into tokens by itself, with {text} and {system} filled in.
    signs: strings that are all in the chat templates of this format. names: of models of this format, an expression.
    trims: whether the space around what the user says is left out.
    """

    name: str
    marks: Items
    start: Items
    with_system: Items
    turn: Items
    end: Items
    signs: Items
    names: str
    trims: bool = True


_HEAD, _HEAD_END, _EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
_LLAMA_3_USER = (_HEAD, "user", _HEAD_END, "\n\n{text}", _EOT)
_LLAMA_3_TURN = (*_LLAMA_3_USER, _HEAD, "assistant", _HEAD_END, "\n\n")
_IM, _IM_END = "<|im_start|>", "<|im_end|>"
_CHATML_TURN = (_IM, "user\n{text}", _IM_END, "\n", _IM, "assistant\n")
_STEP_TURN = (" Source: user", "\n\n {text}", "<step>", " Source: assistant\nDestination: user", "\n\n ")

FORMATS = (
    ChatFormat(
        "llama-2",  # and Code Llama up to 34B
        marks=("<s>", "</s>"),
        start=(),
        with_system=("<s>", "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]"),
        turn=("<s>", "[INST] {text} [/INST]"),
        end=("</s>",),
        signs=("[INST]", "<<SYS>>"),
        names=r"llama-?2.*chat|code-?llama-(7|13|34)b.*instruct",
    ),
    ChatFormat(
        "llama-3",
        marks=("<|begin_of_text|>", _HEAD, _HEAD_END, _EOT),
        start=("<|begin_of_text|>",),
        with_system=(_HEAD, "system", _HEAD_END, "\n\n{system}", _EOT, *_LLAMA_3_TURN),
        turn=_LLAMA_3_TURN,
        end=(_EOT,),
        signs=(_HEAD, _HEAD_END),
        names=r"llama-?3.*instruct",
    ),
    ChatFormat(
        "code-llama-70b",
        marks=("<s>", "<step>"),
        start=("<s>",),
        with_system=(" Source: system", "\n\n {system}", "<step>", *_STEP_TURN),
        turn=_STEP_TURN,
        end=("<step>",),
        signs=("Source: ", "<step>"),
        names=r"code-?llama-70b.*instruct",
    ),
    ChatFormat(
        "mistral",  # version 1
        marks=("<s>", "</s>"),
        start=("<s>",),
        with_system=("[INST] {system}\n\n{text} [/INST]",),
        turn=("[INST] {text} [/INST]",),
        end=("</s>",),
        signs=("[INST]",),
        names=r"mistral.*instruct-v0\.[12]",
        trims=False,
    ),
    ChatFormat(
        "mistral-v3",  # versions 2 and 3, whose brackets are tokens
        marks=("<s>", "</s>", "[INST]", "[/INST]"),
        start=("<s>",),
        with_system=("[INST]", "{system}\n\n{text}", "[/INST]"),
        turn=("[INST]", "{text}", "[/INST]"),
        end=("</s>",),
        signs=("[INST]",),
        names=r"mistral.*instruct-v0\.3",
        trims=False,
    ),
    ChatFormat(
        "chatml",
        marks=(_IM, _IM_END),
        start=(),
        with_system=(_IM, "system\n{system}", _IM_END, "\n", *_CHATML_TURN),
        turn=_CHATML_TURN,
        end=(_IM_END, "\n"),
        signs=(_IM,),
        names=r"$.",  # any name may go with it
        trims=False,
    ),
)
NAMES = tuple(chat_format.name for chat_format in FORMATS)


def format_named(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format of that name. Raises UsageError if there is none, or its tokens are not in the vocabulary."""
    for chat_format in FORMATS:
        if chat_format.name == name:
            lacking = _lacking(chat_format, tokenizer)
            if lacking:
                raise UsageError(
                    f"{name} takes the token {lacking[0]!r}, which the model's vocabulary lacks", where="--chat-format"
                )
            return chat_format
    raise UsageError(f"{name!r} is none of {', '.join(NAMES)}", where="--chat-format")


def recognise(tokenizer: Tokenizer, model_name: str = "") -> tuple[ChatFormat, str]:
    """The format that a model was trained on, and by what it was recognised.

    That is its chat template, or without one the token that ends a text, or without that the model's name.
    Raises UsageError where these tell of none, or of more than one.
    """
    possible = [chat_format for chat_format in FORMATS if not _lacking(chat_format, tokenizer)]
    template = tokenizer.chat_template
    if template:
        found, sign = [f for f in possible if all(sign in template for sign in f.signs)], "its chat template"
        found = [f for f in found if not any(_evidence(f) < _evidence(other) for other in found)]
    else:
        end = tokenizer.tokens[tokenizer.special["eos"]] if "eos" in tokenizer.special else ""
        found = [f for f in possible if f.end[0] == end != "</s>"]  # which ends texts of all kinds
        sign = "the token that ends a text"
    if not found:
        found, sign = [f for f in possible if re.search(f.names, model_name.replace(" ", "-"), re.I)], "its name"
    if len(found) != 1:
        seen = " and ".join(f.name for f in found)
        raise UsageError(
            f"which format its conversations have cannot be told: it looks like {seen}"
            if found
            else "which format its conversations have cannot be told from its chat template, tokens or name",
            todo=f"If it was trained on conversations, name one with --chat-format: {', '.join(NAMES)}",
        )
    return found[0], sign


def _lacking(chat_format: ChatFormat, tokenizer: Tokenizer) -> list[str]:
    """The tokens that the format takes and the vocabulary lacks."""
    marks = dict.fromkeys(chat_format.marks)
    for text in tokenizer.tokens:
        marks.pop(text, None)
        if not marks:
            break
    return list(marks)


def _evidence(chat_format: ChatFormat) -> set[str]:
    """Of two formats that both could be, the one with more evidence is."""
    return {*chat_format.signs, *(mark for mark in chat_format.marks if mark.startswith("["))}
