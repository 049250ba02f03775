"""Divergences in which the table's limits cannot distinguish a fault from amplified rounding: the answer says so and blames no operation.

It remains a divergence and says what settles the question: if the model is known, float64 and measured limits decide.
"""

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern, Verdict

from ..limits import COMPUTES, EXACT_FLOOR, FUTURE_MASS, GROWTH, LARGEST_ROUNDING, limits
from ..measured.dataflow import CACHE
from ..measured.operations import MIXING, NORMS, recurrent
from ..measured.records import Records
from ..measured.slices import prepare, without_infinities
from ..readings.rounding import beyond_rounding, type_of
from ..readings.routing import may_have_flipped
from ..tolerances.few_numbers import FEW, share_of_few
from ..tolerances.noise import BEYOND
from ..tolerances.truth import AMPLIFIED, BOTH
from .eight_bits import is_noise
from .first import BLAMED
from .one_factor import beside_cut_digits
from .scatter import SIMILAR, is_scatter, spares_elements

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Squared errors of two rows of one point by rounding alone: at the failing ones of right engines at most 1.1 times the largest of those
# that agree (a gate of one number in F32, scans in F16 and with 8-bit activations; benchmarks/right_engines.py); twice that is allowed.
_AS_LARGE = 2.0

_CANCELLED = (
    "the error is no larger than at positions where the values are larger: rounding of a sum that all but cancels here, or a small "
    "fault (--model M.gguf decides)"
)

# A recurrence or a norm that amplifies rounding does so at one position in this many at most: a choice, since faults are wrong at most
# positions. A right F32 engine of arwkv7 was 8e-7 off at one of nine, by a norm (benchmarks/right_engines.py).
FEW_POSITIONS = 4

# By how much the norm of a recurrence's head may raise one row's error over its point's usual one, NMSE: right engines up to 190 times
# (qwen3next in F16; below), twice that in round numbers. No bound of rounding holds there: a head that is next to nothing is made as large
# as any other.
_BY_A_NORM = 400.0

_LOWEST = limits(None, None, compute="bf16")

# Patterns of positions, or none: such answers point at operations, which is wrong for rounding.
_OF_POSITIONS = frozenset(
    {
        "from-position-0",
        "every-position",
        "from-position-1",
        "from-position-n",
        "first-position",
        "single-positions",
        "one-position",
    }
    | {"operation", "drift", "grown", "output-matrix", "output-norm", "embedding", "embedding-row"}
)


def undecided(records: Records, verdict: Verdict) -> Verdict:
    """The verdict of a comparison by the table's limits alone, with another pattern if they cannot tell what is wrong."""
    first = verdict.first_divergence
    if first is None or first.checkpoint not in records.names or records.tokens.divergence is not None:
        return verdict
    code = verdict.pattern.code if verdict.pattern is not None else ""
    if (
        code == "precision"
        or (code == "drift" and BLAMED in verdict.operation)
        or (code == "rounded" and records.limits.assumed)
    ):
        return replace(verdict, operation="")
    origins = records.failed & ~records.upstream.failed
    points = np.unique(records.point[origins]).tolist()
    cancelled = {number for number in points if _cancelled(records, origins, number)}
    if records.names.index(first.checkpoint) in cancelled:
        beyond = [records.names[number] for number in points if number not in cancelled]
        further = f"; {beyond[0]} differs by more" if beyond else ""
        return replace(verdict, pattern=Pattern("undecided", f"{_CANCELLED}{further}"), operation="")
    leaks = bool((records.measures.future_mass[records.failed] > FUTURE_MASS).any())
    if code and code not in _OF_POSITIONS and (code != "causal-mask" or leaks):
        return verdict
    name = first.checkpoint
    if sentence := _unlike_what_follows(records, name):
        return replace(verdict, pattern=Pattern("undecided", sentence))
    sentence = (
        _rounding(records, name)
        or _flipped(records)
        or _amplified(records, name)
        or _product_alone(records, name)
        or _kept(records, name)
        or in_cache(records, name, "; --model M.gguf decides")
        or (_of_several_keys(records, name, verdict.pattern.sentence) if code == "from-position-1" and verdict.pattern else "")
    )
    return verdict if not sentence else replace(verdict, pattern=Pattern("undecided", sentence), operation="")


