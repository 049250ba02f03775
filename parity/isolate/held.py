"""An operation's recorded value beside the one that follows from its inputs, by the nearest of several definitions."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ..diff.measured.masked_values import without_masks
from ..diff.readings.layouts import is_rotated, pairs
from ..diff.readings.readings import CLEAR
from ..diff.readings.rounding import beyond_rounding
from ..diff.verdict.scatter import spares_elements
from .operands import holds_rounding
from .values import row_errors, seen_scores

# How many times as far as its own rounding makes it a value may be from that of an arithmetic, if what was not recorded before it is
# rounded at other places: flash attention rounds weights before they are divided by their sum, and may keep scores and sums in that
# type. Right engines were up to 2.1 times as far with sums in float32, and up to 33 times with scores and sums in F16 or BF16
# (benchmarks/kinds_of_kernel.py, apertus and phimoe): twice the latter, in round numbers.
_OTHER_PLACES = 64.0
# Of two definitions by which a value is wrong the later one is meant only if it is so many times nearer.
_NEARER = 10.0


def without_numbers(inputs: Sequence[NDArray[np.float32]], rows: int) -> NDArray[np.bool_]:
    """The rows of a result of which nothing can be said, bool [rows]: an input has NaN there, or at a place that any row may read."""
    unknown = np.zeros(rows, dtype=np.bool_)
    for given in inputs:
        undefined = np.isnan(given) if given.dtype.kind == "f" else np.zeros(given.shape, dtype=np.bool_)
        if undefined.ndim == 2 and len(undefined) == rows:
            unknown |= undefined.any(axis=1)
        elif undefined.ndim == 3 and undefined.shape[1] == rows:
            unknown |= undefined.any(axis=(0, 2))
        elif undefined.any():
            unknown[:] = True
    return unknown


def nearer(errors: NDArray[np.float64], others: NDArray[np.float64], limit: float, *, lower: bool = False) -> bool:
    """Whether a definition with these errors of rows is nearer than an earlier one; if both are equally far off, the first counts.

    `lower`: it is one of a lower arithmetic, whose rounding may hide a fault of its own size.
    """
    wrong, before = int((errors > limit).sum()), int((others > limit).sum())
    return wrong < before or (wrong == before and bool(errors.max() * (1 if lower else _NEARER) < others.max()))


def errors_beside(
    name: str,
    right: NDArray[np.float32],
    dumped: NDArray[np.float32],
    positions: NDArray[np.int64],
    least: NDArray[np.float64] | None,
    limit: float,
) -> NDArray[np.float64]:
    """The errors of rows, float64 [R], as `row_errors`, without what masks on both sides: as infinity under a lower arithmetic's limit."""
    return row_errors(name, *without_masks(right, dumped, limit), positions, least)


