"""Laws of the numbers themselves: one sentence on how the recorded elements derive from the right ones, if it holds for all of them."""

from collections.abc import Callable, Iterator

import numpy as np

from .beside import AS_NOISE, AS_WELL, LEFT_OF_MANY, ROOM, Beside, Bools, Floats, Ints
from .moved import LISTED, moved
from .row_laws import of_rows

WRONG = "wrong; the others are right"  # the end of a sentence that says which elements are wrong, but not how
SAME_ERROR = "the same error at every position, as the rows are alike"
NOT_RECORDED = "every recorded element is right: what differs was not recorded"
ZERO = "every element is 0"
_ALIKE = 1e-3  # rows that differ by no more than this share of the largest element are alike
_SCALES = ": a norm's weight, or scales of channels"
_BIAS = ", as by a bias that is missing, wrong or doubled"
WITHOUT_BIAS, TIMES_BIAS = ", without the bias", " times the bias"
OF_TWO = (WITHOUT_BIAS, TIMES_BIAS)  # how laws end that say two things of one operation
OF_A_WEIGHT = (_SCALES, _BIAS)  # how laws end that a vector of weights explains
_OTHERS = 1e-3  # the most of the squared error that elements which are called right may have
# Elements from which on two numbers are a law: of noise in n elements they remove 90 % with a probability of 0.1^((n − 2) / 2).
_OF_TWO = 16
_SIGN = 1e-5  # the most that a factor called -1 may differ from it


def law(compared: Beside) -> str:
    """The sentence of the first law that holds for every element; "" if none does."""
    if not np.isfinite(compared.right).all():
        return ""
    if not np.isfinite(compared.dumped).all():
        return _not_finite(compared)
    if _all_right(compared):
        return NOT_RECORDED
    every = np.ones(len(compared.index), dtype=np.bool_)
    sentence = next(_by_a_number(compared, every, many=False), "")
    if sentence:
        factor = _factor(compared.dumped, compared.right)
        if factor is not None and compared.holds(compared.right * factor) and not compared.is_whole(factor):
            return f"every recorded element {sentence}; the whole rows are not"
        return f"every element {sentence}"
    some = _differing(compared)
    if 0 < some.sum() < len(some) and _alone(compared, some):
        where = _elements(compared, some)
        many = not where or where.startswith(("elements", "heads"))
        exchanged = next(_exchanged(compared, some), "")
        if exchanged:
            return f"elements {_listed(compared.index[some])} {exchanged}; the others are right"
        relation = next(_by_a_number(compared, some, many), "") or next(_by_a_vector(compared, some, many), "")
        if relation and (where or some.sum() <= LISTED):
            return f"{where or f'elements {_listed(compared.index[some])}'} {relation}; the others are right"
        elsewhere = "" if some.sum() == 1 else next(moved(compared), "") or next(of_rows(compared), "")
        if elsewhere:
            return elsewhere
        if where:
            return f"{where} {'are' if many else 'is'} {WRONG}"
    sentence = next(_by_a_vector(compared, every, many=False), "")
    return f"every element {sentence}" if sentence else next(moved(compared), "") or next(of_rows(compared), "")


def _all_right(compared: Beside) -> bool:
    """Whether the recorded elements are within their records' limits."""
    errors = (compared.dumped - compared.right) ** 2
    if not (errors.sum(axis=1) <= compared.room / ROOM).all():
        return False
    hidden = np.where(compared.outliers, 0.0, errors).sum(axis=1)
    return bool((hidden <= ROOM * compared.noise_beside_outliers)[compared.outliers.any(axis=1)].all())


def _differing(compared: Beside) -> Bools:
    """The elements [k] whose error alone, in any record, exceeds what the whole record may have."""
    with np.errstate(over="ignore"):
        return np.asarray(((compared.dumped - compared.right) ** 2 > compared.room_of_each).any(axis=0))


