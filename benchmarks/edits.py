"""Faults that no entry of the catalogue describes, one edited operation each: is one acquitted, or given a wrong cause?

Run as `PYTHONPATH=tests:benchmarks python benchmarks/edits.py [-n 200] [--from 0] [--budget 20] [--arch NAME,…]`, with `--further`,
`--rare`, `--tiles` or `--structural`.
Every case is drawn by its seed: an architecture of `ARCHITECTURES` or a qwen2 or llama of random shape; a random prompt; one operation,
edited in one layer, from one layer on, or in all; the dump: 10, 16 or all values per row, with or without a sketch, the default points or
all, F32 stated or not.

An edit (`benchmarks/random_edits.py`) changes the operation's result or one operand:
scales it (0.5 % to 2 times), shifts it, rolls or permutes it, exchanges two
elements, negates one, sets one or all after it to zero, or takes another position; or it takes another value of that shape as operand. As
often it exchanges two heads, gives an expert the weights of another, halves a bias, takes the next layer's weight or scales by 1.002.
With `--further` it is one of `FURTHER`: elements of two heads exchanged, one position stale, a product summed in F16 in blocks of 32, a
clamp, absolute values, everything behind an element one place on, a head of zeros, the mean over positions subtracted, powers of 2 for
exp, the first position's values at all, a value of the layer before, a bias added twice. With `--rare` it is one of `RARE`
(`benchmarks/rare_edits.py`): a part of an operand, a weight, a table; with `--tiles` one of `TILES` (`benchmarks/tile_edits.py`); with
`--structural` one of `STRUCTURAL` (`benchmarks/structural_edits.py`): another group, another layer's value, another axis, one term less.

`acquitted`: the answer is "no fault" though a recorded value differs by more than the answer says that passes. `not seen`: nothing is over
a limit, and what the edit changes of the recorded values, planted and measured here, is below the largest limit that the answer tells.
`assumed`: the answer rests on an arithmetic that nothing states, and the edit changes its result by no more than the answer says that this
hides. `wrong cause`: it names a fault that does not reproduce the engine's numbers, in whole rows, at every recorded point (up to the place
that the answer leaves unexplained, if it leaves one). `located`: the first place is the first recorded point that the edit changes, and the
edited operation, the first whose result the edit changes, is among those suspected; `at the operation`: it is the only one suspected, or
its record is, where nothing reads the result. `unseen`: not all of a row was recorded, the first place lies behind the edited operation,
and the answer says that it is not sure of it. `elsewhere`: any other place.
"""

import argparse
import random
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from explain_precision import random_model
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from random_edits import FAULTS, FURTHER, PARTS, WAYS, Edit, drawn, replay
from rare_edits import RARE
from structural_edits import STRUCTURAL
from tile_edits import TILES

from checkpoints.answers.explain import Cause, Explanation
from checkpoints.points import LOGITS
from checkpoints.record import Dump
from engine.faults import SEEN, plant
from engine.graph import Step
from engine.replay.wide import coarse_points
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.measured.slices import SLICE_FLOOR
from parity.explain.explain import ExplainOptions, explain
from parity.explain.findings.known_to import KNOWN_TO
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

