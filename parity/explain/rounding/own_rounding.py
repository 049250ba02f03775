"""A fault below the noise of lower arithmetic, in an engine that rounds as ours does, stands out beside our rounded run.

Such an engine has the very numbers of our run in that arithmetic, but where a value falls to the other side of a tie. The first
operation that has other ones, and by a law, is wrong, however small its error is beside what the arithmetic costs: another way of
rounding has no law.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Pattern
from checkpoints.answers.explain import DivergentPlace, Explanation, PossibleOperations
from checkpoints.record import Dump
from engine.lift.node import GgmlOperation
from engine.replay.precision import rounded
from engine.replay.replay import Replay
from reports.sentences import ARITHMETIC

from ...diff.compare import Comparison
from ...diff.measured.operations import recurrent
from ...diff.verdict.beyond_noise import ONE_FACTOR, failing_at
from ...diff.verdict.one_factor import POSITIONS, SPACING, Allowed, Part, shared_factor, shared_summand
from ...laws.beside import ENOUGH, ROOM, Bools
from ...laws.laws import NOT_RECORDED, SAME_ERROR, WRONG, alike_rows, law
from ...laws.moved import OTHER_ORDER
from ..budget import Budget
from ..case import Case
from ..records.beside import beside
from ..records.records import Expected, Floats, first_over
from .flipped import CHOSEN_OTHERWISE, has_choices, led_to
from .known_model import KnownModel
from .looks_like import floor_of
from .mixed import own_steps
from .precision import OURS, TOGETHER, PrecisionFloor, alike_at, mean_cost, of_ids
from .reproduced import THE_SAME, usual_cost
from .systematic import followed

# The most by which rounding to nearest moves a number, as a part of it: an engine may keep constants (the root of the width by which it
# scales embeddings, say), weights and numbers of each row in the type in which it computes; beside 8-bit activations in BF16.
_HALF_STEP = {"f16": 2.0**-11, "tf32": 2.0**-11, "bf16": 2.0**-8, "q8": 2.0**-8}
_SECONDS = 10.0  # to try the numbers between two recorded points


class Outstanding(Struct, frozen=True):
    """The first operation whose values are not those of our own run in an arithmetic, NMSE [R] each, the law that they follow, and how
    many times what is allowed they are off.
    """

    entry: Expected
    errors: Floats
    law: str
    times: float


def held_to_own_run(compared: Comparison, ours: Dump, known: KnownModel, kind: str) -> Comparison:
    """The comparison of an engine that rounds as ours does: a divergence if an operation has, by a law, other numbers than our own run.

    Where experts are chosen, it is one as well if a point is further off than in such engines (`_beyond_choices`). What shows a factor
    beside the arithmetic's noise may follow from an operation before it, which that noise hides.
    """
    case, cost = known.beside_ours(ours, compared), known.floor(kind)
    if case is None or cost is None or known.case is None:
        return compared
    if not (compared.verdict or _shows_a_factor(compared)):
        return _of_other_experts(compared, case, kind)
    costs = usual_costs(known.case, cost)
    found = outstanding(case, kind, costs)
    if not compared.verdict and (found is None or not _before(compared, found.entry.point)):
        return compared
    if found is not None:
        point, times = found.entry.point, found.times
        pattern = Pattern("own-rounding", f"{point}: {found.law}")
    elif has_choices(case) and (beyond := _beyond_choices(case, kind)) is not None:
        point, times, same = beyond
        sentence = (
            f"{point}: {TOGETHER * times:.0f} times as far off as {ARITHMETIC[kind]} arithmetic makes it, in an engine that begins with "
            f"our own rounding: a fault, or {'an operation in a lower arithmetic still' if same else 'other experts at most positions'}"
        )
        pattern = Pattern("undecided", sentence)
    else:
        return compared
    return _failing(compared, point, times, pattern)


def _shows_a_factor(compared: Comparison) -> bool:
    pattern = compared.verdict.pattern
    return pattern is not None and pattern.code == ONE_FACTOR


def _before(compared: Comparison, point: str) -> bool:
    """Whether a point comes before the first divergence."""
    names, first = compared.records.names, compared.verdict.first_divergence
    return first is not None and point in names and names.index(point) < names.index(first.checkpoint)


def _failing(compared: Comparison, point: str, times: float, pattern: Pattern) -> Comparison:
    if point not in compared.records.names:
        return compared
    records, verdict = failing_at(compared.records, {compared.records.names.index(point): times})
    verdict = replace(verdict, pattern=pattern, operation="")
    return replace(compared, records=records, verdict=replace(verdict, precision=compared.verdict.precision))


def beside_own_run(compared: Comparison, ours: Dump, known: KnownModel, kind: str) -> Comparison:
    """`held_to_own_run` of a comparison that ends in parity, or in a factor, if the engine rounds as ours does; else parity is a
    divergence if the first point that differs is off, beside our own run, as one wrong factor makes it, which may be all that hides our own
    rounding there.
    """
    judged = compared.verdict or _shows_a_factor(compared)
    case, cost = (known.beside_ours(ours, compared), known.floor(kind)) if judged else (None, None)
    if case is None or cost is None or known.case is None:
        return compared
    if rounds_as_ours(case, kind):
        return held_to_own_run(compared, ours, known, kind)
    if not compared.verdict:
        return compared
    first = first_over(entry for entry in case.entries if not of_ids(entry))
    if first is None or first.point not in (costs := usual_costs(known.case, cost)):
        return compared
    least = max(THE_SAME * costs[first.point], float(first.limit.max()))
    for storage in (False, True):
        lower = rounded(case.transformer.steps, kind, storage=storage)
        run = case.make(lower, len(case.positions), None, case.rounded(kind, storage))
        times = float(np.nan_to_num(first.nmse(run.on_host[first.point], case.positions)).mean()) / least
        if times > 1 and (sentence := _one_number(case, run, first, kind)):
            words = f"{first.point}: {sentence}, beside our own run in {ARITHMETIC[kind]} arithmetic"
            return _failing(compared, first.point, times, Pattern("own-rounding", words))
    return compared


def rounds_as_ours(case: Case, kind: str) -> bool:
    """Whether the errors of any point of a dump are those of our own rounding in an arithmetic: the first may be of a fault besides."""
    right, count = case.replay.on_host, len(case.positions)
    for storage in (False, True):
        run = case.make(
            rounded(case.transformer.steps, kind, storage=storage), count, None, case.rounded(kind, storage)
        ).on_host
        for entry in case.entries:
            if entry.over.any():
                rows = (entry.taken(values[entry.point], case.positions) for values in (run, right))
                if alike_at(entry, *rows) >= OURS:
                    return True
    return False


def outstanding(case: Case, kind: str, costs: Mapping[str, float]) -> Outstanding | None:
    """The first outstanding operation of an engine that rounds as ours does; None if nothing that follows a law stands out.

    Args:
        costs: the NMSE that the arithmetic costs each point.
    """
    for storage in (False, True):
        lower = rounded(case.transformer.steps, kind, storage=storage)
        run = case.make(lower, len(case.positions), None, case.rounded(kind, storage))
        found = _first_other(case, run, costs, kind)
        if found is None:
            return None
        entry, errors, part = found
        if part is not None:
            sentence = _law_beside(case, run, entry, errors, 0.0) or f"every element is {part.words}"
            times = part.beyond
        else:
            sentence = _law_beside(case, run, entry, errors, _HALF_STEP[kind]) or _one_number(case, run, entry, kind)
            times = float((errors / entry.limit).max())
        if sentence:
            words = f"{sentence}, beside our own run in {ARITHMETIC[kind]} arithmetic, which has all numbers before it"
            return Outstanding(entry, errors, words, times)
    return None


def usual_costs(case: Case, cost: PrecisionFloor) -> dict[str, float]:
    """What an arithmetic costs each point of a case, NMSE: the larger of both ways of rounding (`usual_cost`)."""
    chosen = has_choices(case)
    return {
        entry.point: max(usual_cost(costs, cost.kind, chosen) for costs in both)
        for entry, *both in zip(case.entries, cost.products, cost.storage, strict=True)
    }


def _of_other_experts(compared: Comparison, case: Case, kind: str) -> Comparison:
    """A divergence, which blames no operation if every record that differs lies behind choices of experts that may be others'."""
    if not has_choices(case):
        return compared
    records, led = compared.records, set[tuple[str, int]]()
    for entry, here in zip(case.entries, led_to(case, floor_of(case, kind)), strict=True):
        led |= {(entry.point, int(position)) for position in case.positions[entry.rows[here]]}
    failed = np.flatnonzero(records.failed)
    if not all((records.names[records.point[at]], int(records.token_idx[at])) in led for at in failed):
        return compared
    pattern = Pattern("undecided", CHOSEN_OTHERWISE)
    return replace(compared, verdict=replace(compared.verdict, pattern=pattern, operation=""))


