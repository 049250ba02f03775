"""If a rotation alone is wrong: by which positions are its rows rotated?"""

from collections.abc import Iterator, Mapping

import numpy as np

from engine.faults.rotation import at_positions, is_rotation
from engine.graph import Step, compute, inputs_of
from engine.inapplicable import NotApplicable

from ...laws.beside import LEFT, ROOM
from ..case import Case
from ..records.records import Expected, Floats
from ..search.state import SearchState

_FURTHER = 64  # positions beyond the prompt's length by which a row may be rotated, in either direction


def other_positions(case: Case, state: SearchState, entry: Expected, errors: Floats) -> str:
    """The sentence on the positions by which a rotation's wrong rows, by these errors [R], are rotated; "" if no position gives them all.

    Rows before the first wrong one are right, and position 0 is 0 whatever it is multiplied by.
    """
    step = state.planting.right.get(entry.point)
    wrong = errors > entry.limit
    if step is None or not is_rotation(step) or not wrong.any():
        return ""
    left = {int(row): set[int]() for row in entry.rows[wrong]}
    length = len(case.positions)
    for by in sorted(range(1 - length - _FURTHER, length + _FURTHER), key=abs):
        moved = _moved(case, step, by)
        if moved is None:
            return ""
        agrees = entry.nmse(moved, case.positions) <= np.minimum(ROOM * entry.limit, LEFT * errors)
        for row in entry.rows[wrong & agrees].tolist():
            left[row].add(by)
    if not all(left.values()):
        return ""
    shown = "" if entry.whole_rows else f" (in the {entry.values.shape[1]} recorded elements: others may be wrong otherwise)"
    return f"{next(_sentences(left, length))}{shown}"


def _moved(case: Case, step: Step, by: int) -> np.ndarray | None:
    """What a rotation makes of its right input by positions that are all moved; None if it cannot."""
    try:
        changed = at_positions(step, lambda positions: positions + by)
        inputs = inputs_of(changed, case.replay.values.__getitem__, case.replay.weights)
        return np.asarray(case.transformer.backend.to_host(compute(changed, inputs, case.replay.weights)))
    except (NotApplicable, ValueError):
        return None


def _sentences(by: Mapping[int, set[int]], length: int) -> Iterator[str]:
    """How the rows are rotated, each row [t] by one of these numbers too far: the simplest that fits all of them."""
    first, to_the_end = min(by), sorted(by) == list(range(min(by), length))
    if to_the_end and first and all(-(row // first) * first in moved for row, moved in by.items()):
        again = f"again after every {first} positions" if length > 2 * first else f"again at position {first}"
        yield f"the rotation counts positions from 0 {again}"
    one = min(set.intersection(*by.values()), key=abs, default=None)
    if one is not None and len(by) > 1:
        where = f"from position {first} on" if to_the_end else f"at {len(by)} positions, {first} the first,"
        yield f"{where} the rotation counts {abs(one)} {'more' if one > 0 else 'less'}: position t is rotated as t {one:+d}"
    listed = [f"{row} as {row + min(moved, key=abs)}" for row, moved in sorted(by.items())]
    yield f"positions are rotated as others: {', '.join(listed[:4])}{', …' if len(listed) > 4 else ''}"
