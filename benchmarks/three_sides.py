"""Three sides, of which one or two are wrong: does `parity diff A B C` ever blame the right one?

Run as `PYTHONPATH=tests:benchmarks python benchmarks/three_sides.py [-n 20] [--from 0]`. A comparison takes the next of `ARCHITECTURES`
and of five kinds, by its number: one wrong side, two that have the same fault, two that have different ones, a side in F16 that says so,
one that does not. The right sides are llama.cpp and our engine; the wrong ones are our engine with a random edit of one operation
(`random_edits.py`). Which side is where is drawn, and so are points, values per row, and whether wrong sides write bare lines.

*blamed* are the sides that the answer calls alone (without a model: two that are wrong alike outvote the right one, which is said of
votes, not of truth, and counted as `outvoted`) or wrong (with it).
"""

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from edits import dump_of
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from random_edits import drawn

from checkpoints.answers.three_way import ThreeWay
from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.record import Dump
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options
from parity.diff.three_way import compare_three
from parity.explain.on_model import three_on
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

ARCHITECTURES = ("qwen3", "gpt2", "mamba2", "qwen3moe", "phi3", "bloom", "lfm2", "olmo2")
KINDS = ("one wrong", "two alike", "two different", "F16 stated", "F16 unstated")


def sides_of(kind: str, faulty: Faulty, right: Dump, tokens: tuple[int, ...], draw: random.Random) -> list[tuple[Dump, bool]]:
    """Three dumps, and whether each is right."""
    points, size, bare = draw.choice(["default", "*"]), draw.choice([16, 1 << 20]), draw.random() < 0.5

    def edited() -> Dump:
        edit = drawn(faulty, tokens, draw)
        return dump_of(faulty, edit.steps, tokens, points, size, bare, stated=True)

    ours = faulty.dump(Planted(()), tokens, points=points, size=size, bare=False)
    wrong = (edited(), False)
    if kind == "one wrong":
        return [wrong, (ours, True), (right, True)]
    if kind == "two alike":
        return [wrong, wrong, (right, True)]
    if kind == "two different":
        return [wrong, (edited(), False), (right, True)]
    half = faulty.dump(
        Planted(()), tokens, points=points, size=size, bare=False, steps=rounded(faulty.right, "f16", storage=True)
    )
    assert half.header is not None
    half = replace(half, header=replace(half.header, compute="f16" if kind == "F16 stated" else "", source="half"))
    return [(half, True), (ours, True), (right, True)]


def blamed(answer: ThreeWay) -> set[int]:
    """The sides that are called alone or wrong at any point; where float64 was asked, it decides."""
    by_truth = {side for point in answer.points for side in point.wrong}
    known = any(value is not None for point in answer.points for value in point.truth)
    return by_truth if known else {point.alone for point in answer.points if point.differs and point.alone is not None}


def main() -> None:
    """Print each comparison, and the count of outcomes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=20)
    parser.add_argument("--from", dest="first", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        for seed in range(options.first, options.first + options.n):
            draw = random.Random(seed)
            kind, name = KINDS[seed % len(KINDS)], ARCHITECTURES[seed // len(KINDS) % len(ARCHITECTURES)]
            path, out = Path(folder) / f"{name}.gguf", Path(folder) / "ref.jsonl"
            if not path.exists():
                make_by_recipe(path, RECIPES[name], shape_of(RECIPES[name]), {}, tokenizer=embedded())
            faulty, tokens = Faulty(path, reference.graph(path)), tokens_of(path, draw.randrange(4, 10), seed)
            reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None, binary=True))
            sides = sides_of(kind, faulty, load(out), tokens, draw)
            draw.shuffle(sides)
            dumps, right = tuple(dump for dump, _ in sides), {number for number, (_, is_right) in enumerate(sides) if is_right}
            for known in (False, True):
                try:
                    with np.errstate(all="ignore"):
                        answer = three_on(dumps, Options(), path) if known else compare_three(dumps)  # type: ignore[arg-type]
                except ParityError as error:
                    outcome, found = f"refused: {error}", set[int]()
                else:
                    found = blamed(answer)
                    outcome = (
                        ("outvoted" if kind == "two alike" and not known else "RIGHT ONE BLAMED")
                        if found & right
                        else "agree"
                        if answer
                        else "wrong ones named"
                        if len(right) < 3 and found == {0, 1, 2} - right
                        else "undecided"
                    )
                where = "with the model" if known else "without"
                counts[f"{where}, {kind}: {outcome}"] += 1
                print(f"{seed} {name}, {kind}, {where}: {outcome}, blamed {sorted(found)}, right {sorted(right)}", flush=True)
    print(*(f"{count:3} {what}" for what, count in sorted(counts.items())), sep="\n")


if __name__ == "__main__":
    main()
