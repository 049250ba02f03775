"""A dump's chosen experts in the order of their scores: any order is right, as long as each expert keeps its own weight."""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import parse
from checkpoints.record import Dump, Rows
from engine.faults.routing_ties import scores_of
from engine.replay.replay import Replay

Ints = NDArray[np.int64]
_SUM = "moe_out"  # the end of the name of what is summed over the chosen experts
# Scores this near, in proportion to the largest, may change places by rounding alone: `ties.NEAR`.
_NEAR = 1e-5


class _Choice(Struct, frozen=True):
    """One layer's choice: the point, the scores that it is made by, the weights looked up among these scores, how many are chosen."""

    point: str
    scores: str
    weights: str
    count: int


def by_score(dump: Dump, replay: Replay, positions: Ints) -> tuple[Dump, tuple[str, ...]]:
    """The dump with each choice of experts in the order of the engine's own scores, the order of the right engine's lists, and a note if
    any was in another.

    What is computed for each chosen expert is put in the same order where its whole row was recorded, and left out where only a
    part of it was, or a sketch, which an order changes. Without recorded scores, right experts in another order are left out.
    """
    points = dict(dump.points)
    reordered: list[str] = []
    for choice in _choices(replay):
        if choice.point not in points:
            continue
        right = np.asarray(replay.on_host[choice.point]).reshape(len(positions), -1)
        orders = _orders(choice, points, right, positions)
        if not orders:
            continue
        reordered.append(choice.point)
        for name, size in _for_each_expert(choice, replay).items():
            if name in points:
                points[name] = _permuted(points[name], size, orders)
    if not reordered:
        return dump, ()
    more = " and others" if len(reordered) > 1 else ""
    note = f"{reordered[0]}{more}: experts are not listed in the order of their scores, which is no fault"
    return replace(dump, points={name: rows for name, rows in points.items() if len(rows)}), (note,)


def _choices(replay: Replay) -> list[_Choice]:
    steps = {step.makes: step for step in replay.steps}
    looked_up = {step.names[:2]: step.makes for step in replay.steps if len(step.names) == 2}
    found = ((step.makes, scores_of(step, steps)) for step in replay.steps)
    return [
        _Choice(name, chosen[0], looked_up.get((chosen[0], name), ""), chosen[1])
        for name, chosen in found
        if chosen is not None
    ]


def _orders(choice: _Choice, points: Mapping[str, Rows], right: NDArray[np.generic], positions: Ints) -> dict[int, Ints | None]:
    """Position -> the places, in the dump's list, of the experts in the order of their scores, where that is another order.

    None where the right experts are listed in another order and the dump does not say by which scores.
    """
    rows = points[choice.point]
    scores, weights = (_by_position(points.get(name)) for name in (choice.scores, choice.weights))
    orders: dict[int, Ints | None] = {}
    for row, position in enumerate(rows.token_idx.tolist()):
        at, ids = int(position - positions[0]), rows.values[row, : int(rows.counts[row])]
        if not 0 <= at < len(right) or len(ids) != choice.count:
            continue
        same = np.array_equal(np.sort(ids), np.sort(right[at]))
        own = _scores(ids, scores.get(position), weights.get(position))
        if own is None:
            if same and not np.array_equal(ids, right[at]):
                orders[position] = None
            continue
        places = np.argsort(ids, kind="stable")[np.argsort(np.argsort(right[at], kind="stable"), kind="stable")]
        if not (same and _descending(own[places])):  # near ties may be listed either way: then as the right engine does
            places = np.arange(len(ids)) if _descending(own) else np.argsort(-own, kind="stable")
        if not np.array_equal(places, np.arange(len(ids))):
            orders[position] = places
    return orders


def _by_position(rows: Rows | None) -> dict[int, NDArray[np.float32]]:
    """Position -> the recorded values."""
    if rows is None or rows.indices is not None:
        return {}
    return {position: rows.values[row, : int(rows.counts[row])] for row, position in enumerate(rows.token_idx.tolist())}


def _scores(
    ids: NDArray[np.float32], scores: NDArray[np.float32] | None, weights: NDArray[np.float32] | None
) -> NDArray[np.float32] | None:
    """The scores of the listed experts: from the row of all scores if it was recorded as far, else from their weights."""
    if scores is not None and np.isfinite(ids).all() and ids.min(initial=0) >= 0 and ids.max(initial=0) < len(scores):
        return scores[ids.astype(np.int64)]
    return weights if weights is not None and len(weights) == len(ids) else None


def _descending(scores: NDArray[np.float32]) -> bool:
    return bool((np.diff(scores) <= _NEAR * np.abs(scores).max(initial=0)).all())


def _for_each_expert(choice: _Choice, replay: Replay) -> dict[str, int]:
    """The layer's values that have a part for each chosen expert, with the size of their rows: computed from the choice, and not yet
    summed over the experts."""
    layer, after = parse(choice.point).layer, {choice.point}
    for step in replay.steps:
        if parse(step.makes).layer in (None, layer) and not step.makes.endswith(_SUM) and after.intersection(step.names):
            after.add(step.makes)
    sizes = {name: int(np.size(replay.on_host[name])) // replay.rows for name in after}
    return {name: size for name, size in sizes.items() if "moe" in name and size % choice.count == 0}


def _permuted(rows: Rows, size: int, orders: Mapping[int, Ints | None]) -> Rows:
    """Rows of `size` elements with the experts' parts in another order; without those, at these positions, that cannot be put in order."""
    other = np.array([position in orders for position in rows.token_idx.tolist()], dtype=np.bool_)
    known = np.array([orders.get(position) is not None for position in rows.token_idx.tolist()], dtype=np.bool_)
    plain = rows.sketch is None and rows.indices is None
    whole = known & (rows.counts == size) if plain else np.zeros(len(rows), dtype=np.bool_)
    values = rows.values.copy()
    for row in np.flatnonzero(other & whole).tolist():
        order = orders[int(rows.token_idx[row])]
        if order is not None:
            values[row, :size] = values[row, :size].reshape(len(order), -1)[order].reshape(-1)
    return replace(rows, values=values).take(~other | whole)
