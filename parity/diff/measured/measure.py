"""How far two aligned records are apart. Returns arrays with one element per record; formats nothing.

NMSE is Σ(a−b)²/Σb², b the reference. Everything is accumulated in float64.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import DumpError
from checkpoints.record import Dump
from checkpoints.short_rows import reduced

from .align import Alignment, Pair, picked
from .masked_values import both_mask, masked_alike, may_mask
from .slices import Values, elements, largest, prepare, present_in, slice_errors
from .whole_rows import column, joined, pass_sums, sizes, whole_rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BLOCK = 1 << 21  # values measured at once: 16 MiB an intermediate


class Measures(Struct, frozen=True):
    """One element per record, [R]; NaN (or -1 for an index) where it is not known.

    `nmse` is the larger of `nmse_slice` and `nmse_row`, infinite where only one side has a non-finite value.
    `bound` is True where `nmse_row` is a lower bound made from `l2` and `sum` only.
    """

    nmse: Floats
    nmse_slice: Floats
    nmse_row: Floats
    bound: NDArray[np.bool_]
    max_abs: Floats
    index: Ints
    cosine: Floats
    relative: Floats
    relative_index: Ints
    ulp: Floats
    ulp_index: Ints
    nonfinite_ours: Ints
    nonfinite_ref: Ints
    future_mass: Floats

    def __len__(self) -> int:
        return len(self.nmse)

    def take(self, keep: NDArray[np.bool_]) -> "Measures":
        """The measures of some of the records; `keep` is bool [R]."""
        return Measures(**{name: getattr(self, name)[keep] for name in self.__struct_fields__})


class Measured(Struct, frozen=True):
    """The pairs in which anything could be compared, and the measures of their R records.

    `point` [R] is the index of a record's pair, `row` [R] its row there; `decode` is our side's phase.
    """

    pairs: tuple[Pair, ...]
    measures: Measures
    notes: tuple[str, ...]
    point: Ints
    row: Ints
    seq: Ints
    token_idx: Ints
    step: Ints
    decode: NDArray[np.bool_]

    @property
    def names(self) -> tuple[str, ...]:
        """The points in dataflow order."""
        return tuple(pair.point for pair in self.pairs)

    def without(self, points: Collection[str]) -> "Measured":
        """The same measures without some points."""
        left = [number for number, pair in enumerate(self.pairs) if pair.point not in points]
        keep = np.isin(self.point, left)
        return replace(
            self,
            pairs=tuple(self.pairs[number] for number in left),
            measures=self.measures.take(keep),
            point=np.searchsorted(left, self.point[keep]),
            row=self.row[keep],
            seq=self.seq[keep],
            token_idx=self.token_idx[keep],
            step=self.step[keep],
            decode=self.decode[keep],
        )

    def names_of(self, some: NDArray[np.bool_]) -> frozenset[str]:
        """The points of these records, bool [R]."""
        names = self.names
        return frozenset(names[number] for number in set(self.point[some].tolist()))


def measured(alignment: Alignment, ours: Dump, ref: Dump) -> Measured:
    """Measure every aligned record; those without a finite value in common are left out, and counted in a note.

    Raises:
        DumpError: nothing could be compared, though the tokens are the same.
    """
    pairs, measures = alignment.pairs, measure(alignment.pairs)
    known = ~np.isnan(measures.nmse)
    notes: tuple[str, ...] = ()
    if not known.all():
        notes = (f"{int((~known).sum())} records have no finite value in common and could not be compared",)
        pairs = picked(pairs, np.split(known, np.cumsum([len(pair.ours) for pair in pairs])[:-1]))
        measures = measures.take(known)
    sums = pass_sums(pairs, ours, ref)
    if sums is not None:
        measures = replace(
            measures,
            nmse=np.fmax(measures.nmse, sums),
            nmse_row=np.fmax(measures.nmse_row, sums),
            bound=measures.bound | (~np.isnan(sums) & np.isnan(measures.nmse_row)),
        )
    if not len(measures) and not alignment.may_be_empty:
        raise DumpError(
            "no record could be compared.",
            f"{alignment.left_out} records come after the position at which the tokens differ."
            if alignment.left_out
            else "Record the same leading values on both sides.",
            code="nothing-in-common",
        )
    point = np.repeat(np.arange(len(pairs)), [len(pair.ours) for pair in pairs])
    return Measured(
        pairs=pairs,
        measures=measures,
        notes=notes,
        point=point,
        row=np.concatenate([np.arange(len(pair.ours)) for pair in pairs]) if pairs else point,
        seq=_keys(pairs, "seq"),
        token_idx=_keys(pairs, "token_idx"),
        step=_keys(pairs, "step"),
        decode=_keys(pairs, "decode").astype(np.bool_),
    )


def energies(measured: Measured) -> Floats:
    """‖b‖² of the reference's whole rows, [R]; of the slice if it is not recorded."""
    of_points: list[Floats] = []
    for pair in measured.pairs:
        values = np.nan_to_num(pair.ref.values.astype(np.float64), posinf=0.0, neginf=0.0)
        sliced = np.sum(values**2, axis=1)
        l2 = pair.ref.stats.get("l2")
        of_points.append(sliced if l2 is None else np.where(np.isnan(l2), sliced, l2**2))
    return np.concatenate(of_points) if of_points else np.zeros(0)


