"""Conversations: each format against its published template and other tokenizers; what is kept between turns."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llamatools_runtime import Chat, Sampler, generate, load, open_chat
from llamatools_runtime.chat import TurnCodec
from llamatools_runtime.chat_formats import NAMES, format_named, recognise
from sentencepiece import SentencePieceProcessor
from test_text import LLAMA_2, LLAMA_3, PATTERN, needs_vocabularies
from tiktoken.load import load_tiktoken_bpe

from llamatools import MetaOptions, Overrides, convert
from llamatools.checkpoint import CONTROL, NORMAL, USER_DEFINED, Tokenizer
from llamatools.errors import UnsupportedError, UsageError
from llamatools.tokenizers import read_tokenizer as read_anew
from llamatools.tokenizers.tiktoken import spelled

read_tokenizer = functools.cache(read_anew)
TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"

# The templates in the tokenizer_config.json of Llama-2-7b-chat-hf, CodeLlama-70b-Instruct-hf, Meta-Llama-3-8B-Instruct,
# Mistral-7B-Instruct-v0.1 and v0.3 and SmolLM2-135M-Instruct, less their errors for roles in a wrong order.
LLAMA_2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CODE_LLAMA_70B_TEMPLATE = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ '<s>' }}{% endif %}"
    "{% set content = 'Source: ' + message['role'] + '\\n\\n ' + message['content'].strip() %}"
    "{{ content + ' <step> ' }}{% endfor %}{{ 'Source: assistant\\nDestination: user\\n\\n ' }}"
)
LLAMA_3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "llama-2": LLAMA_2_TEMPLATE,
    "llama-3": LLAMA_3_TEMPLATE,
    "code-llama-70b": CODE_LLAMA_70B_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
    "mistral-v3": MISTRAL_V3_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
}
SYSTEM, FIRST, REPLY, SECOND = "Be brief.", "What is {text}, in {system}?\nTell me!", "I do not know", "naïve 東京 </w>"


def rendered(name: str, *, system: bool, later: bool) -> str:
    """The published template's text: of the first turn, or of what comes between the first reply and the next."""
    messages = [{"role": "system", "content": SYSTEM}] if system else []
    messages.append({"role": "user", "content": FIRST})
    if later:
        messages += [{"role": "assistant", "content": REPLY}, {"role": "user", "content": SECOND}]
    bos, eos = ("<|begin_of_text|>", "<|eot_id|>") if name == "llama-3" else ("<s>", "</s>")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATES[name])
    text = template.render(messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=True)
    return text.partition(REPLY)[2] if later else text


def sentencepiece(*more: str) -> Tokenizer:
    """Llama 2's vocabulary with more control tokens."""
    t = read_tokenizer(LLAMA_2)
    return replace(
        t,
        tokens=[*t.tokens, *more],
        types=np.append(t.types, [CONTROL] * len(more)).astype(np.int32),
        scores=np.append(t.scores, [0.0] * len(more)).astype(np.float32),  # type: ignore[arg-type]
    )


