"""The other layout, name or moment under which a record equals the reference's: reorderings of a row, other points, a constant factor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import order, parse
from checkpoints.record import Rows

from .whole_rows import sizes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LAYOUT, NAME, MOMENT = "layout", "name", "moment"
_NEAR = 0.5  # relative: two records are looked at more closely if their first values are no further apart
_TELLING = 8  # elements that have to be compared before a reordering is believed
_SAME_STATISTIC = 1e-4  # relative: l2, min and max after an accumulation in float32 differ by less
_MOST_HEADS = 512  # most sizes of heads that are tried
_ENOUGH = 64  # most records that are looked at
CLEAR = 100.0  # a reading has to reduce the error by this factor


class Reading(Struct, frozen=True):
    """What a record shows instead: `kind` is one of the above, `sentence` says it, `mapping` is the `--map` line that settles it."""

    kind: str
    sentence: str
    mapping: str = ""


class Allowed(Struct, frozen=True):
    """How far a reading may be off: NMSE [R], and half a step of the printed decimals."""

    nmse: Floats
    step: float = 0.0

    @classmethod
    def of(cls, limit: Floats, error: Floats, *sides: Rows) -> "Allowed":
        """The limit of the records, but far below the error that they have without a reading."""
        step = sum(float(rows.quantum.max(initial=0.0)) / 2 for rows in sides if rows.quantum is not None)
        return cls(np.minimum(limit, np.nan_to_num(error, posinf=1.0) / CLEAR), step)

    def take(self, rows: Ints) -> "Allowed":
        """The same for some of the records."""
        return Allowed(self.nmse[rows], self.step)


def reading(ours: Rows, ref: Rows, allowed: Allowed, others: Mapping[str, Rows], head_size: int | None) -> Reading | None:
    """The first reading under which our records agree with the reference's; None if there is none.

    Args:
        ours, ref: records of one point, row i of one belongs to row i of the other; all of ours are wrong.
        allowed: how far off each may be.
        others: all records of the reference's other points.
        head_size: the size of the model's attention heads, if it is known.
    """
    if len(ours) > _ENOUGH:
        spread = np.linspace(0, len(ours) - 1, _ENOUGH).astype(np.int64)
        ours, ref, allowed = ours.take(spread), ref.take(spread), allowed.take(spread)
    if ours.indices is not None or ref.indices is not None:
        return None
    layout = _reordered(ours, ref, allowed, head_size) or _renamed(ours, ref, allowed, others) or _scaled(ours, ref, allowed)
    return layout or _other_position(ours, allowed, {ours.point: others[ours.point]} if ours.point in others else {})


def _reordered(ours: Rows, ref: Rows, allowed: Allowed, head_size: int | None) -> Reading | None:
    size = _size(ours, ref)
    if size is None:
        return None
    if not _same_statistics(ours, ref):
        return _heads_first(ours, ref, allowed, head_size)
    for source, sentence, mapping in _orders(size, head_size):
        if _fits(ours, ref, source, allowed):
            kind = parse(ours.point).kind
            line = mapping.replace("POINT", f"blk.{{i}}.{kind}" if parse(ours.point).layer is not None else kind)
            return Reading(LAYOUT, sentence, line)
    return _heads_first(ours, ref, allowed, head_size)


@lru_cache(maxsize=8)
def _orders(size: int, head_size: int | None) -> list[tuple[Ints, str, str]]:
    return list(_every_order(size, head_size))


def _every_order(size: int, head_size: int | None) -> Iterator[tuple[Ints, str, str]]:
    """(the element of the reference at each place of ours, the name of that order, the `--map` line)."""
    place = np.arange(size)
    heads = [head_size] if head_size and size % head_size == 0 else []
    heads += [
        d
        for d in (64, 128, 96, 80, 32, 256, *range(4, min(size, _MOST_HEADS) + 1, 2))
        if size % d == 0 and d <= size and d % 2 == 0
    ]
    for d in dict.fromkeys(heads):
        setting = f"head_size = {d}"
        halves = place.reshape(-1, d // 2, 2).swapaxes(1, 2).reshape(-1)
        yield (
            halves,
            "halves where llama.cpp has neighbours",
            f'"POINT" = {{ point = "POINT", rope_pairs = "neox", {setting} }}',
        )
        pairs = place.reshape(-1, 2, d // 2).swapaxes(1, 2).reshape(-1)
        yield pairs, "neighbours where llama.cpp has halves", f'"POINT" = {{ point = "POINT", rope_pairs = "norm", {setting} }}'
    for d in dict.fromkeys(heads):
        count = size // d
        if count > 1:
            transposed = place.reshape(count, d).T.reshape(-1)
            yield transposed, f"the elements of its {count} heads interleaved (head by head in llama.cpp)", ""
            yield place.reshape(d, count).T.reshape(-1), f"heads of {count} side by side where llama.cpp interleaves them", ""
        for groups in (n for n in range(2, count) if count % n == 0):
            grouped = place.reshape(groups, count // groups, d).swapaxes(0, 1).reshape(-1)
            yield grouped, f"its {count} heads in another order: dealt out over {groups} groups", ""
    if size % 2 == 0:
        yield np.roll(place, size // 2), "its two halves exchanged", ""


def _fits(ours: Rows, ref: Rows, order: Ints, allowed: Allowed) -> bool:
    width = min(ours.values.shape[1], len(order))
    source = order[:width]
    seen = source < ref.values.shape[1]
    if seen.sum() < min(_TELLING, len(order)) or (source[seen] == np.flatnonzero(seen)).all():
        return False
    first = _agree(ours.values[:1, :width][:, seen], ref.values[:1, source[seen]], allowed.take(np.arange(1)))
    return first and _agree(ours.values[:, :width][:, seen], ref.values[:, source[seen]], allowed)


def _heads_first(ours: Rows, ref: Rows, allowed: Allowed, head_size: int | None) -> Reading | None:
    """The reading as rows of a buffer in which all positions of the first head come first, taken as if it had one row a position."""
    size, count = _size(ours, ref), len(ours)
    whole = bool(ours.full().all() and ref.full().all())
    if size is None or count < 2 or not whole or not np.array_equal(ours.token_idx, np.arange(count) + ours.token_idx[0]):
        return None
    for d in dict.fromkeys([*([head_size] if head_size else []), 64, 128, 32, 96, 80, 16, 256]):
        if size % d == 0 and size > d:
            buffer = ref.values.reshape(count, size // d, d).swapaxes(0, 1).reshape(count, size)
            if _agree(ours.values, buffer, allowed):
                return Reading(
                    LAYOUT, f"heads first: a row of ours is a piece of a buffer [heads, positions, {d}], not a position"
                )
    return None


def _renamed(ours: Rows, ref: Rows, allowed: Allowed, others: Mapping[str, Rows]) -> Reading | None:
    for name, rows in others.items():
        if name == ours.point or not _first_alike(ours, rows, allowed):
            continue
        pair = _together(ours, rows, 0)
        if pair is not None and _agree(*pair, allowed):
            same_layer = parse(name).layer == parse(ours.point).layer
            kind = NAME if same_layer else MOMENT
            early = order([name, ours.point])[0] == name
            when = "before this was computed" if early else "late, when its buffer held that"
            sentence = f"it is {name}" + ("" if same_layer else f": captured {when}, or under a wrong name")
            return Reading(kind, sentence, f'"{ours.point}" = "{name}"' if same_layer else "")
    return None


def _first_alike(ours: Rows, rows: Rows, allowed: Allowed) -> bool:
    """Whether another point's record could be our first one: a quick look before all records are paired."""
    width = min(ours.values.shape[1], rows.values.shape[1])
    at = np.flatnonzero((rows.seq == ours.seq[0]) & (rows.token_idx == ours.token_idx[0]))
    if not len(at) or width < 4:
        return False
    mine, theirs = ours.values[0, :2].tolist(), rows.values[at[0], :2].tolist()  # two numbers rule most of them out
    if any(abs(x - y) > _NEAR * max(abs(x), abs(y)) + allowed.step for x, y in zip(mine, theirs, strict=True)):
        return False
    return _agree(ours.values[:1, :width], rows.values[at[:1], :width], allowed.take(np.arange(1)))