SLICES = (10, 16, 1 << 20)
# How far a named fault's numbers may lie from the edited engine's, NMSE at every point: both are computed here, in float32.
SAME = 1e-9
# ggml's table of GELU makes 2.3e-9 of 1e-11 (--from 195024); where the number was wrong in the fourth digit its steps made 3.1e-7 (190063).
SAME_BEHIND_TABLES = 1e-7
ROUGHLY = 10.0  # values that were not recorded are further off than those to which a number was fitted
SKETCHED = 2.0  # a sketch estimates a squared distance with a relative deviation of a quarter: four of them
ARCHITECTURES = (
    *("qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "granite", "deepseek2", "lfm2", "mamba", "qwen35", "gpt2", "starcoder2"),
    *("gpt-oss", "falcon", "olmo2", "command-r", "glm4", "stablelm", "mixtral", "cohere2"),
)


def same_numbers(faulty: Faulty, edit: Edit, causes: Sequence[Cause], tokens: tuple[int, ...], points: Sequence[str]) -> bool:
    """Whether an engine with the named faults computes what the edited one computes, at these points: a number that is said to be known
    roughly, as nearly as the answer says that it fits.
    """
    other, coarse = list(faulty.right), coarse_points(faulty.right)
    rough = max((ROUGHLY * cause.nmse for cause in causes if KNOWN_TO in cause.named.sentence), default=0.0)
    for cause in (cause.named for cause in causes):
        # A model's own multiplier and a fitted one share a name; their parameters tell which.
        fault = next(
            (fault for fault in FAULTS if fault.name == cause.fault and fault.parameters.keys() >= cause.parameters.keys()),
            None,
        )
        if fault is None:
            return False
        other = plant(other, fault, cause.layers, **cause.parameters)
    first, second = replay(faulty, edit.steps, tokens).values, replay(faulty, other, tokens).values
    with np.errstate(all="ignore"):
        for point in points:
            a, b = (np.asarray(run[run_name(run, point)], dtype=np.float64) for run in (first, second))
            most = max(rough, SAME_BEHIND_TABLES if point in coarse else SAME)
            if not ((a - b) ** 2).sum() <= most * (a**2).sum():
                return False
    return True


def run_name(values: Any, point: str) -> str:
    """What a dump shows for a point: another step's value where the capture is wrong."""
    return SEEN + point if SEEN + point in values else point


def is_below(answer: Explanation, dump: Dump, right: Dump) -> bool:
    """Whether what an edited engine's dump changes of the right one's is within the limits that the answer tells."""
    for point, rows in dump.points.items():
        ours, ref = rows.values.astype(np.float64), right.points[point].values.astype(np.float64)
        if ours.shape != ref.shape or not np.array_equal(np.isfinite(ours), np.isfinite(ref)):
            return False
        known = np.isfinite(ref)
        apart = np.square(np.where(known, ours, 0.0) - np.where(known, ref, 0.0)).sum(axis=1)
        energy = np.square(np.where(known, ref, 0.0)).sum(axis=1)
        if "l2" in rows.stats:  # the whole row's, in proportion to what was recorded
            share = SLICE_FLOOR * ours.shape[1] / right.points[point].stats["n"]
            energy = np.maximum(energy, share * np.square(right.points[point].stats["l2"]))
        if bool((apart > answer.passes[point == LOGITS] * energy).any()):
            return False
        if rows.sketch is not None and right.points[point].sketch is not None:
            estimate = np.square(np.asarray(rows.sketch, np.float64) - right.points[point].sketch).mean(axis=1)
            if bool((estimate > SKETCHED * answer.passes[point == LOGITS] * np.square(right.points[point].stats["l2"])).any()):
                return False
    return True


def is_told(answer: Explanation, faulty: Faulty, edit: Edit, tokens: tuple[int, ...]) -> bool:
    """Whether the answer says that a change as large as the edit's of its own result passes."""
    right, edited = (
        np.asarray(replay(faulty, steps, tokens).values[edit.first], dtype=np.float64) for steps in (faulty.right, edit.steps)
    )
    part = dict(answer.hides).get(edit.first, 0.0)
    return right.shape == edited.shape and bool(np.square(edited - right).sum() <= part**2 * np.square(right).sum())


def outcome(
    answer: Explanation, faulty: Faulty, edit: Edit, tokens: tuple[int, ...], points: Sequence[str], dump: Dump, right: Dump
) -> str:
    """How the answer counts: one of the outcomes that the module's docstring explains; `right` is the unedited engine's dump."""
    if answer.first is None and not answer.precision_only:
        return "not seen" if is_below(answer, dump, right) else "acquitted"
    if answer:
        return "assumed" if answer.precision_assumed and is_told(answer, faulty, edit, tokens) else "acquitted"
    if answer.causes:
        if answer.remaining is not None:
            points = points[: points.index(answer.remaining.checkpoint)]
        return "named" if same_numbers(faulty, edit, answer.causes, tokens, points) else "wrong cause"
    begins = begin_of(faulty, edit, tokens)
    if any(suspect.checkpoint == begins for suspect in answer.suspects) and is_read_by_none(faulty, begins):
        return "at the operation"
    if answer.placed is None or answer.first is None:
        return "elsewhere"
    if begins not in answer.placed.operations:
        return "elsewhere" if answer.placed.sure else "unseen"
    return "at the operation" if len(answer.placed.operations) == 1 else "located"


def begin_of(faulty: Faulty, edit: Edit, tokens: tuple[int, ...]) -> str:
    """The first operation whose result an edit changes: experts that no token chose have no other result."""
    right, edited = replay(faulty, faulty.right, tokens).values, replay(faulty, edit.steps, tokens).values
    changed = (step.makes for step in faulty.right if not np.array_equal(right[step.makes], edited[step.makes], equal_nan=True))
    return next(changed, edit.first)


def is_read_by_none(faulty: Faulty, name: str) -> bool:
    """Whether no operation reads this result: then a wrong one is a wrong record, and nothing else."""
    return not any(name in step.names for step in faulty.right)


def sentence(answer: Explanation) -> str:
    """An answer in one line."""
    causes = [
        f"{cause.named.fault} {cause.named.parameters} {cause.named.layers} {cause.explained:.2f}" for cause in answer.causes
    ]
    place = f"{answer.first.checkpoint} {answer.first.token_idx} {answer.first.nmse:.1e}" if answer.first is not None else "-"
    leads = [f"{lead.sentence[:70]}{'' if lead.removed is None else f' {lead.removed:.2f}'}" for lead in answer.leads]
    where = "" if answer.placed is None else f"of {len(answer.placed.operations)}{', sure' if answer.placed.sure else ''}"
    return f"{place} {answer.precision_only}{answer.looks_like} {causes} law: {answer.law}; {where} {leads}"


class Models:
    """The engines of small models, each made once."""

    def __init__(self, folder: Path, reference: Reference, architectures: Sequence[str]) -> None:
        self._folder = folder
        self._reference = reference
        self._names = architectures
        self._engines: dict[str, Faulty] = {}

    def of(self, seed: int, draw: random.Random) -> tuple[str, Faulty, tuple[int, ...]]:
        """An architecture's name, its engine, and a prompt."""
        if seed % 7 == 0 and self._names == ARCHITECTURES:
            faulty, tokens = random_model(self._folder, seed)
            return faulty.transformer.model.hyperparameters.architecture, faulty, tokens[:12]
        name = self._names[seed % len(self._names)]
        if name not in self._engines:
            path = self._folder / f"{name}.gguf"
            make_by_recipe(path, RECIPES[name], shape_of(RECIPES[name]), {}, tokenizer=embedded())
            self._engines[name] = Faulty(path, self._reference.graph(path))
        return name, self._engines[name], tokens_of(self._engines[name].model, draw.randrange(4, 12), seed)


def dump_of(
    faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...], points: str, size: int, bare: bool, stated: bool
) -> Dump:
    """The dump of an engine that runs these steps."""
    dump = faulty.dump(Planted(()), tokens, points=points, size=size, bare=bare, steps=steps)
    if dump.header is not None and not stated:
        dump = replace(dump, header=replace(dump.header, compute=""))
    return dump


