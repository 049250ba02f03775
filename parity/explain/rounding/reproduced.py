"""A dump whose every record is that of our own run in a lower arithmetic: nothing is left that a fault could have made.

Sizes of errors leave room for a fault; values do not. Whether an engine also rounds something besides products and results (a norm's
row before its weight, the file's float32 parameters) is tried at the first place, where it costs one operation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np
from msgspec import Struct

from engine.backend import Array
from engine.graph import Step, weight_name
from engine.replay.precision import is_normed, rounded
from engine.replay.replay import Replay
from engine.replay.rounded_weights import with_rounded_weights

from ...diff.limits import limits
from ..budget import Budget
from ..case import Case
from ..records.records import Expected, Floats, first_over
from .flipped import has_choices
from .mixed import own_steps, rounded_value
from .precision import mean_cost, of_ids

# The part of what an arithmetic costs a point up to which our own run's numbers are the dump's: right engines' were 0 to 0.01 of it,
# from values that lie next to a tie. And the same for a single record, in which one such value may be most of the error.
THE_SAME, _ONE_RECORD = 0.1, 3.0
_BY_TYPE = ("f16", "bf16")  # types in which parameters are kept, and a norm's row


class _Way(Struct, frozen=True):
    """A way of computing in a lower type: besides products, every result; a norm's row; some parameters."""

    storage: bool
    normed: bool = False
    parameters: Callable[[Step, str], bool] | None = None

    def of(self, steps: Sequence[Step], kind: str) -> list[Step]:
        """The steps in that arithmetic."""
        kept = steps if self.parameters is None else with_rounded_weights(steps, kind, self.parameters)
        return rounded(kept, kind, storage=self.storage, normed=self.normed)


def _of_norm(step: Step, _name: str) -> bool:
    return is_normed(step)


def _is_bias(step: Step, name: str) -> bool:
    return not is_normed(step) and name != weight_name(step.weights[0])


def _is_any(_step: Step, _name: str) -> bool:
    return True


def _is_vector(step: Step, name: str) -> bool:
    return _of_norm(step, name) or _is_bias(step, name)


def _ways(kind: str) -> Iterator[_Way]:
    yield from (_Way(storage) for storage in (False, True))
    if kind in _BY_TYPE:
        for normed, parameters, storage in product(
            (False, True), (None, _is_any, _is_vector, _of_norm, _is_bias), (False, True)
        ):
            if normed or parameters is not None:
                yield _Way(storage, normed, parameters)


def is_reproduced(case: Case, kind: str, budget: Budget) -> bool:
    """Whether every record of the dump is, up to values that lie next to a tie, that of a run of the right steps in this arithmetic.

    False if there was no time to tell: a first place that is an embedding shows little, and each way that it leaves costs a run.
    """
    first = first_over(case.entries)
    if first is None:
        return False
    steps, chosen = case.transformer.steps, has_choices(case)
    places = own_steps(steps, first.point, {entry.point for entry in case.entries})
    for way in _ways(kind):
        if budget.over():
            return False
        value = rounded_value(case, places, partial(way.of, kind=kind), first.point)
        if value is None or not _the_same(first, first.nmse(value, case.positions), _cost(case, first, value, kind, chosen)):
            continue
        run = case.make(way.of(steps, kind), len(case.positions), None, case.rounded(kind, way.storage))
        if all(_same_as_run(case, run, entry, kind, chosen) for entry in case.entries):
            return True
    return False


def _same_as_run(case: Case, run: Replay, entry: Expected, kind: str, chosen: bool) -> bool:
    """Whether a point's records are those of a run, to which ids (of chosen experts) may differ: what they lead to is compared."""
    value = run.on_host[entry.point]
    return of_ids(entry) or _the_same(entry, entry.nmse(value, case.positions), _cost(case, entry, value, kind, chosen))


def _cost(case: Case, entry: Expected, value: Array, kind: str, chosen: bool) -> float:
    """What the lower arithmetic of this value costs the point (`usual_cost`)."""
    return usual_cost(entry.between(value, case.replay.on_host[entry.point], case.positions), kind, chosen)


def usual_cost(costs: Floats, kind: str, chosen: bool) -> float:
    """What an arithmetic that costs a point's records that much costs it: mean NMSE.

    Where experts are `chosen` it is the usual record's, and no more than the type's limit: what other experts make is half a row, which
    leaves room for any fault.
    """
    known = costs[np.isfinite(costs)]
    if not chosen or not len(known):
        return mean_cost(costs)
    return min(float(np.median(known)), limits(None, None, compute=kind).operations)


def _the_same(entry: Expected, errors: Floats, cost: float) -> bool:
    errors, least = np.nan_to_num(errors, nan=0.0, posinf=np.inf), float(entry.limit.max())
    return bool(errors.mean() <= max(THE_SAME * cost, least) and errors.max() <= max(_ONE_RECORD * cost, least))
