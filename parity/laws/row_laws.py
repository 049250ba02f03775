"""Laws of whole rows: a ring of positions, sums over positions, limits of values, lost signs, a subtracted mean."""

from collections.abc import Iterator

import numpy as np

from .beside import Beside, Floats

_SMALLEST = 1e-3  # the least part of another row that is called added


def of_rows(compared: Beside) -> Iterator[str]:
    """The sentence of each law of this kind that holds for all wrong records."""
    yield from _limited(compared)
    if compared.whole is not None and len(compared.rows) and compared.whole.shape[0] > 1:
        yield from _of_a_ring(compared, compared.whole)
        yield from _summed(compared, compared.whole)
        yield from _centred(compared, compared.whole)


def _limited(compared: Beside) -> Iterator[str]:
    """Values without their sign, or none beyond a limit."""
    right, dumped = compared.right, compared.dumped
    if (right < 0).any() and compared.holds(np.abs(right)):
        yield "every element is the right one without its sign"
        return
    low, high = float(dumped.min()), float(dumped.max())
    if low >= high or not compared.holds(np.clip(right, low, high)):
        return
    # A limit is met by several values; the largest one that is wrong is no limit.
    below, above = (int((some & (dumped == end)).sum()) > 1 for some, end in ((right < low, low), (right > high, high)))
    if below and above:
        yield f"every element is the right one, clamped to {low:.6g} … {high:.6g}"
    elif below or above:
        yield f"every element is the right one, but none is {'below' if below else 'above'} {low if below else high:.6g}"


def _of_a_ring(compared: Beside, whole: Floats) -> Iterator[str]:
    """Every wrong position holds the values of a position before it, at the same distance for all."""
    first = int(compared.rows.min())
    wrong = np.unique(compared.rows)
    to_the_end = np.array_equal(wrong, np.arange(first, len(whole)))
    for by in range(2, first + 1):
        if compared.holds(whole[compared.rows - by][:, compared.index]):
            if len(wrong) == 1:
                yield f"position {first} holds the right values of position {first - by}"
                return
            ring = f": a ring of {by} positions, of which the older ones are read" if by == first and to_the_end else ""
            yield f"position t holds the right values of position t − {by}{ring}"
            return


def _summed(compared: Beside, whole: Floats) -> Iterator[str]:
    """Rows to which the rows before them are added."""
    rows, columns = compared.rows, compared.index
    if len(rows) < 2 or not rows.any():
        return
    before = np.where((rows > 0)[:, None], whole[np.maximum(rows - 1, 0)][:, columns], 0.0)
    energy = float((before * before).sum())
    part = float(((compared.dumped - compared.right) * before).sum()) / energy if energy else 0.0
    if abs(part) > _SMALLEST and compared.holds(compared.right + part * before):
        times = "" if abs(part - 1) < _SMALLEST else f"{part:.4g} times "
        yield f"each position is the right one plus {times}the position before it"
        return
    sums = np.cumsum(whole, axis=0)[rows][:, columns]
    if compared.holds(sums):
        yield "each position is the sum of the right ones up to it"
    elif compared.holds(sums / (rows + 1.0)[:, None]):
        yield "each position is the mean of the right ones up to it"


def _centred(compared: Beside, whole: Floats) -> Iterator[str]:
    """Rows from which their mean was taken."""
    mean = whole.mean(axis=1)[compared.rows][:, None]
    if mean.any() and compared.holds(compared.right - mean):
        yield "every element is the right one minus the mean of its row"