def _not_finite(compared: Beside) -> str:
    """Which elements are NaN or infinite, if all others are right; else ""."""
    nonfinite = ~np.isfinite(compared.dumped)
    columns = np.asarray(nonfinite.any(axis=0))
    # The others are as right as their limit says: what is left of them is all of their error.
    if not compared.holds(np.where(np.isfinite(compared.dumped), compared.right, 0.0), ~columns, share=np.inf):
        return ""
    values = compared.dumped[nonfinite]
    kinds = [
        name for name, here in (("NaN", np.isnan(values)), ("∞", values == np.inf), ("−∞", values == -np.inf)) if here.any()
    ]
    what = f"{' or '.join(kinds)}: an overflow, a division by zero, an empty soft max row, or memory never written"
    if columns.all():
        return f"every recorded element is {what}" if nonfinite.all() else ""
    where = (
        _elements(compared, columns) or f"elements {_listed(compared.index[columns])}{', …' if columns.sum() > LISTED else ''}"
    )
    return f"{where} {'are' if where.startswith(('elements', 'heads')) else 'is'} {what}; the others are right"


def _alone(compared: Beside, some: Bools) -> bool:
    """Whether the other elements are right, and not just below the limit of one element in a record slightly over its limit."""
    # An outlier's rounding outweighs the errors of all others.
    errors = np.where(compared.outliers, 0.0, (compared.dumped - compared.right) ** 2)
    left = errors[:, ~some].sum(axis=1)
    return bool(left.sum() <= _OTHERS * errors[:, some].sum() or (left <= compared.noise_beside_outliers).all())


def _by_a_number(compared: Beside, some: Bools, many: bool) -> Iterator[str]:
    """How these elements derive from the right ones by one number, or by the operation's bias."""
    dumped, right = compared.dumped[:, some], compared.right[:, some]
    be, have = ("are", "have") if many else ("is", "has")

    def left(values: Floats) -> float | None:
        return compared.left_at(some, values)

    def holds(values: Floats) -> bool:
        return left(values) is not None

    if not dumped.any() and right.any():
        yield f"{be} 0"
        return
    factor = _factor(dumped, right)
    if factor is not None and holds(right * factor):
        wrong_sign = abs(factor + 1) < _SIGN
        yield (
            f"{have} the wrong sign" if wrong_sign else f"{be} {short(factor, lambda c: left(right * c))} times the right one"
        )
        return
    constant = float(np.mean(dumped - right))
    if constant and holds(right + constant):
        yield f"{be} the right one {_signed(short(constant, lambda c: left(right + c)))}"
        return
    if dumped.size >= _OF_TWO and (dumped == dumped.flat[0]).all():
        yield f"{be} {dumped.flat[0]:.6g}, whatever the right one is"
        return
    if compared.bias is None:
        if (both := _line(right, np.ones_like(right), dumped)) is not None and holds(right * both[0] + both[1]):
            alone = holds(np.full_like(right, both[1]))
            yield (
                f"{be} {both[1]:.6g}, whatever the right one is"
                if alone
                else f"{be} {both[0]:.6g} times the right one {_signed(f'{both[1]:.6g}')}"
            )
    else:
        yield from _by_the_bias(dumped, right, compared.bias[some], be, left)


def _by_the_bias(dumped: Floats, right: Floats, bias: Floats, be: str, left: Callable[[Floats], float | None]) -> Iterator[str]:
    """How elements derive from the right ones if the product, its bias, or both are multiplied."""

    def holds(values: Floats) -> bool:
        return left(values) is not None

    factor = _factor(dumped - bias, right - bias)
    if factor is not None and holds((right - bias) * factor + bias):
        yield f"{be} {short(factor, lambda c: left((right - bias) * c + bias))} times the right product; the bias is right"
        return
    for times, sentence in ((0.0, "without the bias"), (2.0, "with the bias twice"), (-1.0, "with the bias subtracted")):
        if bias.any() and holds(right + (times - 1) * bias):
            yield f"{be} the right one {sentence}"
            return
    if (both := _line(right - bias, bias + 0 * right, dumped)) is None:
        return
    if holds((right - bias) * both[0]):
        yield f"{be} {short(both[0], lambda c: left((right - bias) * c))} times the right product{WITHOUT_BIAS}"
    elif holds((right - bias) * both[0] + bias * both[1]):
        yield f"{be} {both[0]:.6g} times the right product and {both[1]:.6g}{TIMES_BIAS}"


