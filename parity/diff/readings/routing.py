"""Which experts a router chose: ids are compared as sets, and a near tie that flips is not a fault.

After a flip other experts compute, so that nothing that depends on them can be compared at that position and later ones.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import parse
from checkpoints.record import Rows

from ..measured.align import Pair
from ..measured.dataflow import Flow
from ..measured.measure import Measured, energies
from ..measured.operations import CHOICES, MIXING
from ..tolerances.against_limits import Held
from .wrong_values import error_energies

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_SHOWN = 3  # flips that are reported one by one
# An error's energy in proportion to the largest row of its point: other experts, ten times as large as any of these, would make it. A right
# BF16 engine's were at most 10 times their own row, which was a small one (qwen3next of random weights, seed 38).
_LARGER = 100.0


def is_routing(pair: Pair) -> bool:
    """Whether a point's values are ids of experts."""
    return pair.ref.dtype.startswith("i") or names_experts(pair.point)


def names_experts(point: str) -> bool:
    """Whether a point is the choice of experts by its name."""
    return parse(point).kind.endswith("moe_topk")


def as_sets(measured: Measured) -> Measured:
    """The measures with the error of chosen experts as the share of them that the other side did not choose; their order is ignored."""
    if not any(map(is_routing, measured.pairs)):
        return measured
    columns = {name: getattr(measured.measures, name).copy() for name in ("nmse", "nmse_slice", "nmse_row", "max_abs")}
    for number, pair in enumerate(measured.pairs):
        if not is_routing(pair):
            continue
        rows = np.flatnonzero(measured.point == number)
        errors = [_apart(ids(pair.ours, r), ids(pair.ref, r)) for r in measured.row[rows].tolist()]
        for column in columns.values():
            column[rows] = errors
    return replace(measured, measures=replace(measured.measures, **columns))


def ids(rows: Rows, r: int) -> frozenset[int]:
    """The experts of record `r` of a point of ids."""
    values = rows.values[r, : int(rows.counts[r])]
    return frozenset(int(value) for value in values[np.isfinite(values)])


def chosen_by(scores: NDArray[np.float32], chosen: frozenset[int]) -> bool:
    """Whether these experts may have been chosen by scores [experts]: none of the others has a higher one. NaN may stand anywhere."""
    if not chosen or max(chosen) >= len(scores):
        return True
    inside = np.isin(np.arange(len(scores)), sorted(chosen))
    return not (scores[~inside, None] > scores[inside]).any()


def _apart(ours: frozenset[int], ref: frozenset[int]) -> float:
    return len(ref - ours) / max(len(ref), 1) if len(ours) == len(ref) else 1.0


class Routed(Struct, frozen=True):
    """`open`: records, bool [R], that differ but cannot be compared: other experts computed them, or the same in another order."""

    open: Bools
    notes: tuple[str, ...] = ()


def routed(measured: Measured, held: Held, model: Flow, ref: Mapping[str, Rows]) -> Routed:
    """The records that cannot be judged because near ties flipped, or because experts are in another order."""
    left_open = np.zeros(len(measured.point), dtype=np.bool_)
    flips: list[str] = []
    orders: list[str] = []
    for number, pair in enumerate(measured.pairs):
        if not is_routing(pair):
            continue
        below = model.descendants(pair.point)
        how = model.whole.computations.get(pair.point)
        scores = np.flatnonzero(_of(measured, set(how.reads if how is not None else ())))
        inside = _in_order_of(model, pair.point, below)
        for record in np.flatnonzero(measured.point == number).tolist():
            r = int(measured.row[record])
            seq, position = int(measured.seq[record]), int(measured.token_idx[record])
            our_ids, ref_ids = ids(pair.ours, r), ids(pair.ref, r)
            # A limit that was measured where choices flip, too, lets other ids pass: what they compute is no more comparable for that.
            if our_ids != ref_ids and not left_open[record]:
                limit = _limit_of_scores(measured, held, scores, seq, position)
                margin = _tie(our_ids, ref_ids, seq, position, model, pair.point, ref, limit)
                if margin is None:
                    continue
                left_open[record] = True
                left_open |= _of(measured, below) & (measured.seq == seq) & (measured.token_idx >= position)
                flips.append(
                    f"{pair.point}, position {position}: ours takes expert {_listed(our_ids - ref_ids)}, the reference "
                    f"{_listed(ref_ids - our_ids)}: a near tie ({margin:.1e} apart)"
                )
            elif not np.array_equal(
                pair.ours.values[r, : int(pair.ours.counts[r])], pair.ref.values[r, : int(pair.ref.counts[r])]
            ):
                here = _of(measured, inside) & (measured.seq == seq) & (measured.token_idx == position) & held.failed
                left_open |= here
                if here.any():
                    orders.append(pair.point)
    others, ties = _of_other_rows(measured, held, model, ref)
    left_open, flips = (left_open | others) & held.failed & ~_of_no_expert(measured), [*flips, *ties]
    notes = [*flips[:_SHOWN]]
    if flips:
        more = f"and {len(flips) - _SHOWN} more near ties; " if len(flips) > _SHOWN else ""
        notes.append(f"{more}values computed by different experts are not compared: {int(left_open.sum())} records")
    if orders:
        notes.append(f"{orders[0]}{' and others' if len(set(orders)) > 1 else ''}: the same experts in another order")
    return Routed(left_open, tuple(notes))