def _scaled(ours: Rows, ref: Rows, allowed: Allowed) -> Reading | None:
    """The reading as a multiple by a constant factor, or as the value after an activation."""
    width = int(min(ours.counts.min(), ref.counts.min()))
    a, b = _wide(ours.values[:, :width]), _wide(ref.values[:, :width])
    if width < _TELLING or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    for name, function in _ACTIVATIONS.items():
        if _agree(a, function(b), allowed):
            return Reading(MOMENT, f"it is {name} of the reference's: captured after the activation")
    energy = np.sum(b * b, axis=1)
    if not energy.all():
        return None
    factors = np.sum(a * b, axis=1) / energy
    factor = float(np.median(factors))
    if abs(factor) < 1e-6 or abs(factor - 1) < 1e-2 or np.abs(factors - factor).max() > 1e-5 * abs(factor):
        return None
    if not _agree(a / factor, b, allowed):
        return None
    return Reading(MOMENT, f"it is {factor:.6g} times the reference's: captured before or after a scale")


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "SiLU": lambda x: x / (1 + np.exp(-np.clip(x, -700, 700))),
    "GELU": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "ReLU": lambda x: np.maximum(x, 0.0),
}


def _other_position(ours: Rows, allowed: Allowed, same: Mapping[str, Rows]) -> Reading | None:
    for rows in same.values():
        for shift, when in ((-1, "late"), (1, "early")):
            pair = _together(ours, rows, shift, all_of_it=False)
            if pair is not None and _agree(*pair, allowed.take(np.arange(len(pair[0])))):
                return Reading(
                    MOMENT, f"position t holds the reference's t {'−' if shift < 0 else '+'} 1: captured a pass too {when}"
                )
    return None