def _keys(pairs: tuple[Pair, ...], name: str) -> Ints:
    columns = [getattr(pair.ours, name) for pair in pairs]
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)


def measure(pairs: Sequence[Pair]) -> Measures:
    """The measures of all records, pair after pair. Records are stacked, so that many small pairs cost as few large ones."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    prepared = [prepare(pair) for pair in pairs]
    for number, values in enumerate(prepared):
        groups[values.a.shape[1], number if values.index is not None else -1].append(number)
    starts = np.concatenate([[0], np.cumsum([len(pair.ours) for pair in pairs])])
    parts: list[Measures] = []
    places: list[Ints] = []
    for (width, _), members in groups.items():
        # Wide rows are measured only a few at a time.
        for chunk in _chunks(members, [len(prepared[number].a) * max(width, 1) for number in members]):
            with np.errstate(over="ignore", invalid="ignore"):  # garbage may exceed the types of sketches and statistics
                parts.append(_measure([pairs[number] for number in chunk], [prepared[number] for number in chunk]))
            places += [np.arange(starts[number], starts[number + 1]) for number in chunk]
    if not parts:
        return _measure([], [])
    order = np.argsort(np.concatenate(places), kind="stable")
    return Measures(
        **{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in Measures.__struct_fields__}
    )


def _chunks(members: list[int], sizes: list[int]) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    filled = 0
    for member, size in zip(members, sizes, strict=True):
        if chunks[-1] and filled + size > _BLOCK:
            chunks.append([])
            filled = 0
        chunks[-1].append(member)
        filled += size
    return chunks


def _measure(pairs: list[Pair], values: list[Values]) -> Measures:
    ours = np.concatenate([v.a for v in values]) if values else np.zeros((0, 0), np.float32)
    ref = np.concatenate([v.b for v in values]) if values else np.zeros((0, 0), np.float32)
    present = present_in(values, ours.shape)
    n = joined([np.where(np.isnan(sizes(p.ref)), sizes(p.ours), sizes(p.ref)) for p in pairs], 0)
    l2 = column(pairs, "ref", "l2")
    finite = np.isfinite(ours) & np.isfinite(ref)
    hidden = both_mask(pairs)  # rows whose statistics and sketch are those of the values that mask
    if may_mask(ref):
        masked = masked_alike(ours, ref)
        hidden |= reduced(np.logical_or, masked)
        ours, ref = np.where(masked, np.float32(0), ours), np.where(masked, np.float32(0), ref)
    l2 = np.where(hidden, np.nan, l2)
    part = slice_errors(values, ours, ref, present, present & finite, n, l2)
    full = joined([_whole(p) for p in pairs], 0) > 0
    exact_text = joined([np.full(len(p.ours), p.ours.quantum is None and p.ref.quantum is None) for p in pairs], 0) > 0
    nmse_row, bound = whole_rows(pairs, n, l2)
    nmse_row = np.where(full, part.nmse, np.where(exact_text & ~hidden, nmse_row, np.nan))
    nonfinite = _nonfinite(pairs, values, ours, ref, present, finite)
    return Measures(
        nmse=np.where(nonfinite.one_sided | nonfinite.nothing, np.inf, np.fmax(part.nmse, nmse_row)),
        nmse_slice=part.nmse,
        nmse_row=nmse_row,
        bound=bound & ~full & exact_text,
        max_abs=np.where(nonfinite.index >= 0, np.inf, part.max_abs),
        index=np.where(nonfinite.index >= 0, nonfinite.index, part.index),
        cosine=part.cosine,
        relative=part.relative,
        relative_index=part.relative_index,
        ulp=part.ulp,
        ulp_index=part.ulp_index,
        nonfinite_ours=nonfinite.ours,
        nonfinite_ref=nonfinite.ref,
        future_mass=_future(column(pairs, "ours", "future_mass"), column(pairs, "ref", "future_mass")),
    )


def _whole(pair: Pair) -> NDArray[np.bool_]:
    """Whether both sides recorded every value of the row: bool [R]. Bare lines don't say how long it is, the reference does."""
    ours_whole = pair.ours.full() | ((pair.ours.counts == pair.ref.counts) & (pair.ours.indices is None))
    return np.asarray(ours_whole & pair.ref.full())