def _beyond_choices(case: Case, kind: str) -> tuple[str, float, bool] | None:
    """The first point that is further off than in right engines that begin with our own rounding, how many times, and whether no other
    experts can be the reason; None without one.

    Those are half a row off, which would excuse any fault: of a point's records those count to which no choice leads that the arithmetic
    may make otherwise or, where all may be led to, the usual one.
    """
    measured = floor_of(case, kind)
    if measured.alike < OURS:
        return None  # nothing is known of its choices
    for entry, led, *both in zip(case.entries, led_to(case, measured), measured.products, measured.storage, strict=True):
        if of_ids(entry):
            continue
        error, *costs = (_middle(each) if led.all() else mean_cost(each[~led]) for each in (entry.base, *both))
        most = TOGETHER * max(float(entry.limit.max()), *costs)
        if error > most:
            return entry.point, error / most, not led.all()
    return None


def _middle(errors: Floats) -> float:
    known = errors[np.isfinite(errors)]
    return float(np.median(known)) if len(known) else 0.0


def standing_out(case: Case, answer: Explanation, kinds: Sequence[str]) -> Explanation:
    """The answer that arithmetics explain everything, unless an operation's values differ from our own run in the first by a law.

    The answer as it is where there are no `kinds`, or where the engine does not round as ours does.
    """
    if not kinds or (cost := floor_of(case, kinds[0])).alike < OURS:
        return answer
    found = outstanding(case, kinds[0], usual_costs(case, cost))
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
        rounds=False,
        placed=PossibleOperations((entry.point,), step.names, sure=recorded.issuperset(step.names)),
        precision_only="",
        precision_alike=(),
        precision_assumed=False,
    )


