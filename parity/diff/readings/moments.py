"""The other point, position, moment or type under which records equal the reference's."""

from collections import Counter
from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import LOGITS, order, parse
from checkpoints.record import Rows

from ..limits import EXACT_FLOOR
from .readings import (
    MOMENT,
    NAME,
    TELLING,
    TYPE,
    Allowed,
    Floats,
    Ints,
    Others,
    Reading,
    agree,
    bare,
    common_length,
    side_by_side,
    wide,
)
from .rounding import rounded_to

_LISTED = 6  # positions that a sentence names
_LIKELIHOODS = 1e-3  # relative: how far the sum of a row's probabilities may be from 1, added up in float32


def renamed(ours: Rows, allowed: Allowed, others: Others) -> Reading | None:
    """The reading as the reference's records of another point."""
    for name in others.beginning_like(ours, allowed):
        rows = others.points[name]
        if name == ours.point or not _first_alike(ours, rows, allowed):
            continue
        pair = _together(ours, rows)
        if pair is not None and agree(*pair, allowed):
            here, there = parse(ours.point), parse(name)
            same_layer = here.layer == there.layer
            early = order([name, ours.point])[0] == name
            when = "before this was computed" if early else "late, when its buffer held that"
            sentence = f"it is {name}" + ("" if same_layer else f": captured {when}, or under a wrong name")
            away = "" if here.layer is None or there.layer is None else str(there.layer - here.layer)
            # What is computed in a later layer is in no buffer yet, nor what any layer computes before the first of them.
            later = there.layer is not None and (not early if here.layer is None else there.layer > here.layer)
            return Reading(
                NAME if same_layer else MOMENT,
                sentence,
                f'"{ours.point}" = "{name}"' if same_layer else "",
                relation=f"{there.kind} {away or there.name}",
                proof=later,
                own=False,
                shows=name,
            )
    return None


def _first_alike(ours: Rows, rows: Rows, allowed: Allowed) -> bool:
    """Whether our first record could be another point's: a quick check before all records are paired."""
    width = min(ours.values.shape[1], rows.values.shape[1])
    at = np.flatnonzero((rows.seq == ours.seq[0]) & (rows.token_idx == ours.token_idx[0]))
    if not len(at) or width < 4:
        return False
    return agree(ours.values[:1, :width], rows.values[at[:1], :width], allowed.take(np.arange(1)))


def _together(ours: Rows, rows: Rows) -> tuple[Floats, Floats] | None:
    """Our records beside those of another point; None if not all of ours have a counterpart."""
    if rows.indices is not None or (common_length(ours, rows) is None and not bare(ours)):
        return None
    if not ((rows.seq == ours.seq[0]) & (rows.token_idx == ours.token_idx[0])).any():
        return None
    place = {(int(seq), int(t)): r for r, (seq, t) in enumerate(zip(rows.seq, rows.token_idx, strict=True))}
    at = [place.get((int(seq), int(t))) for seq, t in zip(ours.seq, ours.token_idx, strict=True)]
    counterparts = [r for r in at if r is not None]
    width = min(ours.values.shape[1], rows.values.shape[1])
    if len(counterparts) < len(ours) or width < min(TELLING, ours.values.shape[1]) or width < 4:
        return None
    return wide(ours.values[:, :width]), wide(rows.values[counterparts, :width])


def scaled(ours: Rows, ref: Rows, allowed: Allowed) -> Reading | None:
    """The reading as a multiple by a constant factor, or as the value after an activation."""
    a, b = side_by_side(ours, ref)
    if a.shape[1] < TELLING or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    if agree(a, b, allowed):
        return None  # what differs is none of these values
    for name, function in _ACTIVATIONS.items():
        if agree(a, function(b), allowed):
            return Reading(MOMENT, f"it is {name} of the reference's: captured after the activation")
    energy = np.sum(b * b, axis=1)
    if not energy.all():
        return None
    if not a.any():
        return Reading(MOMENT, "zeros: captured before it was written, or after it was cleared", own=False)
    if len(ours) == 1 and float(allowed.nmse[0]) > EXACT_FLOOR.logits:
        return None  # a number of that row, which lower arithmetic rounds where terms all but cancel, is such a factor too
    factors = np.sum(a * b, axis=1) / energy
    factor = float(np.median(factors))
    if abs(factor) < 1e-6 or abs(factor - 1) < 1e-2 or np.abs(factors - factor).max() > 1e-5 * abs(factor):
        return None
    if not agree(a / factor, b, allowed):
        return None
    return Reading(MOMENT, f"it is {factor:.6g} times the reference's: captured before or after a scale")


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "SiLU": lambda x: x / (1 + np.exp(-np.clip(x, -700, 700))),
    "GELU": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "ReLU": lambda x: np.maximum(x, 0.0),
}


