"""What the numbers say by themselves: one sentence on how the recorded elements derive from the right ones, if it holds for all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backend import Array
from engine.faults import SEEN

from .records import Expected, Floats, Ints

Values = Mapping[str, Array]
Bools = NDArray[np.bool_]

# A law holds if the error that it leaves in a record is at most this many times its limit, as constants are printed with few digits,
ROOM = 10.0
# and at most this share of the original error, unless that is within the limit: noise of a few limits has no law. A choice: the
# right law leaves only rounding and printed digits.
_LEFT = 0.1
WRONG = "wrong; the others are right"  # the end of a sentence that says which elements are wrong, but not how
ZERO = "every element is 0"
_ROLLS = 64  # offsets of elements that are tried in either direction
_SHIFTS = 4  # offsets of positions
_LISTED = 6  # elements that a sentence lists
_WIDE = 4096  # elements of a row among which a permutation is looked for
# Orders of a row's or a head's elements that engines confuse: which right element is at place i of so many.
_ORDERS: dict[str, Callable[[int, int], int]] = {
    "in reverse": lambda i, size: size - 1 - i,
    "as neighbours (2i, 2i + 1) where halves (i, i + d/2) are wanted": lambda i, size: i // 2 + i % 2 * (size // 2),
    "as halves (i, i + d/2) where neighbours (2i, 2i + 1) are wanted": lambda i, size: 2 * (i % (size // 2)) + i // (size // 2),
}
_OTHERS = 1e-3  # the most of the squared error that elements which are called right may have
_SIGN = 1e-5  # the most that a factor called -1 may differ from it
_SHARES = 0.02, 0.98  # the shares of another position that count as a mix


@dataclass(frozen=True)
class Beside:
    """The wrong records of a place, with the right values.

    Attributes:
        theirs, right: float64 [R, k], the recorded elements. index: int64 [k], which elements of the row they are.
        room: [R], the squared error that counts as noise. rows: [R], the right run's rows.
        whole: float64 [T, n], the complete right rows; None if a row is not a plain vector.
        bias: [k], the vector that the operation adds last, if it has one.
        heads: how many heads a row consists of, if it does.
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
        """Whether values [R, k] equal theirs up to rounding, at these elements."""
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
    """The records of a point that are wrong, by these errors [R], with the right values; None if there is nothing to compare."""
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


def law(compared: Beside) -> str:
    """The sentence of the first law that holds for every element; "" if none does."""
    if not np.isfinite(compared.right).all():
        return ""
    if not np.isfinite(compared.theirs).all():
        return _not_finite(compared)
    if (((compared.theirs - compared.right) ** 2).sum(axis=1) <= compared.room / ROOM).all():
        return "every recorded element is right: what differs was not recorded"
    every = np.ones(len(compared.index), dtype=np.bool_)
    sentence = next(_by_a_number(compared, every, many=False), "")
    if sentence:
        return f"every element {sentence}"
    some = _differing(compared)
    if 0 < some.sum() < len(some) and _alone(compared, some):
        where = _elements(compared, some)
        many = not where or where.startswith(("elements", "heads"))
        exchanged = next(_exchanged(compared, some), "")
        if exchanged:
            return f"elements {_listed(compared.index[some])} {exchanged}; the others are right"
        relation = next(_by_a_number(compared, some, many), "") or next(_by_a_vector(compared, some, many), "")
        if relation and (where or some.sum() <= _LISTED):
            return f"{where or f'elements {_listed(compared.index[some])}'} {relation}; the others are right"
        moved = "" if some.sum() == 1 else next(_moved(compared), "")
        if moved:
            return moved
        if where:
            return f"{where} {'are' if many else 'is'} {WRONG}"
    sentence = next(_by_a_vector(compared, every, many=False), "")
    return f"every element {sentence}" if sentence else next(_moved(compared), "")


def _differing(compared: Beside) -> Bools:
    """The elements [k] that alone have a larger error, in any record, than the whole record may have."""
    with np.errstate(over="ignore"):
        return np.asarray(((compared.theirs - compared.right) ** 2 > compared.room[:, None]).any(axis=0))


