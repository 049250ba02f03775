"""What the numbers say by themselves: one sentence on how the recorded elements come from the right ones, if it holds for all of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backend import Array
from engine.faults import SEEN

from .records import Expected, Floats, Ints

Values = Mapping[str, Array]
Bools = NDArray[np.bool_]

# A law holds if what it leaves of a record is this many times its limit at most: the printed digits of a constant have to do.
ROOM = 10.0
# and no more than this share of what was wrong, unless that is within the limit: noise of a few limits has no law. A choice: the
# law that is meant leaves rounding and printed digits alone.
_LEFT = 0.1
WRONG = "wrong; the others are right"  # the end of a sentence that says which elements are wrong, and not how
ZERO = "every element is 0"
_ROLLS = 64  # offsets of elements that are tried in either direction
_SHIFTS = 4  # offsets of positions
_LISTED = 6  # elements that a sentence lists
_WIDE = 4096  # elements of a row among which a permutation is looked for
# Orders of a row's or a head's elements that engines confuse: which right element stands at place i of so many.
_ORDERS: dict[str, Callable[[int, int], int]] = {
    "in reverse": lambda i, size: size - 1 - i,
    "as neighbours (2i, 2i + 1) where halves (i, i + d/2) are wanted": lambda i, size: i // 2 + i % 2 * (size // 2),
    "as halves (i, i + d/2) where neighbours (2i, 2i + 1) are wanted": lambda i, size: 2 * (i % (size // 2)) + i // (size // 2),
}
_OTHERS = 1e-3  # part of the squared error that elements which are said to be right may hold
_SIGN = 1e-5  # of a factor from -1
_SHARES = 0.02, 0.98  # of a mix with another position: what is less is no mix


@dataclass(frozen=True)
class Beside:
    """The wrong records of a place beside the right values.

    Attributes:
        theirs, right: float64 [R, k], the recorded elements. index: int64 [k], which elements of the row they are.
        room: [R], the squared error that is noise. rows: [R], the right run's rows.
        whole: float64 [T, n], the right rows as a whole; None where a row is no plain vector.
        bias: [k], what is added to each element last, where the operation has such a vector.
        heads: how many heads a row consists of, where it does.
    """

    theirs: Floats
    right: Floats
    index: Ints
    room: Floats
    rows: Ints
    whole: Floats | None = None
    bias: Floats | None = None
    heads: int | None = None

    def holds(self, law: Floats, elements: Bools | None = None) -> bool:
        """Whether values [R, k] are theirs to rounding, at these elements."""
        with np.errstate(invalid="ignore"):
            delta = self.theirs - law if elements is None else (self.theirs - law)[:, elements]
        if not np.isfinite(delta).all():
            return False
        wrong = self.theirs - self.right if elements is None else (self.theirs - self.right)[:, elements]
        left, before = (np.einsum("ij,ij->i", part, part) for part in (delta, wrong))
        within = (left <= self.room / ROOM).all() or float(left.sum()) <= _LEFT * float(before.sum())
        return bool((left <= self.room).all() and within)


def beside(
    entry: Expected, errors: Floats, values: Values, positions: Ints, bias: Floats | None = None, heads: int | None = None
) -> Beside | None:
    """The records of a point that are wrong by these errors [R], beside the right values; None where nothing can be laid beside."""
    wrong = errors > entry.limit
    name = SEEN + entry.point if SEEN + entry.point in values else entry.point
    present = entry.present[wrong]
    if not wrong.any() or not present.any():
        return None
    count = int(present.sum(axis=1).min())
    if count == 0:
        return None
    right = entry.taken(values[name], positions)[wrong][:, :count]
    if entry.index is None:
        index = np.arange(count)
    else:
        index = entry.index[wrong][0, :count]
        if not (entry.index[wrong][:, :count] == index).all():
            return None
    whole = entry.whole_values(values[name], positions)
    fits = bias is not None and whole is not None and len(bias) == whole.shape[1]
    return Beside(
        theirs=entry.values[wrong][:, :count],
        right=right,
        index=index,
        room=ROOM * entry.limit[wrong] * entry.energy[wrong] + (entry.quantum[wrong][:, :count] ** 2).sum(axis=1),
        rows=entry.rows[wrong],
        whole=whole,
        bias=bias[index] if fits and bias is not None else None,
        heads=heads if whole is not None and heads and whole.shape[1] % heads == 0 else None,
    )


def law(found: Beside) -> str:
    """The sentence of the first law that holds for every element; "" where none does."""
    if not np.isfinite(found.right).all():
        return ""
    if not np.isfinite(found.theirs).all():
        return _not_finite(found)
    if (((found.theirs - found.right) ** 2).sum(axis=1) <= found.room / ROOM).all():
        return "every recorded element is right: what differs was not recorded"
    every = np.ones(len(found.index), dtype=np.bool_)
    said = next(_by_a_number(found, every, many=False), "")
    if said:
        return f"every element {said}"
    some = _differing(found)
    if 0 < some.sum() < len(some) and _alone(found, some):
        where = _elements(found, some)
        many = not where or where.startswith(("elements", "heads"))
        exchanged = next(_exchanged(found, some), "")
        if exchanged:
            return f"elements {_listed(found.index[some])} {exchanged}; the others are right"
        relation = next(_by_a_number(found, some, many), "") or next(_by_a_vector(found, some, many), "")
        if relation and (where or some.sum() <= _LISTED):
            return f"{where or f'elements {_listed(found.index[some])}'} {relation}; the others are right"
        moved = "" if some.sum() == 1 else next(_moved(found), "")
        if moved:
            return moved
        if where:
            return f"{where} {'are' if many else 'is'} {WRONG}"
    said = next(_by_a_vector(found, every, many=False), "")
    return f"every element {said}" if said else next(_moved(found), "")


def _differing(found: Beside) -> Bools:
    """The elements [k] that alone are wrong by more than all of a record may be, in any record."""
    with np.errstate(over="ignore"):
        return np.asarray(((found.theirs - found.right) ** 2 > found.room[:, None]).any(axis=0))


def _not_finite(found: Beside) -> str:
    """Which elements are NaN or infinite, where all others are right; "" where they are not."""
    odd = ~np.isfinite(found.theirs)
    columns = np.asarray(odd.any(axis=0))
    if not found.holds(np.where(np.isfinite(found.theirs), found.right, 0.0), ~columns):
        return ""
    values = found.theirs[odd]
    kinds = [
        name for name, here in (("NaN", np.isnan(values)), ("∞", values == np.inf), ("−∞", values == -np.inf)) if here.any()
    ]
    what = f"{' or '.join(kinds)}: an overflow, a division by zero, an empty soft max row, or memory never written"
    if columns.all():
        return f"every recorded element is {what}" if odd.all() else ""
    where = _elements(found, columns) or f"elements {_listed(found.index[columns])}{', …' if columns.sum() > _LISTED else ''}"
    return f"{where} {'are' if where.startswith(('elements', 'heads')) else 'is'} {what}; the others are right"


def _alone(found: Beside, some: Bools) -> bool:
    """Whether the other elements are right, and not only less wrong than one element may be where a record is just over its limit."""
    errors = (found.theirs - found.right) ** 2
    return bool(errors[:, ~some].sum() <= _OTHERS * errors[:, some].sum())


def _by_a_number(found: Beside, some: Bools, many: bool) -> Iterator[str]:
    """How these elements come from the right ones by one number, or by the operation's bias."""
    theirs, right = found.theirs[:, some], found.right[:, some]
    be, have = ("are", "have") if many else ("is", "has")

    def holds(values: Floats) -> bool:
        return _holds(found, some, values)

    if not theirs.any() and right.any():
        yield f"{be} 0"
        return
    factor = _factor(theirs, right)
    if factor is not None and holds(right * factor):
        wrong_sign = abs(factor + 1) < _SIGN
        yield (
            f"{have} the wrong sign" if wrong_sign else f"{be} {_short(factor, lambda c: holds(right * c))} times the right one"
        )
        return
    constant = float(np.mean(theirs - right))
    if constant and holds(right + constant):
        yield f"{be} the right one {_signed(_short(constant, lambda c: holds(right + c)))}"
        return
    if found.bias is None:
        return
    bias = found.bias[some]
    factor = _factor(theirs - bias, right - bias)
    if factor is not None and holds((right - bias) * factor + bias):
        yield f"{be} {_short(factor, lambda c: holds((right - bias) * c + bias))} times the right product; the bias is right"
        return
    for times, sentence in ((0.0, "without the bias"), (2.0, "with the bias twice"), (-1.0, "with the bias subtracted")):
        if bias.any() and holds(right + (times - 1) * bias):
            yield f"{be} the right one {sentence}"
            return


