"""Right values in a wrong place: rolled, shifted by positions, mixed, or in another order."""

from collections.abc import Callable, Iterator

import numpy as np

from .beside import Beside
from .records import Floats

# The beginning of a sentence that lists which element is which.
OTHER_ORDER = "the right values stand in another order: element"
LISTED = 6  # elements that a sentence lists
_ROLLS = 64  # offsets of elements that are tried in either direction
_SHIFTS = 4  # offsets of positions
_WIDE = 4096  # elements of a row among which a permutation is looked for
# Orders of a row's or a head's elements that engines confuse: which right element is at place i of so many.
_ORDERS: dict[str, Callable[[int, int], int]] = {
    "in reverse": lambda i, size: size - 1 - i,
    "as neighbours (2i, 2i + 1) where halves (i, i + d/2) are wanted": lambda i, size: i // 2 + i % 2 * (size // 2),
    "as halves (i, i + d/2) where neighbours (2i, 2i + 1) are wanted": lambda i, size: 2 * (i % (size // 2)) + i // (size // 2),
}
_SHARES = 0.02, 0.98  # the shares of another position that count as a mix


def moved(compared: Beside) -> Iterator[str]:
    """Right values in the wrong place: of another element, another position, or a mix of two positions."""
    whole = compared.whole
    if whole is None:
        return
    count, n = whole.shape
    yield from _heads_moved(compared, whole)
    for by in (sign * step for step in range(1, min(_ROLLS, n - 1) + 1) for sign in (1, -1)):
        if compared.holds(whole[compared.rows][:, (compared.index - by) % n]):
            recorded = len(compared.index)
            # Of two parts that are exchanged, so few elements look the same.
            known = ": the row is rolled" if recorded > abs(by) else f" ({recorded} of {n} elements recorded)"
            yield f"element i is the right element i {'−' if by > 0 else '+'} {abs(by)}{known}"
            return
    size = n // compared.heads if compared.heads else n
    for by in (sign * step for step in range(1, min(_ROLLS, size - 1) + 1) for sign in (1, -1)) if size < n else ():
        if compared.holds(whole[compared.rows][:, compared.index // size * size + (compared.index - by) % size]):
            yield f"element i of each head is its right element i {'−' if by > 0 else '+'} {abs(by)}: each head is rolled"
            return
    for by in (sign * step for step in range(1, _SHIFTS + 1) for sign in (-1, 1)):
        other = compared.rows + by
        inside = (other >= 0) & (other < count)
        # The rows at the edge hold another row's values, or those of the sequence's other end.
        edge = np.clip(other, 0, count - 1)
        for at in (edge, other % count):
            if inside.any() and compared.holds(whole[at][:, compared.index]):
                yield f"position t holds the right values of position t {'+' if by > 0 else '−'} {abs(by)}"
                return
    yield from _mix(compared, whole)
    yield from _permutation(compared, whole)


def _heads_moved(compared: Beside, whole: Floats) -> Iterator[str]:
    """Every recorded head holds the right values of some head, and not each its own."""
    if not compared.heads or compared.heads < 2:
        return
    size = whole.shape[1] // compared.heads
    recorded = sorted(set((compared.index // size).tolist()))
    source: dict[int, int] = {}
    for head in recorded:
        in_head = compared.index // size == head
        if in_head.sum() < 2:
            return
        for other in (head, *(other_head for other_head in range(compared.heads) if other_head != head)):
            if compared.holds_at(in_head, whole[compared.rows][:, compared.index[in_head] + (other - head) * size]):
                source[head] = other
                break
        else:
            return
    displaced = {head: other for head, other in source.items() if head != other}
    if not displaced:
        return
    each = ", ".join(f"head {head} is the right head {other}" for head, other in list(displaced.items())[:LISTED])
    if len(recorded) < compared.heads:
        yield f"{each} ({len(recorded)} of {compared.heads} heads recorded)"
    elif len(displaced) == 2 and set(displaced) == set(displaced.values()):
        yield f"heads {' and '.join(map(str, displaced))} are exchanged"
    else:
        yield f"the heads stand in another order: {each}{', …' if len(displaced) > LISTED else ''}"


def _mix(compared: Beside, whole: Floats) -> Iterator[str]:
    if (compared.rows >= 1).sum() < 2:
        return
    now, before = compared.right, whole[np.maximum(compared.rows - 1, 0)][:, compared.index]
    base = before - now
    share = float(((compared.dumped - now) * base).sum() / max(float((base * base).sum()), 1e-300))
    if _SHARES[0] < share < _SHARES[1] and compared.holds(now + share * base):
        yield f"each position is a mix: {share:.0%} of the one before"


def _permutation(compared: Beside, whole: Floats) -> Iterator[str]:
    """Every element holds the right value of another element, the same one in all records."""
    right = whole[compared.rows]
    if right.shape[1] > _WIDE or len(compared.index) < 2:
        return
    source = []
    for number in range(len(compared.index)):
        delta = right - compared.dumped[:, number][:, None]
        good = np.flatnonzero((delta * delta <= compared.room[:, None]).all(axis=0))
        if len(good) == 0:
            return
        own = compared.index[number]
        source.append(int(own) if own in good else int(good[0]))
    pairs = [(int(i), j) for i, j in zip(compared.index, source, strict=True) if i != j]
    if not pairs:
        return
    if len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        yield f"elements {pairs[0][0]} and {pairs[0][1]} are exchanged; the others are right"
        return
    for size, of in ((right.shape[1], "the row"), (right.shape[1] // (compared.heads or 1), "each head")):
        for how, order in _ORDERS.items():
            reordered = [i // size * size + order(i % size, size) for i in compared.index.tolist()]
            if size > 2 and size % 2 == 0 and reordered == source:
                yield f"the right values stand in another order: {of} {how}"
                return
    shown = ", ".join(f"{i} is the right element {j}" for i, j in pairs[:LISTED])
    yield f"{OTHER_ORDER} {shown}{', …' if len(pairs) > LISTED else ''}"