def by_other_experts(records: Records, verdict: Verdict) -> Verdict:
    """The verdict of a comparison by measured limits, which blames no operation if a near tie may have chosen other experts."""
    code = verdict.pattern.code if verdict.pattern is not None else ""
    if not records.limits.points or code not in _OF_POSITIONS or not (sentence := _flipped(records)):
        return verdict
    return replace(verdict, pattern=Pattern("undecided", sentence), operation="")


def _unlike_what_follows(records: Records, name: str) -> str:
    """A sentence if in a lower arithmetic a point differs by no more than rounding may, and nothing that is made from it does; otherwise
    empty."""
    errors = records.measures.nmse[records.failed & (records.point == records.names.index(name))]
    if (
        records.limits.operations <= EXACT_FLOOR.operations
        or name not in records.unconfirmed
        or errors.max() > LARGEST_ROUNDING
    ):
        return ""
    return (
        "over a limit that is one for all models, but what is computed from it agrees: the cost of lower arithmetic in this model, or a "
        "fault whose effect is hidden there (--model M.gguf measures it)"
    )


def _rounding(records: Records, name: str) -> str:
    number = records.names.index(name)
    here = records.point == number
    origins = records.failed & ~records.upstream.failed
    over, errors = float(records.of_limit[origins].max(initial=0.0)), records.measures.nmse
    most = AMPLIFIED if _at_few_positions(records, origins) else BEYOND * EXACT_FLOOR.operations
    if errors[origins].max(initial=0.0) <= most:
        return (
            f"{over:.1f} × over the limit: a small fault, or float32's rounding, amplified by this model (--model M.gguf lets float64 "
            "decide)"
        )
    if records.limits.operations <= EXACT_FLOOR.operations or over > GROWTH:
        return ""
    few = _few(records, np.flatnonzero(origins & here))
    cut = not few and not is_noise(records, number)
    if not few and (errors[here].min() <= EXACT_FLOOR.operations or (cut and not _digits_cut_off(records, number))):
        return ""
    noise = f"noise at every position{', of values that are smaller, as by digits that are cut off' if cut else ''}"
    return (
        f"{'rows of few numbers' if few else noise}, {over:.1f} × over a limit that is one for all models: a fault, or "
        "the cost of lower arithmetic in this model (--model M.gguf measures it)"
    )


def _digits_cut_off(records: Records, number: int) -> bool:
    """Whether a point's values are all smaller by what digits cut off explain, and the rest of their errors is noise."""
    values = prepare(records.pairs[number])
    ours, right = (side.astype(np.float64) for side in (values.a, values.b))
    if values.index is not None or not (np.isfinite(ours).all() and np.isfinite(right).all()):
        return False
    left = beside_cut_digits(ours - right, right, "bf16" if records.limits.assumed else records.stated)
    return left is not None and is_scatter(right + left, right)


def _at_few_positions(records: Records, origins: Bools) -> bool:
    """Whether all points of origin fail at few of their positions: a norm of values that all but cancel amplifies rounding there alone."""
    here = np.bincount(records.point, minlength=len(records.names))
    failing = np.bincount(records.point[origins], minlength=len(records.names))
    return bool((failing * FEW_POSITIONS <= here).all())


def _cancelled(records: Records, origins: Bools, number: int) -> bool:
    """Whether a point's rows fail because they are small: their errors are those of rows that agree.

    Terms of a sum that all but cancel leave a small number and the rounding of large ones: a scan of one position, a gate of one number.
    """
    here = np.flatnonzero(records.point == number)
    failing, passing = here[origins[here]], here[~records.failed[here]]
    if len(failing) > len(passing) or not (records.measures.nmse[failing] > records.limit[failing]).all():
        return False
    if _not_finite(records, failing).any():
        return False
    share = share_of_few(records.pairs[number].ref)[records.row[failing]]
    if (records.measures.nmse[failing] * share <= records.limit[failing]).all():
        return True  # allowed in the point's largest row
    by_row = records.measures.nmse_row[here] > records.limit[here]  # a whole row tells more than a few of its values
    recorded, whole = _squared(records, number, here)
    fails, passes = np.isin(here, failing), np.isin(here, passing)
    return all(
        not wrong.any() or errors[wrong].max() <= _AS_LARGE * np.fmax.reduce(errors[passes])
        for errors, wrong in ((whole, fails & by_row), (recorded, fails & ~by_row))
    )