def cases(models: Models, seeds: range, budget: float, ways: Sequence[str]) -> Iterator[tuple[str, str, str, float]]:
    """Every case's edit, points, outcome and seconds; each is printed when it is done."""
    for seed in seeds:
        draw = random.Random(seed)
        name, faulty, tokens = models.of(seed, draw)
        edit = drawn(faulty, tokens, draw, ways)
        points, size = draw.choice(["default", "*"]), draw.choice(SLICES)
        bare, stated = draw.random() < 0.5, draw.random() < 0.5
        dump = dump_of(faulty, edit.steps, tokens, points, size, bare, stated)
        began = perf_counter()
        answer = explain(dump, faulty.model, ExplainOptions(budget=budget))
        spent = perf_counter() - began
        recorded = [step.makes for step in faulty.right if step.makes in dump.points]
        right = dump_of(faulty, faulty.right, tokens, points, size, bare, stated)
        outcome_name = outcome(answer, faulty, edit, tokens, recorded, dump, right)
        shape = f"{points}, {size if size < 1 << 20 else 'all'}{'' if bare else ', sketch'}{', f32' if stated else ''}"
        print(f"seed {seed} {name}: {edit.what} ({shape}): {outcome_name}, {spent:.1f} s; {sentence(answer)}", flush=True)
        yield edit.how, points, outcome_name, spent


def table(measured: Sequence[tuple[str, str, str, float]]) -> str:
    """Outcomes by edit, and the times."""
    words = ("named", "at the operation", "located", "unseen", "elsewhere", "not seen", "assumed", "acquitted", "wrong cause")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for how, points, outcome_name, _ in measured:
        for row in (how, "default points" if points == "default" else "all points", "all"):
            counts[row][outcome_name] += 1
    lines = [f"| edit | {' | '.join(words)} |", f"|---|{'---|' * len(words)}"]
    lines += [
        f"| {row} | {' | '.join(str(counts[row][word]) for word in words)} |"
        for row in (*WAYS, *PARTS, *FURTHER, *RARE, *TILES, *STRUCTURAL, *list(counts))
        if row in counts
    ]
    times = sorted(spent for *_, spent in measured)
    return "\n".join([*dict.fromkeys(lines), f"median {statistics.median(times):.1f} s, slowest {times[-1]:.1f} s"])


def main() -> None:
    """Print the cases and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--budget", type=float, default=20.0)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES))
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--further", dest="ways", action="store_const", const=FURTHER)
    kinds.add_argument("--rare", dest="ways", action="store_const", const=RARE, default=())
    kinds.add_argument("--tiles", dest="ways", action="store_const", const=TILES)
    kinds.add_argument("--structural", dest="ways", action="store_const", const=STRUCTURAL)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        models = Models(Path(folder), reference, tuple(options.arch.split(",")))
        measured = list(cases(models, range(options.first, options.first + options.n), options.budget, options.ways or ()))
    print(table(measured))


if __name__ == "__main__":
    main()