def errors_beyond(
    kind: str,
    name: str,
    right: NDArray[np.float32],
    dumped: NDArray[np.float32],
    positions: NDArray[np.int64],
    least: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """The errors of rows of a lower type, `kind`, beyond the rounding of the right ones to it: float64 [R], as `row_errors`."""
    right, rounded = without_masks(right.reshape(dumped.shape), dumped, np.inf)
    return row_errors(name, beyond_rounding(right, rounded, kind), rounded, positions, least)


class Held(Struct, frozen=True):
    """An operation's recorded value and the one that follows from its inputs, at the positions [R] that all of them have."""

    inputs: Sequence[NDArray[np.float32]]
    dumped: NDArray[np.float32]
    ours: NDArray[np.float32]
    positions: NDArray[np.int64]
    errors: NDArray[np.float64]
    reason: str
    rounds: bool = False  # only a definition that rounds activations, unlike the first one, is as near
    unrounded: float = 0.0  # the worst error by the first definition
    unknown: bool = False  # of some rows nothing can be said: an input has NaN there
    lower: str = ""  # the type to which the right value was rounded, if nothing else is wrong
    arithmetic: str = ""  # that of the definition
    pairs: str = ""  # the order of RoPE's pairs in which the right value was recorded, if that is another one
    as_recorded: float = 0.0  # the worst error without that, by the records of its inputs
    in_mode: NDArray[np.float32] | None = None  # what the nearest definition of the mode's own arithmetic makes
    within: str = ""  # the lower arithmetic whose rounding of what was not recorded may be the whole error

    def in_other_pairs(self, name: str, heads: int | None, limit: float) -> "Held | None":
        """The same if the recorded rows are the right ones with RoPE's pairs stored otherwise in each head; else None."""
        dumped, right = self.dumped, self.ours
        if self.unknown or not heads or not is_rotated(name) or dumped.ndim != 2 or right.size != dumped.size:
            return None
        width = dumped.shape[1]
        if width % (2 * heads):
            return None
        for order, sentence, _ in pairs(width, [width // heads]):
            with np.errstate(all="ignore"):  # a foreign engine's values may be as large as they like
                errors = row_errors(name, right.reshape(dumped.shape)[:, order], dumped, self.positions)
            if errors.max() <= limit and errors.max() * CLEAR <= self.errors.max():
                return replace(self, errors=errors, pairs=sentence, as_recorded=float(self.errors.max()))
        return None

    def rounded_within(
        self,
        name: str,
        low: NDArray[np.float32],
        errors: NDArray[np.float64],
        limit: float,
        of_operands: Callable[[], NDArray[np.float32]],
        heads: int | None = None,
    ) -> bool:
        """Whether the rounding of what was not recorded may be the whole error, if a lower arithmetic does it at places of its own.

        `errors` are the distances of rows from our own value in that arithmetic, `low`: none is more than `_OTHER_PLACES` times what
        rounding changes there. A row is that value where it is one rounding alone (a single key has all of the attention); where every
        row has several keys, the errors hold what the rounding of recorded operands alone changes (`of_operands` gives that value).
        """
        if self.in_mode is None or self.in_mode.size != low.size:
            return False
        cost = row_errors(name, self.in_mode, low.reshape(self.in_mode.shape), self.positions)
        if (errors > np.maximum(limit, _OTHER_PLACES * cost)).any():
            return False
        one = errors[cost > limit] <= limit
        return bool(one.any()) or (
            self.in_mode.size == self.dumped.size and holds_rounding(self.dumped, of_operands(), self.in_mode, heads)
        )

    def agrees(self, limit: float) -> bool:
        """Whether the recorded value is the right one, as it is or rounded to a lower type."""
        return bool(self.errors.max() <= limit) or bool(self.lower)

    def spares_elements(self) -> bool:
        """Whether a part of the recorded value is exactly that of the mode's own arithmetic: whole rows of it, or some elements of each."""
        dumped, right = self._rows(self.ours if self.in_mode is None else self.in_mode)
        known = np.isfinite(dumped) & np.isfinite(right)
        return spares_elements(np.where(known, dumped, 0.0) - np.where(known, right, 0.0), right, known)

    def wrong_rows(self, limit: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The wrong rows of the recorded value, and the right ones: [R, n]; of scores those of positions up to the row's own."""
        dumped, right = self._rows(self.ours)
        off = self.errors > limit
        return (dumped[off], right[off]) if dumped.size else (dumped, right)

    def of_other_positions(self, limit: float) -> str:
        """A sentence if the wrong rows are the right ones of other positions, with the distance if it is the same for all; otherwise
        ""."""
        wrong, _ = self.wrong_rows(limit)
        if self.dumped.ndim != 2 or not len(wrong) or len(self.positions) != len(self.dumped) or not np.isfinite(wrong).all():
            return ""
        right = self.ours.reshape(self.dumped.shape).astype(np.float64)
        away = set[int]()
        for row, position in zip(wrong, self.positions[self.errors > limit].tolist(), strict=True):
            with np.errstate(all="ignore"):  # a foreign engine's values may be as large as they like
                errors = np.sum((right - row) ** 2, axis=1)
                near = errors <= limit * (row @ row)
            nearest = int(np.argmin(errors))
            if not near[nearest]:
                return ""
            away.add(position - int(self.positions[nearest]))
        if len(away) > 1:
            return "they hold the right values of other positions"
        by = away.pop()
        return f"position t holds the right value of position t {'−' if by > 0 else '+'} {abs(by)}"

    def _rows(self, right: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if right.shape == self.dumped.shape and right.ndim == 3 and right.shape[1] == len(self.positions):
            seen = (seen_scores(scores, self.positions).transpose(1, 0, 2) for scores in (self.dumped, right))
            both = [rows.reshape(len(rows), -1).astype(np.float64) for rows in seen]
            return both[0], both[1]
        if right.size != self.dumped.size or self.dumped.ndim != 2:
            return np.zeros((0, 0)), np.zeros((0, 0))
        return self.dumped.astype(np.float64), right.reshape(self.dumped.shape).astype(np.float64)