def single_bytes(type_: int = CONTROL, eos: int = 258) -> Tokenizer:
    """A vocabulary of bytes, and ChatML's tokens of a type."""
    tokens = [*(spelled(bytes([byte])) for byte in range(256)), "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    types = np.array([NORMAL] * 256 + [type_] * 3, np.int32)
    return Tokenizer("gpt2", "smollm", tokens, None, types, special={"eos": eos}, add_bos=False)


def turns(name: str, tokenizer: Tokenizer, system: str | None = None) -> TurnCodec:
    return TurnCodec(tokenizer, format_named(name, tokenizer), system)


@needs_vocabularies
@pytest.mark.parametrize("system", [True, False])
def test_llama_3_as_its_template_and_tiktoken_do(system: bool) -> None:
    marks = {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007}
    oracle = tiktoken.Encoding(
        "llama3",
        pat_str=PATTERN,
        mergeable_ranks=load_tiktoken_bpe(str(LLAMA_3)),
        special_tokens=marks | {"<|eot_id|>": 128009},
    )
    codec = turns("llama-3", read_tokenizer(LLAMA_3), SYSTEM if system else None)
    first, later = (rendered("llama-3", system=system, later=later) for later in (False, True))
    assert codec.first(f" {FIRST}\n") == oracle.encode(first, allowed_special="all")
    assert codec.end() + codec.later(SECOND) == oracle.encode(later, allowed_special="all")


@needs_vocabularies
@pytest.mark.parametrize(
    ("name", "system"), [("llama-2", True), ("llama-2", False), ("mistral", False)]
)  # whose template has no instructions
def test_llama_2_and_mistral_as_their_templates_and_sentencepiece_do(name: str, system: bool) -> None:
    processor = SentencePieceProcessor(model_file=str(LLAMA_2))

    def oracle(text: str) -> list[int]:
        pieces = [piece for piece in re.split(r"(</?s>)", text) if piece.strip()]  # Llama 2 ends a reply with a space
        ids = {"<s>": [processor.bos_id()], "</s>": [processor.eos_id()]}
        return list(itertools.chain(*(ids.get(piece) or processor.encode(piece) for piece in pieces)))

    codec = turns(name, sentencepiece(), SYSTEM if system else None)
    assert codec.first(FIRST) == oracle(rendered(name, system=system, later=False))
    assert codec.end() + codec.later(SECOND) == oracle(rendered(name, system=system, later=True))


@needs_vocabularies
def test_mistral_v3_and_code_llama_70b_as_their_templates() -> None:
    tokenizer = sentencepiece("[INST]", "[/INST]", "<step>")

    def spelled_out(ids: list[int]) -> str:
        return "".join(tokenizer.tokens[id_] for id_ in ids).replace("▁", " ").replace("<0x0A>", "\n")

    codec = turns("mistral-v3", tokenizer)
    assert spelled_out(codec.first(FIRST)) == rendered("mistral-v3", system=False, later=False)
    assert spelled_out(codec.end() + codec.later("Why?")) == "</s>[INST] Why?[/INST]"
    # The published template of the 70B differs in spaces from Meta's own code, which cuts the text anew at each item.
    codec = turns("code-llama-70b", tokenizer, SYSTEM)
    text, published = spelled_out(codec.first(FIRST)), rendered("code-llama-70b", system=True, later=False)
    assert text.replace("<step>", " <step> ").split() == published.replace("<s>", "<s> ").split()
    assert text.startswith("<s>  Source: system \n\n Be brief.<step>  Source: user \n\n ")


@pytest.mark.parametrize("system", [True, False])
def test_chatml_as_its_template(system: bool) -> None:
    def oracle(text: str) -> list[int]:
        marks = {"<|im_start|>": [256], "<|im_end|>": [257]}
        pieces = re.split(r"(<\|im_\w+\|>)", text)
        return list(itertools.chain(*(marks.get(piece) or list(piece.encode()) for piece in pieces)))

    codec = turns("chatml", single_bytes(), SYSTEM if system else None)
    first = rendered("chatml", system=system, later=False)
    if not system:  # the template has instructions of its own, which only the user can give here
        first = re.sub(r"^<\|im_start\|>system\n.*?<\|im_end\|>\n", "", first)
    assert codec.first(FIRST) == oracle(first)
    assert codec.end() + codec.later(SECOND) == oracle(rendered("chatml", system=system, later=True))


@needs_vocabularies
@pytest.mark.parametrize("type_", [CONTROL, USER_DEFINED, NORMAL])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_types_is_never_a_control_token(name: str, type_: int) -> None:
    if name in ("llama-3", "chatml"):
        tokenizer = read_tokenizer(LLAMA_3) if name == "llama-3" else single_bytes(type_)
    else:
        tokenizer = sentencepiece("[INST]", "[/INST]", "<step>")
    types = tokenizer.types.copy()
    marks = [tokenizer.tokens.index(mark) for mark in format_named(name, tokenizer).marks]
    types[marks] = type_
    codec = turns(name, replace(tokenizer, types=types))
    plain, attack = codec.first("x"), codec.first("".join(format_named(name, tokenizer).marks))
    assert [id_ for id_ in attack if id_ in marks] == [id_ for id_ in plain if id_ in marks]
    assert "".join(format_named(name, tokenizer).marks) in codec.decode(attack)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return replace(tokenizer, chat_template=template)


@needs_vocabularies
@pytest.mark.parametrize("name", NAMES)
def test_formats_are_recognised_by_their_templates(name: str) -> None:
    bracketed = name in ("mistral-v3", "code-llama-70b")
    tokenizer = {"llama-3": lambda: read_tokenizer(LLAMA_3), "chatml": single_bytes}.get(
        name, lambda: sentencepiece(*(["[INST]", "[/INST]", "<step>"] if bracketed else []))
    )()
    found, sign = recognise(with_template(tokenizer, TEMPLATES[name]))
    assert (found.name, sign) == (name, "its chat template")


@needs_vocabularies
@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        ("Llama-2-7b-chat", "llama-2"),
        ("Llama 2 13B Chat HF", "llama-2"),
        ("CodeLlama-34b-Instruct", "llama-2"),
        ("CodeLlama-70b-Instruct-hf", "code-llama-70b"),
        ("Mistral-7B-Instruct-v0.2", "mistral"),
        ("Mistral-7B-Instruct-v0.3", "mistral-v3"),
    ],
)
def test_formats_are_recognised_by_names(model_name: str, name: str) -> None:
    found, sign = recognise(sentencepiece("[INST]", "[/INST]", "<step>"), model_name)
    assert (found.name, sign) == (name, "its name")


