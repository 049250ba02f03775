"""Errors that lie where no rounding puts them: in two elements of all rows, or in one direction."""

import numpy as np

from checkpoints.points import of_scores

from ..records.records import Expected, Floats, Ints

_MANY = 10  # recorded elements of a row that suffice to see that two of them have all of the error
_AS_UNEVEN = 20.0  # how far the share of two elements may lie from our own rounding's: as `precision.APART`
# The part of the errors outside their common direction, if a single element of a layer is wrong: it adds one column of a matrix to the
# layer's output at every position, so that float32's rounding leaves 3e-11. Rounding of all elements leaves 0.1 and more.
_PARALLEL, _PARALLEL_ROWS = 1e-6, 3
_OWN_DIRECTIONS = 1e-2  # the right rows must have at least this part outside theirs: rows of one repeated token have none


def in_two_elements(entry: Expected) -> Ints | None:
    """The two of many recorded elements that have all but a tenth of a point's error, if there are such: rounding spreads it over all, but
    where a row's own values are so uneven.
    """
    right = entry.pair.ref.values.astype(np.float64)
    if right.shape != entry.values.shape or right.shape[1] < _MANY or of_scores(entry.point):
        return None
    columns = by_element(entry, entry.values, right)
    two = np.argsort(columns)[-2:]
    over = bool(entry.over.any())
    return two if over and columns[two].sum() > 0.9 * columns.sum() else None


def by_element(entry: Expected, rows: Floats, right: Floats) -> Floats:
    """The error of a point's rows [R, k] in each recorded element: [k], in proportion to the rows' energy."""
    known = entry.present & np.isfinite(rows) & np.isfinite(right)
    with np.errstate(over="ignore", invalid="ignore"):  # of models whose own numbers overflow
        errors = np.where(known, rows - right, 0.0)
        return np.asarray((errors**2 / entry.energy[:, None]).sum(axis=0))


def as_uneven(entry: Expected, two: Ints, own: Floats) -> bool:
    """Whether our own rounding's errors, [k], are as uneven as the dump's: two elements and the others off by one factor."""
    dumped = by_element(entry, entry.values, entry.pair.ref.values.astype(np.float64))
    others = dumped.sum() - dumped[two].sum(), own.sum() - own[two].sum()
    return bool(dumped[two].sum() * others[1] <= _AS_UNEVEN * own[two].sum() * others[0])


def in_one_direction(entry: Expected) -> bool:
    """Whether a point's errors are multiples of one vector at all positions, though the right rows are not: rounding does not do that."""
    right = entry.pair.ref.values.astype(np.float64)
    over = entry.over
    if right.shape != entry.values.shape or over.sum() < _PARALLEL_ROWS or right.shape[1] < _PARALLEL_ROWS:
        return False
    errors = np.where(entry.present & np.isfinite(entry.values), entry.values - right, 0.0)[over]
    return _in_no_direction(errors) <= _PARALLEL and _in_no_direction(right[over]) >= _OWN_DIRECTIONS


def _in_no_direction(rows: Floats) -> float:
    """The part of some rows, each scaled to length 1, that lies outside their main direction."""
    sizes = np.linalg.norm(rows, axis=1)
    units = rows[sizes > 0] / sizes[sizes > 0, None]
    if len(units) < _PARALLEL_ROWS or not np.isfinite(units).all():
        return 1.0
    return float(1 - np.linalg.svd(units, compute_uv=False)[0] ** 2 / len(units))
