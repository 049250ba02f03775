"""Faults that no entry of the catalogue describes, one edited operation each: is one acquitted, or given a wrong cause?

Run as `PYTHONPATH=tests:benchmarks python benchmarks/edits.py [-n 200] [--from 0] [--budget 20] [--arch NAME,…] [--further]`. Every case
is drawn by its seed: an architecture of `ARCHITECTURES` or a qwen2 or llama of random shape; a random prompt; one operation, edited in
one layer, from one layer on, or in all; the dump: 10, 16 or all values a row, with or without a sketch, the default points or all, F32
stated or not.

An edit changes the operation's result or one operand: scales it (0.5 % to 2 times), shifts it, rolls or permutes it, exchanges two
elements, negates one, sets one or all after it to zero, or takes another position; or it takes another value of that shape as operand. As
often it exchanges two heads, gives an expert the weights of another, halves a bias, takes the next layer's weight or scales by 1.002.
With `--further` it is one of `FURTHER`: elements of two heads exchanged, one position stale, a product summed in F16 in blocks of 32, a
clamp, absolute values, everything behind an element one place on, a head of zeros, the mean over positions subtracted, powers of 2 for
exp, the first position's values at all, a value of the layer before, a bias added twice.

`acquitted`: the answer is "no fault" though a recorded value differs. `wrong cause`: it names a fault that does not reproduce the engine's
numbers, in whole rows, at every recorded point (up to the place that the answer leaves unexplained, if it leaves one). `located`: the
first place is the first recorded point that the edit changes, and the edited operation is among those suspected; `at the operation`: it
is the only one suspected. `elsewhere`: any other place.
"""

import argparse
import random
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from explain_precision import random_model
from planted import Faulty, Planted, half_sums, tokens_of

from checkpoints.answers.explain import Explanation, Named
from checkpoints.points import parse
from checkpoints.record import Dump
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, FITTED, SEEN, plant
from engine.graph import Altered, History, Step, WeightSource
from engine.inapplicable import NotApplicable
from engine.lift.node import GgmlOperation
from engine.replay.replay import Replay
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.explain.explain import ExplainOptions, explain
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

