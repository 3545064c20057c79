"""Generating text from a GGUF."""

import json
import math

import numpy as np
import pytest
from llamatools_runtime import Sampler, Timing, generate, generation, load, run
from llamatools_runtime.generation import BATCH, TextStream
from llamatools_runtime.kernels.team import team
from tiny_llamas import STORIES, TINY, needs_stories, random_weights, stories, write_gguf

from llamatools import quantize
from llamatools.errors import FormatError, UnsupportedError, UsageError


@pytest.fixture(scope="module")
def stories_gguf(tmp_path_factory):
    weights, hparams = stories()
    path = tmp_path_factory.mktemp("stories") / "stories260k.gguf"
    return write_gguf(path, weights, hparams, tokenizer=STORIES / "tokenizer.model")


@pytest.fixture
def tiny(tmp_path):
    return load(write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY))[0]


@needs_stories
def test_stories260k_says_what_its_author_says_it_says(stories_gguf):
    shown = []
    report = run(stories_gguf, on_text=shown.append)
    assert report.text == "".join(shown) == (STORIES / "expected.txt").read_text().removesuffix("\n")
    assert report.timing.n_prompt == 1
    assert report.timing.n_generated == len(report.ids) == 256
    assert report.timing.ending == "token limit"
    assert all(len(line) <= 80 for line in report.lines())
    assert json.loads(json.dumps(report.as_dict()))["ending"] == "token limit"


@needs_stories
def test_the_story_ends_where_the_model_begins_another(stories_gguf):
    report = run(stories_gguf, max_tokens=500)
    assert report.timing.ending == "end of text"
    assert report.timing.n_generated < 400
    assert report.text.endswith('You are a good friend."')


@needs_stories
def test_text_reads_on_from_the_prompt(stories_gguf):
    expected = (STORIES / "expected.txt").read_text()
    prompt, rest = expected[:27], expected[27:]
    assert rest.startswith(run(stories_gguf, prompt, max_tokens=20).text)


@needs_stories
def test_a_seed_makes_draws_repeatable(stories_gguf):
    texts = [run(stories_gguf, "Lily", temperature=1.0, seed=seed, max_tokens=20).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@needs_stories
@pytest.mark.parametrize("float32", [False, True])
def test_threads_do_not_change_the_text(stories_gguf, tmp_path, float32):
    quantize(stories_gguf, tmp_path / "q.gguf", "q8_0")
    texts = {
        run(tmp_path / "q.gguf", "Lily and Tom went to the", max_tokens=60, threads=threads, float32=float32).ids
        for threads in (1, 2, 3)
    }
    team(2)
    assert len(texts) == 1


@needs_stories
def test_a_prompt_longer_than_the_context_is_refused(stories_gguf):
    with pytest.raises(UsageError, match=r"stories260k\.gguf: a prompt of 1001 tokens, but the model's context is 512"):
        run(stories_gguf, "a" * 1000)


@needs_stories
def test_errors_name_the_file_unless_they_are_the_callers(stories_gguf, tmp_path):
    weights, hparams = stories()
    weights["layers.2.attention.wv.weight"] = weights["layers.2.attention.wv.weight"] * np.float32(np.nan)
    damaged = write_gguf(tmp_path / "m.gguf", weights, hparams, tokenizer=STORIES / "tokenizer.model")
    with pytest.raises(FormatError, match=r"m\.gguf: layer 2: NaN or infinity first appears here, at token 0 of 1"):
        run(damaged)

    extra = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"] * 300}
    unknown = write_gguf(tmp_path / "u.gguf", random_weights(TINY), TINY, extra=extra)
    with pytest.raises(UnsupportedError, match=r"u\.gguf: vocabulary of kind 'bert'"):
        run(unknown)

    def closed(text):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(stories_gguf, on_text=closed)


def test_a_file_without_vocabulary_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY)
    with pytest.raises(UnsupportedError, match=r"m\.gguf: it has no vocabulary to read a prompt with"):
        run(path, "Hello")


def test_generation_stops_where_the_context_is_full(tiny):
    timing = Timing()
    ids = list(generate(tiny, [1] * 120, Sampler(), max_tokens=1000, timing=timing))
    assert len(ids) == 9  # eight more fit into the context of 128, and its last token gives one that does not
    assert timing.ending == "context full"


def test_generation_stops_at_an_end_id_and_at_the_limit(tiny):
    timing = Timing()
    first = list(generate(tiny, [1, 2, 3], Sampler(), max_tokens=5, timing=timing))
    assert len(first) == 5
    assert timing.ending == "token limit"
    end = next(token for token in first if token != first[0])
    stopped = list(generate(tiny, [1, 2, 3], Sampler(), max_tokens=5, end_ids={end}, timing=timing))
    assert stopped == first[: first.index(end)]
    assert timing.ending == "end of text"
    assert list(generate(tiny, [1], Sampler(), max_tokens=0)) == []


def test_a_prompt_of_several_batches_gives_what_one_token_at_a_time_gives(tmp_path, monkeypatch):
    tiny = load(write_gguf(tmp_path / "m.gguf", random_weights(TINY), TINY))[0]
    prompt = np.random.default_rng(0).integers(0, 300, 100).tolist()
    assert len(prompt) < BATCH
    at_once = list(generate(tiny, prompt, Sampler(), max_tokens=10))
    monkeypatch.setattr(generation, "BATCH", 33)
    assert list(generate(tiny, prompt, Sampler(), max_tokens=10)) == at_once


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "an empty prompt. This model's tokenizer begins no text by itself; give it some"),
        ([1] * 129, 5, "a prompt of 129 tokens, but the model's context is 128"),
        ([1], -1, "at most -1 tokens were asked for: it must be 0 or more"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tiny, prompt, max_tokens, message):
    with pytest.raises(UsageError, match=message):
        list(generate(tiny, prompt, Sampler(), max_tokens=max_tokens))


def test_timing_counts_tokens_per_second():
    timing = Timing(n_prompt=10, prompt_seconds=2.0, n_generated=9, generate_seconds=4.0)
    assert (timing.prompt_rate, timing.generate_rate) == (5.0, 2.0)
    assert (Timing().prompt_rate, Timing().generate_rate) == (0.0, 0.0)
    assert not math.isnan(Timing().prompt_rate)


BYTES = dict(enumerate("a 🦙é".encode()))


def decode(ids):
    return bytes(BYTES[i] for i in ids).decode("utf-8", "replace").removeprefix(" ")


def test_a_character_of_several_tokens_is_shown_when_whole():
    stream = TextStream(decode, [])
    assert [stream.push(i) for i in BYTES] == ["a", " ", "", "", "", "🦙", "", "é"]
    assert stream.rest() == ""


def test_a_character_that_stays_incomplete_is_shown_at_the_end():
    stream = TextStream(decode, [0])
    assert [stream.push(2), stream.push(3)] == ["", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"
