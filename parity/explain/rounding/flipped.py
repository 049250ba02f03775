"""Experts that lower arithmetic chooses otherwise: scores that are closer together than its rounding may fall either way, which is no
fault.

What such a choice leads to differs by far more than rounding. An engine whose other errors are our own rounding's is not judged by it.
Where the dump has the choice itself, it says whether it is another one.
"""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import parse
from engine.faults.routing_ties import scores_of
from engine.graph import made_from
from engine.replay.precision import rounded
from engine.replay.replay import Replay

from ..case import Case
from ..records.records import Expected, Floats
from .precision import OURS, TOGETHER, PrecisionFloor

# The dump's scores and ours are off by one rounding each, in either direction: two of them exchange places if they are this much nearer.
_REACH = 4.0
# The farthest off that other experts bring a record: four times what they did at most where every position of every layer chose one other
# (seven models of as many architectures, whole rows and 16 values: 40 in rows of one number, 20 in others, 1.4 in a layer's output).
_FARTHEST = 160.0
# More of the records than this are not left out: what is left would prove nothing.
_MOST = 0.5
Flip = tuple[int, int, frozenset[str]]  # a choice: its layer, its row, and what is computed from it
# Said where an arithmetic fits only without them: a large fault may be among them, so that the engine is not called right.
CHOSEN_OTHERWISE = (
    "experts: records behind choices that this arithmetic may make otherwise differ by far more than it costs: it chose others there, or a "
    "fault is among them; `parity isolate`, which judges each operation by its own inputs, tells which"
)


def without_flipped(case: Case, measured: PrecisionFloor) -> list[Expected]:
    """The records; those that depend on a choice that the arithmetic may flip get its plain cost as their error.

    All as they are where the dump's errors are not our own rounding's, or too many would be left out.
    """
    led = led_to(case, measured)
    costs = [np.maximum(*cost) for cost in zip(measured.products, measured.storage, strict=True)]
    far = [here & (entry.base > TOGETHER * cost) for entry, here, cost in zip(case.entries, led, costs, strict=True)]
    if not any(some.any() for some in far) or not _few(case, far):
        return case.entries
    return [
        replace(entry, base=np.where(some, cost, entry.base))
        for entry, some, cost in zip(case.entries, far, costs, strict=True)
    ]


def chosen_otherwise(case: Case, measured: PrecisionFloor) -> bool:
    """Whether all records over their limits, which allow for a stated arithmetic's noise, depend on choices that it may flip."""
    over = [entry.over for entry in case.entries]
    led = led_to(case, measured)
    return _few(case, over) and not any((some & ~here).any() for some, here in zip(over, led, strict=True))


def may_lead_to(case: Case, kind: str, entry: Expected, limit: Floats) -> bool:
    """Whether all records of a point over these limits, [R], depend on choices that an arithmetic may flip.

    Unlike `led_to`, whatever the other errors are: where nothing states the arithmetic, it is not known whose rounding they should be.
    """
    over = np.asarray(entry.base > limit)
    return bool(over.any()) and not (over & ~_behind(entry, _possible_flips(case, kind))).any()


def _few(case: Case, some: Sequence[NDArray[np.bool_]]) -> bool:
    """Whether so few of the records may be left out."""
    return sum(int(here.sum()) for here in some) <= _MOST * sum(len(entry.rows) for entry in case.entries)


def led_to(case: Case, measured: PrecisionFloor) -> list[NDArray[np.bool_]]:
    """The records of each point, [R], that depend on a choice that the arithmetic may flip, and are no farther off than that brings them;
    none if the errors are not those of our rounding.
    """
    flips = _possible_flips(case, measured.kind) if measured.alike >= OURS else []
    return [_behind(entry, flips) & ~(np.isfinite(entry.base) & (entry.base > _FARTHEST)) for entry in case.entries]


def _behind(entry: Expected, flips: Sequence[Flip]) -> NDArray[np.bool_]:
    """The records of a point, [R], that depend on one of these choices."""
    later, here = parse(entry.point).layer, np.zeros(len(entry.rows), dtype=np.bool_)
    for layer, row, after in flips:
        if entry.point in after:
            here |= (entry.rows > row) if later is None or later > layer else np.zeros_like(here)
            here |= entry.rows == row
    return here


def has_choices(case: Case) -> bool:
    """Whether the model chooses experts."""
    return bool(_choices(case))


def _choices(case: Case) -> dict[str, tuple[str, int]]:
    """The scores of each choice of experts, and how many are chosen."""
    steps = {step.makes: step for step in case.transformer.steps}
    return {step.makes: chosen for step in case.transformer.steps if (chosen := scores_of(step, steps)) is not None}


def _possible_flips(case: Case, kind: str) -> list[Flip]:
    """Choices whose scores lie within reach of the arithmetic's rounding."""
    if not (choices := _choices(case)):
        return []
    others = [
        case.make(
            rounded(case.transformer.steps, kind, storage=storage), len(case.positions), None, case.rounded(kind, storage)
        )
        for storage in (False, True)
    ]
    flips = list[Flip]()
    for name, (scores, count) in choices.items():
        layer = parse(name).layer
        near = may_exchange(_rows(case.replay, scores), [_rows(other, scores) for other in others], count) & ~_as_ours(
            case, name
        )
        after = made_from(name, case.transformer.steps) | {name} if near.any() else frozenset()
        flips += [(-1 if layer is None else layer, row, after) for row in np.flatnonzero(near).tolist()]
    return flips


def _rows(replay: Replay, name: str) -> Floats:
    return np.asarray(replay.on_host[name], dtype=np.float64).reshape(replay.rows, -1)


def may_exchange(right: Floats, others: Sequence[Floats], count: int) -> NDArray[np.bool_]:
    """Whether two neighbours among the chosen scores, or the last of them and the next one, may exchange places: [T].

    Scores of minus infinity are those of experts outside of the chosen groups; rounding may choose other groups.
    """
    finite = np.isfinite(right)
    others = [np.where(finite, other, 0.0) for other in others]
    regrouped = np.any([~np.isfinite(other).all(axis=1) for other in others], axis=0)
    within = np.where(finite, right, 0.0)
    noise = np.max([np.abs(other - within).max(axis=1) for other in others], axis=0)
    ranked = -np.sort(-right, axis=1)[:, : count + 1]
    with np.errstate(invalid="ignore"):
        gaps = np.nan_to_num(ranked[:, :-1] - ranked[:, 1:], nan=np.inf)
    return np.asarray(regrouped | (gaps.min(axis=1) <= _REACH * noise))


def _as_ours(case: Case, name: str) -> NDArray[np.bool_]:
    """Whether the dump has a choice whole, and the same as ours: [T]; False where it was not recorded."""
    same = np.zeros(len(case.positions), dtype=np.bool_)
    for entry in case.entries:
        if entry.point == name and entry.values.shape[1] == _rows(case.replay, name).shape[1]:
            right = entry.taken(case.replay.on_host[name], case.positions)
            same[entry.rows] = entry.present.all(axis=1) & (entry.values == right).all(axis=1)
    return same
