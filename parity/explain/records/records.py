"""A dump's records beside the values of the right engine, in a form with which many candidates are compared."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import DumpError
from checkpoints.points import LOGITS, of_scores, parse
from checkpoints.printable import first_names
from checkpoints.record import Dump, Header, Rows
from checkpoints.summary import summarise
from engine.replay.replay import Replay

from ...diff.limits import EXACT_FLOOR
from ...diff.measured.align import Pair, align
from ...diff.measured.measure import measure
from ...diff.measured.slices import SLICE_FLOOR
from ...diff.measured.whole_rows import sizes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The share of a record's error that may be left where a candidate is taken for better, as of a lead's.
_BETTER = 0.1


class Expected(Struct, frozen=True):
    """The records of one point; R records of k values.

    Attributes:
        rows: int64 [R], the replay's row of each record.
        values: float64 [R, k]; `present` says which of them exist; `index` which elements of the row they are.
        quantum: half the step of the printed digits, [R, k].
        energy: [R], the divisor of a squared error.
        base: [R], NMSE against the right engine. limit: [R], NMSE that counts as noise.
    """

    pair: Pair
    rows: Ints
    values: Floats
    present: NDArray[np.bool_]
    index: Ints | None
    quantum: Floats
    energy: Floats
    base: Floats
    limit: Floats

    @property
    def point(self) -> str:
        """The point's name."""
        return self.pair.point

    @property
    def over(self) -> NDArray[np.bool_]:
        """Which records differ from the right engine's, [R]."""
        return np.asarray(self.base > self.limit)

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Which records have values that are not a number, [R]: no arithmetic makes these of numbers that it can hold."""
        return np.asarray((self.present & np.isnan(self.values)).any(axis=1) & self.over)

    def nmse(self, tensor: NDArray[np.float32], positions: Ints) -> Floats:
        """NMSE of a candidate's tensor, [R]; records beyond the candidate's rows are NaN.

        The slice's NMSE is computed as `measure` does, and by `measure` itself if records hold more than the slice.
        """
        return np.asarray(self.nmse_of(tensor[None], positions)[0])

    def nmse_of(self, tensors: NDArray[np.float32], positions: Ints) -> Floats:
        """`nmse` of M tensors, [M, …] -> [M, R]."""
        here = self.rows < len(positions)
        slices = self._slices(tensors, positions, here)
        present, wanted = self.present[here], self.values[here]
        finite = np.isfinite(slices) & np.isfinite(wanted)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            delta = np.where(present & finite, slices - wanted, 0.0)
            printed = self.quantum[here]
            if printed.any():
                delta[np.abs(delta) <= printed + np.spacing(np.abs(wanted).astype(np.float32))] = 0.0
            error = np.einsum("mij,mij->mi", delta, delta) / self.energy[here]
        error[np.isnan(error)] = 0.0  # no difference where there are no values
        one_sided = present & (np.isfinite(slices) != np.isfinite(wanted))
        error[one_sided.any(axis=2)] = np.inf
        result = np.full((len(tensors), len(self.rows)), np.nan)
        result[:, here] = error
        if self.whole:  # a sketch is only compared where the slice does not contradict it
            base, limit = self.base[here], self.limit[here]
            better = (base > limit) & ((error <= limit) | (error < _BETTER * base))
            for number, agrees in enumerate(error <= limit if error.size else ()):
                # A record may differ in its sketch alone: then a slice that hardly moves is no sign of a better one.
                asked = here.copy()
                asked[here] = True if agrees.all() else better[number]
                if asked.any():
                    result[number, asked] = self._measured(tensors[number], positions, asked)[asked]
        return result

    def residual(self, tensor: NDArray[np.float32], positions: Ints) -> Floats:
        """The recorded elements' difference to a tensor of the first rows, over each record's size: float64 [n]; absent ones are 0."""
        here = self.rows < len(positions)
        values = self._slice(tensor, positions, here)
        present = self.present[here] & np.isfinite(self.values[here])
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            delta = np.where(present, (values - self.values[here]) / np.sqrt(self.energy[here])[:, None], 0.0)
        return np.asarray(delta.reshape(-1))

    @property
    def whole(self) -> bool:
        """Whether the records hold more than their slice: a sketch or statistics of the whole row."""
        return self.pair.ours.sketch is not None or not {"l2", "sum", "nonfinite"}.isdisjoint(self.pair.ours.stats)

    @property
    def width(self) -> int:
        """How many elements the longest row has; 0 if that is not known."""
        return int(np.nan_to_num(sizes(self.pair.ref)).max(initial=0))

    @property
    def whole_rows(self) -> bool:
        """Whether whole rows are seen: every value of them, or a sketch of all."""
        return self.pair.ours.sketch is not None or bool((self.present.sum(axis=1) >= sizes(self.pair.ref)).all())

    def _measured(self, tensor: NDArray[np.float32], positions: Ints, here: NDArray[np.bool_]) -> Floats:
        summary = _summary(self.point, tensor, positions, {self.point: self.pair.ours})
        pair = Pair(self.point, self.pair.ours.take(here), summary.take(self.rows[here]))
        result = np.full(len(self.rows), np.nan)
        if here.any():
            result[here] = np.nan_to_num(measure([pair]).nmse, nan=0.0, posinf=np.inf)
        return result

    def taken(self, tensor: NDArray[np.float32], positions: Ints) -> Floats:
        """The recorded elements of another tensor of this point, of the records in its rows: [R, k]."""
        return self._slice(tensor, positions, self.rows < len(positions))

    def errors_beside(self, tensor: NDArray[np.float32], positions: Ints) -> tuple[Floats, NDArray[np.bool_]]:
        """The recorded elements minus those of a tensor of all rows, 0 where either is no number, and where both are: [R, k]."""
        right = self.taken(tensor, positions)
        known = self.present & np.isfinite(self.values) & np.isfinite(right)
        return np.where(known, self.values, 0.0) - np.where(known, right, 0.0), known

    def at(self, tensor: NDArray[np.float32], positions: Ints, row: int) -> Floats:
        """The recorded elements of one row of a tensor of the first rows: [k]; absent ones are 0."""
        here = self.rows == row
        return np.asarray(np.where(self.present[here], self._slice(tensor, positions, here), 0.0)[0])

    def whole_values(self, tensor: NDArray[np.float32], positions: Ints) -> Floats | None:
        """The complete rows of a tensor: [T, n]; None if a row is not a plain vector."""
        known = parse(self.point).known
        if of_scores(self.point) or (known is not None and "t+1" in known.row):
            return None
        return tensor.reshape(len(positions), -1).astype(np.float64)

    def between(self, values: NDArray[np.float32], other: NDArray[np.float32], positions: Ints) -> Floats:
        """NMSE of one tensor against another as `base` measures the dump's: [R]; infinite where either is not finite, but for infinities
        that both have (a mask's, say).

        At the recorded elements; where records hold more than those, of whole rows if that is larger.
        """
        rows, others = self.taken(values, positions), self.taken(other, positions)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            delta = np.where(self.present & (rows != others), rows - others, 0.0)
            squares = np.einsum("ij,ij->i", delta, delta)
            error = np.where(squares == 0, 0.0, squares / self.energy)  # of rows of zeros as well
        error = np.where(np.isfinite(error), error, np.inf)
        if self.whole and np.isfinite(error).all():
            sides = (self._recorded_like(tensor, positions) for tensor in (values, other))
            error = np.fmax(error, measure([Pair(self.point, *sides)]).nmse)
        return error

    def _recorded_like(self, tensor: NDArray[np.float32], positions: Ints) -> Rows:
        """A tensor's records with what the dump's have: the same elements, statistics, and a sketch if those have one."""
        rows, dumped = _summary(self.point, tensor, positions, {self.point: self.pair.ours}).take(self.rows), self.pair.ours
        stats = {name: values for name, values in rows.stats.items() if name in dumped.stats}
        return replace(rows, stats=stats, sketch=None if dumped.sketch is None else rows.sketch)

    def _slice(self, tensor: NDArray[np.float32], positions: Ints, here: NDArray[np.bool_]) -> Floats:
        """The recorded elements of a candidate's tensor: float64 [records within its rows, k]."""
        return np.asarray(self._slices(tensor[None], positions, here)[0])

    def _slices(self, tensors: NDArray[np.float32], positions: Ints, here: NDArray[np.bool_]) -> Floats:
        """`_slice` of M tensors: [M, records within their rows, k]."""
        width = self.values.shape[1]
        known = parse(self.point).known
        if of_scores(self.point) or (known is not None and "t+1" in known.row):
            return np.array([self._growing(tensor, positions, here) for tensor in tensors])
        flat = tensors.reshape(len(tensors), len(positions), -1)
        if self.index is not None:
            index = np.maximum(self.index[here], 0)[None]
            return np.take_along_axis(flat[:, self.rows[here]], index, axis=2).astype(np.float64)
        cut = flat[:, :, :width][:, self.rows[here]].astype(np.float64)
        return np.pad(cut, ((0, 0), (0, 0), (0, width - cut.shape[2])), constant_values=np.nan) if cut.shape[2] < width else cut

    def _growing(self, tensor: NDArray[np.float32], positions: Ints, here: NDArray[np.bool_]) -> Floats:
        """`_slice` for rows that have an element for each position up to their own."""
        width = self.values.shape[1]
        rows = summarise(self.point, tensor, positions - positions[0], slice_size=width, keep=self.rows[here], first=0).values
        padded = np.full((int(here.sum()), width), np.nan)
        padded[:, : rows.shape[1]] = rows
        return padded


def expected(dump: Dump, replay: Replay, positions: Ints, header: Header) -> tuple[list[Expected], tuple[str, ...]]:
    """Every record of the dump that our engine has, too, in dataflow order, and notes on those that it lacks.

    Raises:
        DumpError: there are none, or records of one key contradict each other.
    """
    known = {name: dump.points[name] for name in replay.values if name in dump.points}  # in the order of computation
    foreign = [name for name in dump.points if name not in known]
    notes = [f"ignored, because our engine has no such point: {first_names(foreign)}"] if foreign else []
    longer = [name for name, rows in known.items() if _of_another_length(rows, replay)]
    if len(longer) < len(known):  # a record, not an operation: diff says what such rows hold
        known = {name: rows for name, rows in known.items() if name not in longer}
        notes += [f"left out, because their rows have another length than the model's: {first_names(longer)}"] if longer else []
    if not known:
        raise DumpError(
            f"{dump.path} has no point that our engine has.",
            "`parity model M` lists the points by name.",
            code="nothing-in-common",
        )
    right = Dump("our engine", header, right_rows(replay, positions, known))
    pairs = align(replace(dump, points=known), right).pairs
    return [_expected(pair, positions) for pair in pairs], tuple(notes)


def _of_another_length(rows: Rows, replay: Replay) -> bool:
    """Whether all of a point's rows say that they have another number of elements than the model's; logits may be padded."""
    kind = parse(rows.point).known
    if rows.point == LOGITS or of_scores(rows.point) or (kind is not None and "t+1" in kind.row):
        return False
    size = int(np.size(replay.on_host[rows.point])) // replay.rows
    return bool(((rows.sizes >= 0) & (rows.sizes != size)).all())


def first_over(entries: Iterable[Expected]) -> Expected | None:
    """The first point of which a record differs from the right engine's; None if none does."""
    return next((entry for entry in entries if entry.over.any()), None)


def columns(entries: Sequence[Expected]) -> tuple[Ints, Ints, Ints]:
    """Each record's point (as a number), sequence and position, one point after the other: int64 [R] each."""
    point = np.repeat(np.arange(len(entries)), [len(entry.rows) for entry in entries])
    seq, token_idx = (np.concatenate([getattr(entry.pair.ours, name) for entry in entries]) for name in ("seq", "token_idx"))
    return point, seq, token_idx


def with_limits(entries: Sequence[Expected], limit: Floats) -> list[Expected]:
    """The records with other limits: [R], one point after the other."""
    ends = np.cumsum([len(entry.rows) for entry in entries])[:-1]
    return [replace(entry, limit=part) for entry, part in zip(entries, np.split(limit, ends), strict=True)]


def right_rows(
    replay: Replay, positions: Ints, points: Mapping[str, Rows] | Sequence[str], whole: Collection[str] = ()
) -> dict[str, Rows]:
    """The right engine's records at these points, as many values of each row as a dump's; of `whole` ones all."""
    return {name: _summary(name, replay.on_host[name], positions, points, whole=name in whole) for name in points}


def _summary(
    name: str, tensor: NDArray[np.float32], positions: Ints, like: Mapping[str, Rows] | Sequence[str], *, whole: bool = False
) -> Rows:
    width = int(like[name].values.shape[1]) if isinstance(like, Mapping) else 16
    rows = like[name] if isinstance(like, Mapping) else None
    whole = whole or (rows is not None and rows.indices is not None)
    return summarise(
        name, np.ascontiguousarray(tensor), positions, slice_size=None if whole else width, first=int(positions[0])
    )


def _expected(pair: Pair, positions: Ints) -> Expected:
    rows = pair.ours.token_idx - positions[0]
    values = pair.ours.values.astype(np.float64)
    present = np.arange(values.shape[1])[None, :] < pair.ours.counts[:, None]
    count, n = present.sum(axis=1), sizes(pair.ref)
    wanted = np.where(present & np.isfinite(values), values, 0.0)
    floor = SLICE_FLOOR * count / n * pair.ref.stats["l2"] ** 2
    return Expected(
        pair=pair,
        rows=rows,
        values=values,
        present=present,
        index=pair.ours.indices,
        quantum=np.zeros(values.shape) if pair.ours.quantum is None else pair.ours.quantum / 2,
        energy=np.fmax(np.einsum("ij,ij->i", wanted, wanted), floor),
        base=np.nan_to_num(measure([pair]).nmse, nan=0.0, posinf=np.inf),
        limit=np.full(len(rows), EXACT_FLOOR.at(pair.point)),
    )