SLICES = (10, 16, 1 << 20)
# How far a named fault's numbers may lie from the edited engine's, NMSE at every point: both are computed here, in float32.
SAME = 1e-9
ARCHITECTURES = (
    *("qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "granite", "deepseek2", "lfm2", "mamba", "qwen35", "gpt2", "starcoder2"),
    *("gpt-oss", "falcon", "olmo2", "command-r", "glm4", "stablelm", "mixtral", "cohere2"),
)
WAYS = ("scaled", "shifted", "rolled", "permuted", "exchanged", "negated", "zeroed", "position", "operand")
# Of what an operation reads beside its operands, and of attention's heads: drawn as often as all others together.
PARTS = (
    "heads exchanged",
    "an expert's weights of another",
    "bias halved",
    "weight of the neighbouring layer",
    "scaled by 1.002",
)
_RESULTS = (
    "across heads",
    "one position stale",
    "clamped",
    "absolute",
    "one place on",
    "a head of zeros",
    "mean over positions",
    "first",
)
FURTHER = (*_RESULTS, "summed in F16", "powers of 2", "value of the layer before", "bias twice")
_FAULTS = {**CATALOGUE, **{fit.fault.name: fit.fault for fit in FITTED}}
_INSIDE = ("kq", "kq_soft_max")  # rows behind a mask: what moves elements of them makes values of later positions


@dataclass(frozen=True)
class Edit:
    """One edited operation: the model's steps with the edit, the first edited step, and the kind of edit."""

    steps: list[Step]
    first: str
    how: str
    what: str


def _change(how: str, draw: random.Random) -> Callable[[Array], Array]:
    """The function that edits a value [T, …, n] in this way."""
    by = draw.choice([1 + draw.choice([1, -1]) * draw.uniform(0.005, 0.1), draw.uniform(0.5, 2.0), -1.0, 0.0, 2.0])
    plus = draw.choice([1, -1]) * draw.choice([0.003, 0.01, 0.1])
    seed, by_elements = draw.randrange(1 << 30), draw.choice([1, -1, 2, 8])
    part = draw.random()

    def some(x: Array) -> list[int]:
        return random.Random(seed).sample(range(min(x.shape[-1], 10)), min(x.shape[-1], 2))

    def changed(x: Array) -> Array:
        out = x.copy()
        if how == "exchanged":
            out[..., some(x)] = x[..., some(x)[::-1]]
        elif how == "negated":
            out[..., some(x)[0]] *= x.dtype.type(-1)
        else:
            out[..., some(x)[0] : None if part < 0.5 else some(x)[0] + 1] = 0
        return out

    ways: dict[str, Callable[[Array], Array]] = {
        "scaled": lambda x: x * x.dtype.type(by),
        "shifted": lambda x: x + x.dtype.type(plus),
        "rolled": lambda x: np.roll(x, by_elements, axis=-1),
        "permuted": lambda x: x[..., np.random.default_rng(seed).permutation(x.shape[-1])],
        "position": lambda x: np.roll(x, 1, axis=0),
    }
    return ways.get(how, changed)


def _further_change(how: str, draw: random.Random, heads: int) -> Callable[[Array], Array]:
    """The function that edits a value [T, …, n] in one of the further ways."""
    part, place = draw.random(), draw.randrange(1 << 20)

    def changed(x: Array) -> Array:
        out, count = x.copy(), x.shape[-1]
        if how == "across heads":
            pair = [place % (count // heads), count // heads * (heads - 1) + (place + 3) % (count // heads)]
            out[..., pair] = x[..., pair[::-1]]
        elif how == "one position stale":
            at = 1 + place % (len(x) - 1)
            out[at] = x[at - 1]
        elif how == "clamped":
            largest = x.dtype.type((0.2 + 0.6 * part) * np.abs(x).max())
            np.clip(x, -largest, largest, out=out)
        elif how == "absolute":
            np.abs(x, out=out)
        elif how == "one place on":
            at = place % max(1, min(count - 1, 8))
            out[..., at:-1] = x[..., at + 1 :]
        elif how == "a head of zeros":
            size = count // heads
            out[..., place % heads * size : (place % heads + 1) * size] = 0
        elif how == "mean over positions":
            out -= x.mean(axis=0, keepdims=True)
        else:
            out[:] = x[:1]
        return out

    return changed


def _further_edited(step: Step, how: str, draw: random.Random, right: dict[str, Step]) -> Step | None:
    """The step with one of the further edits; None where it does not apply."""
    point = parse(step.makes)
    if how in _RESULTS:
        scores = right.get(f"blk.{point.layer}.kq")
        heads = 1 if scores is None else int(scores.params.get("kv_heads" if point.kind[:1] in "kv" else "heads", 1))
        of_heads = point.kind in ("q", "k", "v", "q_rope", "k_rope", "q_norm", "k_norm", "kqv_out")
        if (not of_heads or heads < 2) and "head" in how:
            return None
        change = _further_change(how, draw, heads)
        return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))
    if how == "summed in F16":
        return replace(step, op=half_sums) if step.op is ops.linear else None
    if how == "powers of 2":
        scale = step.params.get("scale")
        return replace(step, params={**step.params, "scale": scale * np.log(2)}) if step.op is ops.causal_soft_max else None
    if how == "value of the layer before":
        before = f"blk.{(point.layer or 0) - 1}.{point.kind}"
        return Step(step.makes, np.copy, (before,)) if before in right else None
    bias = step.weights[-1] if len(step.weights) > 1 else None
    if not isinstance(bias, str) or "bias" not in bias:
        return None
    return replace(step, weights=(*step.weights[:-1], Altered(bias, lambda source, name: source.get(name) * 2)))


def _edited(
    step: Step, how: str, draw: random.Random, right: dict[str, Step], shapes: dict[str, tuple[int, ...]]
) -> Step | None:
    """The step with this edit; None if its shapes do not allow it."""
    if how in FURTHER:
        return _further_edited(step, how, draw, right)
    if how in PARTS:
        return _part_edited(step, how, right)
    if how == "operand":
        order = list(right)
        at = draw.randrange(len(step.reads)) if step.reads else 0
        if not step.reads or not isinstance(step.reads[at], str) or step.reads[at] not in shapes:
            return None
        mine = shapes[str(step.reads[at])]
        alike = [
            name
            for name in order[: order.index(step.makes)]
            if shapes.get(name) == mine and name != step.reads[at] and right[name].axis == 0
        ]
        return replace(step, reads=(*step.reads[:at], draw.choice(alike), *step.reads[at + 1 :])) if alike else None
    change = _change(how, draw)
    places = [at for at, read in enumerate(step.reads) if isinstance(read, str) and read in shapes and right[read].axis == 0]
    at = draw.choice(places) if places and draw.random() < 0.5 else -1

    def op(*inputs: Any, **params: Any) -> Array:
        if at < 0:
            return change(step.op(*inputs, **params))
        return step.op(*(change(value) if number == at else value for number, value in enumerate(inputs)), **params)

    return replace(step, op=op)


def _part_edited(step: Step, how: str, right: dict[str, Step]) -> Step | None:
    """The step with an edit of a part: two heads, a weight, a bias."""
    layer, kind = parse(step.makes).layer, parse(step.makes).kind
    if how == "scaled by 1.002":
        return replace(step, op=lambda *inputs, **params: step.op(*inputs, **params) * np.float32(1.002))
    if how == "heads exchanged":
        scores = right.get(f"blk.{layer}.kq")
        heads = 0 if scores is None else int(scores.params.get("kv_heads" if kind[:1] in "kv" else "heads", 0))
        if kind not in ("q", "k", "v", "q_rope", "k_rope", "q_norm", "k_norm", "kqv_out") or heads < 2:
            return None

        def exchanged(x: Array) -> Array:
            shaped = x.reshape(len(x), heads, -1)
            return shaped[:, [1, 0, *range(2, heads)]].reshape(x.shape)

        return replace(step, op=lambda *inputs, **params: exchanged(step.op(*inputs, **params)))
    if how == "bias halved":
        if len(step.weights) < 2 or not isinstance(step.weights[-1], str) or "bias" not in step.weights[-1]:
            return None
        return replace(step, weights=(*step.weights[:-1], Altered(step.weights[-1], lambda source, name: source.get(name) / 2)))
    first = step.weights[0] if step.weights else None
    if not isinstance(first, str):
        return None
    if how == "weight of the neighbouring layer":
        other = first.replace(f"blk.{layer}.", f"blk.{(layer or 0) + 1}.")
        known = any(other in step.weights for step in right.values())
        return replace(step, weights=(other, *step.weights[1:])) if layer is not None and known and other != first else None
    if not isinstance(step.op, GgmlOperation) or step.op.name != "MUL_MAT_ID":
        return None

    def doubled(source: WeightSource, name: str) -> Array:
        weight = source.get(name).copy()
        weight[1] = weight[0]
        return weight

    return replace(step, weights=(Altered(first, doubled), *step.weights[1:]))


def drawn(faulty: Faulty, tokens: tuple[int, ...], draw: random.Random, further: bool = False) -> Edit:
    """One operation edited in some layers, in a usual or in a further way."""
    right = {step.makes: step for step in faulty.right}
    values = replay(faulty, faulty.right, tokens).values
    shapes = {name: values[name].shape for name in right if values[name].dtype.kind == "f"}
    while True:
        chosen = draw.choice(faulty.right)
        ways = FURTHER if further else WAYS if draw.random() < 0.5 else PARTS
        how, layers = draw.choice(ways), draw.choice(["one", "all", "from"])
        head, _, kind = chosen.makes.rpartition(".")
        inside = kind in _INSIDE and (
            how in ("rolled", "permuted", "zeroed", "exchanged", "negated", "shifted") or how in _RESULTS
        )
        history = any(isinstance(read, History) for read in chosen.reads)
        if chosen.axis != 0 or inside or history or chosen.makes not in shapes or chosen.makes.startswith(SEEN):
            continue
        seed = draw.randrange(1 << 30)
        same = [name for name in right if head and name.endswith(f".{kind}")]
        names = [chosen.makes] if layers == "one" or not head else same if layers == "all" else same[same.index(chosen.makes) :]
        edited = {name: _edited(right[name], how, random.Random(seed), right, shapes) for name in names}
        if any(step is None for step in edited.values()):
            continue
        steps = [edited.get(step.makes) or step for step in faulty.right]
        try:
            replay(faulty, steps, tokens)
        except (NotApplicable, ValueError, IndexError, TypeError):
            continue  # this operation's shapes do not allow the edit
        where = chosen.makes if len(names) == 1 else f"{names[0]} … {names[-1]}"
        return Edit(steps, names[0], how, f"{how} at {where}")


def replay(faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...]) -> Replay:
    """These steps run over these tokens in one pass."""
    count, transformer = len(tokens), faulty.transformer
    with np.errstate(all="ignore"):
        return Replay(steps, tokens, range(count), [0] * count, transformer.weights, transformer.backend)


