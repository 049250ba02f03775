"""Faults that no entry of the catalogue describes, and right engines: is anybody acquitted or accused wrongly?

Run as `python benchmarks/explain_edits.py [edits|right] [-n 30] [--from 0] [--budget 60]`. Models of random shape, weights and type (every
fifth one is the embedded model), random prompts, slices of 10, 16 or all values, with and without a sketch, the default points or all,
a header that says f32 or none.

`edits`: one operation of one layer, of some or of all is changed: its result scaled, shifted, rolled, permuted, two elements
exchanged, one negated, cut off, of another position, or one operand exchanged for another value of the same shape. `acquitted` is an
answer that says "no fault"; `wrong cause` names a fault that does not make the engine's numbers, at every point and in whole
rows; `located` says that the first differing point is the operation (where its records allow to see it).

`right`: engines without a fault in F32 (another order of sums), F16, BF16, TF32 and 8-bit arithmetic. `accused` is an answer with a
cause or a place; `called exact` says that a lower arithmetic agrees "with the right engine" without naming it.
"""

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from explain_precision import ARITHMETIC, random_model
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.explain import Explanation, Named
from checkpoints.record import Dump
from engine.backend import Array
from engine.faults import CATALOGUE, FITTED, as_recorded, plant
from engine.graph import History, Step
from engine.replay.replay import Replay
from parity.explain.explain import ExplainOptions, explain
from parity.models import embedded as default_model

SLICES = (10, 16, 1 << 20)
# How far a named fault's numbers may lie from the edited engine's, NMSE at every point: both are computed here, in float32.
SAME = 1e-9


_FAULTS = {**CATALOGUE, **{fit.fault.name: fit.fault for fit in FITTED}}


def edit(step: Step, how: str, draw: random.Random, right: dict[str, Step]) -> Step | None:
    """The step with this edit; None where it has no place."""
    if how == "operand":
        names = [name for name in right if name != step.makes and list(right).index(name) < list(right).index(step.makes)]
        at = draw.randrange(len(step.reads))
        kind = step.reads[at]
        if isinstance(kind, History) or not names:
            return None
        alike = [name for name in names if name.rpartition(".")[2] in _ALIKE.get(str(kind).rpartition(".")[2], ())]
        return replace(step, reads=(*step.reads[:at], draw.choice(alike), *step.reads[at + 1 :])) if alike else None
    change = _changes(draw)[how]

    def op(*inputs: Any, **params: Any) -> Array:
        return change(step.op(*inputs, **params))

    return replace(step, op=op)


_STREAM = ("embd", "attn_norm", "attn_out", "ffn_inp", "ffn_norm", "ffn_out", "l_out", "output_norm", "q", "q_rope", "kqv_out")
_ALIKE = dict.fromkeys(("attn_norm", "attn_out", "ffn_inp", "ffn_norm", "ffn_out", "l_out", "output_norm", "embd"), _STREAM)
EDITS = ("scaled", "shifted", "rolled", "permuted", "exchanged", "negated", "cut off", "position", "operand")


def _changes(draw: random.Random) -> dict[str, Callable[[Array], Array]]:
    by = draw.choice([0.5, 0.9, 0.999, 1.002, 1.1, 2.0, -1.0])
    plus = draw.choice([0.01, -0.003, 0.1])
    seed, n = draw.randrange(1 << 30), draw.choice([1, -1, 2, 8])

    def flat(change: Callable[[Array], None]) -> Callable[[Array], Array]:
        def made(x: Array) -> Array:
            out = x.copy()
            change(out)
            return out

        return made

    def exchanged(x: Array) -> None:
        rng = random.Random(seed)
        i, j = rng.sample(range(min(x.shape[-1], 10)), 2) if x.shape[-1] > 1 else (0, 0)
        x[..., [i, j]] = x[..., [j, i]]

    def negated(x: Array) -> None:
        x[..., random.Random(seed).randrange(min(x.shape[-1], 10))] *= np.float32(-1)

    def cut(x: Array) -> None:
        x[..., random.Random(seed).randrange(1, min(x.shape[-1], 10)) if x.shape[-1] > 1 else 0 :] = 0

    return {
        "scaled": lambda x: x * x.dtype.type(by),
        "shifted": lambda x: x + x.dtype.type(plus),
        "rolled": lambda x: np.roll(x, n, axis=-1),
        "permuted": lambda x: x[..., np.random.default_rng(seed).permutation(x.shape[-1])],
        "exchanged": flat(exchanged),
        "negated": flat(negated),
        "cut off": flat(cut),
        "position": lambda x: np.roll(x, 1, axis=-2),
    }


