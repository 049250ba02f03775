"""Which of the reference's positions our records belong to: decided by both sides' tokens, otherwise by their values; never silently."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from checkpoints.distinct import distinct
from checkpoints.errors import DumpError
from checkpoints.formats import shifted
from checkpoints.points import order
from checkpoints.record import Dump, Rows

from .align import Pair, keys
from .measure import measure

# An offset is only taken if its error is this many times below every other one's, and below this NMSE. Measured on the
# catalogue of faults (some 80 wrong engines on each of three models, 16 positions, ten points from embd to logits, 4,900 searches): a
# wrong offset was best 562 times, by at most 3.3 times if its error was below 0.5 (rows of two tokens have 1 to 2). A right engine's
# right offset is better by 1e8 or more; a wrong engine's shows at the embedding in 460 of 490 searches.
CLEAR = 10.0
RELATED = 0.5
_POINTS = 8  # points that are tried, in dataflow order; if both sides have the embedding, the first one decides
_RECORDS = 64  # most records of one point at one offset; their median is its error there
_EXACT = 1e-10  # two errors below this are equal: two right engines differ by no more (the limit of exact mode)


class AlignedDump(Struct, frozen=True):
    """Our dump at the reference's positions; `note` says how they are known, empty if both sides count by their tokens."""

    ours: Dump
    note: str = ""


class Scores(Struct, frozen=True):
    """The error (median NMSE of the records) of one point at each offset that was tried."""

    point: str
    errors: dict[int, float]

    def ratio(self, offset: int) -> float:
        """How many times larger the error is at the best of the other offsets; infinite if there is no other."""
        others = [error for other, error in self.errors.items() if other != offset]
        return max(min(others), _EXACT) / max(self.errors[offset], _EXACT) if others else np.inf

    @property
    def clear(self) -> bool:
        """Whether the best offset is beyond doubt."""
        return self.errors[self.best] < RELATED and self.ratio(self.best) >= CLEAR

    @property
    def best(self) -> int:
        """The offset with the least error; among equals the one closest to 0."""
        return min(self.errors, key=lambda offset: (max(self.errors[offset], _EXACT), abs(offset)))


def place(ours: Dump, ref: Dump) -> AlignedDump:
    """Move `ours` to the reference's positions.

    Generated tokens decide if both sides list them; prompts that both sides list begin at position 0. If nothing states it,
    the plausible offsets are tried on the first points that both sides have, and the one with clearly the least error is taken.

    Raises:
        DumpError: no offset is clearly better than the others, and the two sides do not have the same positions.
    """
    placed = _by_generated(ours, ref)
    if placed is not None:
        offset, matching = placed
        note = f"positions: ours are moved by {offset:+d}, where {matching} of our generated tokens are the reference's"
        return AlignedDump(shifted(ours, offset), note) if offset else AlignedDump(ours)
    if _counts_from_its_prompt(ours) and _counts_from_its_prompt(ref):
        return AlignedDump(ours)
    return _by_values(ours, ref)


def _by_generated(ours: Dump, ref: Dump) -> tuple[int, int] | None:
    """The offset at which our generated tokens begin like the reference's, and how many do; None if they say nothing."""
    our_tokens, ref_tokens = ([token for token in side.tokens if token.seq == 0] for side in (ours, ref))
    if not our_tokens or not ref_tokens:
        return None
    first = min(token.token_idx for token in our_tokens)
    chosen = {token.token_idx: token.id for token in ref_tokens}

    def matching(offset: int) -> int:
        return sum(chosen.get(token.token_idx + offset) == token.id for token in our_tokens)

    # Generated tokens that follow their own prompt are where format 1 wants them.
    follow_prompt = ours.header is not None and 0 < len(ours.header.tokens) <= first
    offset = 0 if follow_prompt else max(0, min(chosen) - first, key=matching)
    return (offset, matching(offset)) if matching(offset) else None


def _counts_from_its_prompt(dump: Dump) -> bool:
    """Whether a dump lists its prompt and nothing in it contradicts that position 0 is the prompt's first token."""
    length = len(dump.header.tokens) if dump.header is not None else 0
    return length > 0 and not any(bool(np.any(rows.decode & (rows.token_idx < length))) for rows in dump.points.values())


