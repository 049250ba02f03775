"""Pairs the records of two dumps by their key (seq, checkpoint, token_idx).

All later stages work on arrays: a `Pair` holds the rows of one point of both sides, row i beside row i.
"""

from collections.abc import Iterable

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Missing, Uncompared
from checkpoints.dataflow import Dataflow
from checkpoints.errors import DumpError
from checkpoints.nearest import unknown_names
from checkpoints.record import Dump, Rows
from checkpoints.repeated import same_values

from .dataflow import ordered
from .tokens import SAME, TokenComparison
from .uncompared import uncompared

_POSITION_BITS = 40  # the reader accepts positions below 2^40


class Pair(Struct, frozen=True):
    """Records of one point that both sides have; row i of `ours` and row i of `ref` have the same key."""

    point: str
    ours: Rows
    ref: Rows


class Alignment(Struct, frozen=True):
    """Pairs in dataflow order, what each side lacks, and sentences for the user.

    `left_out` counts the records after the position where the token sequences diverge. `may_be_empty`: there may be no pairs at all,
    since the tokens themselves are the divergence.
    """

    pairs: tuple[Pair, ...]
    missing_ours: Missing
    missing_ref: Missing
    uncompared: Uncompared
    notes: tuple[str, ...]
    left_out: int = 0
    may_be_empty: bool = False


def align(
    ours: Dump, ref: Dump, step: int | None = None, tokens: TokenComparison = SAME, whole: Dataflow | None = None
) -> Alignment:
    """Align two dumps; `step` selects among contradicting records of one key on either side.

    The order is that of the dataflow, or the vocabulary's if there is none; other nodes are placed where the reference computed them.
    Records after the position where the token sequences diverge are left out.

    Raises:
        DumpError: records of one key contradict each other, or the dumps have no key in common.
    """
    doubled: dict[str, dict[str, int]] = {}
    names = ordered([*ref.points, *ours.points], whole)
    pairs: list[Pair] = []
    lacks_ours, lacks_ref = _Lacks(), _Lacks()
    for name in names:
        left, right = ours.points.get(name), ref.points.get(name)
        if left is not None:
            left = _unique(left, ours.path, step, doubled)
        if right is not None:
            right = _unique(right, ref.path, step, doubled)
        if left is None and right is not None:
            lacks_ours.point(name, right)
        elif right is None and left is not None:
            lacks_ref.point(name, left)
        elif left is not None and right is not None:
            pair = _pair(name, left, right, lacks_ours, lacks_ref)
            if len(pair.ours):
                pairs.append(pair)
    if not pairs:
        raise _nothing(ours, ref)
    total = sum(len(pair.ours) for pair in pairs)
    kept = tuple(pairs)
    if tokens.until is not None:
        kept = picked(pairs, [pair.ref.token_idx < tokens.until for pair in pairs])
    left_out = total - sum(len(pair.ours) for pair in kept)
    notes = tuple(_doubled(path, counts) for path, counts in doubled.items())
    lacking = lacks_ours.missing()
    compared = {position for pair in pairs for position in pair.ref.token_idx.tolist()} if lacking.positions else set()
    never_compared = uncompared(
        [name for name in names if name in ref.points], {pair.point for pair in pairs}, lacking.positions, compared
    )
    return Alignment(kept, lacking, lacks_ref.missing(), never_compared, notes, left_out, tokens.divergence is not None)


def picked(pairs: Iterable[Pair], keep: Iterable[NDArray[np.bool_]]) -> tuple[Pair, ...]:
    """The pairs with the kept rows only; pairs without any are dropped."""
    kept: list[Pair] = []
    for pair, mask in zip(pairs, keep, strict=True):
        if mask.all():
            kept.append(pair)
        elif mask.any():
            kept.append(Pair(pair.point, pair.ours.take(mask), pair.ref.take(mask)))
    return tuple(kept)


def as_wide(rows: Rows, like: Rows) -> Rows:
    """The rows with at most as many leading values as `like` has; unchanged if either lists its elements by index."""
    width = int(like.counts.max(initial=0))
    if rows.indices is not None or like.indices is not None or not 0 < width < rows.values.shape[1]:
        return rows
    return replace(rows, values=rows.values[:, :width], counts=np.minimum(rows.counts, width))


def keys(rows: Rows) -> NDArray[np.int64]:
    """int64 [R]: a number for each record that sorts by sequence, then position."""
    return numbers_of(rows.seq, rows.token_idx)


