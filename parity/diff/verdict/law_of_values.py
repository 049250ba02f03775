"""The law by which wrong values follow from the reference's: one sentence that holds for every recorded element, or ""."""

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import of_scores
from checkpoints.record import Rows

from ...laws.beside import ENOUGH, LEFT, Beside, room, room_of_others
from ...laws.keys import law_of_keys
from ...laws.laws import NOT_RECORDED, SAME_ERROR, WRONG, law
from ..measured.records import Records
from ..measured.slices import prepare
from ..measured.whole_rows import sizes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def law_of_values(records: Records, failing: Ints) -> str:
    """The law of some records of one point, which are wrong; "" without one."""
    if sentence := _of_keys(records, failing):
        return sentence
    beside = _beside(records, failing)
    if beside is None or beside.dumped.size < ENOUGH:
        return ""
    sentence = law(beside)
    if sentence.endswith(WRONG):
        off = (beside.dumped - beside.right) ** 2 > beside.room[:, None]
        if (off.any(axis=0) != off.all(axis=0)).any():
            return ""  # elements that are wrong at some of the positions make no pattern
    if sentence == NOT_RECORDED or SAME_ERROR in sentence:
        return ""
    return sentence if _all_recorded(records, failing) else _of_the_recorded(sentence)


def _of_keys(records: Records, failing: Ints) -> str:
    """The law of attention's weights, if the point has such: rows with a weight for each key, of which later positions have more."""
    if not len(failing):
        return ""
    pair, at = records.pairs[records.point[failing[0]]], records.row[failing]
    values, of_all = prepare(pair), sizes(pair.ref)
    if not of_scores(pair.point) or values.counts is None or values.index is not None or np.isnan(of_all).any():
        return ""
    known = np.arange(values.a.shape[1]) < values.counts[at, None]
    dumped, right = (np.where(known, side[at], 0.0).astype(np.float64) for side in (values.a, values.b))
    printed = np.zeros(len(at)) if values.quantum is None else np.where(known, values.quantum[at] ** 2, 0.0).sum(axis=1)
    compared = Beside(
        dumped=dumped,
        right=right,
        index=np.arange(dumped.shape[1]),
        room=room(records.limit[failing], (right**2).sum(axis=1), dumped, right) + printed,
        printed=printed,
        rows=at,
    )
    return law_of_keys(compared, of_all[at].astype(np.int64), values.counts[at], of_all.astype(np.int64))


def _all_recorded(records: Records, failing: Ints) -> bool:
    """Whether both sides recorded these rows whole."""
    pair, at = records.pairs[records.point[failing[0]]], records.row[failing]
    return bool((np.minimum(pair.ours.counts[at], pair.ref.counts[at]) == sizes(pair.ref)[at]).all())


def _of_the_recorded(sentence: str) -> str:
    """A law's sentence, where nothing is known of the elements that were not recorded."""
    return sentence.replace("every element", "every recorded element").replace("the others are", "the other recorded ones are")


def most_are_right(records: Records, failing: Ints) -> bool:
    """Whether more than half of the recorded elements of these records are right, each by its share of its record's limit, and like the
    right one: beside outliers a limit is wider than whole other elements.
    """
    beside = _beside(records, failing)
    if beside is None:
        return False
    allowed = (records.limit[failing] * np.mean(beside.right**2, axis=1))[:, None]
    allowed = np.minimum(allowed, LEFT * beside.right**2)
    return bool(2 * ((beside.dumped - beside.right) ** 2 <= allowed).mean() > 1)


def _beside(records: Records, failing: Ints) -> Beside | None:
    """These records, [R], of one point beside the reference's.

    None where their values are not leading ones, are not numbers, or are not equally many (a cache's rows, of which later positions read
    more: in what all rows have, most of them would not be seen).
    """
    if not len(failing):
        return None
    pair, at = records.pairs[records.point[failing[0]]], records.row[failing]
    values = prepare(pair)
    if values.counts is None or np.ptp(values.counts[at]):
        return None
    width = int(values.counts[at[0]])
    dumped, right = (side[at, :width].astype(np.float64) for side in (values.a, values.b))
    if values.index is not None or not width or not np.isfinite(right).all():
        return None
    quantum = values.quantum
    printed = np.zeros(len(at)) if quantum is None else (quantum[at, :width] ** 2).sum(axis=1)
    noise = room(records.limit[failing], (right**2).sum(axis=1), dumped, right)
    return Beside(
        dumped=dumped,
        right=right,
        index=np.arange(width, dtype=np.int64),
        room=noise + printed,
        others=room_of_others(noise, right) + printed,
        printed=printed,
        rows=at,
        whole=_whole(pair.ref),
    )


def _whole(ref: Rows) -> Floats | None:
    """The reference's rows if they are whole and of all positions from 0 on: laws count rows as positions."""
    of_one_length = ref.full().all() and len(set(ref.counts.tolist())) == 1
    in_order = np.array_equal(ref.token_idx, np.arange(len(ref))) and (np.diff(ref.seq) == 0).all()
    return ref.values[:, : int(ref.counts[0])].astype(np.float64) if of_one_length and in_order else None
