"""Every entry of the catalogue planted into every architecture: it applies or raises `NotApplicable`, and nothing else is raised.

Run as `PYTHONPATH=tests python benchmarks/explain_entries.py [NAME …] [--skip NAME,…]`. Small models are made by recipe. Each
variant of each entry (for fitted numbers, the values that the fit starts from) is planted in all layers and in one, and run. Then
the right engine's own dump of every point is explained: it has no fault. Exit code 1 if an entry raised anything but
`NotApplicable`, or a right engine was accused.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter
from traceback import extract_tb
from typing import Any

import numpy as np
from planted import Faulty, Planted, tokens_of

from checkpoints.errors import ParityError
from engine.faults import CATALOGUE, FITTED, FITTED_PARTS, Fault, Planting
from engine.graph import Step
from engine.halves import decoder_alone, encoder_alone, handed_over
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.explain.explain import ExplainOptions, explain
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

_TOKENS = 6
_VISITED = 60  # values computed after a variant's change, about two layers; each entry's first variant runs to the end


def entries(right: dict[str, Step]) -> Iterator[tuple[Fault, dict[str, Any]]]:
    """Every fault with every variant; fitted numbers have the values that their fit starts from."""
    for fault in CATALOGUE.values():
        for parameters in fault.variants(right):
            yield fault, parameters
    for fit in (*FITTED, *FITTED_PARTS):
        for parameters in fit.variants(right):
            wanted = fit.wanted(right, parameters)
            for start in fit.starts(0.0 if wanted is None else wanted)[:2]:
                yield fit.fault, {fit.parameter: start, **parameters}


def swept(faulty: Faulty, raised: Counter[str]) -> tuple[int, int]:
    """How many variants apply to a model, and how many do not; exceptions of other types are counted in `raised`."""
    tokens = tokens_of(faulty.model, _TOKENS, seed=1)
    transformer, passes = faulty.transformer, [0] * (_TOKENS - 2) + [1, 2]
    computed = transformer.weights, transformer.backend
    if transformer.encoder is None:
        return _swept(Replay(faulty.right, tokens, range(_TOKENS), passes, *computed), faulty.right, raised)
    alone = encoder_alone(transformer.encoder)
    encoder = Replay(alone, tokens, range(_TOKENS), [0] * _TOKENS, *computed)
    given = {name: encoder.values[plain] for name, plain in handed_over(transformer.encoder).items()}
    steps = decoder_alone(transformer.encoder, faulty.right)
    halves = (
        _swept(encoder, alone, raised),
        _swept(Replay(steps, tokens, range(_TOKENS), passes, *computed, None, given), steps, raised),
    )
    return sum(half[0] for half in halves), sum(half[1] for half in halves)


def _swept(right: Replay, steps: Sequence[Step], raised: Counter[str]) -> tuple[int, int]:
    """`swept` for a list of steps of which the right run is given."""
    planting = Planting(steps)
    applied = inapplicable = 0
    seen: set[str] = set()
    for fault, parameters in entries({step.makes: step for step in steps}):
        for layers in (None, (1,)):
            if layers is not None and (fault.once or not planting.has_layers(fault)):
                continue
            last = len(steps) if layers is None and fault.name not in seen else _VISITED
            visits = count()
            try:
                right.run(planting.of(fault, layers, parameters), lambda _name, _value, n=visits, end=last: next(n) < end)
                seen.add(fault.name)
                applied += 1
            except NotApplicable:
                inapplicable += 1
            except Exception as error:  # what the benchmark looks for
                at = extract_tb(error.__traceback__)[-1]
                raised[f"{fault.name}: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"] += 1
    return applied, inapplicable


def main() -> None:
    """Sweep and print, architecture by architecture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="recipes; all without")
    parser.add_argument("--skip", default="", help="recipes that are left out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bad = 0
    with tempfile.TemporaryDirectory() as folder, Reference() as reference, np.errstate(all="ignore"):
        for name in options.names or RECIPES:
            if name in options.skip.split(","):
                continue
            began = perf_counter()
            model = Path(folder) / f"{name}.gguf"
            chosen = RECIPES[name]
            raised: Counter[str] = Counter()
            try:
                make_by_recipe(model, chosen, shape_of(chosen), {}, tokenizer=embedded())
                faulty = Faulty(model, reference.graph(model))
            except ParityError as error:
                print(f"{name}: refused: {error.message}", flush=True)
                continue
            applied, inapplicable = swept(faulty, raised)
            tokens = tokens_of(model, _TOKENS, seed=2)
            answer = explain(faulty.dump(Planted(()), tokens, points="all"), model, ExplainOptions(tokens=tokens, budget=2.0))
            accused = "" if answer and not answer.differing else f"; THE RIGHT ENGINE IS ACCUSED at {answer.first}"
            bad += len(raised) + bool(accused)
            seconds = perf_counter() - began
            print(f"{name}: {applied} applied, {inapplicable} not applicable{accused}, {seconds:.1f} s", flush=True)
            for what, times in raised.items():
                print(f"   {times} × {what}", flush=True)
            model.unlink()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