def _not_finite(compared: Beside) -> str:
    """Which elements are NaN or infinite, if all others are right; else ""."""
    odd = ~np.isfinite(compared.theirs)
    columns = np.asarray(odd.any(axis=0))
    if not compared.holds(np.where(np.isfinite(compared.theirs), compared.right, 0.0), ~columns):
        return ""
    values = compared.theirs[odd]
    kinds = [
        name for name, here in (("NaN", np.isnan(values)), ("∞", values == np.inf), ("−∞", values == -np.inf)) if here.any()
    ]
    what = f"{' or '.join(kinds)}: an overflow, a division by zero, an empty soft max row, or memory never written"
    if columns.all():
        return f"every recorded element is {what}" if odd.all() else ""
    where = (
        _elements(compared, columns) or f"elements {_listed(compared.index[columns])}{', …' if columns.sum() > _LISTED else ''}"
    )
    return f"{where} {'are' if where.startswith(('elements', 'heads')) else 'is'} {what}; the others are right"


def _alone(compared: Beside, some: Bools) -> bool:
    """Whether the other elements are right, and not just below the limit of one element in a record slightly over its limit."""
    errors = (compared.theirs - compared.right) ** 2
    return bool(errors[:, ~some].sum() <= _OTHERS * errors[:, some].sum())


def _by_a_number(compared: Beside, some: Bools, many: bool) -> Iterator[str]:
    """How these elements derive from the right ones by one number, or by the operation's bias."""
    theirs, right = compared.theirs[:, some], compared.right[:, some]
    be, have = ("are", "have") if many else ("is", "has")

    def holds(values: Floats) -> bool:
        return _holds(compared, some, values)

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
    if compared.bias is None:
        return
    bias = compared.bias[some]
    factor = _factor(theirs - bias, right - bias)
    if factor is not None and holds((right - bias) * factor + bias):
        yield f"{be} {_short(factor, lambda c: holds((right - bias) * c + bias))} times the right product; the bias is right"
        return
    for times, sentence in ((0.0, "without the bias"), (2.0, "with the bias twice"), (-1.0, "with the bias subtracted")):
        if bias.any() and holds(right + (times - 1) * bias):
            yield f"{be} the right one {sentence}"
            return


def _by_a_vector(compared: Beside, some: Bools, many: bool) -> Iterator[str]:
    """The same vector added at every position, or one factor for each position."""
    theirs, right = compared.theirs[:, some], compared.right[:, some]
    be, have = ("are", "have") if many else ("is", "has")
    if len(theirs) < 2:
        return
    vector = (theirs - right).mean(axis=0)
    if vector.any() and _holds(compared, some, right + vector):
        yield f"{have} the same vector added at every position: a bias missing, wrong or doubled"
        return
    energy = np.einsum("ij,ij->i", right, right)
    if some.sum() > 1 and (energy > 0).all():
        each = np.einsum("ij,ij->i", theirs, right) / energy
        if _holds(compared, some, right * each[:, None]):
            yield f"{be} off by a factor of the position's own ({each.min():.4g} to {each.max():.4g})"


def _holds(compared: Beside, some: Bools, values: Floats) -> bool:
    """Whether values of some elements [R, s] equal theirs up to rounding."""
    whole = compared.right.copy()
    whole[:, some] = values
    return compared.holds(whole, some)


def _factor(theirs: Floats, right: Floats) -> float | None:
    energy = float((right * right).sum())
    return float((theirs * right).sum()) / energy if energy > 0 else None


def _short(value: float, holds: Callable[[float], bool]) -> str:
    """A number in as few digits as suffice."""
    for digits in range(1, 9):
        short = f"{value:.{digits}g}"
        if holds(float(short)):
            return f"{float(short):g}" if digits <= 6 else short
    return f"{value:.9g}"


def _signed(number: str) -> str:
    return f"minus {number[1:]}" if number.startswith("-") else f"plus {number}"


