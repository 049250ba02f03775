"""Every compared record as columns, which `judge` and `table` read."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.answers.diff import Difference, Limits, Missing, RecordFault, Uncompared
from checkpoints.points import ENCODER, parse
from checkpoints.record import DECODE, PREFILL, Dump

from ..limits import FUTURE_MASS, JUMP
from .align import Pair
from .dataflow import Flow, Upstream, upstream
from .measure import Measures
from .tokens import TokenComparison

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_SHOWN = 16  # values of a record that a verdict carries


class Judged(Struct, frozen=True):
    """Which of our records show something other than the point they are named after, bool [R], and what they show."""

    otherwise: Bools
    faults: tuple[RecordFault, ...] = ()
    unconfirmed: frozenset[str] = frozenset()  # points that differ although nothing that is made from them does
    blind: frozenset[str] = frozenset()  # points that show something else, as in other layers, and may be wrong besides
    elsewhere: Mapping[str, str] = {}  # points whose right values stand under another point's name, and that name
    # By what the errors of records that may be noise are multiplied (`wrong_values.share_of_noise`); 1 for others.
    share: Floats | None = None


class Records(Struct, frozen=True, dict=True):
    """R compared records, sorted by dataflow, then sequence and position.

    Attributes:
        ours, ref: the dumps they came from.
        pairs: rows of both sides; `point` [R] is the index of a record's pair, `row` [R] its row there.
        decode: our side's phase.
        limit: NMSE limit of each record. `of_limit`: error in proportion to it; `failed` where that is above 1, except
            for those that are `otherwise`: they show something other than the point they are named after.
        open: records that cannot be compared: after a near tie, other experts computed them than the reference's.
        stated: the arithmetic of ours, if a header or the caller states it.
        unconfirmed: points that differ although nothing that is made from them does.
        left_out: records that the token sequences left out.
    """

    ours: Dump
    ref: Dump
    pairs: tuple[Pair, ...]
    point: Ints
    row: Ints
    seq: Ints
    token_idx: Ints
    step: Ints
    decode: Bools
    measures: Measures
    limit: Floats
    of_limit: Floats
    failed: Bools
    otherwise: Bools
    open: Bools
    flow: Flow
    limits: Limits
    mode: str
    tokens: TokenComparison
    text: dict[int, str]
    missing_ours: Missing
    missing_ref: Missing
    uncompared: Uncompared
    left_out: int
    strict: bool
    stated: str
    notes: tuple[str, ...]
    excused: int = 0
    record_faults: tuple[RecordFault, ...] = ()
    unconfirmed: frozenset[str] = frozenset()

    @cached_property
    def trusted(self) -> Bools:
        """[R]: records whose error says something of the engine: they show their own point, computed by the reference's experts."""
        return ~(self.otherwise | self.open)

    @cached_property
    def upstream(self) -> Upstream:
        """The errors of what each record depends on, by `flow`."""
        nmse = np.where(self.trusted, self.measures.nmse, 0.0)
        return upstream(self.flow, self.point, self.seq, self.token_idx, nmse, self.failed)

    def text_of(self, name: str, position: int) -> str | None:
        """The text of a point's token; None if it is not known: a decoder's positions, after an encoder, have tokens of their own."""
        return None if self._encoded and not name.startswith(ENCODER) else self.text.get(position)

    @cached_property
    def _encoded(self) -> bool:
        """Whether an encoder's points are compared."""
        return any(name.startswith(ENCODER) for name in self.names)

    def __len__(self) -> int:
        return len(self.point)

    @property
    def names(self) -> tuple[str, ...]:
        """The points in dataflow order."""
        return tuple(pair.point for pair in self.pairs)

    def jump(self) -> Floats:
        """[R]: each error divided by the worst error upstream of it; infinite if that is 0, and 0 if there is no error."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.measures.nmse / self.upstream.worst
        return np.where(self.measures.nmse == 0, 0.0, np.where(np.isnan(ratio), 1.0, ratio))

    def fresh(self) -> Bools:
        """[R]: failing records whose error is not explained by what they are made from."""
        # A leak from later positions shows in no value upstream, and need not be large.
        leak = self.measures.future_mass > FUTURE_MASS
        return self.failed & ((self.jump() > JUMP) | (leak & ~self.upstream.failed))

    def difference(self, i: int) -> Difference:
        """One record, with the values of both sides."""
        m, pair, row = self.measures, self.pairs[self.point[i]], int(self.row[i])
        jump = float(self.jump_of(i))
        width = min(_SHOWN, int(min(pair.ours.counts[row], pair.ref.counts[row])))
        return Difference(
            checkpoint=pair.point,
            layer=parse(pair.point).layer,
            token_idx=int(self.token_idx[i]),
            nmse=float(m.nmse[i]),
            max_abs=_known(m.max_abs[i]),
            limit=float(self.limit[i]),
            ours=tuple(pair.ours.values[row, :width].tolist()),
            ref=tuple(pair.ref.values[row, :width].tolist()),
            fresh=self.fresh_of(i),
            seq=int(self.seq[i]),
            step=int(self.step[i]),
            phase=DECODE if self.decode[i] else PREFILL,
            token=self.text_of(pair.point, int(self.token_idx[i])) if self.seq[i] == 0 else None,
            nmse_slice=_known(m.nmse_slice[i]),
            nmse_row=_known(m.nmse_row[i]),
            of_limit=float(self.of_limit[i]),
            jump=jump if np.isfinite(jump) else None,
            index=_index(m.index[i]),
            cosine=_known(m.cosine[i]),
            relative=_known(m.relative[i]),
            relative_index=_index(m.relative_index[i]),
            ulp=_known(m.ulp[i]),
            ulp_index=_index(m.ulp_index[i]),
            nonfinite_ours=int(m.nonfinite_ours[i]),
            nonfinite_ref=int(m.nonfinite_ref[i]),
            future_mass=_known(m.future_mass[i]),
        )

    def jump_of(self, i: int) -> float:
        """`jump` of one record."""
        nmse, worst = float(self.measures.nmse[i]), float(self.upstream.worst[i])
        if nmse == 0:
            return 0.0
        return 1.0 if nmse == worst else (np.inf if worst == 0 else nmse / worst)

    def fresh_of(self, i: int) -> bool:
        """`fresh` of one record."""
        leak = bool(self.measures.future_mass[i] > FUTURE_MASS) and not self.upstream.failed[i]
        return bool(self.failed[i]) and (self.jump_of(i) > JUMP or leak)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _index(value: int) -> int | None:
    return None if value < 0 else int(value)
