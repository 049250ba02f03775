"""A fault below the noise of lower arithmetic, in an engine that rounds as ours does, stands out beside our rounded run.

Such an engine has the very numbers of our run in that arithmetic, but where a value falls to the other side of a tie. The first
operation that has other ones, and by a law, is wrong, however small its error is beside what the arithmetic costs: another way of
rounding has no law.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.explain import DivergentPlace, Explanation, PossibleOperations
from engine.replay.precision import rounded
from engine.replay.replay import Replay
from reports.sentences import ARITHMETIC

from .beside import ROOM, beside
from .case import Case
from .flipped import has_choices
from .laws import WRONG, law
from .looks_like import floor_of
from .precision import OURS, of_ids
from .records import Expected, Floats
from .reproduced import THE_SAME, usual_cost

# The most by which rounding to nearest moves a constant, as a part of it: an engine may keep one (the root of the width by which it
# scales embeddings, say) in the type in which it computes.
_OF_A_CONSTANT = {"f16": 2.0**-11, "tf32": 2.0**-11, "bf16": 2.0**-9}
_ENOUGH = 12  # recorded values: a number fitted to fewer may follow noise


class Outstanding(Struct, frozen=True):
    """The first operation whose values are not those of our own run in an arithmetic, NMSE [R] each, and the law that they follow."""

    entry: Expected
    errors: Floats
    law: str


def outstanding(case: Case, kind: str, costs: Mapping[str, float]) -> Outstanding | None:
    """The first outstanding operation of an engine that rounds as ours does; None if nothing that follows a law stands out.

    Args:
        costs: the NMSE that the arithmetic costs each point.
    """
    for storage in (False, True):
        lower = rounded(case.transformer.steps, kind, storage=storage)
        run = case.make(lower, len(case.positions), None, case.rounded(kind, storage))
        found = _first_other(case, run, costs)
        if found is None:
            return None
        entry, errors = found
        sentence = _law_beside(case, run, entry, errors, _OF_A_CONSTANT.get(kind, 0.0))
        if sentence:
            words = f"{sentence}, beside our own run in {ARITHMETIC[kind]} arithmetic, which has all numbers before it"
            return Outstanding(entry, errors, words)
    return None


def standing_out(case: Case, answer: Explanation, kinds: Sequence[str]) -> Explanation:
    """The answer that arithmetics explain everything, unless an operation's values differ from our own run in the first by a law.

    The answer as it is where there are no `kinds`, or where the engine does not round as ours does.
    """
    if not kinds or (cost := floor_of(case, kinds[0])).alike < OURS:
        return answer
    chosen = has_choices(case)
    costs = {
        entry.point: max(usual_cost(costs, kinds[0], chosen) for costs in both)
        for entry, *both in zip(case.entries, cost.products, cost.storage, strict=True)
    }
    found = outstanding(case, kinds[0], costs)
    if found is None:
        return answer
    entry, errors = found.entry, found.errors
    recorded = {other.point for other in case.entries}
    step = next(step for step in case.transformer.steps if step.makes == entry.point)
    at = int(np.flatnonzero(errors > entry.limit)[0])
    place = DivergentPlace(entry.point, int(case.positions[entry.rows[at]]), float(errors[at]), float(entry.limit[at]))
    return replace(
        answer,
        first=place,
        remaining=place,
        differing=int((errors > entry.limit).sum()),
        law=found.law,
        placed=PossibleOperations((entry.point,), step.names, sure=recorded.issuperset(step.names)),
        precision_only="",
        precision_alike=(),
        precision_assumed=False,
    )


def _first_other(case: Case, run: Replay, costs: Mapping[str, float]) -> tuple[Expected, Floats] | None:
    """The first point whose recorded values are not this run's, with the difference that counts as none in this arithmetic as its
    limit, and the errors."""
    for entry in case.entries:
        if entry.point not in costs:
            continue
        same = np.full(len(entry.rows), max(THE_SAME * costs[entry.point], float(entry.limit.max())))
        errors = np.nan_to_num(entry.nmse(run.on_host[entry.point], case.positions))
        if not of_ids(entry) and float(errors.mean()) > same[0]:
            return replace(entry, limit=same), errors
    return None


def _law_beside(case: Case, run: Replay, entry: Expected, errors: Floats, of_a_constant: float) -> str:
    """The law that the wrong records follow; "" without one, or if a constant that is rounded to the type explains them."""
    compared = beside(replace(entry, limit=entry.limit / ROOM), errors, run.on_host, case.positions)
    if compared is None or compared.dumped.size < _ENOUGH:
        return ""
    energy = float((compared.right**2).sum())
    factor = float((compared.dumped * compared.right).sum()) / energy if energy > 0 else 1.0
    if abs(factor - 1) <= of_a_constant and compared.holds(compared.right * factor):
        return ""
    sentence = law(compared)
    return "" if sentence.endswith(WRONG) or "not recorded" in sentence else sentence