def _by_a_vector(found: Beside, some: Bools, many: bool) -> Iterator[str]:
    """The same vector added at every position, or one factor for each position."""
    theirs, right = found.theirs[:, some], found.right[:, some]
    be, have = ("are", "have") if many else ("is", "has")
    if len(theirs) < 2:
        return
    vector = (theirs - right).mean(axis=0)
    if vector.any() and _holds(found, some, right + vector):
        yield f"{have} the same vector added at every position: a bias missing, wrong or doubled"
        return
    energy = np.einsum("ij,ij->i", right, right)
    if some.sum() > 1 and (energy > 0).all():
        each = np.einsum("ij,ij->i", theirs, right) / energy
        if _holds(found, some, right * each[:, None]):
            yield f"{be} off by a factor of the position's own ({each.min():.4g} to {each.max():.4g})"


def _holds(found: Beside, some: Bools, values: Floats) -> bool:
    """Whether values of some elements [R, s] are theirs to rounding."""
    whole = found.right.copy()
    whole[:, some] = values
    return found.holds(whole, some)


def _factor(theirs: Floats, right: Floats) -> float | None:
    energy = float((right * right).sum())
    return float((theirs * right).sum()) / energy if energy > 0 else None


def _short(value: float, holds: Callable[[float], bool]) -> str:
    """A number in as few digits as will do."""
    for digits in range(1, 9):
        short = f"{value:.{digits}g}"
        if holds(float(short)):
            return f"{float(short):g}" if digits <= 6 else short
    return f"{value:.9g}"