def _not_finite(records: Records, chosen: Ints) -> NDArray[np.bool_]:
    """Which records fail by values that are not finite: sums of squares leave these out."""
    measures = records.measures
    nonfinite = (measures.nonfinite_ours[chosen] > 0) | (measures.nonfinite_ref[chosen] > 0)
    return np.asarray(nonfinite & np.isinf(measures.nmse[chosen]))


def _squared(records: Records, number: int, here: Ints) -> tuple[Floats, Floats]:
    """The squared errors of one point's records, by their values and by their whole rows: float64 [len(here)]; NaN where not known."""
    pair, rows = records.pairs[number], records.row[here]
    values = prepare(pair)
    with np.errstate(invalid="ignore", over="ignore"):
        recorded = np.nansum(np.square(values.a[rows].astype(np.float64) - values.b[rows]), axis=1)
        l2 = pair.ref.stats.get("l2", np.full(len(pair.ref), np.nan))[rows]
        return recorded, np.asarray(records.measures.nmse_row[here] * l2**2)


def _few(records: Records, chosen: Ints) -> bool:
    """Whether rows have so few numbers that all may nearly cancel, as scores of the first positions do."""
    pair = records.pairs[records.point[chosen[0]]]
    values = pair.ref.values[records.row[chosen]]
    inside = np.arange(values.shape[1]) < pair.ref.counts[records.row[chosen], None]
    whole = pair.ref.full()[records.row[chosen]]
    return bool((whole & ((np.isfinite(values) & inside).sum(axis=1) <= FEW)).all())


def _flipped(records: Records) -> str:
    """A sentence if lower arithmetic may have chosen other experts wherever an error is too large for rounding; otherwise empty."""
    if records.limits.operations <= EXACT_FLOOR.operations:
        return ""
    # Where nothing states the arithmetic, it may be 8 bits.
    most = limits(None, None, compute="q8").operations if records.limits.assumed else GROWTH * _of_table(records)
    origins = np.flatnonzero(records.failed & ~records.upstream.failed & (records.measures.nmse > most))
    choices = [
        may_have_flipped(
            records.flow,
            records.names[records.point[at]],
            int(records.seq[at]),
            int(records.token_idx[at]),
            records.ref.points,
            most,
        )
        for at in origins.tolist()
    ]
    if not choices or not all(choices):
        return ""
    return (
        f"a fault, or other experts: {choices[0]} chooses by a near tie at position {records.token_idx[origins[0]]}, which lower "
        f"arithmetic may decide the other way (record it on both sides{'' if records.limits.points else ', or --model M.gguf'})"
    )


def _of_table(records: Records) -> float:
    """The table's limit: those that are measured are wide where other experts cost half a row."""
    measured = records.limits.points and records.stated in COMPUTES
    return limits(None, None, compute=records.stated).operations if measured else records.limits.operations


def _product_alone(records: Records, name: str) -> str:
    """A sentence if a product may be in a lower arithmetic although its inputs are in float32; otherwise empty.

    That is mixed precision, if nothing states the arithmetic: F16 logits, sums in F16. Its errors are noise at every element and position.
    """
    number, flow = records.names.index(name), records.flow
    stretch = flow.between(name)
    if not records.limits.assumed or records.stated or stretch is None or not MIXING & flow.operations(stretch.nodes):
        return ""
    if not _noise_everywhere(records, number, _LOWEST.operations):
        return ""
    return (
        "noise at every position, of the size that lower arithmetic makes, while what it is computed from is in float32: mixed precision, "
        "or a small fault (--model M.gguf decides)"
    )


def _noise_everywhere(records: Records, number: int, most: float, some: Bools | slice = slice(None)) -> bool:
    """Whether all records of a point, or `some`, are off by noise of about the same size, at most this NMSE, that spares no elements."""
    errors, rows = (of[records.point == number][some] for of in (records.measures.nmse, records.row))
    if not EXACT_FLOOR.operations < errors.min() <= errors.max() <= min(SIMILAR * errors.min(), most):
        return False
    values = prepare(records.pairs[number])
    both = np.stack(without_infinities(values.a[rows], values.b[rows]))
    # Every position has read the first rows of a cache: they are one sample. Later positions have read further ones, if rows are whole.
    a, b = np.unique(both[:, :, np.isfinite(both).all(axis=(0, 1))], axis=1).astype(np.float64)
    return values.index is None and is_scatter(a, b) and not spares_elements(a - b, b, np.ones(a.shape, dtype=np.bool_))


