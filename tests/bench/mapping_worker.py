"""One process of mapping.py: loads a model, generates, and prints what that took as one line of JSON.

    python tests/bench/mapping_worker.py MODEL map|read N_TOKENS [wait]

map: as `llamatools run` does. read: every tensor into memory of the process's own, as loaders did before 2023.
wait: stays as it is after that, until a line comes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np  # noqa: F401 - before the first look, as everything that is not the model
from llamatools_runtime import Model, Sampler, generate, load
from llamatools_runtime.load import assemble, check, layer_of
from llamatools_runtime.memory_report import Watch, kinds
from llamatools_runtime.planned import PlannedWeights

import llamatools

PROMPT = [1]  # what it says is nothing that matters here


def read(path: Path) -> tuple[Model, llamatools.Layout]:
    """The model, with every tensor in private memory."""
    layout = llamatools.inspect(path)
    hparams, linear_factor = check(layout)
    weights = dict(PlannedWeights(layout.tensors))
    layers = tuple(layer_of(weights, n) for n in range(hparams.n_layers))
    return assemble(hparams, weights, layers, linear_factor), layout


def main() -> None:
    path, by, n_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    watch = Watch(path)
    model, layout = load(path) if by == "map" else read(path)
    watch(0)
    for n, _ in enumerate(generate(model, PROMPT, Sampler(0.0), max_tokens=n_tokens), 1):
        watch(n)
    facts = {
        "seconds": watch.seconds,
        "stages": {stage: look.as_dict() for stage, look in watch.looks.items()},
        "kinds": [asdict(kind) for kind in kinds(layout, watch.looks)],
    }
    print(json.dumps(facts), flush=True)
    if "wait" in sys.argv:
        sys.stdin.readline()


if __name__ == "__main__":
    main()
