"""Which elements of a matrix's rows account for the error of a product, if they are neighbours and off by a common factor: a block, a
shard."""

import numpy as np

from ..records.records import Floats

_EACH = 2048  # elements of a row up to which a range may begin and end at each of them,
_BLOCK = 32  # in longer ones at blocks alone
_ALONG = 0.999999  # the least share of the error's energy that the range accounts for
_ENOUGH = 4  # errors: three and a factor are met by chance less than once in 10^9 of some million ranges


def column_range(x: Floats, rows: Floats, error: Floats) -> tuple[int, int, float, Floats] | None:
    """The range [first, end) of the elements of `rows` that are wrong, by which factor, and the part of the product that they make [R, k].

    Args:
        x: inputs [R, in]. rows: of the right matrix [k, in]. error: of the product [R, k].

    Returns:
        None if no range accounts for the error.
    """
    width = x.shape[1]
    total = float((error * error).sum())
    if error.size < _ENOUGH or not (np.isfinite(total) and total > 0):
        return None
    ends = np.arange(0, width + 1, 1 if width <= _EACH else _BLOCK)
    if ends[-1] != width:
        ends = np.append(ends, width)
    # Σ over elements 0 … e of x · row, for every end e: a range's part of the product is the difference of two.
    inner, along = np.zeros((len(ends), len(ends))), np.zeros(len(ends))
    for record in range(len(x)):
        parts = np.add.reduceat(rows * x[record], ends[:-1], axis=1)
        sums = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(parts, axis=1)], axis=1)
        inner += sums.T @ sums
        along += error[record] @ sums
    sizes = np.diag(inner)
    energy = sizes[None, :] + sizes[:, None] - 2 * inner
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(energy > 1e-12 * sizes.max(), (along[None, :] - along[:, None]) ** 2 / energy, 0.0) / total
    begin, end = np.unravel_index(int(np.argmax(np.triu(shares, 1))), shares.shape)
    if shares[begin, end] < _ALONG:
        return None
    first, last = int(ends[begin]), int(ends[end])
    effect = x[:, first:last] @ rows[:, first:last].T
    return first, last, 1 + float((error * effect).sum() / (effect * effect).sum()), effect