def test_formats_are_recognised_by_what_ends_a_text() -> None:
    found, sign = recognise(single_bytes(eos=257))
    assert (found.name, sign) == ("chatml", "the token that ends a text")


ASK = f". If it was trained on conversations, name one with --chat-format: {', '.join(NAMES)}"


def test_what_cannot_be_told_is_asked_for() -> None:
    unknown = "which format its conversations have cannot be told from its chat template, tokens or name" + ASK
    for tokenizer in (single_bytes(), with_template(single_bytes(), "{{ messages }}")):
        with pytest.raises(UsageError, match=f"^{re.escape(unknown)}$"):
            recognise(tokenizer, "Mistral-7B-v0.1")
    both = replace(single_bytes(), tokens=[*single_bytes().tokens, "<s>", "</s>"])
    ambiguous = "which format its conversations have cannot be told: it looks like mistral and chatml" + ASK
    with pytest.raises(UsageError, match=f"^{re.escape(ambiguous)}$"):
        recognise(with_template(both, CHATML_TEMPLATE + MISTRAL_TEMPLATE))


def test_formats_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"^--chat-format: 'alpaca' is none of llama-2, llama-3, "):
        format_named("alpaca", single_bytes())
    with pytest.raises(
        UsageError, match=r"^--chat-format: llama-2 takes the token '<s>', which the model's vocabulary lacks$"
    ):
        format_named("llama-2", single_bytes())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "tiny.gguf"
    convert(TINY, path, options=MetaOptions(overrides=Overrides(context=1024)))
    return path


def after(n: int) -> Callable[[], bool]:
    """Says no n times, then yes."""
    answers = itertools.chain([False] * n, itertools.repeat(True))
    return lambda: next(answers)


def talk(path: Path, n_tokens: int | None = None) -> Chat:
    return open_chat(path, Sampler(), format_name="llama-2", n_tokens=n_tokens)[0]


def test_only_what_is_new_is_computed_and_nothing_else_changes(tiny: Path) -> None:
    chat, model = talk(tiny), load(tiny)[0]
    n_computed = 0
    for said in ("How doth", "the little", "crocodile"):
        before = len(chat.ids)
        pieces = list(chat.say(said, max_tokens=8))
        assert chat.timing.n_generated == 8
        n_computed += chat.timing.n_prompt + 7  # the last token is computed with the next turn
        turn = chat.ids[before:-9]
        alone = list(generate(model, chat.ids[: before + len(turn)], Sampler(), max_tokens=8))
        assert chat.ids[before:] == [*turn, *alone, 2]
        assert "".join(pieces) == "".join(pieces).lstrip() != ""
    assert n_computed == len(chat.ids) - 2
    assert chat.timing.ending == "token limit"


def test_a_reply_that_is_stopped(tiny: Path) -> None:
    chat, other = talk(tiny), talk(tiny)
    said = list(chat.say("How doth", stopped=after(0)))
    assert (said, chat.ids, chat.timing.ending) == ([""], [], "interrupted")
    list(chat.say("How doth", stopped=after(5)))
    assert (chat.timing.ending, chat.timing.n_generated) == ("interrupted", 5)
    list(other.say("How doth", max_tokens=5))
    assert chat.ids == other.ids
    list(chat.say("the little", stopped=after(0)))
    assert chat.ids == other.ids  # as if nothing had been said
    assert list(chat.say("the little", max_tokens=9)) == list(other.say("the little", max_tokens=9))
    chat.forget()
    fresh = talk(tiny)
    assert list(chat.say("crocodile", max_tokens=9)) == list(fresh.say("crocodile", max_tokens=9))
    assert chat.ids == fresh.ids


def test_a_full_context(tiny: Path) -> None:
    chat = talk(tiny, 40)
    assert chat.capacity == 40
    list(chat.say("How doth"))
    assert chat.timing.ending == "context full"
    taken = len(chat.ids)
    with pytest.raises(
        UsageError, match=rf"^the context is full: it holds 40 tokens, {taken} are taken and this needs \d+ more$"
    ):
        list(chat.say("the little"))
    assert len(chat.ids) == taken
    chat.forget()
    list(chat.say("How doth", max_tokens=1))
    assert talk(tiny, 10**6).capacity == 1024


def test_a_file_without_a_vocabulary(tmp_path: Path) -> None:
    from tiny_llamas import TINY as HPARAMS
    from tiny_llamas import random_weights, write_gguf

    path = write_gguf(tmp_path / "bare.gguf", random_weights(HPARAMS), HPARAMS)
    with pytest.raises(UnsupportedError, match=r"bare.gguf: it has no vocabulary to talk with$"):
        open_chat(path, Sampler())
