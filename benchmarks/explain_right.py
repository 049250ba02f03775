"""Right engines in every arithmetic: is anybody accused, or called exact that is not?

Run as `PYTHONPATH=tests:benchmarks python benchmarks/explain_right.py [-n 30] [--from 0] [--budget 60]`. Models of random shape, weights
and type (every fifth one is the embedded model), random prompts, slices of 10, 16 or all values, with and without a sketch, the default
points or all.

Engines without a fault in F32 (another order of sums), F16, BF16, TF32 and 8-bit arithmetic. `accused` is an answer with a
cause or a place; `called exact` says that a lower arithmetic agrees "with the right engine" without naming it.
"""

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path

from edits import SLICES, dump_of, sentence
from explain_precision import ARITHMETIC, random_model
from planted import Faulty, tokens_of

from parity.explain.explain import ExplainOptions, explain
from parity.models import embedded as default_model


def a_case(folder: Path, seed: int) -> tuple[Faulty, tuple[int, ...], random.Random]:
    """A model, a prompt, and what draws the rest."""
    draw = random.Random(seed)
    if seed % 5 == 0:
        faulty = Faulty(default_model.path())
        return faulty, tokens_of(faulty.model, draw.randrange(4, 16), seed), draw
    faulty, tokens = random_model(folder, seed)
    return faulty, tokens, draw


def right_engines(folder: Path, seeds: range, budget: float) -> None:
    """Print what right engines in each arithmetic are told."""
    reported: Counter[str] = Counter()
    for seed in seeds:
        faulty, tokens, draw = a_case(folder, seed)
        for name, (kind, arithmetic) in ARITHMETIC.items():
            points, size, bare = draw.choice(["default", "*"]), draw.choice(SLICES), draw.random() < 0.5
            dump = dump_of(faulty, arithmetic(faulty.right), tokens, points, size, bare, stated=False)
            answer = explain(dump, faulty.model, ExplainOptions(budget=budget))
            exact = answer.first is None and not answer.precision_only
            outcome = ("called exact" if kind else "right") if exact else "right" if answer else "accused"
            reported[outcome] += 1
            if outcome != "right":
                print(f"seed {seed}, {name} ({points}, {size}, {bare}): {outcome}; {sentence(answer)}", flush=True)
    print(dict(reported))


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=30)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        right_engines(Path(folder), range(options.first, options.first + options.n), options.budget)


if __name__ == "__main__":
    main()
