"""What is left to say when no known fault reproduces the numbers: partial candidates, and what the numbers themselves say."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.explain import Lead, Named
from checkpoints.points import parse
from engine.backend import Array
from engine.faults import SEEN

from .records import Expected, Floats, Ints
from .search import Search
from .state import State, key

Values = Mapping[str, Array]

_COUNT = 3  # partial candidates that are shown
_WORTH = 0.5  # part of the error that a candidate must take away to be shown
# What counts as equal in an observation: NMSE of float32 noise (tolerance.EXACT_FLOOR), with room for printed digits.
_EQUAL = 1e-9
_F16_MAX = 65504.0  # the largest finite float16


def leads(entries: Sequence[Expected], state: State, search: Search, positions: Ints) -> list[Lead]:
    """What is to be said of a state's first place: observations, then the candidates that take most of the error away."""
    if state.first is None:
        return []
    entry = replace(entries[state.first.point], base=state.nmse[state.first.point])
    values = search.screening.replay(state, len(positions)).on_host
    seen = [Lead(sentence) for sentence in _observations(entry, values, positions)]
    best: dict[str, Lead] = {}
    for removed, candidate in sorted(search.tried.removed.get(key(state.faults), []), key=lambda pair: -pair[0]):
        if removed < _WORTH or len(best) >= _COUNT:
            break
        named = Named(
            candidate.fault.name, dict(candidate.parameters), candidate.layers, candidate.fault.sentence(candidate.parameters)
        )
        best.setdefault(named.fault, Lead(named.sentence, removed, named))
    return [*seen, *best.values()]


def _observations(entry: Expected, values: Values, positions: Ints) -> Iterator[str]:
    wrong = entry.base > entry.limit
    theirs = np.where(entry.present, entry.values, 0.0)[wrong]
    right = np.where(entry.present, entry.taken(values[_shown(values, entry.point)], positions), 0.0)[wrong]
    if not np.isfinite(theirs).all():
        share = 1 - np.isfinite(theirs).mean()
        yield f"{share:.0%} of the values are NaN or infinite: an overflow, an empty softmax row, or memory never written"
        return
    if not theirs.any():
        yield "all values are 0: memory never written, or a kernel that did not run"
        return
    if np.abs(theirs).max() == _F16_MAX or np.abs(theirs).max() > _F16_MAX:
        yield "values reach float16's largest (65504): saturation"
    yield from _factor(theirs, right)
    yield from _permutation(theirs, right)
    yield from _shift(entry, values, positions, wrong)
    yield from _other_point(entry, values, positions, wrong)
    yield from _steps(theirs)
    yield _which(entry, wrong)


def _shown(values: Values, point: str) -> str:
    """The name of what the dump shows for a point: another one, where a cause is a fault of the capture."""
    return SEEN + point if SEEN + point in values else point


def _close(a: Floats, b: Floats) -> bool:
    energy = float((b * b).sum())
    return energy > 0 and float(((a - b) ** 2).sum()) <= _EQUAL * energy


def _factor(theirs: Floats, right: Floats) -> Iterator[str]:
    """One constant for all values, or one for each position."""
    energy = np.einsum("ij,ij->i", right, right)
    if not (energy > 0).all():
        return
    each = np.einsum("ij,ij->i", theirs, right) / energy
    if _close(theirs, right * each[:, None]):
        if np.ptp(each) <= 1e-4 * np.abs(each).max():
            value = float(each.mean())
            yield "the sign is wrong" if abs(value + 1) < 1e-4 else f"all values are {value:.6g} times the right ones"
        else:
            yield f"each position is off by a factor of its own ({each.min():.4g} to {each.max():.4g})"
        return
    offset = theirs - right
    if offset.shape[0] > 1 and _close(offset, np.broadcast_to(offset[:1], offset.shape)):
        yield "the same vector is added at every position: a bias missing, wrong or doubled"


def _permutation(theirs: Floats, right: Floats) -> Iterator[str]:
    """The same values in another order within the recorded slice."""
    if theirs.shape[1] > 1 and _close(np.sort(theirs, axis=1), np.sort(right, axis=1)):
        yield "the right values in another order: channels or heads are permuted"


def _shift(entry: Expected, values: Values, positions: Ints, wrong: NDArray[np.bool_]) -> Iterator[str]:
    """The right values of another position, or a mix of two neighbours."""
    tensor = entry.taken_all(values[_shown(values, entry.point)], positions)
    if tensor is None:
        return
    rows, theirs = entry.rows[wrong], np.where(entry.present, entry.values, 0.0)[wrong]
    for by in range(-4, 5):
        inside = (rows + by >= 0) & (rows + by < len(positions))
        if by and inside.any() and _close(theirs[inside], tensor[rows[inside] + by][:, : theirs.shape[1]]):
            yield f"position t holds the right values of position t {'+' if by > 0 else '−'} {abs(by)}"
            return
    inside = rows >= 1
    if inside.sum() > 1:
        now, before = tensor[rows[inside]], tensor[rows[inside] - 1]
        mixed = theirs[inside] - now
        base = before - now
        share = float((mixed * base).sum() / max((base * base).sum(), 1e-300))
        if 0.01 < share < 0.99 and _close(mixed, share * base):
            yield f"each position is a mix: {share:.0%} of the one before"


def _other_point(entry: Expected, values: Values, positions: Ints, wrong: NDArray[np.bool_]) -> Iterator[str]:
    """Equality with another point of the right engine."""
    theirs = np.where(entry.present, entry.values, 0.0)[wrong]
    for name, tensor in values.items():
        if name == entry.point or getattr(tensor, "ndim", 0) != 2 or tensor.shape[0] != len(positions):
            continue
        made = tensor[entry.rows[wrong], : theirs.shape[1]].astype(np.float64)
        if made.shape == theirs.shape and _close(theirs, made):
            yield f"the values are those of {name} in a right engine"
            return


def _steps(theirs: Floats) -> Iterator[str]:
    """Values that lower types hold exactly."""
    flat = theirs[theirs != 0].astype(np.float32)
    if len(flat) < 8:
        return
    bits = flat.view(np.uint32)
    if not (bits & np.uint32(0xFFFF)).any():
        yield "every value is a bfloat16: the engine keeps activations in BF16"
    elif not (bits & np.uint32(0x1FFF)).any():
        yield "every value has 10 bits of mantissa: the engine keeps activations in F16 (or TF32)"


def _which(entry: Expected, wrong: NDArray[np.bool_]) -> str:
    """Which positions are wrong, and what acts there."""
    rows = entry.rows[wrong]
    outside = parse(entry.point).layer is None
    if len(rows) == len(entry.rows):
        acts = "this operation or its weights" if outside else "values, output projection, feed-forward, a norm or weights"
        return f"all positions are wrong: {acts}"
    if rows.min() > 0 and len(rows) == (entry.rows >= rows.min()).sum():
        right = "position 0 is" if rows.min() == 1 else f"positions 0 to {rows.min() - 1} are"
        return f"{right} right, all later ones wrong: queries, keys, RoPE, scale, mask or cache"
    listed = f"{', '.join(str(int(row)) for row in rows[:6])}{', …' if len(rows) > 6 else ''}"
    return f"{len(rows)} of {len(entry.rows)} positions are wrong, the others right: {listed}"
