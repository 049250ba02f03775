"""Three dumps of one experiment: every pair is compared as by `diff`, and at each point the odd one out is named."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.diff import PointSummary, RecordFault, Verdict
from checkpoints.answers.three_way import PAIRS, RecordedOtherwise, ThreeWay, ThreeWayPoint
from checkpoints.errors import DumpError, InputError
from checkpoints.points import order
from checkpoints.record import Dump

from .compare import Options, compare
from .measured.tokens import TOKENS
from .tolerances.truth import MULTIPLE, Floats, Truth


def compare_three(dumps: tuple[Dump, Dump, Dump], options: Options | None = None) -> ThreeWay:
    """Compare every two of three dumps.

    Raises:
        InputError: they are of two models or two prompts.
        DumpError: two of them have nothing in common; the message says which.
    """
    sides = names(dumps)
    verdicts = []
    for first, second in PAIRS:
        try:
            verdicts.append(compare(dumps[first], dumps[second], options))
        except (DumpError, InputError) as error:
            kind = type(error)
            raise kind(f"{sides[first]} and {sides[second]}: {error.message}", error.advice, code=error.code) from error
    points_of = [{point.checkpoint: point for point in verdict.points} for verdict in verdicts]
    points = (
        *_tokens(verdicts),
        *(_point(name, [pair.get(name) for pair in points_of]) for name in order(name for pair in points_of for name in pair)),
    )
    wrong = next((point for point in points if point.differs), None)
    return ThreeWay(
        sides, points, _counts(verdicts), wrong, _recorded_otherwise(verdicts, dumps, options), _notes(sides, verdicts)
    )


def with_truth(three_way: ThreeWay, dumps: tuple[Dump, Dump, Dump], truth: Truth) -> ThreeWay:
    """The answer extended by each side's distance from float64 where they differ: two sides that agree may share a fault."""
    wanted = [point.checkpoint for point in three_way.points if point.differs]
    far = [truth.distances({name: dump.points[name] for name in wanted if name in dump.points}) for dump in dumps]
    points = tuple(_with_distances(point, [side.get(point.checkpoint) for side in far]) for point in three_way.points)
    return replace(three_way, points=points, first=next((point for point in points if point.differs), None))


def _with_distances(point: ThreeWayPoint, sides: Sequence[Floats | None]) -> ThreeWayPoint:
    worst = [None if side is None or np.isnan(side).all() else float(np.nanmax(side)) for side in sides]
    known = [far for far in worst if far is not None]
    if not point.differs or len(known) < 2:
        return point
    # A side that agrees with the nearest one is as far off as a right one may be: by llama.cpp's table of GELU, say.
    nearest = worst.index(min(known))
    alike = [pair for pair, share in zip(PAIRS, point.of_limit, strict=True) if share is not None and share <= 1]
    agree = {number for pair in alike if nearest in pair for number in pair}
    wrong = tuple(
        number for number, far in enumerate(worst) if far is not None and far > MULTIPLE * min(known) and number not in agree
    )
    return replace(point, truth=(worst[0], worst[1], worst[2]), wrong=wrong)


def names(dumps: tuple[Dump, Dump, Dump]) -> tuple[str, str, str]:
    """The name that each side gives itself, or its file's name if two are the same or one has none."""
    sources = [dump.header.source if dump.header is not None else "" for dump in dumps]
    sources = ["ours" if name == "engine" else name for name in sources]
    unique = [name if name and sources.count(name) == 1 else str(dump.path) for name, dump in zip(sources, dumps, strict=True)]
    return (unique[0], unique[1], unique[2])


def _counts(verdicts: list[Verdict]) -> tuple[int, int, int]:
    first, second, third = (verdict.compared for verdict in verdicts)
    return (first, second, third)


def _notes(sides: tuple[str, str, str], verdicts: list[Verdict]) -> tuple[str, ...]:
    """The notes of the comparisons, each once; with the pair's names if they do not apply to all three."""
    pairs_of: dict[str, list[str]] = {}
    for (first, second), verdict in zip(PAIRS, verdicts, strict=True):
        for note in verdict.notes:
            pairs_of.setdefault(note, []).append(f"{sides[first]} – {sides[second]}")
    return tuple(note if len(pairs) == len(PAIRS) else f"{', '.join(pairs)}: {note}" for note, pairs in pairs_of.items())


def _recorded_otherwise(
    verdicts: Sequence[Verdict], dumps: tuple[Dump, Dump, Dump], options: Options | None
) -> tuple[RecordedOtherwise, ...]:
    """The faults of records, each point's once, of the side that both pairs which show it have in common."""
    faults: dict[str, dict[int, RecordFault]] = {}
    for pair, verdict in enumerate(verdicts):
        for fault in verdict.record_faults:
            faults.setdefault(fault.checkpoint, {})[pair] = fault
    of_side = {name: _common_side(tuple(pairs)) for name, pairs in faults.items()}
    # A pair's faults are told of its first side; the third side is nowhere first.
    third = compare(dumps[2], dumps[0], options).record_faults if 2 in of_side.values() else ()
    of_third = {fault.checkpoint: fault for fault in third}

    def fault_of_side(name: str) -> RecordFault:
        pairs = faults[name]
        return (of_third.get(name) if of_side[name] == 2 else pairs.get(2 * (of_side[name] or 0))) or next(iter(pairs.values()))

    return tuple(RecordedOtherwise(of_side[name], fault_of_side(name)) for name in order(faults))


def _common_side(pairs: tuple[int, ...]) -> int | None:
    """The side that two of the pairs have in common; None of one pair or all."""
    return next(side for side in range(3) if all(side in PAIRS[pair] for pair in pairs)) if len(pairs) == 2 else None


def _tokens(verdicts: Sequence[Verdict]) -> tuple[ThreeWayPoint, ...]:
    """The point at which tokens differ, as in `diff`; empty if those of all three sides are the same."""
    firsts = [verdict.first_divergence for verdict in verdicts]
    wrong = [first is not None and first.checkpoint == TOKENS for first in firsts]
    if not any(wrong):
        return ()
    alone = next(side for side in range(3) if side not in PAIRS[wrong.index(False)]) if wrong.count(False) == 1 else None
    return (ThreeWayPoint(TOKENS, (None, None, None), (None, None, None), alone, differs=True),)


def _point(name: str, pairs: list[PointSummary | None]) -> ThreeWayPoint:
    wrong = [number for number, pair in enumerate(pairs) if pair is not None and pair.failed]
    right = [number for number, pair in enumerate(pairs) if pair is not None and not pair.failed]
    alone = None
    if len(wrong) == 2 and right:
        # The side that both failing pairs share; the third pair, which agrees, lacks it.
        alone = next(side for side in range(3) if side not in PAIRS[right[0]])
    nmse = [pair.worst.nmse if pair is not None else None for pair in pairs]
    share = [pair.worst.of_limit if pair is not None else None for pair in pairs]
    return ThreeWayPoint(name, (nmse[0], nmse[1], nmse[2]), (share[0], share[1], share[2]), alone, differs=bool(wrong))