def _by_values(ours: Dump, ref: Dump) -> AlignedDump:
    common = [name for name in order(ref.points) if name in ours.points]
    tried: list[Scores] = []
    for name in common[:_POINTS]:
        scores = tried_offsets(ours.points[name], ref.points[name], _plausible(ours, ref, name))
        if not scores.errors:
            continue
        tried.append(scores)
        if scores.clear:
            return _taken(ours, scores)
    if not tried:
        return AlignedDump(ours)  # no point or no value in common: `align` says so
    same = all(np.array_equal(distinct(keys(ours.points[name])), distinct(keys(ref.points[name]))) for name in common)
    first = tried[0]
    listed = ", ".join(
        f"{error:.2g} at {offset:+d}" for offset, error in sorted(first.errors.items(), key=lambda pair: pair[1])[:3]
    )
    if same:
        note = f"positions: used as numbered, which is the same on both sides; values do not decide it (NMSE of {first.point}: {listed})"
        return AlignedDump(ours, note)
    if (further := _one_too_many(ours, ref, first)) is not None:
        note = (
            f"positions: ours are used as numbered, but from the second on {first.point} fits the reference's position before (NMSE "
            f"{further:.2g}): is the first token (BOS) there twice, or a slot in front of it?"
        )
        return AlignedDump(ours, note)
    raise DumpError(
        f"nothing says how the positions of {ours.path} are counted, and no offset fits clearly: NMSE of {first.point} is {listed}.",
        "Give --offset N, which is added to every position of ours (0: they count from the prompt's first token, like the reference's).",
        code="positions",
    )


def _one_too_many(ours: Dump, ref: Dump, tried: Scores) -> float | None:
    """The error of a point at the offset that moves our first position in front of the reference's, if only that one fits; else None."""
    name = tried.point
    offset = int(ref.points[name].token_idx.min()) - int(ours.points[name].token_idx.min()) - 1
    scores = tried_offsets(ours.points[name], ref.points[name], {*tried.errors, offset})
    return scores.errors[offset] if offset in scores.errors and scores.best == offset and scores.clear else None


def _taken(ours: Dump, scores: Scores) -> AlignedDump:
    offset = scores.best
    how = f"ours are moved by {offset:+d}" if offset else "ours are used as numbered (--offset 0)"
    note = f"positions: nothing says how ours are counted; {how}: NMSE of {scores.point} {scores.errors[offset]:.2g} there"
    others = {other: error for other, error in scores.errors.items() if other != offset}
    if others:
        second = min(others, key=lambda other: others[other])
        note += f", {others[second]:.2g} at the next best, {second:+d}"
    else:
        note += ", and no other offset is possible"
    if offset == 1:
        note += "; is the first token (BOS) missing in ours?"
    return AlignedDump(shifted(ours, offset) if offset else ours, note)


def elsewhere(ours: Dump, ref: Dump, wrong: Sequence[str]) -> list[str]:
    """Sentences on points that are wrong at every position but agree at others: their positions are counted differently.

    An engine that computes logits only for the last token, and prints them as position 0, is not wrong there.
    """
    notes: list[str] = []
    for name in wrong[:_POINTS]:
        scores = tried_offsets(ours.points[name], ref.points[name], _plausible(ours, ref, name) | {0})
        if 0 in scores.errors and scores.best != 0 and scores.clear:
            notes.append(
                f"{name} of ours fits the reference {scores.best:+d} positions on (NMSE {scores.errors[scores.best]:.2g} instead of "
                f"{scores.errors[0]:.2g}): does its token_idx count differently from the other points'?"
            )
    return notes


def _plausible(ours: Dump, ref: Dump, point: str) -> set[int]:
    """Offsets that a way of counting explains, at which most records of the shorter side have a counterpart."""
    left, right = ours.points[point].token_idx, ref.points[point].token_idx
    prompt = len(ref.header.tokens) if ref.header is not None else 0
    decoded = [int(rows.token_idx[rows.decode].min()) for rows in ref.points.values() if rows.decode.any()]
    starts = {int(right.min()), prompt, prompt - 1, *decoded}
    offsets = {start - int(left.min()) for start in starts} | {int(right.max()) - int(left.max())}
    near = {offset + step for offset in (*offsets, 0) for step in (-1, 0, 1)}
    enough = (min(len(left), len(right)) + 1) // 2
    return {offset for offset in near if np.isin(left + offset, right).sum() >= enough and int(left.min()) + offset >= 0}


def tried_offsets(ours: Rows, ref: Rows, offsets: set[int]) -> Scores:
    """The error of one point at each of these offsets; offsets at which nothing can be compared are left out."""
    our_rows, ref_keys = ours.take(np.unique(keys(ours), return_index=True)[1]), keys(ref)
    _, ref_first = np.unique(ref_keys, return_index=True)
    errors: dict[int, float] = {}
    for offset in sorted(offsets):
        _, left, right = np.intersect1d(keys(our_rows) + offset, ref_keys[ref_first], assume_unique=True, return_indices=True)
        spread = np.linspace(0, len(left) - 1, min(len(left), _RECORDS)).astype(np.int64)  # evenly over all records
        pair = Pair(ours.point, our_rows.take(left[spread]), ref.take(ref_first[right[spread]]))
        nmse = measure([pair]).nmse
        if not np.isnan(nmse).all():
            errors[offset] = float(np.nanmedian(nmse))
    return Scores(ours.point, errors)