def numbers_of(seq: NDArray[np.int64], token_idx: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [R]: a number for each (sequence, position) that sorts by sequence, then position."""
    return (seq << _POSITION_BITS) | token_idx


def place_of(number: int) -> tuple[int, int]:
    """The sequence and the position that a number of `numbers_of` stands for."""
    return number >> _POSITION_BITS, number & ((1 << _POSITION_BITS) - 1)


class _Lacks:
    """Counts what one side lacks."""

    def __init__(self) -> None:
        self._points: list[str] = []
        self._positions: set[int] = set()
        self._records = 0

    def point(self, name: str, rows: Rows) -> None:
        self._points.append(name)
        self._records += len(rows)

    def records(self, positions: NDArray[np.int64]) -> None:
        self._positions.update(positions.tolist())
        self._records += len(positions)

    def missing(self) -> Missing:
        return Missing(tuple(self._points), tuple(sorted(self._positions)), self._records)


def _pair(name: str, left: Rows, right: Rows, lacks_ours: _Lacks, lacks_ref: _Lacks) -> Pair:
    first, second = keys(left), keys(right)
    if np.array_equal(first, second):
        return Pair(name, left, right)
    _, at_left, at_right = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    lacks_ref.records(np.delete(left.token_idx, at_left))
    lacks_ours.records(np.delete(right.token_idx, at_right))
    return Pair(name, left.take(at_left), right.take(at_right))


def _doubled(path: str, counts: dict[str, int]) -> str:
    """The note on a dump's records that occur twice, counted by point."""
    of = f"{len(counts)} points" if len(counts) > 1 else next(iter(counts))
    return f"{path}: {sum(counts.values())} records of {of} occur twice; each position is counted once"


def _unique(rows: Rows, path: str, step: int | None, doubled: dict[str, dict[str, int]]) -> Rows:
    """The rows sorted by key, one for each key; `doubled` gets the number of others, by path and point."""
    key = keys(rows)
    if bool(np.all(key[1:] > key[:-1])):
        return rows
    by_key = np.argsort(key, kind="stable")
    ordered = key[by_key]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    heads = by_key[starts]
    if bool(starts.all()):
        return rows.take(by_key)
    head = heads[np.cumsum(starts) - 1]  # the first record of each record's key
    others = by_key[~starts]
    same = same_values(rows, head[~starts], others)
    if not same.all():
        heads = _select(rows, path, step, by_key, starts, others[~same])
    doubled.setdefault(path, {})[rows.point] = len(others)
    return rows.take(heads)


def _select(
    rows: Rows,
    path: str,
    step: int | None,
    by_key: NDArray[np.int64],
    starts: NDArray[np.bool_],
    contradicting: NDArray[np.int64],
) -> NDArray[np.int64]:
    """One record for each key among contradicting ones: that of the chosen step."""
    group = np.cumsum(starts) - 1
    place = np.empty(len(rows), dtype=np.int64)
    place[by_key] = group
    torn = np.unique(place[contradicting])
    heads = by_key[starts].copy()
    members = by_key[np.isin(group, torn)]
    if step is not None:
        chosen = members[rows.step[members] == step]
        if len(np.unique(place[chosen])) == len(chosen) == len(torn):
            heads[place[chosen]] = chosen
            return heads
    first = members[place[members] == torn[0]]
    steps = sorted(set(rows.step[members].tolist()))
    place_of_first = f"position {int(rows.token_idx[first[0]])} of {rows.point}"
    if len(steps) == 1:
        raise DumpError(
            f"{path} has contradicting records of {place_of_first}, all of step {steps[0]}.",
            'Number the forward passes in "step", or the sequences in "seq".',
            code="contradiction",
        )
    listed = ", ".join(map(str, steps[:12])) + (", …" if len(steps) > 12 else "")
    raise DumpError(
        f"{path} has contradicting records of {place_of_first}, of steps {listed}"
        + (f"; step {step} does not have exactly one of each." if step is not None else "."),
        "Choose one with --step.",
        code="contradiction",
    )


def _nothing(ours: Dump, ref: Dump) -> DumpError:
    common = [name for name in ref.points if name in ours.points]
    if not common:
        return DumpError(
            f"the dumps have no point in common: ours has {_some(ours.points)}, the reference has {_some(ref.points)}.",
            _advice(ours),
            code="nothing-in-common",
        )
    left, right = ours.points[common[0]], ref.points[common[0]]
    advice = (
        f"Record the same --positions on both sides, counted from 0, or move ours: --offset {_lowest(right) - _lowest(left):d}."
    )
    if not set(left.seq.tolist()) & set(right.seq.tolist()):
        advice = 'Number the prompts of a batch alike on both sides: "seq" is 0 for the first one, and where there is only one.'
    return DumpError(
        f"the dumps have no position in common: at {common[0]} ours has {_span(left)}, the reference has {_span(right)}.",
        advice,
        code="nothing-in-common",
    )


def _advice(ours: Dump) -> str:
    unknown = unknown_names(ours.points)
    if unknown:
        return f"{unknown[0][0].upper()}{unknown[0][1:]}."
    return "Record the same --points on both sides; `parity model M` lists their names."


def _lowest(rows: Rows) -> int:
    return int(rows.token_idx.min())


def _some(names: dict[str, Rows]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _span(rows: Rows) -> str:
    low, high = int(rows.token_idx.min()), int(rows.token_idx.max())
    positions = f"position {low}" if low == high else f"positions {low} to {high}"
    sequences = sorted(set(rows.seq.tolist()))
    return positions if sequences == [0] else f"{positions} of sequence {', '.join(map(str, sequences[:4]))}"
