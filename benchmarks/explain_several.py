"""Two and three faults at once: how many `parity explain` names, and whether it names a wrong one or leaves one unlocated.

Run as `PYTHONPATH=tests python benchmarks/explain_several.py [--count 25] [--numbers 2,3] [--from 0] [--budget 60] [--ranks]`.
Combination `i` is drawn with seed `i` and planted into the stories model, a synthetic llama or a synthetic qwen2, in turn; faults that do
not apply to the model, and those that leave no trace beside the others, are drawn again. The search sees seven points of
sixteen values. The budget is in seconds of CPU time, so that other work on the machine does not spend it.

`--ranks` prints instead, for pairs of faults in layer 0, the rank of the right pair among the likely ones:
`parity.explain.search.together.MOST` comes from it.
"""

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from explain import models
from planted import Faulty, Planted, tokens_of

from checkpoints.answers.explain import Explanation
from checkpoints.record import Dump
from engine.faults import CATALOGUE
from engine.inapplicable import NotApplicable
from parity.explain import budget as explain_budget
from parity.explain.budget import Budget
from parity.explain.case import Case
from parity.explain.explain import ExplainOptions, explain
from parity.explain.search.together import Together

Part = tuple[str, dict[str, Any], tuple[int, ...] | None]


def same(first: Dump, second: Dump) -> bool:
    """Whether two dumps hold the same values within float32's noise."""
    for name, rows in first.points.items():
        a, b = rows.values.astype(np.float64), second.points[name].values.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return False
        delta = np.where(np.isfinite(a), a - np.where(np.isfinite(b), b, 0), 0)
        if (np.einsum("ij,ij->i", delta, delta) > 1e-9 * np.nansum(np.where(np.isfinite(a), a * a, 0), axis=1)).any():
            return False
    return True


def draw(faulty: Faulty, tokens: tuple[int, ...], number: int, rng: random.Random) -> tuple[Planted, Dump]:
    """Different random faults, each of which changes the dump beside the others, and the dump of the engine that has them all."""
    right = {step.makes: step for step in faulty.right}
    while True:
        names = rng.sample(sorted(CATALOGUE), number)
        variants = [CATALOGUE[name].variants(right) for name in names]
        if not all(variants):
            continue
        parts: list[Part] = [(name, rng.choice(of), None) for name, of in zip(names, variants, strict=True)]
        try:
            dump = faulty.dump(Planted(tuple(parts)), tokens)
            without = [faulty.dump(Planted((*parts[:at], *parts[at + 1 :])), tokens) for at in range(number)]
        except (NotApplicable, ValueError):  # ValueError: NumPy's, of shapes that do not go together in this model
            continue
        if not any(same(dump, fewer) for fewer in without):
            return Planted(tuple(parts)), dump


def judge(answer: Explanation, planted: Planted, dump: Dump, faulty: Faulty) -> str:
    """The outcome: all named, same numbers (other causes that reproduce every record), located, missed, or wrong."""
    names = {name for name, _, _ in planted.faults}
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in answer.causes]
    if answer.first is None:
        return "missed"
    if answer.remaining is None:
        return "all named" if all(any(name in class_names for class_names in classes) for name in names) else "same numbers"
    if any(names.isdisjoint(class_names) for class_names in classes):
        return "wrong"
    left = [part for part in planted.faults if not any(part[0] in class_names for class_names in classes)]
    return "located" if not left or _between(answer, left, dump, faulty) else "missed"


def _between(answer: Explanation, left: Sequence[Part], dump: Dump, faulty: Faulty) -> bool:
    """Whether one of the faults not yet named acts between the remaining place and the recorded point before it."""
    order = {step.makes: number for number, step in enumerate(faulty.right)}
    recorded = sorted(order[name] for name in dump.points)
    end = order[answer.remaining.checkpoint] if answer.remaining is not None else 0
    start = max((number for number in recorded if number < end), default=-1)
    for part in left:
        if CATALOGUE[part[0]].shows is not None:
            return True  # it shows where the dump first differs, whatever it is
        steps = Planted((part,)).steps(faulty.right)
        known = {step.makes: step for step in faulty.right}
        changed = [order[step.makes] for step in steps if step.makes in order and known[step.makes] is not step]
        if any(start < number <= end for number in changed):
            return True
    return False


def ranks(folder: Path, first: int, count: int) -> None:
    """Print the rank of each drawn pair that acts in layer 0 among the likely ones."""
    engines = [(name, Faulty(model)) for name, model in models(folder, ("stories", "llama", "qwen2"))]
    for seed in range(first, first + count):
        name, faulty = engines[seed % len(engines)]
        tokens = tokens_of(faulty.model, 8, seed)
        planted, dump = draw(faulty, tokens, 2, random.Random(seed))
        case = Case(dump, faulty.model, ExplainOptions(tokens=tokens))
        screening = case.screening(case.entries, Budget(600.0))
        start = screening.start()
        if len(screening.suspects(start)) != 1 or any(CATALOGUE[fault].shows for fault, _, _ in planted.faults):
            continue
        together = Together(screening, start, (0,))
        wanted = {
            number
            for number, effect in enumerate(together.effects)
            for candidate in effect.alike
            if (candidate.fault.name, candidate.parameters, None) in planted.faults
        }
        ranks_of_planted = [rank for rank, chosen in enumerate(together.likely(2).tolist()) if set(chosen) == wanted]
        print(
            f"{seed} {name}: {ranks_of_planted} of {len(together.effects)} effects, {[fault for fault, _, _ in planted.faults]}",
            flush=True,
        )


def combinations(folder: Path, number: int, first: int, count: int, budget: float) -> Counter[str]:
    """Print each combination with its outcome; count the outcomes."""
    engines = [(name, Faulty(model)) for name, model in models(folder, ("stories", "llama", "qwen2"))]
    outcomes: Counter[str] = Counter()
    seconds: list[float] = []
    for seed in range(first, first + count):
        name, faulty = engines[seed % len(engines)]
        rng = random.Random(1000 * number + seed)
        tokens = tokens_of(faulty.model, 24, seed)
        planted, dump = draw(faulty, tokens, number, rng)
        began = process_time()
        answer = explain(dump, faulty.model, ExplainOptions(tokens=tokens, budget=budget))
        spent = process_time() - began
        seconds.append(spent)
        outcome = judge(answer, planted, dump, faulty)
        outcomes[outcome] += 1
        faults = [(fault, parameters) for fault, parameters, _ in planted.faults]
        causes = [(cause.named.fault, cause.named.parameters, cause.named.layers) for cause in answer.causes]
        left = f"; left at {answer.remaining.checkpoint}, {answer.remaining.token_idx}" if answer.remaining else ""
        late = "" if answer.complete else ", out of time"
        print(f"{number}/{seed} {name}: {outcome}, {spent:.0f} s CPU{late}\n  {faults}\n  {causes}{left}", flush=True)
    print(f"CPU seconds: median {np.median(seconds):.0f}, largest {max(seconds):.0f}")
    return outcomes


def main() -> None:
    """Print every combination and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--numbers", default="2,3")
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--ranks", action="store_true")
    options = parser.parse_args()
    explain_budget.perf_counter = process_time  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        if options.ranks:
            ranks(Path(folder), options.first, options.count)
            return
        for number in map(int, options.numbers.split(",")):
            outcomes = combinations(Path(folder), number, options.first, options.count, options.budget)
            print(f"{number} faults at once: {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
