"""The page shows what was measured, to scale, and nothing that a file's name could smuggle in."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from llamatools_runtime.quality import Quality
from llamatools_runtime.quality_page import BARS, Names, page, write_page
from llamatools_runtime.scoring import Scores

from llamatools.errors import UsageError

N_CHUNKS, CONTEXT = 8, 64
NAMES = Names("small.gguf", "text.txt", "large.gguf")


def measured(divergence=None, n_chunks=N_CHUNKS):
    draws, n = np.random.default_rng(0), n_chunks * (CONTEXT // 2 - 1)
    base = draws.exponential(3.0, n)
    own = base + draws.normal(0.2, 0.3, n)
    if divergence is None:
        divergence = np.exp(draws.normal(-2, 1, n))
    return Quality(CONTEXT, n_chunks, own, Scores(own, base, divergence, draws.random(n) < 0.8))


def drawings(text):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]


def test_every_token_is_in_the_histogram():
    quality = measured()
    _, histogram = drawings(page(quality, NAMES))
    bars = list(histogram.iter("rect"))
    counts = [int(bar.find("title").text.split()[-2]) for bar in bars]
    assert sum(counts) == len(quality.surprise)
    heights = [float(bar.get("height")) / count for bar, count in zip(bars, counts, strict=True)]
    assert heights == pytest.approx([heights[0]] * len(heights), rel=0.05)
    for bar, count in zip(bars, counts, strict=True):
        low, high = (float(part) for part in re.findall(r"[\d.e+-]+", bar.find("title").text)[:2])
        inside = (quality.scores.divergence >= 0.97 * low) & (quality.scores.divergence <= 1.03 * high)
        assert inside.sum() >= count


def test_curves_are_to_scale():
    quality = measured()
    curves, _ = drawings(page(quality, NAMES))
    at = {float(text.text): float(text.get("y")) - 4 for text in curves.iter("text") if text.get("text-anchor") == "end"
          and re.fullmatch(r"[\d.]+", text.text)}  # fmt: skip
    (low, low_y), *_, (high, high_y) = sorted(at.items())
    dots = [dot for dot in curves.iter("circle") if dot.get("class") == "dot model"]
    assert len(dots) == N_CHUNKS
    for dot, estimate in zip(dots, quality.running_perplexity, strict=True):
        value = low + (float(dot.get("cy")) - low_y) / (high_y - low_y) * (high - low)
        assert value == pytest.approx(estimate.value, abs=0.005 * (high - low))
    names = [text.text for text in curves.iter("text") if text.get("class") == "name"]
    assert names == ["the model", "the other"]


def test_figures_are_those_of_the_lines():
    quality = measured()
    text = page(quality, NAMES)
    for figure in re.findall(r"[\d.]+ ± [\d.]+", "\n".join(quality.lines())):
        assert figure in text
    assert "against large.gguf" in text


def test_a_model_alone_has_one_drawing():
    text = page(Quality(CONTEXT, 2, np.ones(62)), Names("a.gguf", "b.txt"))
    assert len(drawings(text)) == 1
    assert "KL" not in text
    assert "against" not in text


def test_nothing_comes_from_elsewhere_and_names_are_text():
    text = page(measured(), Names("<script>alert(1)</script>", 'a"&b\x1b.txt', "<img src=x>"))
    assert "default-src 'none'" in text
    tags: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: (
        tags.add(tag)
        or [  # type: ignore[method-assign]
            pytest.fail(f"{tag} {name}") for name, _ in attributes if name in ("src", "href", "onload")
        ]
    )
    parser.feed(text)
    assert not tags & {"script", "img", "link", "iframe"}
    assert "&quot;&amp;b\\x1b.txt" in text
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("divergence", [np.zeros(248), np.full(248, 1e-9), np.full(248, 0.1)])
def test_divergences_that_are_all_alike(divergence):
    _, histogram = drawings(page(measured(divergence), NAMES))
    assert len(list(histogram.iter("rect"))) == 1
    assert "nan" not in ElementTree.tostring(histogram, "unicode")


def test_many_chunks_are_a_line_without_dots():
    curves, histogram = drawings(page(measured(n_chunks=150), NAMES))
    assert not list(curves.iter("circle"))
    assert len(list(histogram.iter("rect"))) <= BARS


def test_a_page_is_not_written_over(tmp_path):
    write_page(measured(), NAMES, tmp_path / "q.html")
    assert (tmp_path / "q.html").read_text("utf-8") == page(measured(), NAMES)
    with pytest.raises(UsageError, match=r"q\.html: exists already"):
        write_page(measured(), NAMES, tmp_path / "q.html")
    write_page(measured(), NAMES, tmp_path / "q.html", force=True)
