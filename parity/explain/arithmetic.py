"""Two dumps compared where nothing says in which arithmetic one of them was computed: the one that fits best is found."""

from dataclasses import replace

import numpy as np

from checkpoints.answers.diff import AGREES, Precision
from checkpoints.record import Dump

from ..diff.compare import Comparison, Options, comparison
from ..diff.operations import MIXING
from .case import Case
from .known_model import KnownModel
from .precision import KINDS, LOWER, PrecisionFloor, best, mean_cost, mismatch


def of_unknown_arithmetic(ours: Dump, ref: Dump, options: Options, known: KnownModel) -> Comparison:
    """The comparison if nothing says what OURS computes in: float32, unless its first computed point differs as in a lower arithmetic."""
    exact = comparison(ours, ref, replace(options, compute="f32"))
    as_float32 = _with(exact, "f32", "")
    first = exact.verdict.first_divergence
    if (
        exact.verdict
        or first is None
        or first.checkpoint not in exact.records.names
        or _computed_before(exact, first.checkpoint)
    ):
        return as_float32
    if known.case is None:
        return comparison(ours, ref, options)
    wanted = next((number for number, entry in enumerate(known.case.entries) if entry.point == first.checkpoint), None)
    if wanted is None:
        return as_float32
    error = float(np.mean(exact.records.measures.nmse[exact.records.point == exact.records.names.index(first.checkpoint)]))
    candidates: dict[str, Comparison] = {}
    far: dict[str, float] = {}
    for kind in KINDS:
        cost = known.floor(kind)
        allowed = known.limits(ours, kind, cost)
        if cost is None or allowed is None:
            continue
        if not mean_cost(cost.products[wanted]) * LOWER <= error <= allowed.points[first.checkpoint]:
            continue
        if _spared(exact, known.case, cost):
            continue
        tried = comparison(ours, ref, replace(options, compute=kind, limits=allowed))
        if any(point.checkpoint == first.checkpoint and point.status == AGREES for point in tried.verdict.points):
            candidates[kind], far[kind] = tried, mismatch(_errors(exact, known.case, cost))
    agreeing = {kind: far[kind] for kind, compared in candidates.items() if compared.verdict}
    fitting = best(agreeing or far)
    return _with(candidates[fitting[0]], fitting[0], first.checkpoint, fitting[1:]) if fitting else as_float32


def _with(compared: Comparison, arithmetic: str, in_float32: str, alike: tuple[str, ...] = ()) -> Comparison:
    precision = Precision(arithmetic, False, "measured", in_float32, alike)
    return replace(compared, verdict=replace(compared.verdict, precision=precision))


def _errors(exact: Comparison, case: Case, cost: PrecisionFloor) -> list[tuple[float, float, float]]:
    """Each point's mean error, and the cost of the arithmetic there: with products rounded, and with activations rounded."""
    records = exact.records
    numbers = {name: number for number, name in enumerate(records.names)}
    return [
        (float(records.measures.nmse[records.point == numbers[entry.point]].mean()), mean_cost(multiplied), mean_cost(stored))
        for entry, multiplied, stored in zip(case.entries, cost.products, cost.storage, strict=True)
        if entry.point in numbers
    ]


def _computed_before(compared: Comparison, first: str) -> bool:
    """Whether, before the first difference, a product with weights agrees as float32 does: then the arithmetic is float32."""
    model = compared.records.flow
    for point in compared.verdict.points:
        if point.checkpoint == first:
            break
        behind = {point.checkpoint, *_above(compared, point.checkpoint)} if point.checkpoint in model.whole.made else set[str]()
        if point.status == AGREES and MIXING & model.operations(behind):
            return True
    return False


def _spared(exact: Comparison, case: Case, cost: PrecisionFloor) -> bool:
    """Whether all records of a point that this arithmetic must have moved are as right as in float32."""
    records = exact.records
    for entry, products in zip(case.entries, cost.products, strict=True):
        if entry.point not in records.names:
            continue
        here = records.point == records.names.index(entry.point)
        errors, limits = records.measures.nmse[here], records.limit[here]
        typical = float(np.median(products))  # rounding flips a choice of experts here and there, which costs far more
        if not np.isfinite(typical):
            continue  # rows of zeros, masks
        if typical > float(limits.max()) and float(errors.mean()) < LOWER * typical:
            return True
    return False


def _above(compared: Comparison, name: str) -> set[str]:
    """All nodes that a point is made from."""
    makers = compared.records.flow.whole.made
    every, waiting = set[str](), [name]
    while waiting:
        for other in makers[waiting.pop()].reads:
            if other not in every:
                every.add(other)
                waiting.append(other)
    return every