def _of_no_expert(measured: Measured) -> Bools:
    """The records, bool [R], whose error is far larger than any of the reference's rows of their point: no other expert makes that."""
    largest = np.zeros(len(measured.pairs))
    np.maximum.at(largest, measured.point, energies(measured))
    return np.asarray(error_energies(measured) > _LARGER * largest[measured.point])


def _of_other_rows(measured: Measured, held: Held, model: Flow, ref: Mapping[str, Rows]) -> tuple[Bools, list[str]]:
    """The failing records that show other rows, chosen by scores which nearly tie (of groups of experts), and a sentence for each."""
    other, ties = np.zeros(len(measured.point), dtype=np.bool_), list[str]()
    for record in np.flatnonzero(held.failed).tolist():
        name = measured.names[measured.point[record]]
        how = model.whole.computations.get(name)
        if how is None or how.op != "GET_ROWS" or len(how.reads) != 2 or names_experts(how.reads[1]):
            continue
        seq, position = int(measured.seq[record]), int(measured.token_idx[record])
        scores = _scores(ref, how.reads[1], seq, position)
        limit = _limit_of_scores(measured, held, np.flatnonzero(_of(measured, {how.reads[1]})), seq, position)
        margin = None if scores is None or (scores == np.rint(scores)).all() else nearest(scores, limit)  # no ids
        pair, rows = measured.pairs[measured.point[record]], _scores(ref, how.reads[0], seq, position)
        if (
            margin is not None
            and scores is not None
            and _are_rows_of(pair.ours, int(measured.row[record]), rows, len(scores), held.limit[record])
        ):
            other[record] = True
            ties.append(f"{name}, position {position}: its rows are chosen by {how.reads[1]}: a near tie ({margin:.1e} apart)")
    return other, ties


def _are_rows_of(ours: Rows, r: int, whole: Floats | None, number: int, limit: float) -> bool:
    """Whether record `r` of ours is made of rows, within the limit, of the `number` that the reference has at this position, in `whole`."""
    values = ours.values[r, : int(ours.counts[r])].astype(np.float64)
    if whole is None or ours.indices is not None or not np.isfinite(values).all() or not len(whole) or len(whole) % number:
        return False
    error, energy, every = 0.0, 0.0, whole.reshape(number, -1)
    width = every.shape[1]
    for start in range(0, len(values), width):
        part = values[start : start + width]
        apart = ((every[:, : len(part)] - part) ** 2).sum(axis=1)
        nearest_one = int(np.argmin(apart))
        error, energy = error + float(apart[nearest_one]), energy + float((every[nearest_one, : len(part)] ** 2).sum())
    return error <= limit * energy


def in_order_of_experts(model: Flow, pairs: Sequence[Pair]) -> set[str]:
    """The points whose values are chosen experts' ids or stand in their order: where a near tie exchanges two of them, so are they."""
    chosen = [pair.point for pair in pairs if is_routing(pair)]
    return {name for point in chosen for name in (point, *_in_order_of(model, point, model.descendants(point)))}


def _in_order_of(model: Flow, point: str, below: set[str]) -> set[str]:
    """The points of the layer whose values are in the order of the chosen experts: those before their sum.

    Nodes without a telling name are among them if they are made from nothing else (a scaled copy of the ids, say).
    """
    inside = {point}
    for name in model.names:
        if name not in below or parse(name).layer != parse(point).layer or name.endswith("moe_out"):
            continue
        if "moe" in name or (parse(name).known is None and inside.issuperset(model.parents[name])):
            inside.add(name)
    return inside - {point}


def _limit_of_scores(measured: Measured, held: Held, scores: Ints, seq: int, position: int) -> float:
    """The limit of the scores that experts are chosen by (the records `scores`) at a position; if not compared, of what was compared."""
    here = scores[(measured.seq[scores] == seq) & (measured.token_idx[scores] == position)]
    if not len(here):
        here = np.flatnonzero((measured.seq == seq) & (measured.token_idx == position))
    return float(held.limit[here].max())


