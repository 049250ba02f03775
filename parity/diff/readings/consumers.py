"""Is the operation wrong, or only the record? If everything computed from the recorded point agrees, the operation is right, and the
record shows another layout, moment or point than its name says.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import RecordFault
from checkpoints.points import parse
from checkpoints.record import Dump, Rows

from ..measured.dataflow import Flow
from ..measured.measure import Measured, energies
from ..measured.operations import CHOICES, ELEMENTWISE, MIXING, NORMS
from ..measured.records import Judged
from ..tolerances.against_limits import Held, limit_at_last
from .lost_numbers import LostNumbers
from .readings import MOMENT, NAME, Allowed, Others, Reading, head_size_of
from .record_faults import in_order, record_fault
from .rounded_records import RoundedRecords
from .routing import chosen_by, ids
from .same_vector import alike
from .shown import shown_by
from .wrong_values import at_bounds, in_seen_head, removed_by_a_norm, share_of_noise

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# A consumer's error has to be this many times below that of the record it is made from, both in proportion to their rows and, if
# the consumer is a sum, in absolute terms: a residual stream that is much larger than what is added hides its error.
_BELOW = 100.0
_UNRELATED = 2.0  # NMSE of unrelated values: however far off a record is, a norm or a product after it shows no more


def judged(
    measured: Measured,
    held: Held,
    model: Flow,
    ours: Dump,
    ref: Dump,
    known: Sequence[RecordFault] = (),
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Judged:
    """Judge every failing point by what is made from it. `known`: faults of points that are not compared any more.

    `elsewhere`: points whose right values stand under such a point's name, and that name.
    """
    return _Consumers(measured, held, model.of_readers, ours, ref, elsewhere).judged(known)


class _Consumers:
    """Judges points from the last to the first, so that what is made from a point is judged before it."""

    def __init__(
        self, measured: Measured, held: Held, model: Flow, ours: Dump, ref: Dump, elsewhere: Mapping[str, str]
    ) -> None:
        self._measured, self._held, self._model, self._ours, self._ref = measured, held, model, ours, ref
        self._place = {name: number for number, name in enumerate(measured.names)}
        self._rows = np.split(
            np.arange(len(measured.point)), np.searchsorted(measured.point, np.arange(1, len(measured.pairs)))
        )
        self._at: dict[str, dict[tuple[int, int], int]] = {}
        self._otherwise = np.zeros(len(measured.point), dtype=np.bool_)
        self._share = np.ones(len(self._otherwise))  # `Judged.share`
        self._energy = energies(measured)
        # Points whose error what agrees after them need not show: a norm or a bound removes it, a choice is the same.
        self._hidden: set[str] = set()
        self._numbers = LostNumbers(model, measured)
        self._readings: dict[str, Reading | None] = {}
        self._rounded = RoundedRecords(model, self._wrong_records)
        self._others = Others(ref.points, rotated=model.may_rotate)
        self._right_elsewhere = dict(elsewhere)
        self._blind: set[str] = set()  # points whose own values are recorded nowhere, and not known to be right
        self._head_size = head_size_of(ref, ours)

    def judged(self, known: Sequence[RecordFault]) -> Judged:
        """All record faults, in dataflow order."""
        shown: dict[str, Reading | None] = {}
        unconfirmed: set[str] = set()
        while self._judge_once(shown, unconfirmed):
            pass  # what one layer shows may be known from another one
        wrong = {name: self._wrong(name) for name in self._measured.names if name in shown}
        faults = [*known, *(self._fault(name, wrong[name], shown[name]) for name in wrong)]
        return Judged(
            self._otherwise,
            in_order(faults, self._measured.names, self._model),
            frozenset(unconfirmed),
            frozenset(self._blind),
            self._right_elsewhere,
            self._share,
        )

    def _wrong(self, name: str) -> Ints:
        rows = self._rows[self._place[name]]
        return np.asarray(rows[self._held.failed[rows] & (self._share[rows] == 1)])

    def _judge_once(self, shown: dict[str, Reading | None], unconfirmed: set[str]) -> bool:
        """Judge the points that are not yet acquitted; returns whether any of them is now."""
        known = {(parse(name).kind, read.same) for name, read in shown.items() if read is not None}
        before = len(shown)
        unconfirmed.clear()
        for name in reversed(self._measured.names):
            wrong = self._wrong(name)
            if name in shown or not len(wrong):
                continue
            if not (np.isfinite(self._measured.measures.nmse[wrong]) | self._numbers.lost(name, wrong).any(axis=1)).all():
                continue  # nothing is known of NaN that was not recorded
            decided = self._decisions(name, wrong)
            alike = {reading for kind, reading in known if kind == parse(name).kind}
            if decided is None and not alike and not self._begins(name) and not self._rounded.alone(name):
                continue
            read = self._reading(name, wrong)
            if read is not None and read.own and decided is not None and not any(decided):
                # Its own values, all of them: what chooses by them need not tell, if something else does.
                decided = self._decisions(name, wrong, choices=False)
            acquitted = self._acquitted(name, decided, read)
            pair, rows = self._measured.pairs[self._place[name]], self._measured.row[wrong]
            share = share_of_noise(pair, rows, self._measured.measures.nmse[wrong], self._held.take(wrong))
            if acquitted and read is None and share is not None:
                self._share[wrong] = share
            elif acquitted or (read is not None and (read.proof or read.same in alike or self._rounded.alone(name))):
                if not acquitted and read is not None and not read.own:
                    self._blind.add(name)
                self._otherwise[wrong] = True
                shown[name] = read
            elif elsewhere := self._elsewhere(name, wrong):
                self._otherwise[wrong] = True
                shown[name] = Reading(NAME, f"another value than its name says: its own is recorded as {elsewhere}", own=False)
            elif decided is not None and (any(decided) or name in self._hidden):
                unconfirmed.add(name)
        return len(shown) > before

    def _elsewhere(self, name: str, wrong: Ints) -> str:
        """The point of the same layer under whose name a first wrong point's right values were recorded: it was computed right.

        That is one made from it. Two products of one input that show each other's values may have exchanged their weights.
        """
        if name in self._right_elsewhere:
            return self._right_elsewhere[name]
        if parse(name).layer is None or not self._begins(name):
            return ""
        keys = self._keys(wrong)
        below = self._model.descendants(name)
        for other in self._measured.names:
            if other not in below or parse(other).layer != parse(name).layer:
                continue
            wrong_there = self._wrong(other)
            if len(wrong_there) and keys <= self._keys(wrong_there):
                read = self._reading(other, wrong_there)
                if read is not None and read.shows == name:
                    self._right_elsewhere[name] = other
                    return other
        return ""

    def _keys(self, records: Ints) -> set[tuple[int, int]]:
        return set(zip(self._measured.seq[records].tolist(), self._measured.token_idx[records].tolist(), strict=True))

    def _begins(self, name: str) -> bool:
        """Whether nothing that a point is made from is wrong."""
        return all(self._otherwise[self._wrong(other)].all() for other in self._model.parents[name])

    def _reading(self, name: str, wrong: Ints) -> Reading | None:
        if name not in self._readings:
            self._readings[name] = self._read(name, wrong)
        return self._readings[name]

    def _wrong_records(self, name: str) -> tuple[Rows, Rows]:
        pair, rows = self._measured.pairs[self._place[name]], self._measured.row[self._wrong(name)]
        return pair.ours.take(rows), pair.ref.take(rows)

    def _read(self, name: str, wrong: Ints) -> Reading | None:
        if not np.isfinite(self._measured.measures.nmse[wrong]).all():
            return None
        ours, ref = self._wrong_records(name)
        last = limit_at_last(self._held, self._measured, wrong, self._model.parents[name])
        allowed = Allowed.of(self._held.limit[wrong], self._measured.measures.nmse[wrong], ours, ref, last=last)
        layout = shown_by(ours, ref, allowed, self._others, self._head_size)
        if layout is None and (others := alike(name, ours, self._ours.points)):
            here, there = parse(name), parse(others[0])
            away = "" if here.layer is None or there.layer is None else str(there.layer - here.layer)
            return Reading(
                MOMENT,
                f"it is {others[0]} of ours: captured late, or from its buffer",
                relation=f"{there.kind} {away or there.name}",
                own=False,
            )
        return layout

    def _decisions(self, name: str, wrong: Ints, *, choices: bool = True) -> list[bool] | None:
        """For each wrong record of a point, whether what is made from it decides; None if something made from it is wrong, too.

        `choices`: whatever is chosen by it must decide as well.
        """
        children = self._model.children[name]
        if not choices:
            children = tuple(child for child in children if not self._chooses(name, child))
        if not children:
            return None
        decided: list[bool] = []
        for record in wrong.tolist():
            judged_by_consumers = self._decided(name, record, children)
            if judged_by_consumers is None:
                return None
            decided.append(judged_by_consumers)
        return decided

    def _chooses(self, name: str, child: str) -> bool:
        return bool(self._model.operations(self._model.path(name, child)) & CHOICES)

    def _acquitted(self, name: str, decided: list[bool] | None, read: Reading | None) -> bool:
        """Whether the points made from a point show that the operation is not to blame for its wrong records."""
        if decided is None:
            return False
        if read is not None:
            return all(decided) if read.weak else any(decided)
        # Without a reading the proof must be complete: all positions, and no consumer after a soft max, which may hide the error.
        children = self._model.children[name]
        after_soft_max = any(self._model.hidden(name, child) for child in children)
        return all(decided) and not after_soft_max

    def _decided(self, name: str, record: int, children: tuple[str, ...]) -> bool | None:
        """Whether everything made from a record agrees and would not if it were wrong; None if something made from it is wrong.

        Even if something is wrong, a norm or a product with weights that agrees has read the right row.
        """
        decided, consumed, hidden, unclear = True, False, False, False
        failing, read = False, False
        for child in children:
            other = self._record(child, record)
            if other is None and self._left_by_a_pass(child, record):
                unclear = True
            elif other is None:
                decided = False
            elif self._otherwise[other] or self._share[other] != 1:
                consumed = True  # judged in turn by what is made from it
            elif self._held.failed[other]:
                failing = True
            elif not np.isfinite(self._measured.measures.nmse[record]):  # what is made from NaN would be NaN, too
                lost = self._numbers.would_be_lost(name, child, record, other, whole=self._known_whole(other))
                if lost or self._would_choose_others(name, child, record, other):
                    consumed = True
                else:
                    unclear = True  # another reader that had a finite value shows that there was one
                    self._hidden.add(name)
            elif self._hides(name, child, record, other):
                hidden = True  # it says nothing, but a residual sum beside it does
                self._hidden.add(name)
            elif self._telling(name, child, record, other):
                consumed = True
                read = read or (self._reads_rows(name, child) and not self._model.hidden(name, child))
            else:
                decided = False
                if self._chooses(name, child):
                    self._hidden.add(name)  # scores of what was not chosen may be any below the chosen ones
        if failing:
            return True if read else None
        return decided and (consumed or not (hidden or unclear))

    def _left_by_a_pass(self, name: str, record: int) -> bool:
        """Whether a point is a state, recorded once in a pass, at its last position: it has no counterpart of each of that pass's."""
        of_pass = self._measured.step[self._rows[self._place[name]]] == self._measured.step[record]
        return int(of_pass.sum()) == 1

    def _known_whole(self, record: int) -> bool:
        """Whether a record is compared as a whole row."""
        measures = self._measured.measures
        return not (np.isnan(measures.nmse_row[record]) or measures.bound[record])

    def _reads_rows(self, name: str, child: str) -> bool:
        """Whether a consumer reads whole rows: through a norm or a product with weights."""
        return self._model.mixes(name, child) or bool(self._model.operations(self._model.path(name, child)) & NORMS)

    def _record(self, name: str, like: int) -> int | None:
        if name not in self._at:
            rows = self._rows[self._place[name]]
            keys = zip(self._measured.seq[rows].tolist(), self._measured.token_idx[rows].tolist(), strict=True)
            self._at[name] = dict(zip(keys, rows.tolist(), strict=True))
        return self._at[name].get((int(self._measured.seq[like]), int(self._measured.token_idx[like])))

    def _telling(self, name: str, child: str, record: int, other: int) -> bool:
        """Whether an agreeing consumer would differ if the record were wrong: its error is far smaller, and it sees the wrong elements."""
        measures = self._measured.measures
        error, left = float(measures.nmse[record]), float(measures.nmse[other])
        if not left * _BELOW <= min(error, _UNRELATED):
            return False
        operations = self._model.operations(self._model.path(name, child))
        if self._chooses(name, child):  # many other scores choose the same experts
            return self._would_choose_others(name, child, record, other)
        if operations <= ELEMENTWISE and not left * self._energy[other] * _BELOW <= error * self._energy[record]:
            return False
        if self._known_whole(other) or self._model.mixes(name, child):
            return True
        seen = measures.nmse_slice[record] * _BELOW > self._held.limit[record]
        seen_head = (*self._row_of(name, record), *self._row_of(child, other), self._head_size)
        if seen and (operations <= ELEMENTWISE | NORMS or in_seen_head(*seen_head)):  # a norm scales all elements alike
            return True
        # A later mix, by weights or attention's products, sees the whole row.
        return any(
            self._agrees(further, record)
            for further in self._model.children[child]
            if MIXING & self._model.operations(self._model.path(child, further))
        )

    def _row_of(self, name: str, record: int) -> tuple[Rows, int]:
        return self._measured.pairs[self._place[name]].ours, int(self._measured.row[record])

    def _would_choose_others(self, name: str, child: str, record: int, other: int) -> bool:
        """Whether experts are chosen by a record's values themselves, and by these others would have been chosen."""
        (scores, above), (chosen, below) = self._row_of(name, record), self._row_of(child, other)
        if not self._model.operations(self._model.path(name, child)) <= CHOICES | {"VIEW"} or not scores.full()[above]:
            return False
        return not chosen_by(scores.values[above, : scores.counts[above]], ids(chosen, below))

    def _hides(self, name: str, child: str, record: int, other: int) -> bool:
        """Whether an agreeing consumer would agree even if the engine had used the recorded value, because a norm or a bound removes
        the difference."""
        operations, limit = self._model.operations(self._model.path(name, child)), float(self._held.limit[record])
        pair, row = self._measured.pairs[self._place[name]], int(self._measured.row[record])
        if operations <= ELEMENTWISE:
            return at_bounds(pair, row, limit, self._measured.pairs[self._place[child]], int(self._measured.row[other]))
        if not operations & NORMS or not operations <= ELEMENTWISE | NORMS:
            return False
        return removed_by_a_norm(pair, row, limit, limit * _BELOW)  # far more than what an agreeing norm may be off

    def _agrees(self, name: str, like: int) -> bool:
        other = self._record(name, like)
        return other is not None and not self._held.failed[other]

    def _agreeing(self, name: str) -> list[str]:
        """The nearest points made from one that agree as they were recorded."""
        agreeing: list[str] = []
        waiting, seen = [*self._model.children[name]], set[str]()
        while waiting:
            child = waiting.pop(0)
            if child in seen:
                continue
            seen.add(child)
            if self._otherwise[self._rows[self._place[child]]].any():
                waiting += self._model.children[child]
            elif not self._held.failed[self._rows[self._place[child]]].any():
                agreeing.append(child)
        return agreeing

    def _fault(self, name: str, wrong: Ints, read: Reading | None) -> RecordFault:
        nonfinite = not np.isfinite(self._measured.measures.nmse[wrong]).all()
        return record_fault(self._wrong_records(name)[0], read, self._agreeing(name), nonfinite=nonfinite)