def edited(steps: Sequence[Step], draw: random.Random) -> tuple[list[Step], str, str]:
    """The steps with one operation edited in some layers, the first edited step's name, and a description."""
    right = {step.makes: step for step in steps}
    while True:
        chosen = draw.choice(list(steps))
        how = draw.choice(EDITS)
        layers = draw.choice(["one", "all", "from"])
        head, _, kind = chosen.makes.rpartition(".")
        if kind in ("k_read", "v_read") or (
            how in ("rolled", "permuted", "cut off", "exchanged") and kind in ("kq", "kq_soft_max")
        ):
            continue  # the cache's own rows; scores behind the mask
        seed = draw.randrange(1 << 30)
        same = [step.makes for step in steps if head and step.makes.endswith("." + kind)]
        names = [chosen.makes] if layers == "one" or not head else same if layers == "all" else same[same.index(chosen.makes) :]
        made = {name: edit(right[name], how, random.Random(seed), right) for name in names}
        if all(step is not None for step in made.values()):
            where = chosen.makes if len(names) == 1 else f"{names[0]} … {names[-1]}"
            return [made.get(step.makes) or step for step in steps], names[0], f"{how} at {where}"


def dump_of(
    faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...], points: str, size: int, bare: bool, stated: bool
) -> Dump:
    """The dump of an engine that runs these steps."""
    right, faulty.right = faulty.right, list(steps)
    try:
        found = faulty.dump(Planted(()), tokens, points=points, size=size, bare=bare)
    finally:
        faulty.right = right
    if found.header is not None and not stated:
        found = replace(found, header=replace(found.header, compute=""))
    return found


def same_numbers(faulty: Faulty, steps: Sequence[Step], causes: Sequence[Named], tokens: tuple[int, ...]) -> bool:
    """Whether an engine with the named faults computes what the edited one computes."""
    other = list(faulty.right)
    for cause in causes:
        if cause.fault not in _FAULTS:
            return False
        other = plant(other, _FAULTS[cause.fault], cause.layers, **cause.parameters)
    runs = []
    for some in (steps, as_recorded(other)):
        count, transformer = len(tokens), faulty.transformer
        runs.append(Replay(some, tokens, range(count), [0] * count, transformer.weights, transformer.backend))
    with np.errstate(all="ignore"):
        for step in faulty.right:
            one, two = (run.values[step.makes].astype(np.float64) for run in runs)
            if not ((one - two) ** 2).sum() <= SAME * (one**2).sum():
                return False
    return True


def a_case(folder: Path, seed: int) -> tuple[Faulty, tuple[int, ...], random.Random]:
    """A model, a prompt, and what draws the rest."""
    draw = random.Random(seed)
    if seed % 5 == 0:
        faulty = Faulty(default_model.path())
        return faulty, tokens_of(faulty.model, draw.randrange(4, 16), seed), draw
    faulty, tokens = random_model(folder, seed)
    return faulty, tokens, draw


def edits(folder: Path, seeds: range, budget: float) -> None:
    """Print what engines with one random edit are told."""
    reported: Counter[str] = Counter()
    slowest = 0.0
    for seed in seeds:
        faulty, tokens, draw = a_case(folder, seed)
        steps, first, what = edited(faulty.right, draw)
        points, size = draw.choice(["default", "*"]), draw.choice(SLICES)
        bare, stated = draw.random() < 0.5, draw.random() < 0.5
        dump = dump_of(faulty, steps, tokens, points, size, bare, stated)
        began = perf_counter()
        answer = explain(dump, faulty.model, ExplainOptions(budget=budget))
        spent = perf_counter() - began
        slowest = max(slowest, spent)
        outcome = _outcome(answer, faulty, steps, tokens, first, points)
        reported[outcome] += 1
        shape = f"{points}, {size if size < 1 << 20 else 'all'}{'' if bare else ', sketch'}{', f32' if stated else ''}"
        print(f"seed {seed}: {what} ({shape}): {outcome}, {spent:.1f} s; {_said(answer)}", flush=True)
    print(dict(reported), f"slowest {slowest:.1f} s")


def _outcome(
    answer: Explanation, faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...], first: str, points: str
) -> str:
    if answer.first is None and not answer.precision_only:
        return "not seen"
    if answer:
        return "acquitted"
    if answer.causes:
        named = [cause.named for cause in answer.causes]
        return "named" if same_numbers(faulty, steps, named, tokens) else "wrong cause"
    if points != "*":
        return "interval"
    return "located" if answer.first is not None and answer.first.checkpoint == first else "elsewhere"


def _said(answer: Explanation) -> str:
    causes = [
        f"{cause.named.fault} {cause.named.parameters} {cause.named.layers} {cause.explained:.2f}" for cause in answer.causes
    ]
    place = f"{answer.first.checkpoint} {answer.first.token_idx} {answer.first.nmse:.1e}" if answer.first is not None else "-"
    leads = [f"{lead.sentence[:70]}{'' if lead.removed is None else f' {lead.removed:.2f}'}" for lead in answer.leads]
    where = "" if answer.placed is None else f"of {len(answer.placed.operations)}{', sure' if answer.placed.sure else ''}"
    return f"{place} {answer.precision_only}{answer.looks_like} {causes} law: {answer.law}; {where} {leads}"


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
                print(f"seed {seed}, {name} ({points}, {size}, {bare}): {outcome}; {_said(answer)}", flush=True)
    print(dict(reported))


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", default="edits", choices=["edits", "right"])
    parser.add_argument("-n", type=int, default=30)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = {"edits": edits, "right": right_engines}[options.what]
        measure(Path(folder), range(options.first, options.first + options.n), options.budget)


if __name__ == "__main__":
    main()