def _together(ours: Rows, rows: Rows, shift: int, *, all_of_it: bool = True) -> tuple[Floats, Floats] | None:
    """Our records beside those of another point or position; None if not all of ours have a counterpart."""
    if rows.indices is not None or (_size(ours, rows) is None and not _bare(ours)):
        return None
    if all_of_it and not ((rows.seq == ours.seq[0]) & (rows.token_idx == ours.token_idx[0])).any():
        return None
    place = {(int(seq), int(t)): r for r, (seq, t) in enumerate(zip(rows.seq, rows.token_idx, strict=True))}
    at = [place.get((int(seq), int(t) + shift)) for seq, t in zip(ours.seq, ours.token_idx, strict=True)]
    mine = [i for i, r in enumerate(at) if r is not None]
    theirs = [r for r in at if r is not None]
    if (all_of_it and len(mine) < len(ours)) or len(mine) < (1 if all_of_it else 3):
        return None
    width = min(ours.values.shape[1], rows.values.shape[1])
    if width < min(_TELLING, ours.values.shape[1]) or width < 4:
        return None
    return _wide(ours.values[mine, :width]), _wide(rows.values[theirs, :width])


def _wide(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """The values as float64, without NumPy's warning about signalling NaNs."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def _bare(rows: Rows) -> bool:
    return not any(rows.shapes) and "n" not in rows.stats


def _agree(a: NDArray[np.floating], b: NDArray[np.floating], allowed: Allowed) -> bool:
    a, b = _wide(a), _wide(b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or len(set(b[0].tolist())) < 3:
        return False
    delta = np.maximum(np.abs(a - b) - allowed.step, 0.0)
    energy = np.sum(b * b, axis=1)
    return bool((np.sum(delta**2, axis=1) <= allowed.nmse * energy).all() and energy.all())


def _size(ours: Rows, ref: Rows) -> int | None:
    """The length of both sides' rows; None if it varies, is not known, or differs."""
    known = [sizes(rows) for rows in (ours, ref)]
    every = {int(n) for column in known for n in column[~np.isnan(column)]}
    return every.pop() if len(every) == 1 else None


def _same_statistics(ours: Rows, ref: Rows) -> bool:
    """Whether a reordering is possible: whether all statistics that do not depend on the order agree."""
    for name in ("l2", "min", "max"):
        a, b = ours.stats.get(name), ref.stats.get(name)
        if a is not None and b is not None:
            known = ~np.isnan(a) & ~np.isnan(b)
            scale = np.maximum(np.abs(b), ref.stats.get("l2", np.abs(b)) * 1e-2)
            if (np.abs(a - b)[known] > _SAME_STATISTIC * scale[known]).any():
                return False
    return True


def head_size_of(points: Mapping[str, Rows], hparams: Sequence[Mapping[str, object] | None]) -> int | None:
    """The size of attention's heads: from a header's hyperparameters, or from the shapes of scores and their values."""
    for known in hparams:
        for name in ("head_size", "head_dim", "key_length"):
            value = (known or {}).get(name)
            if isinstance(value, int) and value > 0:
                return value
    for name, rows in points.items():
        if parse(name).kind in ("kq", "kq_soft_max") and rows.shapes and len(rows.shapes[0]) == 2:
            layer = parse(name).layer
            queries = points.get(f"blk.{layer}.q") or points.get(f"blk.{layer}.kqv_out")
            if queries is not None and queries.shapes and queries.shapes[0]:
                return prod(queries.shapes[0]) // max(rows.shapes[0][0], 1)
    return None