def _exchanged(compared: Beside, some: Bools) -> Iterator[str]:
    """These elements hold each other's right values."""
    numbers = np.flatnonzero(some)
    if not 2 <= len(numbers) <= _LISTED:
        return
    order = [_match(compared, int(number), numbers) for number in numbers]
    if None in order or len(set(order)) < len(order):
        return
    if len(numbers) == 2:
        yield "are exchanged"
    else:
        yield "hold each other's values in another order"


def _match(compared: Beside, number: int, among: Ints) -> int | None:
    """Which of the elements `among` has the right values that this element holds in every record; None if none has."""
    for other in among.tolist():
        delta = compared.theirs[:, number] - compared.right[:, other]
        if other != number and bool((delta * delta <= compared.room).all()):
            return int(other)
    return None


def _elements(compared: Beside, some: Bools) -> str:
    """Which elements these are, if they form a pattern; else ""."""
    index = compared.index[some]
    first, last = int(index[0]), int(index[-1])
    leading = compared.whole is None or len(compared.index) < compared.whole.shape[1]
    seen = f" (of the {len(compared.index)} recorded)" if leading else ""
    if len(index) == 1:
        return f"element {first} alone"
    if compared.heads and compared.whole is not None:
        size = compared.whole.shape[1] // compared.heads
        heads = sorted(set((index // size).tolist()))
        mine = compared.index[np.isin(compared.index // size, heads)]
        if len(heads) < compared.heads and len(mine) == len(index) and len(mine) >= min(size, 2):
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


def _moved(compared: Beside) -> Iterator[str]:
    """Right values in the wrong place: of another element, another position, or a mix of two positions."""
    whole = compared.whole
    if whole is None:
        return
    count, n = whole.shape
    yield from _heads_moved(compared, whole)
    for by in (sign * step for step in range(1, min(_ROLLS, n - 1) + 1) for sign in (1, -1)):
        if compared.holds(whole[compared.rows][:, (compared.index - by) % n]):
            yield f"element i is the right element i {'−' if by > 0 else '+'} {abs(by)}: the row is rolled"
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
        mine = compared.index // size == head
        if mine.sum() < 2:
            return
        for other in (head, *(one for one in range(compared.heads) if one != head)):
            if _holds(compared, mine, whole[compared.rows][:, compared.index[mine] + (other - head) * size]):
                source[head] = other
                break
        else:
            return
    moved = {head: other for head, other in source.items() if head != other}
    if not moved:
        return
    each = ", ".join(f"head {head} is the right head {other}" for head, other in list(moved.items())[:_LISTED])
    if len(recorded) < compared.heads:
        yield f"{each} ({len(recorded)} of {compared.heads} heads recorded)"
    elif len(moved) == 2 and set(moved) == set(moved.values()):
        yield f"heads {' and '.join(map(str, moved))} are exchanged"
    else:
        yield f"the heads stand in another order: {each}{', …' if len(moved) > _LISTED else ''}"


def _mix(compared: Beside, whole: Floats) -> Iterator[str]:
    if (compared.rows >= 1).sum() < 2:
        return
    now, before = compared.right, whole[np.maximum(compared.rows - 1, 0)][:, compared.index]
    base = before - now
    share = float(((compared.theirs - now) * base).sum() / max(float((base * base).sum()), 1e-300))
    if _SHARES[0] < share < _SHARES[1] and compared.holds(now + share * base):
        yield f"each position is a mix: {share:.0%} of the one before"


def _permutation(compared: Beside, whole: Floats) -> Iterator[str]:
    """Every element holds the right value of another element, the same one in all records."""
    right = whole[compared.rows]
    if right.shape[1] > _WIDE or len(compared.index) < 2:
        return
    source = []
    for number in range(len(compared.index)):
        delta = right - compared.theirs[:, number][:, None]
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
            stands = [i // size * size + order(i % size, size) for i in compared.index.tolist()]
            if size > 2 and size % 2 == 0 and stands == source:
                yield f"the right values stand in another order: {of} {how}"
                return
    shown = ", ".join(f"{i} is the right element {j}" for i, j in pairs[:_LISTED])
    yield f"the right values stand in another order: element {shown}{', …' if len(pairs) > _LISTED else ''}"