class _Nonfinite(Struct, frozen=True):
    """NaN and infinities, [R]: how many each side has, whether only one side has some, and the first such
    element (-1: none was recorded). `nothing`: both have NaN wherever something was recorded; NaN agrees with nothing."""

    ours: Ints
    ref: Ints
    one_sided: NDArray[np.bool_]
    index: Ints
    nothing: NDArray[np.bool_]


def _nonfinite(
    pairs: list[Pair],
    values: list[Values],
    ours: NDArray[np.float32],
    ref: NDArray[np.float32],
    present: NDArray[np.bool_],
    finite: NDArray[np.bool_],
) -> _Nonfinite:
    stated = [column(pairs, side, "nonfinite") for side in ("ours", "ref")]
    some = np.flatnonzero(reduced(np.logical_or, present & ~finite))  # rows where a recorded value is not finite: few
    a, b, there = ours[some], ref[some], present[some]
    counts = [_count_nonfinite(known, some, there & ~np.isfinite(x)) for known, x in zip(stated, (a, b), strict=True)]
    counted = ~np.isnan(stated[0]) & ~np.isnan(stated[1])
    one_sided = counted & (counts[0] != counts[1])
    at = np.full(len(ours), -1, dtype=np.int64)
    nothing = np.zeros(len(ours), dtype=np.bool_)
    if len(some):
        different = there & ~finite[some] & ~((a == b) | (np.isnan(a) & np.isnan(b)))
        index = elements(values)
        first, where = largest(different.astype(np.float64), None if index is None else index[some])
        at[some] = np.where(first > 0, where, -1)
        one_sided[some] |= first > 0
        neither = there & np.isnan(a) & np.isnan(b)
        nothing[some] = neither.any(axis=1) & (neither == there).all(axis=1)
    return _Nonfinite(counts[0], counts[1], one_sided, at, nothing)


def _count_nonfinite(stated: Floats, some: Ints, seen: NDArray[np.bool_]) -> Ints:
    """How many values of each record are not finite, [R]: as its statistics say, but at least those `seen` in some of the records."""
    recorded = np.zeros(len(stated))
    recorded[some] = seen.sum(axis=1)
    return np.fmax(stated, recorded).astype(np.int64)


def _future(ours: Floats, ref: Floats) -> Floats:
    """How much more weight ours gives to later positions than the reference does, [R]; NaN where ours does not state it."""
    return np.abs(ours - np.where(np.isnan(ref), 0.0, ref))
