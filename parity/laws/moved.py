"""Right values in a wrong place: rolled, shifted by positions, mixed, or in another order."""

from collections.abc import Callable, Iterator

import numpy as np

from .beside import LEFT_OF_MANY, Beside, Floats

# The beginning of a sentence that lists which element is which.
OTHER_ORDER = "the right values stand in another order: element"
LISTED = 6  # elements that a sentence lists
_ROLLS = 64  # offsets of elements that are tried in either direction
_SHIFTS = 4  # offsets of positions
_WIDE = 4096  # elements of a row among which a permutation is looked for
# How probable an exchange, or an order that engines confuse, may be by chance; and how many elements may stand in another order by chance,
# among all those that it is looked for. In noise under the limits of BF16 (16 values of one to four rows) 42 % of 1,500 random rows had
# an order without this, none with it; true orders with noise of a thirtieth to a fifth of the limit are found from two rows on.
_CHANCE, _AMBIGUOUS = 1e-3, 0.1
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
        if compared.holds(whole[compared.rows][:, (compared.index - by) % n], share=LEFT_OF_MANY):
            recorded = len(compared.index)
            # Of two parts that are exchanged, so few elements look the same.
            known = ": the row is rolled" if recorded > abs(by) else f" ({recorded} of {n} elements recorded)"
            yield f"element i is the right element i {'−' if by > 0 else '+'} {abs(by)}{known}"
            return
    size = n // compared.heads if compared.heads else n
    for by in (sign * step for step in range(1, min(_ROLLS, size - 1) + 1) for sign in (1, -1)) if size < n else ():
        rolled = compared.index // size * size + (compared.index - by) % size
        if compared.holds(whole[compared.rows][:, rolled], share=LEFT_OF_MANY):
            yield f"element i of each head is its right element i {'−' if by > 0 else '+'} {abs(by)}: each head is rolled"
            return
    for by in (sign * step for step in range(1, _SHIFTS + 1) for sign in (-1, 1)):
        other = compared.rows + by
        inside = (other >= 0) & (other < count)
        # The rows at the edge hold another row's values, or those of the sequence's other end.
        edge = np.clip(other, 0, count - 1)
        for at in (edge, other % count):
            if inside.any() and compared.holds(whole[at][:, compared.index], share=LEFT_OF_MANY):
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
    for own, dumped in zip(compared.index.tolist(), compared.dumped.T, strict=True):
        errors = (right - dumped[:, None]) ** 2
        good = np.flatnonzero((errors <= compared.room[:, None]).all(axis=0))
        if len(good) == 0:
            return
        source.append(own if own in good else int(good[errors[:, good].sum(axis=0).argmin()]))
    pairs = [(i, j) for i, j in zip(compared.index.tolist(), source, strict=True) if i != j]
    if not pairs or not compared.holds(right[:, source]):
        return
    as_near = _as_near_by_chance(compared, right[:, source])
    if len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        if (len(source) * as_near) ** 2 <= _CHANCE:
            yield f"elements {pairs[0][0]} and {pairs[0][1]} are exchanged; the others are right"
        return
    for size, of in ((right.shape[1], "the row"), (right.shape[1] // (compared.heads or 1), "each head")):
        for how, order in _ORDERS.items():
            reordered = [i // size * size + order(i % size, size) for i in compared.index.tolist()]
            if size > 2 and size % 2 == 0 and reordered == source and as_near ** len(pairs) <= _CHANCE:
                yield f"the right values stand in another order: {of} {how}"
                return
    if len(pairs) * right.shape[1] * as_near > _AMBIGUOUS:
        return
    shown = ", ".join(f"{i} is the right element {j}" for i, j in pairs[:LISTED])
    yield f"{OTHER_ORDER} {shown}{', …' if len(pairs) > LISTED else ''}"


def _as_near_by_chance(compared: Beside, law: Floats) -> float:
    """How probably an element is as near to a value of its size as these values [R, k] are to the dump's: of noise in R records a share s
    of the squared error is left with a probability of s^(R / 2).
    """
    left, before = (((compared.dumped - values) ** 2).sum() for values in (law, compared.right))
    return float((left / before) ** (len(compared.rows) / 2))