# The share of an error that is left beside one factor. Right engines with a GELU of their own left 0.11 and more (ten architectures, 720
# rows of 8, 10, 16 and all values); of eight values, the fewest that are read, scattered errors leave less than this once in 10⁵ draws.
_LEFT = 0.05


def other_position(ours: Rows, allowed: Allowed, rows: Rows) -> Reading | None:
    """The reading as the reference's records of other positions of the same point."""
    single_logits = len(ours) == 1 and ours.point == LOGITS
    shown = _positions_shown(ours, allowed.at_last() if single_logits else allowed, rows)
    known = shown >= 0
    if known.sum() < min(len(ours), 3) or (~known).sum() > 1:
        return None
    away = set((shown - ours.token_idx)[known].tolist())
    if away == {0}:
        return None  # what differs was not recorded
    last = int(rows.token_idx.max())
    if len(ours) == 1 and not (single_logits and shown[0] == last and not _is_a_factor(ours, rows, allowed)):
        return None
    if len(ours) == 1:
        return Reading(MOMENT, f"it is the reference's at position {last}, the last: only its number is wrong", proof=True)
    if away in ({-1}, {1}):
        shift, when = ("− 1", "late") if away == {-1} else ("+ 1", "early")
        return Reading(MOMENT, f"position t holds the reference's t {shift}: captured a pass too {when}", relation=f"t {shift}")
    if not known.all():
        return None
    turned = (shown - ours.token_idx) % len(rows)
    if len(set(turned.tolist())) == 1 and len(away) > 1:
        distance = min(away, key=abs)
        return Reading(
            MOMENT, f"position t holds the reference's t {'−' if distance < 0 else '+'} {abs(distance)}, around the end"
        )
    if len(away) == 1:
        distance = away.pop()
        return Reading(MOMENT, f"position t holds the reference's t {'−' if distance < 0 else '+'} {abs(distance)}")
    if len(set(shown.tolist())) == 1:
        sentence = f"every position holds the reference's position {shown[0]}: one row was captured again and again"
        return Reading(MOMENT, sentence, own=False)
    if len(set(shown.tolist())) == len(shown):
        more = ", …" if len(shown) > _LISTED else ""
        shown_text, our_text = (
            ", ".join(map(str, positions[:_LISTED].tolist())) + more for positions in (shown, ours.token_idx)
        )
        return Reading(MOMENT, f"its positions are in another order: {our_text} hold the reference's {shown_text}")
    return None


def _is_a_factor(ours: Rows, rows: Rows, allowed: Allowed) -> bool:
    """Whether a record that is the last position's but for more than its own limit differs from that by one factor, which is no noise."""
    there = (rows.token_idx == rows.token_idx.max()) & (rows.seq == ours.seq[0])
    width = min(int(ours.counts.min()), rows.values.shape[1])
    a, b = wide(ours.values[0, :width]), wide(rows.values[there][0, :width])
    error, energy = float(np.sum((a - b) ** 2)), float(np.sum(b * b))
    left = float(np.sum((a - b * (a @ b) / energy) ** 2))
    return width >= TELLING and error > float(allowed.nmse[0]) * energy and left < _LEFT * error


