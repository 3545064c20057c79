"""The bundled model in every recipe: llama-quantize's bytes, and in llama.cpp the words that `run` says."""

from __future__ import annotations

from pathlib import Path

import llamacpp
import pytest
from imatrix_files import write_imatrix
from quantizing import TINY_LLAMA, columns_of, digest

import llamatools
from llamatools import MetaOptions, Overrides, QuantizeOptions, reports

# Of the files that llama-quantize (b11434, x86-64) makes of the same GGUF; without and with the same imatrix.
FROZEN = {
    "q4_0": "79a69a2ad671682bb4d60983ba4ad791080d85afc93cbed00b25fe10f9ad58b4",
    "q4_1": "4a6ab7a52a8852381952df76f024545d3cb44fb7837e1233b0bc267fc7d2b1ae",
    "q5_0": "63ecf55173a2b273d775436e94295cb5e7fea9184a5b1c1f23c71163df5c992c",
    "q5_1": "7359a30de47172d27ae98622a8183dd48e2a7ff1b60b5b1661557e8c6464570f",
    "q8_0": "30c7e770d3bbca314ba357bb51ab1e49f141275b757e868cba697ad425be1b84",
    "q4_k_s": "5349a6c8eb9fece4cfaf4ffabd77c9a214aae236d89eaac75a3f3f8ff86e9032",
    "q4_k_m": "562c4193f88fcae7f2296e63e86abae8da3fb118b6100cbfc4668558a6b0c204",
    "q5_k_s": "92e3229922cf59b5a1741579fcd63a27022890c34ded2f0009718d195d378016",
    "q5_k_m": "896eeae60dbe20081f99a90edbbe0801cb806b76eb5fc9d9d2093d158c9d3a97",
    "q6_k": "44cb76ae9b7271d2a0af2c2fa39ef8daec6670912adf95e80a5d476e390bb59f",
    "iq4_nl": "1529002c8ac4e7dc7d0a583af8b5b3bd74f963014d2305b309cc7994ed279d31",
    "iq4_xs": "41fecdf92689fd5dd3a889e01c92cd7a87f86c330b7c362846abdfc55244bb2e",
}
FROZEN_WEIGHTED = {
    "q4_0": "c28b22f36a12d4284ed361af8cc49dc6ec2a35395f36cace6ce12cfc1624c649",
    "q4_1": "9ef6592ea441e76c75ead02c03e575b63991a498ca0b81df35eed8035d6f0701",
    "q5_0": "ea9b4e200fbf5b627b95a4d5de6cb9bb592f72cd8a958cb15a9355495bdaee53",
    "q5_1": "249e6cbe4b267218f40c40184038a9b100a32c17b315595853fce250787ca61a",
    "q4_k_s": "7d54b0a393054b08733dafe2a9c7fac8a93e1b99bc132c2dd0c515b69d385c2b",
    "q4_k_m": "52d006347bc2cb70c27af73b9533284d9d445e815fa6d5e79106d1e79d5cc6a4",
    "q5_k_s": "83857788f7940f519dfc476abcd464b946424fd2754aeec73e2f67dfc4f0b17f",
    "q5_k_m": "273a5361c2f0e68fa27f7c5f2bd4eaf5dc2e6d46ff50337dbb53b74cbdae5405",
    "q6_k": "c50a6addb793ec4cd0c0e35b5e2d3df4e535cbae70929dafd149f65a8819c482",
    "iq4_nl": "e096ebcdf7a5aab027c3341fad6b9809fb7bd728df5418da8baad83bb84b8ada",
    "iq4_xs": "52f2cb92f73b5b082fd83799f750f8e8fc8fe752c017e60067cddf8c6a7dbd07",
}


@pytest.mark.parametrize("recipe", FROZEN)
def test_tiny_llama_has_the_bytes_of_llama_quantize(tiny_gguf: Path, tmp_path: Path, recipe: str) -> None:
    llamatools.quantize(tiny_gguf, tmp_path / "q.gguf", recipe)
    assert digest(tmp_path / "q.gguf") == FROZEN[recipe]


@pytest.mark.parametrize("recipe", FROZEN_WEIGHTED)
def test_tiny_llama_has_the_bytes_of_llama_quantize_with_an_imatrix(
    tiny_gguf: Path, tmp_path: Path, recipe: str
) -> None:
    imatrix = write_imatrix(tmp_path / "i.dat", columns_of(tiny_gguf))
    done = llamatools.quantize(tiny_gguf, tmp_path / "q.gguf", recipe, options=QuantizeOptions(imatrix=imatrix))
    assert digest(tmp_path / "q.gguf") == FROZEN_WEIGHTED[recipe]
    assert "imatrix   has no entry for token_embd.weight, output.weight" in reports.lines(done)


def test_the_rules_for_a_checkpoint_are_those_for_its_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    checkpoint = MetaOptions(overrides=Overrides(context=1024))
    asked = QuantizeOptions(tensor_types=["ffn_up=q8_0"], embedding_type="q6_k")
    rules = llamatools.recipe_of(TINY_LLAMA, "q4_k_m", options=asked, checkpoint_options=checkpoint)
    assert rules == llamatools.recipe_of(tiny_gguf, "q4_k_m", options=asked)
    (tmp_path / "recipe").write_text(rules.text())
    for recipe, options in (("q4_k_m", asked), (tmp_path / "recipe", QuantizeOptions())):
        done = llamatools.convert(
            TINY_LLAMA, tmp_path / "q.gguf", dtype=recipe, quantizing=options, options=checkpoint, force=True
        )
        assert done.recipe == rules
    groups_of_4 = {"llama.attention.head_count_kv": "1"}  # for which iq4_nl has other rules
    changed = llamatools.recipe_of(TINY_LLAMA, "iq4_nl", checkpoint_options=checkpoint, settings=groups_of_4)
    assert changed != llamatools.recipe_of(TINY_LLAMA, "iq4_nl", checkpoint_options=checkpoint)


@pytest.mark.parametrize("recipe", FROZEN)
def test_llama_cpp_loads_and_says_what_run_says(tiny_gguf: Path, tmp_path: Path, recipe: str) -> None:
    import llamatools_runtime as runtime

    llamatools.quantize(tiny_gguf, tmp_path / "q.gguf", recipe)
    ours = runtime.run(tmp_path / "q.gguf", "", max_tokens=64)
    with llamacpp.Model(tmp_path / "q.gguf") as model:
        assert list(ours.ids) == model.greedy([model.bos_id], 64)
