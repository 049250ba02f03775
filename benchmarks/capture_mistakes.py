"""Mistakes of a recorder in right and in wrong engines: is a right engine blamed, or a wrong one acquitted?

Run as `PYTHONPATH=tests:benchmarks python benchmarks/capture_mistakes.py [--arch NAME,…] [--seed 0]`. Ten mistakes (`MISTAKES`) are made
in the dump of a right engine and in that of one with a random edit of one operation (`random_edits.py`) which shows in `logits`: sixteen
values per row, every point, bare lines. Then `lint`, and `diff` with lint's findings put aside.

A right engine is *told* if lint has a finding or diff says that a record alone is wrong, *seen* if diff sees a difference, *blamed* if diff
names an operation and lint says nothing, *unseen* if nobody sees any difference. A wrong engine is *acquitted* if lint says nothing and
diff says parity.
"""

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from random_edits import drawn

from checkpoints.formats import load
from checkpoints.points import LOGITS, parse
from checkpoints.record import Dump, Rows
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.explain.on_model import compared_on
from parity.lint.lint import lint
from parity.lint.model_facts import ModelFacts
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

ARCHITECTURES = ("qwen3", "gpt2", "mamba2", "qwen3moe", "phi3")
Points = Mapping[str, Rows]


def _taken(rows: Rows, of: Rows) -> Rows:
    """Another point's values under this name."""
    return replace(of, point=rows.point)


def _outputs(points: Points) -> list[str]:
    return [name for name in points if parse(name).kind == "l_out"]


def swapped_buffers(points: Points, _: Points) -> dict[str, Rows]:
    """Two buffers that swap each layer, read at the end of the pass."""
    outputs = _outputs(points)
    return {name: _taken(points[name], points[outputs[-1 - (len(outputs) - 1 - n) % 2]]) for n, name in enumerate(outputs)}


def stale_pointer(points: Points, _: Points) -> dict[str, Rows]:
    """A layer's output is still the one before."""
    outputs = _outputs(points)
    return {outputs[2]: _taken(points[outputs[2]], points[outputs[1]])}


def last_row_only(points: Points, _: Points) -> dict[str, Rows]:
    """Every position has the last one's row."""
    name = _outputs(points)[1]
    rows = points[name]
    return {name: replace(rows, values=np.repeat(rows.values[-1:], len(rows), axis=0))}


def one_layer_for_all(points: Points, _: Points) -> dict[str, Rows]:
    """Every layer's output is layer 0's."""
    outputs = _outputs(points)
    return {name: _taken(points[name], points[outputs[0]]) for name in outputs[1:]}


def transposed(points: Points, _: Points) -> dict[str, Rows]:
    """A matrix [T, n] read as [n, T]."""
    name = _outputs(points)[1]
    rows = points[name]
    return {name: replace(rows, values=rows.values.T.reshape(rows.values.shape).copy())}


def half_written(points: Points, _: Points) -> dict[str, Rows]:
    """The second half of each row was not yet there."""
    name = _outputs(points)[1]
    values = points[name].values.copy()
    values[:, values.shape[1] // 2 :] = 0
    return {name: replace(points[name], values=values)}


def next_moment(points: Points, _: Points) -> dict[str, Rows]:
    """What the buffer holds one operation later."""
    name = _outputs(points)[1]
    order = [other for other in points if points[other].values.shape == points[name].values.shape]
    return {name: _taken(points[name], points[order[order.index(name) + 1]])}


def prompt_before(points: Points, other: Points) -> dict[str, Rows]:
    """A layer's records are those of the prompt before."""
    return {name: other[name] for name in points if parse(name).layer == 1}


def padded_rows(points: Points, _: Points) -> dict[str, Rows]:
    """Rows are padded to 16 more elements than are taken: each begins later than the one before."""
    name = _outputs(points)[1]
    rows = points[name]
    flat = np.concatenate([np.concatenate([row, np.zeros(3, np.float32)]) for row in rows.values])
    return {name: replace(rows, values=flat[: rows.values.size].reshape(rows.values.shape))}


def names_exchanged(points: Points, _: Points) -> dict[str, Rows]:
    """Two points have each other's names."""
    first, second = _outputs(points)[1:3]
    return {first: _taken(points[first], points[second]), second: _taken(points[second], points[first])}


MISTAKES: tuple[Callable[[Points, Points], dict[str, Rows]], ...] = (
    *(swapped_buffers, stale_pointer, last_row_only, one_layer_for_all, transposed),
    *(half_written, next_moment, prompt_before, padded_rows, names_exchanged),
)


def outcome(ours: Dump, ref: Dump, faulty: Faulty, right: bool, known: bool) -> tuple[str, str]:
    """How the answers count, and what they say."""
    findings = [finding.rule for finding in lint(ours, ModelFacts(faulty.transformer.model)).findings]
    options = Options(compute="f32")
    verdict = compared_on(ours, ref, options, faulty.model).verdict if known else compare(ours, ref, options)
    pattern = "" if verdict.pattern is None else verdict.pattern.code
    said = f"lint {findings}, diff {pattern or bool(verdict)} {verdict.operation} {[fault.kind for fault in verdict.record_faults[:2]]}"
    agrees = verdict.first_divergence is None and not verdict.record_faults
    if not right:
        return "acquitted" if agrees and not findings else "not acquitted", said
    if findings or verdict.record_faults or pattern in ("other-record", "before-rope", "same-vector", "order"):
        return "told", said
    return ("unseen" if agrees else "blamed" if verdict.operation else "seen"), said


def main() -> None:
    """Print each dump's outcome, and their counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default=",".join(ARCHITECTURES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        for number, name in enumerate(options.arch.split(",")):
            draw = random.Random(options.seed + number)
            path, out = Path(folder) / f"{name}.gguf", Path(folder) / "ref.jsonl"
            make_by_recipe(path, RECIPES[name], shape_of(RECIPES[name]), {}, tokenizer=embedded())
            faulty, tokens = Faulty(path, reference.graph(path)), tokens_of(path, 8, options.seed)
            reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None, binary=True))
            ref, before = load(out), faulty.dump(Planted(()), tokens_of(path, 8, options.seed + 1), points="*").points
            right = faulty.dump(Planted(()), tokens, points="*")
            while True:
                wrong = faulty.dump(Planted(()), tokens, points="*", steps=drawn(faulty, tokens, draw).steps)
                difference = wrong.points[LOGITS].values - right.points[LOGITS].values
                if (
                    np.isfinite(difference).all()
                    and np.abs(difference).max() > 1e-3 * np.abs(right.points[LOGITS].values).max()
                ):
                    break
            for mistake in MISTAKES:
                for engine, is_right in ((right, True), (wrong, False)):
                    changed = mistake(engine.points, before)
                    ours = replace(engine, header=None, points={**engine.points, **changed})
                    for known in (False, True):
                        with np.errstate(all="ignore"):
                            counted, said = outcome(ours, ref, faulty, is_right, known)
                        where = f"{'right' if is_right else 'wrong'} engine, {'with the model' if known else 'without'}"
                        counts[f"{where}: {counted}"] += 1
                        print(f"{name}, {mistake.__name__}, {where}: {counted}; {said}", flush=True)
    print(*(f"{count:3} {what}" for what, count in sorted(counts.items())), sep="\n")


if __name__ == "__main__":
    main()