def _first_other(case: Case, run: Replay, costs: Mapping[str, float], kind: str) -> tuple[Expected, Floats, Part | None] | None:
    """The first point whose recorded values are not this run's, with the difference that counts as none in this arithmetic as its
    limit, the errors, and the factor or summand that all positions share if the errors are below that limit.

    From the first position on at which the dump lists other experts than the run, or in another order, both compute with other rows.
    """
    parted = np.inf
    for entry in case.entries:
        if entry.point not in costs:
            continue
        same = np.full(len(entry.rows), max(THE_SAME * costs[entry.point], float(entry.limit.max())))
        errors = np.nan_to_num(entry.nmse(run.on_host[entry.point], case.positions), posinf=np.inf)
        positions = case.positions[entry.rows]
        if of_ids(entry):
            parted = min(parted, positions[errors > 0].min(initial=np.iinfo(positions.dtype).max))
            continue
        alike = positions < parted
        if (part := _in_common(case, run, entry, alike, kind)) is not None:
            return entry, np.where(alike, errors, 0.0), part
        if alike.any() and float(errors[alike].mean()) > same[0]:
            return replace(entry, limit=same), np.where(alike, errors, 0.0), None
    return None


def _in_common(case: Case, run: Replay, entry: Expected, alike: Bools, kind: str) -> Part | None:
    """The factor or summand that some records, bool [R], of a point share beside our own run's values; None if they share none.

    Values next to a tie, which fall to its other side, have none. A time step's bias in a lower type is a factor of a whole head.
    """
    numbers = own_steps(case.transformer.steps, entry.point, {other.point for other in case.entries})
    names = {step.op.name for number in numbers if isinstance((step := case.transformer.steps[number]).op, GgmlOperation)}
    if any(map(recurrent, names)):
        return None
    values = entry.taken(run.on_host[entry.point], case.positions)
    errors, known = entry.errors_beside(run.on_host[entry.point], case.positions)
    columns = known[alike].all(axis=0)  # rows of a cache, or of scores, grow with the position
    errors, right = errors[alike][:, columns], values[alike][:, columns]
    # A product's result has no constant of its own; approximations of exp and the like are off by far less than F16's half step.
    if not right.size or alike_rows(right):  # one row, and not as many as there are positions
        return None
    constant = _HALF_STEP[kind if "SCALE" in names else "f16"]
    spacing = SPACING.get(kind, SPACING["bf16"])  # digits may be cut off where a cache, say, is written
    factor = shared_factor(errors, right, Allowed(constant, np.inf, spacing, constant))
    if factor is not None:
        return replace(factor, beyond=abs(factor.factor - 1) / constant)
    summand = shared_summand(errors, right, Allowed(constant, constant))
    least = _HALF_STEP["f16"] * float(np.sqrt(np.mean(right * right)))
    return replace(summand, beyond=abs(summand.summand) / least) if summand and abs(summand.summand) > least else None


