"""How far a converted tensor is from its source, row by row: a single wrong row counts in a matrix of a hundred thousand."""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .packed import Floats
from .quantisation_loss import LOSS, largest_loss

# A type of 16 bits rounds: half a step of bfloat16's 8 bits is 2^-9.
_ROUNDED = 2.0**-17
_SUBNORMAL = 2.0**-50  # the square of half a step of float16's smallest numbers
# Scales of blocks are float16, of which the smallest step times a block's largest integers (63 · 15 in Q4_K) is 3e-5.
_SMALLEST = 1e-9
# A row's NMSE: at most 1.7 times the type's loss on the embedded model, in ten types; an importance matrix costs single rows more.
_OF_ROWS = 8.0
_MOST = 0.5  # a row that is another row, or zero, has an error of 1 to 2 times its square
_FAINT = 1e-3  # of the mean row's square: a row that small is judged as if it had as much


class Distance(Struct):
    """Squares of differences and of right values, float64 [rows] each, of a tensor with `columns` values in each row."""

    errors: NDArray[np.float64]
    energies: NDArray[np.float64]
    columns: int

    @classmethod
    def of(cls, rows: int, columns: int) -> "Distance":
        """Of that many rows, none of which was compared yet."""
        return cls(np.zeros(rows), np.zeros(rows), columns)

    def put(self, start: int, held: Floats, wanted: Floats) -> None:
        """Compare rows from `start` on: float32 [n, columns] each."""
        with np.errstate(over="ignore", invalid="ignore"):
            off = np.subtract(held, wanted, dtype=np.float64)
            right = wanted.astype(np.float64)
            self.errors[start : start + len(held)] = np.einsum("ij,ij->i", off, off)
            self.energies[start : start + len(held)] = np.einsum("ij,ij->i", right, right)

    @property
    def nmse(self) -> float:
        """Of the whole tensor."""
        error, energy = float(self.errors.sum()), float(self.energies.sum())
        return error / energy if energy else 0.0 if error == 0 else np.inf


class Limit(Struct, frozen=True):
    """What a type's rounding may cost: the NMSE of a whole tensor, that of one row, and the square of an element's difference."""

    whole: float
    row: float
    element: float

    def holds(self, distance: Distance | None) -> bool:
        """Whether a tensor is its source, rounded to the type."""
        return distance is not None and distance.nmse <= self.whole and not len(self.wrong_rows(distance))

    def wrong_rows(self, distance: Distance) -> NDArray[np.intp]:
        """The rows that are not their source's."""
        least = _FAINT * float(distance.energies.mean()) if self.whole else 0.0
        allowed = self.row * np.maximum(distance.energies, least) + self.element * distance.columns
        return np.flatnonzero(~(distance.errors <= allowed))

    def excess(self, distance: Distance, what: str) -> str:
        """What is wrong about a tensor, in words: where, and `what` the first wrong row is."""
        wrong, rows = self.wrong_rows(distance), len(distance.errors)
        if not len(wrong) or 2 * len(wrong) > rows:
            return f"{what} (NMSE {distance.nmse:.1e})"
        first, last = int(wrong[0]), int(wrong[-1])
        where = f"row {first:,}" if first == last else f"rows {first:,} to {last:,}"
        among = "" if len(wrong) == last - first + 1 else f", {len(wrong):,} of them"
        return f"{where} of {rows:,}{among}: {what}; all other rows are right"


def limit_of(kind: int, exactly: float = 0.0) -> Limit:
    """That of a ggml type; `exactly` is the NMSE that float32 may have."""
    if kind == 0:
        return Limit(exactly, exactly, 0.0)
    if kind in (1, 30):
        return Limit(_ROUNDED, _ROUNDED, _SUBNORMAL)
    whole = largest_loss(kind)
    return Limit(whole, max(whole, min(_OF_ROWS * LOSS.get(kind, 1.0), _MOST)), _SMALLEST)
