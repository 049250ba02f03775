"""Records that are the right values rounded to a lower type by the recorder: the values that the engine continues with were not rounded."""

from collections.abc import Collection, Sequence

import numpy as np
from msgspec.structs import replace

from checkpoints.printable import first_names
from engine import ops
from engine.faults.edits import ggml, integer
from engine.graph import Step, made_from

from ...diff.readings.rounding import rounded_to
from .records import Expected

_COPIES = ("CONT", "CPY", "DUP", "GET_ROWS", "SET_ROWS", "CONCAT", "REPEAT", "PAD", "ROLL")
_RELU = 6  # enum ggml_unary_op


def as_captured(entries: Sequence[Expected], steps: Sequence[Step]) -> tuple[list[Expected], tuple[str, ...]]:
    """The records, with limits that allow for such rounding, and a note on it.

    A point counts if its values are the right ones rounded, and what is recorded next of what is computed from it agrees, or is the right
    value rounded, too: an engine that computes in that type has errors there. Copies of rounded values are rounded whoever did it, and so
    are sums over a single key. The last recorded point has nothing after it: the note says so. What is made from a point that counts was
    recorded by the same recorder.
    """
    kinds = {
        entry.point: kind for entry in entries if entry.over.any() and (kind := rounded_to(entry.pair.ours, entry.pair.ref))
    }
    if not kinds:
        return list(entries), ()
    agreeing = {entry.point for entry in entries if not entry.over.any()}
    recorded = frozenset(entry.point for entry in entries)
    after = {name: made_from(name, steps) & recorded for name in kinds}
    single = all(int(entry.rows.max(initial=0)) == 0 for entry in entries)
    shown = {name for name in kinds if _computed_next(name, steps, recorded, single) & {*agreeing, *kinds}}
    captured = shown | {name for name in kinds if not after[name]}
    captured |= {name for name in kinds for before in captured if name in after[before]}
    if not captured:
        return list(entries), ()
    listed = [name for name in kinds if name in captured]
    types = " or ".join(dict.fromkeys(kinds[name] for name in listed))
    whose = (
        "the recorder's rounding, not the engine's"
        if shown
        else "no record of what is computed from them says whose rounding it is"
    )
    note = f"captured in a lower type: {first_names(listed)} hold the right values rounded to {types}: {whose}"
    return [_within(entry) if entry.point in captured else entry for entry in entries], (note,)


def _within(entry: Expected) -> Expected:
    return replace(entry, limit=np.maximum(entry.limit, entry.base))


def _computed_next(name: str, steps: Sequence[Step], recorded: Collection[str], single: bool) -> set[str]:
    """The recorded values that are computed from one, or from copies of it, with no other recorded value between.

    `single`: only the first position is recorded, where attention has one key, whose weight is 1: what it sums is a copy.
    """
    reached, following = {name}, set()
    for step in steps:
        if not reached.isdisjoint(step.names):
            if step.makes in recorded and not _keeps_numbers(step) and not (single and step.op is ops.weighted_values):
                following.add(step.makes)
            else:
                reached.add(step.makes)
    return following


def _keeps_numbers(step: Step) -> bool:
    """Whether each number of a result is one of the operand's, or 0: rounded numbers then stay rounded."""
    relu = ggml(step, "UNARY") and integer(step, 0) == _RELU
    return step.op is ops.cached or (not step.weights and (relu or ggml(step, *_COPIES)))