def same_numbers(faulty: Faulty, edit: Edit, causes: Sequence[Named], tokens: tuple[int, ...], points: Sequence[str]) -> bool:
    """Whether an engine with the named faults computes what the edited one computes, at these points."""
    other = list(faulty.right)
    for cause in causes:
        if cause.fault not in _FAULTS:
            return False
        other = plant(other, _FAULTS[cause.fault], cause.layers, **cause.parameters)
    first, second = replay(faulty, edit.steps, tokens).values, replay(faulty, other, tokens).values
    with np.errstate(all="ignore"):
        for point in points:
            a, b = (np.asarray(run[run_name(run, point)], dtype=np.float64) for run in (first, second))
            if not ((a - b) ** 2).sum() <= SAME * (a**2).sum():
                return False
    return True


def run_name(values: Any, point: str) -> str:
    """What a dump shows for a point: another step's value where the capture is wrong."""
    return SEEN + point if SEEN + point in values else point


def outcome(answer: Explanation, faulty: Faulty, edit: Edit, tokens: tuple[int, ...], points: Sequence[str]) -> str:
    """How the answer counts: one of the outcomes that the module's docstring explains."""
    if answer.first is None and not answer.precision_only:
        return "not seen"
    if answer:
        return "acquitted"
    if answer.causes:
        if answer.remaining is not None:
            points = points[: points.index(answer.remaining.checkpoint)]
        return (
            "named" if same_numbers(faulty, edit, [cause.named for cause in answer.causes], tokens, points) else "wrong cause"
        )
    if answer.placed is None or answer.first is None:
        return "elsewhere"
    if edit.first not in answer.placed.operations:
        return "elsewhere"
    return "at the operation" if len(answer.placed.operations) == 1 else "located"


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
        self._made: dict[str, Faulty] = {}

    def of(self, seed: int, draw: random.Random) -> tuple[str, Faulty, tuple[int, ...]]:
        """An architecture's name, its engine, and a prompt."""
        if seed % 7 == 0 and self._names == ARCHITECTURES:
            faulty, tokens = random_model(self._folder, seed)
            return faulty.transformer.model.hyperparameters.architecture, faulty, tokens[:12]
        name = self._names[seed % len(self._names)]
        if name not in self._made:
            path = self._folder / f"{name}.gguf"
            make_by_recipe(path, RECIPES[name], shape_of(RECIPES[name]), {}, tokenizer=embedded())
            self._made[name] = Faulty(path, self._reference.graph(path))
        return name, self._made[name], tokens_of(self._made[name].model, draw.randrange(4, 12), seed)


