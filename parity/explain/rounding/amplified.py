"""Single rows at which rounding is amplified: what is left of a sum that all but cancels there, or a norm of that.

A run with an arithmetic's rounding shows what it costs such a row once, by luck less than it costs another right engine. Float64 with noise
in every operation shows by how much the row amplifies any rounding, in proportion to the point's other rows, whose cost is known.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import RowLimit
from checkpoints.record import Dump, Rows

from ...arbiter.arbiter import Arbiter
from ...diff.compare import Comparison, Options, comparison
from ...diff.measured.records import Records
from ...diff.tolerances.truth_columns import compared_part
from ...diff.verdict.undecided import FEW_POSITIONS
from ..records.records import Expected, Floats
from .known_model import KnownModel
from .precision import PrecisionFloor

# So many times as far as its point's usual row noise moves a row (NMSE) of which next to nothing is left: a tenth of its terms. A right
# mamba2 needed it at 9,900 times (benchmarks/right_engines.py --from 220085); 1 % at one position passed where rows of 2 to 70 times, which
# no right engine needed, were judged so.
_AMPLIFIED = 100.0
# A right engine's error at a point is up to 3.8 times what our own rounding costs there (measured beside `precision.UPPER`); twice that.
_MOST = 8.0


def compared_by_cost(ours: Dump, ref: Dump, options: Options, known: KnownModel, kind: str) -> Comparison:
    """Two dumps compared by the limits that an arithmetic's cost gives, raised where single rows that are over them amplify rounding."""
    compared = comparison(ours, ref, options)
    if compared.verdict or known.case is None or options.limits is None or (cost := known.floor(kind)) is None:
        return compared
    costs = {entry.point: (entry.pair.ours, of) for entry, of in zip(known.case.entries, of_each(cost), strict=True)}
    rows = _raised(compared.records, known, costs)
    if not rows:
        return compared
    return comparison(ours, ref, replace(options, limits=replace(options.limits, rows=(*options.limits.rows, *rows))))


def _raised(records: Records, known: KnownModel, costs: Mapping[str, tuple[Rows, Floats]]) -> list[RowLimit]:
    """Limits of the failing records at which rounding is amplified; `costs`: of each point the records whose cost is known, and that."""
    over = {number: records.failed[records.point == number] for number in dict.fromkeys(records.point[records.failed].tolist())}
    pairs = {number: records.pairs[number] for number, failed in over.items() if _are_single(failed)}
    pairs = {number: pair for number, pair in pairs.items() if pair.point in costs and _same(pair.ref, costs[pair.point][0])}
    spreads = known.spread({pair.point: compared_part(pair) for pair in pairs.values()}) if pairs else {}
    raised: list[RowLimit] = []
    for number, pair in pairs.items():
        here = np.flatnonzero(records.point == number)
        rows = records.row[here]
        limit = _limits(costs[pair.point][1], spreads.get(pair.point, np.zeros(len(pair.ref))))[rows]
        for at in np.flatnonzero(over[number] & (limit > records.limit[here])).tolist():
            key = int(records.seq[here[at]]), int(records.token_idx[here[at]])
            raised.append(RowLimit(pair.point, *key, float(limit[at])))
    return raised


def with_amplified(entries: Sequence[Expected], cost: PrecisionFloor, arbiter: Arbiter) -> list[Expected]:
    """Records under the limits that an arithmetic gives, raised where single ones that are over them amplify rounding."""
    single = {entry.point: entry for entry in entries if _are_single(entry.over)}
    spreads = arbiter.spread({name: compared_part(entry.pair) for name, entry in single.items()}) if single else {}
    return [
        replace(entry, limit=np.where(entry.over, np.fmax(entry.limit, _limits(of, spreads[entry.point])), entry.limit))
        if entry.point in spreads
        else entry
        for entry, of in zip(entries, of_each(cost), strict=True)
    ]


def of_each(cost: PrecisionFloor) -> list[Floats]:
    """What an arithmetic costs each record of each point, [R], by the dearer of both ways of rounding."""
    return [np.fmax(products, storage) for products, storage in zip(cost.products, cost.storage, strict=True)]


def _are_single(over: NDArray[np.bool_]) -> bool:
    """Whether some records of a point are over their limits, and so few that the others show what is usual there."""
    return 0 < int(over.sum()) * FEW_POSITIONS <= len(over)


def _same(rows: Rows, others: Rows) -> bool:
    """Whether two sets of rows are records of the same positions, in the same order."""
    return np.array_equal(rows.seq, others.seq) and np.array_equal(rows.token_idx, others.token_idx)


def _limits(cost: Floats, spread: Floats) -> Floats:
    """The limits of a point's records, [R], where rounding is amplified (else 0): its cost by the `spread` of noise, as in usual rows."""
    known = (spread > 0) & (cost > 0) & np.isfinite(spread) & np.isfinite(cost)
    if not known.any():
        return np.zeros(len(cost))
    amplified = spread >= _AMPLIFIED * float(np.median(spread[known]))
    return np.where(amplified, _MOST * spread * float(np.median(cost[known] / spread[known])), 0.0)