def _of_several_keys(records: Records, name: str, pattern: str) -> str:
    """A sentence if all but position 0, where attention has one key, may be off by a lower type of scores or weights; otherwise empty."""
    number = records.names.index(name)
    if not records.limits.assumed or records.stated:
        return ""
    if not _noise_everywhere(records, number, _LOWEST.operations, records.failed[records.point == number]):
        return ""
    return (
        f"{pattern}; or these keep scores or weights in a lower type, which nothing states: the errors are noise and of that size (--model "
        "M.gguf decides)"
    )


def in_cache(records: Records, name: str, further: str = "") -> str:
    """A sentence if what was read from a cache may have been kept there in a lower type, which nothing states; otherwise empty."""
    stretch, header = records.flow.between(name), records.ours.header
    if stretch is None or records.flow.operations(stretch.nodes) != {CACHE} or (header is not None and header.kv_type):
        return ""
    if not _noise_everywhere(records, records.names.index(name), limits(None, None, compute="q8").operations):
        return ""
    return (
        "noise at every position, of the size that a cache of lower type makes, and nothing states the cache's type: 8 bits or fewer, say, "
        f'or a fault of that size ("kv_type" in the header says it{further})'
    )


def _kept(records: Records, name: str) -> str:
    """A sentence if all of a point's values are numbers of a lower type, and no further off than rounding to it makes them beside the
    errors of what they are made from; otherwise empty.
    """
    values, here = prepare(records.pairs[records.names.index(name)]), records.point == records.names.index(name)
    if not records.limits.assumed or records.stated or values.index is not None:
        return ""
    ours, right = (side[records.row[here]] for side in without_infinities(values.a, values.b))
    kind = type_of(ours)
    if not kind or type_of(right) or not np.isfinite(right).all():
        return ""
    energy = np.square(right.astype(np.float64)).sum(axis=1)
    beyond = np.square(beyond_rounding(right, ours, kind).astype(np.float64) - ours).sum(axis=1)
    if (beyond > energy * np.fmax(EXACT_FLOOR.at(name), BOTH * records.upstream.worst[here])).any():
        return ""
    return (
        f"every value is one of {kind}, and no further off than rounding to it makes it: mixed precision, which nothing states, or a fault "
        "that is smaller still (--model M.gguf decides)"
    )


def _amplified(records: Records, name: str) -> str:
    """A sentence if a recurrence or a norm may have amplified a lower arithmetic's error at single positions; otherwise empty.

    The sum that a state is read with may nearly cancel at one position, and a norm after it divides by what is left. A right F16 engine of
    qwen3next was 1.9e-3 off at one of nine positions, and 1e-5 at the others (benchmarks/right_engines.py --from 2074), one of bailingmoe3
    1.4e-4 at one of six, at the norm of a head of what its recurrence gives (--from 815000). In 8 bits one of rwkv6 was 0.14 off at
    position 0, where a head reads one key only, in proportion to a number that may be next to nothing (--from 200011).
    """
    stretch = records.flow.between(name)
    if records.limits.operations <= EXACT_FLOOR.operations or stretch is None:
        return ""
    operations = records.flow.operations(stretch.nodes)
    if not (any(map(recurrent, operations)) or operations & NORMS):
        return ""
    number = records.names.index(name)
    errors, failed = records.measures.nmse[records.point == number], records.failed[records.point == number]
    largest = LARGEST_ROUNDING
    if any(map(recurrent, operations)) and operations & NORMS:
        largest = max(largest, _BY_A_NORM * float(np.median(errors)))
    if failed.sum() * FEW_POSITIONS > len(failed) or not EXACT_FLOOR.operations < errors.min() <= errors.max() <= largest:
        return ""
    return (
        "noise at every position and more at single ones, where a recurrence or a norm may amplify it: a fault, or the cost of lower "
        "arithmetic in this model (--model M.gguf measures it)"
    )