def _by_a_vector(compared: Beside, some: Bools, many: bool) -> Iterator[str]:
    """One vector at every position, added or as factors, or one factor for each position: of these the one that leaves least."""
    dumped, right = compared.dumped[:, some], compared.right[:, some]
    be, have = ("are", "have") if many else ("is", "has")
    if len(np.unique(np.concatenate([dumped, right], axis=1), axis=0)) < 2:
        return  # one row, as a cache's first one that is read at every position: any error of it is a vector
    laws: list[tuple[Floats, str]] = []
    vector = (dumped - right).mean(axis=0)
    if vector.any():
        laws.append((right + vector, f"{have} the same vector added at every position{_BIAS}"))
    both = dumped * right, right * right
    # Of one element alone a factor is no vector.
    for axis, what in ((0, "its own at every position"), (1, "the position's own")) if some.sum() > 1 else ():
        product, energy = (part.sum(axis=axis, keepdims=True) for part in both)
        if (energy > 0).all():
            each = product / energy
            ends = _apart(float(each.min()), float(each.max()))
            laws.append((right * each, f"{be} off by a factor of {what} ({ends}){_SCALES if axis == 0 else ''}"))
    held = [
        (float(((dumped - values) ** 2).sum()), sentence)
        for values, sentence in laws
        if compared.holds_at(some, values, LEFT_OF_MANY)
    ]
    if len(held) > 1 and alike_rows(right):
        yield f"{have} {SAME_ERROR}: a vector that is added, or factors of elements"
    elif held:
        yield min(held)[1]


def alike_rows(right: Floats) -> bool:
    """Whether right rows [R, k] are all the same, as where a cache's first row is read at every position."""
    return bool(float(np.ptp(right, axis=0).max()) <= _ALIKE * float(np.abs(right).max()))


def _factor(dumped: Floats, right: Floats) -> float | None:
    energy = float((right * right).sum())
    return float((dumped * right).sum()) / energy if energy > 0 else None


def short(value: float, left: Callable[[float], float | None]) -> str:
    """A number in as few digits as leave no more error than all of them do.

    Args:
        left: the error that a number leaves (`Beside.left`); None if the law does not hold with it.
    """
    of_all = left(value)
    most = np.inf if of_all is None else max(AS_WELL * of_all, AS_NOISE / ROOM)
    for digits in range(1, 9):
        short = f"{value:.{digits}g}"
        of_short = left(float(short))
        if of_short is not None and of_short <= most:
            return f"{float(short):g}" if digits <= 6 else short
    return f"{value:.9g}"


def _line(first: Floats, second: Floats, dumped: Floats) -> tuple[float, float] | None:
    """The factors of two values whose sum is nearest the dump's; None if so few elements would follow any two."""
    if dumped.size < _OF_TWO:
        return None
    factors, _, rank, _ = np.linalg.lstsq(np.stack([first.ravel(), second.ravel()], axis=1), dumped.ravel())
    return (float(factors[0]), float(factors[1])) if rank == len(factors) else None


def _apart(low: float, high: float) -> str:
    """A range in four digits, or in eight where four would not tell its ends apart."""
    digits = 8 if f"{low:.4g}" == f"{high:.4g}" else 4
    return f"{low:.{digits}g} to {high:.{digits}g}"


def _signed(number: str) -> str:
    return f"minus {number[1:]}" if number.startswith("-") else f"plus {number}"


def _exchanged(compared: Beside, some: Bools) -> Iterator[str]:
    """These elements hold each other's right values."""
    numbers = np.flatnonzero(some)
    if not 2 <= len(numbers) <= LISTED:
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
        delta = compared.dumped[:, number] - compared.right[:, other]
        if other != number and bool((delta * delta <= compared.room_of_each[:, number]).all()):
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
        of_heads = compared.index[np.isin(compared.index // size, heads)]
        if len(heads) < compared.heads and len(of_heads) == len(index) and len(of_heads) >= min(size, 2):
            return f"head {heads[0]} alone" if len(heads) == 1 else f"heads {', '.join(map(str, heads[:LISTED]))}"
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
    return " and ".join(map(str, index.tolist())) if len(index) == 2 else ", ".join(map(str, index[:LISTED].tolist()))
