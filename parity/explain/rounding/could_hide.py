"""How large a fault an assumed arithmetic hides: the factor of each operation's result whose error is as large as the dump's."""

import numpy as np
from msgspec.structs import replace

from ..case import Case
from ..search.cone import of_ggml
from ..search.search import Search
from ..search.state import SearchState
from .directions import CHANGE, Scaled

_MOST = 64  # operations that are asked, the last ones first
# NMSE of a change that is float32's rounding (7e-13 measured: `limits.EXACT_FLOOR`): a factor that a norm takes away is no fault.
_NOTHING = 1e-12
_ALL = 1.0  # a factor that doubles a result: what leaves less is not in proportion any more


def could_hide(case: Case, search: Search, start: SearchState) -> tuple[tuple[str, float], ...]:
    """The operations in question at the first place, each with the part by which its result may be too large without a larger error
    there than the dump has; the largest part first.
    """
    if start.first is None:
        return ()
    entry = case.entries[start.first.point]
    seen = float(np.max(start.nmse[start.first.point]))
    end = start.order[entry.point] + 1
    parts = {}
    names = sorted(search.screening.cone(start).steps, key=start.order.__getitem__)
    for name in [name for name in names if not of_ggml(name)][-_MOST:]:
        if search.screening.budget.over():
            break
        number = start.order[name]
        scaled = replace(start.steps[number], op=Scaled(start.steps[number].op))
        changed = case.replay.changed([*start.steps[:number], scaled, *start.steps[number + 1 : end]])
        if entry.point not in changed:
            continue
        rows = (case.transformer.backend.to_host(changed[entry.point]), case.replay.on_host[entry.point])
        moved, right = (np.where(entry.present, entry.taken(row, case.positions), 0.0) for row in rows)
        effect = float((np.square(moved - right).sum(axis=1) / entry.energy).max())
        if effect > _NOTHING:
            parts[name] = CHANGE * float(np.sqrt(seen / effect))
    return tuple(sorted(((name, part) for name, part in parts.items() if part <= _ALL), key=lambda pair: -pair[1]))