def _signed(number: str) -> str:
    return f"minus {number[1:]}" if number.startswith("-") else f"plus {number}"


def _exchanged(found: Beside, some: Bools) -> Iterator[str]:
    """These elements hold each other's right values."""
    numbers = np.flatnonzero(some)
    if not 2 <= len(numbers) <= _LISTED:
        return
    order = [_match(found, int(number), numbers) for number in numbers]
    if None in order or len(set(order)) < len(order):
        return
    if len(numbers) == 2:
        yield "are exchanged"
    else:
        yield "hold each other's values in another order"


def _match(found: Beside, number: int, among: Ints) -> int | None:
    """Which of some elements' right values an element holds in every record."""
    for other in among.tolist():
        delta = found.theirs[:, number] - found.right[:, other]
        if other != number and bool((delta * delta <= found.room).all()):
            return int(other)
    return None


def _elements(found: Beside, some: Bools) -> str:
    """Which elements these are, where they form a pattern; "" where they do not."""
    index = found.index[some]
    first, last = int(index[0]), int(index[-1])
    leading = found.whole is None or len(found.index) < found.whole.shape[1]
    seen = f" (of the {len(found.index)} recorded)" if leading else ""
    if len(index) == 1:
        return f"element {first} alone"
    if found.heads and found.whole is not None:
        size = found.whole.shape[1] // found.heads
        heads = sorted(set((index // size).tolist()))
        mine = found.index[np.isin(found.index // size, heads)]
        if len(heads) < found.heads and len(mine) == len(index) and len(mine) >= min(size, 2):
            return f"head {heads[0]} alone" if len(heads) == 1 else f"heads {', '.join(map(str, heads[:_LISTED]))}"
    if bool(some[np.flatnonzero(some)[0] :].all()):
        return f"everything from element {first} on{seen}"
    if bool(some[: np.flatnonzero(some)[-1] + 1].all()):
        return f"everything up to element {last}{seen}"
    if len(index) > 2 and len(set(np.diff(index).tolist())) == 1 and index[1] - index[0] > 1:
        return f"every {_ordinal(int(index[1] - index[0]))} element from {first} on{seen}"
    if bool((np.diff(index) == 1).all()):
        return f"elements {first} to {last}"
    return f"elements {_listed(index)}" if len(index) == 2 else ""


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _listed(index: Ints) -> str:
    return " and ".join(map(str, index.tolist())) if len(index) == 2 else ", ".join(map(str, index[:_LISTED].tolist()))


def _moved(found: Beside) -> Iterator[str]:
    """Right values at another place: of another element, another position, or a mix of two positions."""
    whole = found.whole
    if whole is None:
        return
    count, n = whole.shape
    yield from _heads_moved(found, whole)
    for by in (sign * step for step in range(1, min(_ROLLS, n - 1) + 1) for sign in (1, -1)):
        if found.holds(whole[found.rows][:, (found.index - by) % n]):
            yield f"element i is the right element i {'−' if by > 0 else '+'} {abs(by)}: the row is rolled"
            return
    size = n // found.heads if found.heads else n
    for by in (sign * step for step in range(1, min(_ROLLS, size - 1) + 1) for sign in (1, -1)) if size < n else ():
        if found.holds(whole[found.rows][:, found.index // size * size + (found.index - by) % size]):
            yield f"element i of each head is its right element i {'−' if by > 0 else '+'} {abs(by)}: each head is rolled"
            return
    for by in (sign * step for step in range(1, _SHIFTS + 1) for sign in (-1, 1)):
        other = found.rows + by
        inside = (other >= 0) & (other < count)
        # The rows at the edge hold another one's, or the sequence's other end.
        edge = np.clip(other, 0, count - 1)
        for at in (edge, other % count):
            if inside.any() and found.holds(whole[at][:, found.index]):
                yield f"position t holds the right values of position t {'+' if by > 0 else '−'} {abs(by)}"
                return
    yield from _mix(found, whole)
    yield from _permutation(found, whole)


def _heads_moved(found: Beside, whole: Floats) -> Iterator[str]:
    """Every recorded head holds the right values of one head, and not each of its own."""
    if not found.heads or found.heads < 2:
        return
    size = whole.shape[1] // found.heads
    recorded = sorted(set((found.index // size).tolist()))
    source: dict[int, int] = {}
    for head in recorded:
        mine = found.index // size == head
        if mine.sum() < 2:
            return
        for other in (head, *(one for one in range(found.heads) if one != head)):
            if _holds(found, mine, whole[found.rows][:, found.index[mine] + (other - head) * size]):
                source[head] = other
                break
        else:
            return
    moved = {head: other for head, other in source.items() if head != other}
    if not moved:
        return
    each = ", ".join(f"head {head} is the right head {other}" for head, other in list(moved.items())[:_LISTED])
    if len(recorded) < found.heads:
        yield f"{each} ({len(recorded)} of {found.heads} heads recorded)"
    elif len(moved) == 2 and set(moved) == set(moved.values()):
        yield f"heads {' and '.join(map(str, moved))} are exchanged"
    else:
        yield f"the heads stand in another order: {each}{', …' if len(moved) > _LISTED else ''}"


def _mix(found: Beside, whole: Floats) -> Iterator[str]:
    if (found.rows >= 1).sum() < 2:
        return
    now, before = found.right, whole[np.maximum(found.rows - 1, 0)][:, found.index]
    base = before - now
    share = float(((found.theirs - now) * base).sum() / max(float((base * base).sum()), 1e-300))
    if _SHARES[0] < share < _SHARES[1] and found.holds(now + share * base):
        yield f"each position is a mix: {share:.0%} of the one before"


def _permutation(found: Beside, whole: Floats) -> Iterator[str]:
    """Every element holds the right value of another element, the same one in all records."""
    right = whole[found.rows]
    if right.shape[1] > _WIDE or len(found.index) < 2:
        return
    source = []
    for number in range(len(found.index)):
        delta = right - found.theirs[:, number][:, None]
        good = np.flatnonzero((delta * delta <= found.room[:, None]).all(axis=0))
        if len(good) == 0:
            return
        own = found.index[number]
        source.append(int(own) if own in good else int(good[0]))
    pairs = [(int(i), j) for i, j in zip(found.index, source, strict=True) if i != j]
    if not pairs:
        return
    if len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        yield f"elements {pairs[0][0]} and {pairs[0][1]} are exchanged; the others are right"
        return
    for size, of in ((right.shape[1], "the row"), (right.shape[1] // (found.heads or 1), "each head")):
        for how, order in _ORDERS.items():
            stands = [i // size * size + order(i % size, size) for i in found.index.tolist()]
            if size > 2 and size % 2 == 0 and stands == source:
                yield f"the right values stand in another order: {of} {how}"
                return
    shown = ", ".join(f"{i} is the right element {j}" for i, j in pairs[:_LISTED])
    yield f"the right values stand in another order: element {shown}{', …' if len(pairs) > _LISTED else ''}"
