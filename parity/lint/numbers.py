"""Values that no transformer computes: garbage, patterns, other types' bits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.lint import WARNING
from checkpoints.points import EMBD, LOGITS, of_scores, parse
from checkpoints.record import Rows
from reports.numbers import count, ranges

from .rule import Hit, Subject, by_point, kind, leading, of_ids, positions_of

# The largest activations seen in published models are some 1e4 ("massive activations", Sun et al. 2024), scores before the
# scale some 1e5; an fp16 engine overflows at 65504. Five orders of magnitude above that, nothing is a computed value.
_LARGEST_RIGHT = 1e5
_HUGE = 1e10
# The values of a right row span some orders of magnitude; garbage from foreign memory spans dozens.
_SPREAD = 1e10
# What engines write for −∞ (hidden scores, suppressed logits, those of a padded vocabulary): the lowest numbers of float32 and bfloat16;
# for logits, scores and masks also minus a power of ten, as source code has it (-1e30f). In an activation that is the initial maximum of a
# soft max that computes in parts, which reached its result.
_LOWEST = np.array([0xFF7FFFFF, 0xFF7F0000], np.uint32).view(np.float32)
_WRITTEN = np.append(_LOWEST, (-(10.0 ** np.arange(11, 39))).astype(np.float32))
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
# Residual stream, projections and logits are sums of many products: an exact zero among them is next to impossible.
# (Embeddings of 4-bit types, ReLU layers, norms with a zero weight and saturated attention have true zeros.)
_DENSE = frozenset({"l_out", "ffn_inp", "attn_out", "q", "k", "v", "q_rope", "k_rope", LOGITS})
_ENOUGH = 8  # values that a row must have before its pattern means anything
# A sequence's first position has zeros before it; activations between the vocabulary's points may be zero in all recorded values.
_PADDED = frozenset({"CONCAT", "PAD", "FILL"})
# Distance from the row's median, in robust standard deviations (1.4826 · MAD), that no logit of a right model reaches: measured, at
# most 9.2 on the embedded model (four random prompts of 256 tokens, 300 of its own) and 4.7 on six synthetic ones, where ids
# occur in training. Ids that never occur are within 0.3 of each other and 80 such deviations below a likely one: the distance must
# also be beyond what a softmax in float32 distinguishes from 0, e^-104, which no model needs.
_OUTLIER = 60.0
_FAR = 104.0


def non_finite(subject: Subject) -> Iterator[Hit]:
    """NaN or infinities, recorded or counted."""
    for name, rows in subject.points.items():
        width = np.arange(rows.values.shape[1])
        inside = width[None, :] < rows.counts[:, None]
        nonfinite = ~np.isfinite(rows.values) & inside
        origin = subject.computation(name)
        if "kq" in kind(name) or "mask" in kind(name):
            nonfinite &= ~np.isneginf(rows.values)  # a mask's −∞ is intended
        counted = np.nan_to_num(rows.stats.get("nonfinite", np.zeros(len(rows))))
        # What must not be chosen is −∞; a point of which nothing is known may be a mask, or made of one.
        unknown = origin is None and parse(name).known is None
        mask = origin is not None and (
            origin.op == "FILL"
            or _hides_the_rest(rows, inside, counted)
            or (_of_fills(subject, name) and _only_hides(rows, inside))
        )
        if unknown or mask:
            nonfinite &= ~np.isneginf(rows.values)
            counted = np.zeros(len(rows))
        wrong_rows = (nonfinite.any(axis=1) | (counted > 0)).nonzero()[0].tolist()
        if wrong_rows:
            first = min(wrong_rows, key=lambda r: int(rows.token_idx[r]))
            wrong_values = int(max(counted[first], nonfinite[first].sum()))
            at = np.flatnonzero(nonfinite[first])
            place = f", the first at index {int(at[0])}: {rows.values[first, at[0]]}" if len(at) else ""
            evidence = (
                f"{name} has {count(wrong_values, 'value')} that {'is' if wrong_values == 1 else 'are'} not a number{place}, "
                + positions_of(rows, wrong_rows)
            )
            yield Hit(name, int(rows.token_idx[first]), evidence)


def _of_fills(subject: Subject, name: str) -> bool:
    """Whether a value is composed of constants, like a mask that shows what an index chose."""
    origin = subject.computation(name)
    reads = () if origin is None else origin.reads
    return any(made.op == "FILL" for read in reads if (made := subject.computation(read)) is not None)


def _only_hides(rows: Rows, inside: NDArray[np.bool_]) -> bool:
    """Whether every value is 0 or −∞."""
    return bool(((rows.values == 0) | np.isneginf(rows.values) | ~inside).all())


def _hides_the_rest(rows: Rows, inside: NDArray[np.bool_], counted: NDArray[np.float64]) -> bool:
    """Whether no value is non-finite but −∞, and every row ends in it, or has it for each later position of the pass: scores to which a
    mask was added, over a cache or over the pass.
    """
    hidden = np.isneginf(rows.values) & inside
    ends = np.maximum.accumulate(hidden, axis=1) & inside
    if not hidden.any() or not (np.isfinite(rows.values) | hidden | ~inside).all():
        return False
    order = np.argsort(rows.token_idx)
    in_order, size = counted[order], int(rows.sizes[order[0]])
    later = np.maximum(
        np.count_nonzero(in_order) - np.arange(len(in_order)), 0
    )  # positions of the pass that each one must not see
    causal = 0 < later[0] < len(in_order) and (in_order * (later[0] + 1) == size * later).all()
    return bool((hidden == ends).all() or causal)


def impossible_size(subject: Subject) -> Iterator[Hit]:
    """1e18 next to 0.0 next to 3.04: memory that contains something else. The lowest number of a type hides scores and logits."""
    for name, rows in subject.points.items():
        hiding = _WRITTEN if name == LOGITS or of_scores(name) or parse(name).known is None else _LOWEST
        stated = [np.abs(_shown(rows.stats[stat], hiding)) for stat in ("max", "min") if stat in rows.stats]
        size = np.abs(_shown(rows.values, hiding))
        if all(sizes.max(initial=0.0) <= _HUGE for sizes in (size, *stated)):  # which also means that none is NaN
            continue
        largest = np.where(np.isfinite(size), size, 0.0).max(axis=1, initial=0.0).astype(np.float64)
        for sizes in stated:
            largest = np.maximum(largest, np.nan_to_num(sizes, posinf=0.0))
        bad = (largest > _HUGE).nonzero()[0].tolist()
        if not bad:
            continue
        first = min(bad, key=lambda r: int(rows.token_idx[r]))
        row = leading(rows, first)
        nonzero = np.abs(row[np.isfinite(row) & (row != 0)])
        # A row of only huge values is from an engine that overflows, which a comparison can name.
        scattered = len(nonzero) == 0 or float(np.min(nonzero)) < largest[first] / _SPREAD
        climbing = _climbs(rows, largest, first)
        shown = ", ".join(f"{x:.3g}" for x in _telling_values(row)) or f"{largest[first]:.3g}"
        evidence = f"{name} holds values up to {largest[first]:.1e} ({shown}), {positions_of(rows, bad)}" + (
            ", and rises to them from position to position, as a state does that grows where it should decay"
            if climbing
            else ""
        )
        yield Hit(name, int(rows.token_idx[first]), evidence, None if scattered and not climbing else WARNING)


def _climbs(rows: Rows, largest: NDArray[np.float64], first: int) -> bool:
    """Whether each position is larger than the one before, and the last before the first huge one already beyond any right engine's:
    a recurrence that explodes. Other memory's bytes are huge at once.
    """
    before = (rows.seq == rows.seq[first]) & (rows.token_idx < rows.token_idx[first])
    sizes = largest[before][np.argsort(rows.token_idx[before])]
    return len(sizes) > 1 and bool(sizes[-1] > _LARGEST_RIGHT and (np.diff(sizes) > 0).all())


def _shown(values: NDArray[Any], hiding: NDArray[np.float32]) -> NDArray[Any]:
    """The values with 0 for those that stand for −∞."""
    with np.errstate(over="ignore"):
        hidden = np.isin(values.astype(np.float32), hiding)
    return np.where(hidden, values.dtype.type(0), values) if hidden.any() else values


def _telling_values(row: NDArray[np.float32]) -> list[float]:
    """The largest value, a zero and a middle one, which show best that they do not belong together."""
    finite = row[np.isfinite(row)]
    if not len(finite):
        return []
    ordered = finite[np.argsort(-np.abs(finite))]
    picked = [float(ordered[0])]
    if (finite == 0).any():
        picked.append(0.0)
    nonzero = ordered[ordered != 0]
    if len(nonzero) > 1:
        picked.append(float(nonzero[len(nonzero) // 2]))
    return picked


def exact_zeros(subject: Subject) -> Iterator[Hit]:
    """Exact zeros among plausible values of a sum of many products."""
    rows_of: dict[str, list[int]] = {}
    for name, rows in subject.points.items():
        if kind(name) not in _DENSE or rows.values.shape[1] < _ENOUGH:
            continue
        inside = np.arange(rows.values.shape[1])[None, :] < rows.counts[:, None]
        zero = (rows.values == 0) & inside
        some = (zero.sum(axis=1) >= 3) & (zero.sum(axis=1) * 5 >= rows.counts) & (zero.sum(axis=1) < rows.counts)
        if rows.quantum is not None and some.any():
            # Printed with few decimals, a small value becomes a zero, too.
            typical = np.nanmedian(np.where(zero | ~inside, np.nan, np.abs(rows.values))[some], axis=1)
            some[some] = typical > 1000 * rows.quantum[some].max(axis=1)
        if some.any():
            rows_of[name] = some.nonzero()[0].tolist()

    def sentence(name: str, wrong_rows: list[int]) -> str:
        rows = subject.points[name]
        zeros = np.flatnonzero(leading(rows, wrong_rows[0]) == 0)
        return (
            f"{name} holds {len(zeros)} exact zeros among {int(rows.counts[wrong_rows[0]])} values (index "
            f"{ranges(tuple(zeros.tolist()))}), {positions_of(rows, wrong_rows)}"
        )

    yield from by_point(rows_of, subject, sentence)


def garbage_logits(subject: Subject) -> Iterator[Hit]:
    """Single logits far outside the range of their row."""
    rows = subject.points.get(LOGITS)
    if rows is None:
        return
    wrong_rows: list[int] = []
    text = ""
    for r in range(len(rows)):
        values = leading(rows, r)
        kept = np.flatnonzero(np.isfinite(values) & ~np.isin(values, _WRITTEN))
        row = values[kept].astype(np.float64)
        if len(row) < _ENOUGH:
            continue
        median = _median(row)
        deviation = 1.4826 * _median(np.abs(row - median))
        if deviation == 0:
            continue
        far = np.flatnonzero(np.abs(row - median) > max(_OUTLIER * deviation, _FAR))
        if len(far) and len(far) < len(row) // 4:
            wrong_rows.append(r)
            listed = ", ".join(f"[{kept[i]}] {row[i]:.4g}" for i in far[:4]) + (", …" if len(far) > 4 else "")
            text = text or f"{count(len(far), 'logit')} far outside the row's {median:.3g} ± {deviation:.2g}: {listed}"
    if wrong_rows:
        yield Hit(LOGITS, int(rows.token_idx[wrong_rows[0]]), f"{text}, {positions_of(rows, wrong_rows)}")


def _median(row: NDArray[np.float64]) -> float:
    """The upper median. np.median would import numpy.ma, 20 ms of every comparison."""
    return float(np.partition(row, len(row) // 2)[len(row) // 2])


def flat_row(subject: Subject) -> Iterator[Hit]:
    """Rows of one repeated number, or of numbers in even steps."""
    # A bias that is looked up by distance is the same for all distances beyond the largest.
    flow = subject.dataflow
    of_tokens = frozenset() if flow is None else flow.downstream(lambda name, _: name.endswith(EMBD))
    for name, rows in subject.points.items():
        if of_tokens and flow is not None and name in flow.computations and name not in of_tokens:
            continue
        if kind(name) == "kq_soft_max" or "mask" in kind(name) or rows.values.shape[1] < _ENOUGH or rows.dtype.startswith("i"):
            continue
        origin, point = subject.computation(name), parse(name)
        if origin is None and point.known is None and point.layer is None:
            continue  # of no layer, as far as is known: distances and what is made of them do rise in even steps
        even = _even_steps(rows)
        if point.known is None or (origin is not None and origin.op in _PADDED):
            even &= (rows.values[:, 0] != 0) & ~of_ids(rows)
        if even.any():
            bad = even.nonzero()[0].tolist()
            row = leading(rows, bad[0])
            if row[0] == row[-1]:
                if row[0] == 0 and rows.quantum is not None:
                    continue  # it may be printed with too few decimals to tell
                evidence, severity = f"{row[0]:.4g} everywhere", WARNING if row[0] == 0 else None
            else:
                evidence, severity = f"even steps: {', '.join(f'{x:.4g}' for x in row[:4])}, …", None
            yield Hit(name, int(rows.token_idx[bad[0]]), f"{name} is {evidence}, {positions_of(rows, bad)}", severity)


def _even_steps(rows: Rows) -> NDArray[np.bool_]:
    """bool [R]: whether all steps from one value to the next are equal (zero included)."""
    inside = np.arange(rows.values.shape[1])[None, :] < rows.counts[:, None]
    values = np.where(inside, rows.values, np.nan).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.diff(values, axis=1)
        # The last digits of a rounded ramp: two float32 roundings of the largest value.
        room = 2 * np.finfo(np.float32).eps * np.nanmax(np.abs(values), axis=1, initial=0.0)
        same = np.abs(steps - steps[:, :1]) <= room[:, None]
        # A slope smaller than the rounding does not count.
        visible = (np.abs(steps[:, 0]) > 100 * room) | np.all((steps == 0) | ~inside[:, 1:], axis=1)
    even: NDArray[np.bool_] = np.all(same | ~inside[:, 1:], axis=1) & (rows.counts >= _ENOUGH) & visible
    return even


def denormals(subject: Subject) -> Iterator[Hit]:
    """Rows mostly below the smallest normal float32: integers or other bits read as floats."""
    rows_of: dict[str, list[int]] = {}
    for name, rows in subject.points.items():
        if kind(name) == "kq_soft_max" or rows.values.shape[1] < _ENOUGH:
            continue
        size = np.abs(rows.values)
        tiny = np.sum((size > 0) & (size < _SMALLEST_NORMAL), axis=1)
        bad = ((tiny * 2 > np.sum(size > 0, axis=1)) & (tiny >= _ENOUGH // 2)).nonzero()[0].tolist()
        if bad:
            rows_of[name] = bad

    def sentence(name: str, wrong_rows: list[int]) -> str:
        row = leading(subject.points[name], wrong_rows[0])
        example = next(float(x) for x in row if 0 < abs(x) < _SMALLEST_NORMAL)
        return f"{name} is mostly denormal numbers such as {example:.2g}, {positions_of(subject.points[name], wrong_rows)}"

    yield from by_point(rows_of, subject, sentence)
