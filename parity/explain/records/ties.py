"""Near ties of routing: a dump that took the other of two experts whose scores differ only by rounding has no fault there."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from engine.faults.routing_ties import scores_of, taken_otherwise
from engine.graph import Step
from engine.replay.replay import Replay
from engine.transformer import Transformer

from .records import Expected

# Margin of a near tie, in proportion to the largest score: sums of float32 over some thousand elements differ by 1e-6.
NEAR = 1e-5
MOST = 64  # near ties that are tried one after the other until one explains a difference


class RightEngine(Protocol):
    """The right engine beside a dump (`parity.explain.case.Case`): its tokens and records, its replays, and how it takes other steps."""

    transformer: Transformer
    tokens: tuple[int, ...]
    entries: list[Expected]

    def make(self, steps: Sequence[Step], rows: int) -> Replay:
        """A replay of steps over the first rows."""

    def compared(self, steps: Sequence[Step]) -> list[Expected]:
        """The dump's records beside those of other steps."""

    def take(self, steps: Sequence[Step], entries: list[Expected]) -> None:
        """Make other steps the right ones."""


def _first(entries: Sequence[Expected]) -> tuple[int, int] | None:
    """The number of the first point that differs, and its first row that does."""
    for number, entry in enumerate(entries):
        wrong = entry.over
        if wrong.any():
            return number, int(entry.rows[wrong].min())
    return None


def near_ties(case: RightEngine, steps: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """(Number of a step that chooses experts, row at which the last chosen expert and the next one score practically the same)."""
    right = {step.makes: step for step in steps}
    values = case.make(steps, len(case.tokens)).on_host
    for number, step in enumerate(steps):
        chosen = scores_of(step, right)
        if chosen is None:
            continue
        scores = np.sort(np.asarray(values[chosen[0]], dtype=np.float64).reshape(len(case.tokens), -1), axis=1)[:, ::-1]
        margin = scores[:, chosen[1] - 1] - scores[:, chosen[1]]
        for row in np.nonzero(margin <= NEAR * np.abs(scores).max(axis=1))[0].tolist():
            yield number, row


def resolved(case: RightEngine) -> tuple[str, ...]:
    """Let the right engine choose as the dump did at each near tie that explains a difference; returns sentences on where.

    Changes the case: its steps, replay and records become those of the right engine that chose so.
    """
    taken: list[tuple[str, int]] = []
    steps, entries = list(case.transformer.steps), case.entries
    tried, last = 0, None
    ties = near_ties(case, steps)
    while (first := _first(entries)) is not None and tried < MOST:
        tie = next((near_tie for near_tie in ties if near_tie != last and near_tie[1] <= first[1]), None)
        if tie is None:
            break
        tried += 1
        number, row = tie
        changed = [*steps]
        changed[number] = taken_otherwise(steps[number], (row,))
        compared = case.compared(changed)
        after = _first(compared)
        if after is None or first < after:
            steps, entries = changed, compared
            taken.append((steps[number].makes, row))
            tried, last = 1, tie  # not back again
            ties = near_ties(case, steps)
    if not taken:
        return ()
    case.take(steps, entries)
    where = ", ".join(f"{name}, position {row}" for name, row in taken[:3])
    return (f"routing: {len(taken)} near ties of experts were decided the other way ({where}): not a fault",)
