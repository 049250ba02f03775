"""What the values that an engine holds say of themselves, where nothing that can happen to a tensor as a whole gives them."""

import numpy as np
from numpy.typing import NDArray

from reports.numbers import count

from .weights import Floats

# Read from printed decimals with 6 digits or more; a wrong layout is off by the size of the weights.
CLOSE = 2e-6
_PROBE = 16  # values by which a place in the file is recognised: weights of 4 bits repeat over fewer
_ROWS = 4096  # rows that are compared with each other: 4 s of processor time for a matrix as wide
_ALIKE = (
    0.98  # cosine: a row of 4,096 and itself in Q4_0 have 0.996 at least (of 512), two rows of 16 at most 0.948 (of 10^8 pairs)
)
_FEW = 0.05  # of the values: so few are named one by one


def unequal(loaded: Floats, right: Floats) -> NDArray[np.bool_]:
    """Which values differ by more than their last printed digits."""
    scale = float(np.abs(right[np.isfinite(right)]).max(initial=0.0))
    equal = (loaded == right) | (np.isnan(loaded) & np.isnan(right))
    with np.errstate(invalid="ignore", over="ignore"):
        off: NDArray[np.bool_] = ~(equal | (np.abs(loaded.astype(np.float64) - right) <= CLOSE * scale))
    return off


def said(loaded: Floats, right: Floats, columns: int, block: int, start: int = 0) -> str:
    """A sentence on values from element `start` on, of rows of `columns`, in blocks with a scale each; they differ from the right ones."""
    off = unequal(loaded, right)
    at = off.nonzero()[0]
    first, total = int(at[0]), len(loaded)
    lost = off & ~np.isfinite(loaded) & np.isfinite(right)
    if lost.sum() == len(at):
        many = f"{count(len(at), 'value')} of {total:,} {'is' if len(at) == 1 else 'are'}"
        return f"{many} NaN or infinite, the first at element {start + first:,}; the others are right"
    before = "" if start + first == 0 else f" from element {start + first:,} on"
    if not loaded[first:].any():
        return f"zero{before or ' throughout'}{_rest(first)}"
    if by := _moved(loaded, right, first):
        rows, beyond = divmod(abs(by), columns)
        size = count(rows, "row") if rows and not beyond else count(abs(by), "element")
        return f"each value{before} is the one that the file has {size} {'later' if by > 0 else 'earlier'}{_rest(first)}"
    with np.errstate(invalid="ignore", over="ignore"):
        constant = float((loaded.astype(np.float64) - right).mean())
        if np.isfinite(constant) and not unequal(loaded, (right + constant).astype(np.float32)).any():
            return f"the file's values {'plus' if constant > 0 else 'minus'} {abs(constant):.6g}"
    if len(at) <= _FEW * total:
        last = int(at[-1])
        where = f"element {start + first:,}" if last == first else f"elements {start + first:,} to {start + last:,}"
        return f"{count(len(at), 'value')} of {total:,} {'differs' if len(at) == 1 else 'differ'}, in {where}; the others are right"
    if block > 1 and start % block == 0 and _rescaled(loaded, right, block):
        return f"each block of {block} is the file's times a factor of its own: the scale of another block"
    if not start and _reordered(loaded, right, columns):
        return "the file's rows in another order"
    return f"nothing known gives these values{before}{_rest(first)}"


def _rest(first: int) -> str:
    return "; those before are right" if first else ""


def _moved(loaded: Floats, right: Floats, first: int) -> int:
    """By how many elements the values from the first wrong one on are those of another place; 0 if they are not."""
    middle, total = (first + len(loaded)) // 2, len(loaded)
    probe = loaded[middle : middle + _PROBE]
    if len(probe) < _PROBE or not np.isfinite(probe).all() or np.ptp(probe) == 0:
        return 0
    places = np.flatnonzero(~unequal(right[: total - _PROBE + 1], np.broadcast_to(probe[0], total - _PROBE + 1)))
    for place in sorted(places.tolist(), key=lambda place: abs(place - middle)):
        by = place - middle
        if by and not unequal(probe, right[place : place + _PROBE]).any():
            begin, end = max(first, -by), min(total, total - by)
            if not unequal(loaded[begin:end], right[begin + by : end + by]).any():
                return by
    return 0


def _rescaled(loaded: Floats, right: Floats, block: int) -> bool:
    """Whether each whole block is the right one times one number."""
    whole = len(loaded) // block * block
    held, wide = (values[:whole].reshape(-1, block).astype(np.float64) for values in (loaded, right))
    if not len(held) or not np.isfinite(held).all():
        return False
    energy = (wide**2).sum(axis=1)
    factor = (held * wide).sum(axis=1) / np.where(energy > 0, energy, 1.0)
    rescaled = (wide * factor[:, None]).reshape(-1).astype(np.float32)
    return not unequal(loaded[:whole], rescaled).any()


def _reordered(loaded: Floats, right: Floats, columns: int) -> bool:
    """Whether each row is one of the file's, no two the same, not each its own: known by direction, so that rounded rows are, too."""
    rows = len(loaded) // columns
    if not 1 < rows <= _ROWS or columns < _PROBE or len(loaded) % columns or not np.isfinite(loaded).all():
        return False
    held, wide = (values.reshape(rows, columns).astype(np.float64) for values in (loaded, right))
    sizes = [np.sqrt((of**2).sum(axis=1)) for of in (held, wide)]
    if not all(size.all() for size in sizes):
        return False
    alike = (held / sizes[0][:, None]) @ (wide / sizes[1][:, None]).T
    source = alike.argmax(axis=1)
    moved = bool((source != np.arange(rows)).any())
    return moved and len(set(source.tolist())) == rows and bool((alike.max(axis=1) > _ALIKE).all())