def _of(measured: Measured, names: set[str]) -> Bools:
    wanted = np.array([name in names for name in measured.names], dtype=np.bool_)
    return np.asarray(wanted[measured.point])


def _listed(ids: frozenset[int]) -> str:
    return " and ".join(map(str, sorted(ids)))


def _tie(
    our_ids: frozenset[int],
    ref_ids: frozenset[int],
    seq: int,
    position: int,
    model: Flow,
    point: str,
    ref: Mapping[str, Rows],
    limit: float,
) -> float | None:
    """How far apart the reference's scores of the exchanged experts are, if an error within the limit can exchange them; else None.

    If experts are chosen from chosen groups, a near tie of groups exchanges them, too, whatever their own scores are.
    """
    if len(our_ids) != len(ref_ids):
        return None
    groups: list[float] = []
    for name in _chosen_by(model, point):
        scores = _scores(ref, name, seq, position)
        if scores is None:
            continue
        if max(our_ids | ref_ids) >= len(scores):  # not one score for each expert
            groups += [margin for margin in (nearest(scores, limit),) if margin is not None]
            continue
        lost, won = scores[sorted(ref_ids - our_ids)], scores[sorted(our_ids - ref_ids)]
        if not (np.isfinite(lost).all() and np.isfinite(won).all()):
            continue  # its group was not chosen
        margin = float(lost.max() - won.min())
        if margin**2 <= limit * float(np.sum(scores[np.isfinite(scores)] ** 2)):
            return margin
    return min(groups, default=None)


def _chosen_by(model: Flow, point: str) -> list[str]:
    """The nodes that experts are chosen by, the nearest first, back to the product that scores them."""
    waiting, chosen = [point], list[str]()
    while waiting:
        name = waiting.pop(0)
        how = model.whole.computations.get(name)
        for other in how.reads if how is not None and (how.op not in MIXING or name == point) else ():
            if other not in chosen:
                chosen.append(other)
                waiting.append(other)
    return chosen


def _scores(ref: Mapping[str, Rows], name: str, seq: int, position: int) -> Floats | None:
    """A whole row of the reference; None if it was not recorded."""
    rows = ref.get(name)
    at = np.flatnonzero((rows.seq == seq) & (rows.token_idx == position)) if rows is not None else np.zeros(0, np.int64)
    if rows is None or not len(at) or not rows.full()[at[0]]:
        return None
    return rows.values[at[0], : int(rows.counts[at[0]])].astype(np.float64)


def nearest(scores: Floats, limit: float) -> float | None:
    """The smallest difference between two neighbouring scores, if an error within the limit can exchange them; else None."""
    known = np.sort(scores[np.isfinite(scores)])
    if len(known) < 2:
        return None
    margin = float(np.diff(known).min())
    return margin if margin**2 <= limit * float(np.sum(known**2)) else None


def may_have_flipped(model: Flow, point: str, seq: int, position: int, ref: Mapping[str, Rows], limit: float) -> str:
    """The node between a point and the compared points before it that chooses by a near tie in the reference's scores; else empty."""
    stretch = model.between(point)
    for name in stretch.nodes if stretch is not None else ():
        how = model.whole.computations[name]
        if how.op not in CHOICES:
            continue
        for read in how.reads:
            scores = _scores(ref, read, seq, position)
            if scores is None:
                continue
            chosen = _chosen(model, name, seq, position, ref)
            if (nearest(scores, limit) if chosen is None else _of_the_last(scores, chosen, limit)) is not None:
                return name
    return ""


def _chosen(model: Flow, name: str, seq: int, position: int, ref: Mapping[str, Rows]) -> frozenset[int] | None:
    """The experts that the reference chose at a node, if it recorded them."""
    for point in (name, *model.whole.readers.get(name, ())):
        rows = ref.get(point)
        if rows is None or not parse(point).kind.endswith("moe_topk"):
            continue
        at = np.flatnonzero((rows.seq == seq) & (rows.token_idx == position))
        if len(at) and rows.full()[at[0]]:
            return ids(rows, int(at[0]))
    return None


def _of_the_last(scores: Floats, chosen: frozenset[int], limit: float) -> float | None:
    """How far the last chosen expert's score is from the next one's, if an error within the limit can exchange them; else None."""
    if not chosen or max(chosen) >= len(scores) or len(chosen) >= len(scores) or not np.isfinite(scores).all():
        return nearest(scores, limit)
    inside = np.isin(np.arange(len(scores)), sorted(chosen))
    margin = float(scores[inside].min() - scores[~inside].max())
    return margin if margin**2 <= limit * float(np.sum(scores**2)) else None