def _one_number(case: Case, run: Replay, entry: Expected, kind: str) -> str:
    """The factor of one result that was not recorded, or of one parameter, that a point's errors beside our own run follow; "" without one
    that is further off than digits which are cut off, or numbers that are kept in the type, bring it within a layer.
    """
    errors, known = entry.errors_beside(run.on_host[entry.point], case.positions)
    if int(known.sum()) < ENOUGH:
        return ""
    numbers = own_steps(case.transformer.steps, entry.point, {other.point for other in case.entries})
    among = {case.transformer.steps[number].makes for number in numbers}
    every, _ = followed(case, entry, errors, known, Budget(_SECONDS), among)
    factors = [one for one in every if not one.shifted and abs(one.change) > Allowed.of(kind, 1).below]
    best = max(factors, key=lambda one: one.along, default=None)
    return "" if best is None else f"its errors are as if {best.words}"


def _law_beside(case: Case, run: Replay, entry: Expected, errors: Floats, half_step: float) -> str:
    """The law that the wrong records follow; "" without one, or if numbers of theirs that are rounded to the type explain them."""
    compared = beside(replace(entry, limit=entry.limit / ROOM), errors, run.on_host, case.positions)
    if compared is None or compared.dumped.size < ENOUGH:
        return ""
    size = np.fmax(np.abs(compared.right), np.sqrt(np.mean(compared.right**2, axis=1, keepdims=True)))
    if bool((np.abs(compared.dumped - compared.right) <= half_step * size).all()):
        return ""
    energy = float((compared.right**2).sum())
    factor = float((compared.dumped * compared.right).sum()) / energy if energy > 0 else 1.0
    if abs(factor - 1) <= half_step and compared.holds(compared.right * factor):
        return ""
    sentence = law(compared)
    # Within an arithmetic's noise any value of a row or two is near that of another element: one in 80 of 2,048 was.
    if sentence.startswith(OTHER_ORDER) and len(compared.rows) < POSITIONS:
        return ""
    return "" if sentence.endswith(WRONG) or sentence == NOT_RECORDED or SAME_ERROR in sentence else sentence