def _positions_shown(ours: Rows, allowed: Allowed, rows: Rows) -> Ints:
    """The position of the reference whose record each of ours is, [R]; -1 if there is none.

    If several positions have that record, as those of one token do before attention, the one at the commonest distance counts.
    """
    width = min(int(ours.counts.min()), rows.values.shape[1])
    shown = np.full(len(ours), -1, dtype=np.int64)
    if rows.indices is not None or width < 4 or width < min(TELLING, ours.values.shape[1]):
        return shown
    candidates = wide(rows.values[:, :width])
    energy = np.sum(candidates**2, axis=1)
    usable = np.isfinite(candidates).all(axis=1) & (energy > 0)
    matches: dict[int, list[int]] = {}
    for i in range(len(ours)):
        row = wide(ours.values[i, :width])
        if not np.isfinite(row).all() or len(set(row.tolist())) < 3:
            continue
        delta = np.maximum(np.abs(candidates - row) - allowed.step, 0.0)
        near = usable & (rows.seq == ours.seq[i]) & (np.sum(delta**2, axis=1) <= allowed.nmse[i] * energy)
        if near.any():
            matches[i] = rows.token_idx[near].tolist()
    distances = Counter(position - int(ours.token_idx[i]) for i, positions in matches.items() for position in positions)
    for i, positions in matches.items():
        shown[i] = max(positions, key=lambda position: distances[position - int(ours.token_idx[i])])
    return shown


def other_type(ours: Rows, ref: Rows, allowed: Allowed) -> Reading | None:
    """The reading as the reference's values rounded to a type, or as their bits taken for another type's."""
    rounded = rounded_to(ours, ref)
    if rounded:
        return Reading(TYPE, f"rounded to {rounded}: captured in that type, or kept in it")
    width = int(min(ours.counts.min(), ref.counts.min()))
    a, b = ours.values[:, :width], ref.values[:, :width]
    if width < TELLING or not np.isfinite(b).all() or not b.any(axis=1).all():
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # bits of another type may be infinite, or signalling NaN
        for what, misread in _MISREAD.items():
            other, low = misread(b), misread(_lower(b))
            near = np.abs(wide(a) - wide(other)) <= np.abs(wide(low) - wide(other)) + allowed.step
            same, telling = near | (np.isnan(a) & np.isnan(other)), np.isfinite(other) & (other != 0)
            if same.mean() > _SAME_BITS and telling.mean() > _SAME_BITS / 2:
                return Reading(TYPE, what)
    return None


_SAME_BITS = (
    0.98  # share of the values; the two engines' last bits differ, and some values round up in one and down in the other
)


def _lower(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values one step of BF16 further from zero."""
    return np.asarray((np.ascontiguousarray(x).view(np.uint32) + np.uint32(1 << 16)).view(np.float32))


def _bf16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.asarray((np.ascontiguousarray(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16))


def _bf16_as_f16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(_bf16_bits(x).view(np.float16).astype(np.float32))


def _f16_as_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


_MISREAD: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "BF16 bits read as F16": _bf16_as_f16,
    "F16 bits read as BF16": _f16_as_bf16,
}


def likelihoods(ours: Rows, ref: Rows, allowed: Allowed) -> Reading | None:
    """The reading of logits as probabilities or their logarithms. Only whole rows prove it: of a part, the sum is not known."""
    if not (ours.full().all() and ref.full().all()):
        return _less_a_constant(ours, ref, allowed)
    if any(prod(shape) < 2 for shape in ref.shapes):
        return None
    a, b = wide(ours.values), wide(ref.values)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    logarithms = b - b.max(axis=1, keepdims=True)
    logarithms -= np.log(np.sum(np.exp(logarithms), axis=1, keepdims=True))
    if np.abs(a - logarithms).max() < _LIKELIHOODS:
        return Reading(MOMENT, "log-probabilities: captured after the log soft max", proof=True)
    if np.abs(a - np.exp(logarithms)).max() < _LIKELIHOODS * np.exp(logarithms).max():
        return Reading(MOMENT, "probabilities: captured after the soft max", proof=True)
    return None


def _less_a_constant(ours: Rows, ref: Rows, allowed: Allowed) -> Reading | None:
    """The reading of a part of the logits as log-probabilities: the logits less a number of each position, none above what is possible.

    A fault may add a number, too: this proves nothing, but the same soft max follows.
    """
    width = int(min(ours.counts.min(), ref.counts.min()))
    if width < TELLING or len(ours) < 2:
        return None
    a, b = wide(ours.values[:, :width]), wide(ref.values[:, :width])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    less = np.median(b - a, axis=1, keepdims=True)
    possible = np.sum(np.exp(np.minimum(a, 1.0)), axis=1) <= 1 + _LIKELIHOODS
    if not possible.all() or not agree(a + less, b, allowed):
        return None
    return Reading(
        MOMENT,
        "the reference's less a number at each position, of which the soft max is the same: captured after a log soft max?",
    )