def dump_of(
    faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...], points: str, size: int, bare: bool, stated: bool
) -> Dump:
    """The dump of an engine that runs these steps."""
    dump = faulty.dump(Planted(()), tokens, points=points, size=size, bare=bare, steps=steps)
    if dump.header is not None and not stated:
        dump = replace(dump, header=replace(dump.header, compute=""))
    return dump


def cases(models: Models, seeds: range, budget: float, further: bool) -> Iterator[tuple[str, str, str, float]]:
    """Every case's edit, points, outcome and seconds; each is printed when it is done."""
    for seed in seeds:
        draw = random.Random(seed)
        name, faulty, tokens = models.of(seed, draw)
        edit = drawn(faulty, tokens, draw, further)
        points, size = draw.choice(["default", "*"]), draw.choice(SLICES)
        bare, stated = draw.random() < 0.5, draw.random() < 0.5
        dump = dump_of(faulty, edit.steps, tokens, points, size, bare, stated)
        began = perf_counter()
        answer = explain(dump, faulty.model, ExplainOptions(budget=budget))
        spent = perf_counter() - began
        outcome_name = outcome(answer, faulty, edit, tokens, [step.makes for step in faulty.right if step.makes in dump.points])
        shape = f"{points}, {size if size < 1 << 20 else 'all'}{'' if bare else ', sketch'}{', f32' if stated else ''}"
        print(f"seed {seed} {name}: {edit.what} ({shape}): {outcome_name}, {spent:.1f} s; {sentence(answer)}", flush=True)
        yield edit.how, points, outcome_name, spent


def table(measured: Sequence[tuple[str, str, str, float]]) -> str:
    """Outcomes by edit, and the times."""
    words = ("named", "at the operation", "located", "elsewhere", "not seen", "acquitted", "wrong cause")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for how, points, outcome_name, _ in measured:
        for row in (how, "default points" if points == "default" else "all points", "all"):
            counts[row][outcome_name] += 1
    lines = [f"| edit | {' | '.join(words)} |", f"|---|{'---|' * len(words)}"]
    lines += [
        f"| {row} | {' | '.join(str(counts[row][word]) for word in words)} |"
        for row in (*WAYS, *PARTS, *FURTHER, *list(counts))
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
    parser.add_argument("--further", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        models = Models(Path(folder), reference, tuple(options.arch.split(",")))
        measured = list(cases(models, range(options.first, options.first + options.n), options.budget, options.further))
    print(table(measured))


if __name__ == "__main__":
    main()
