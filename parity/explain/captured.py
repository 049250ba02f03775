"""Records that are the right values, rounded to a lower type by whoever recorded them: what the engine goes on with was not rounded."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from engine.graph import Step

from ..diff.rounding import rounded_to
from .records import Expected

_LISTED = 4  # points that a note names


def as_captured(entries: Sequence[Expected], steps: Sequence[Step]) -> tuple[list[Expected], tuple[str, ...]]:
    """The records with limits that such rounding stays within, and a note on it.

    A point counts if its values are the right ones rounded, and something recorded that is made from it agrees, or is the right value
    rounded, too: an engine that computes in that type has errors in everything after it. The last recorded point has nothing after it. What
    is made from a point that counts was recorded by the same recorder.
    """
    kinds = {
        entry.point: kind for entry in entries if _differs(entry) and (kind := rounded_to(entry.pair.ours, entry.pair.ref))
    }
    if not kinds:
        return list(entries), ()
    agreeing = {entry.point for entry in entries if not _differs(entry)}
    recorded = frozenset(entry.point for entry in entries)
    after = {name: _made_from(name, steps) & recorded for name in kinds}
    captured = {name for name, made in after.items() if not made or made & {*agreeing, *kinds}}
    captured |= {name for name in kinds for before in captured if name in after[before]}
    if not captured:
        return list(entries), ()
    listed = [name for name in kinds if name in captured]
    types = " or ".join(dict.fromkeys(kinds[name] for name in listed))
    note = (
        f"captured in a lower type: {', '.join(listed[:_LISTED])}{', …' if len(listed) > _LISTED else ''} hold the right values rounded to"
        f" {types}: the recorder's rounding, not the engine's"
    )
    return [_within(entry) if entry.point in captured else entry for entry in entries], (note,)


def _differs(entry: Expected) -> bool:
    return bool((entry.base > entry.limit).any())


def _within(entry: Expected) -> Expected:
    return replace(entry, limit=np.maximum(entry.limit, entry.base))


def _made_from(name: str, steps: Sequence[Step]) -> frozenset[str]:
    """All values that are made from one, directly or through others."""
    reached = {name}
    for step in steps:
        if not reached.isdisjoint(step.names):
            reached.add(step.makes)
    return frozenset(reached - {name})
