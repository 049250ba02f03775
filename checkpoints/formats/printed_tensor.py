"""A tensor that a log prints in part, row by row, and the records made of its rows."""

import numpy as np
from msgspec import Struct, field

from ..points import parse
from ..record import Rows

PASS_SUM, PASS_ROWS = (
    "pass_sum",
    "pass_rows",
)  # statistics of a pass's last record: a sum, and the number of positions it covers
_QUANTUM = 1e-4  # %.4f
# If a log's sums are of the printed values only, they equal the sums of the printed digits to half a step each; the sums of
# all values differ from that in 99 % of a real log's tensors.
_MOST = 0.5


class PrintedTensor(Struct):
    """A tensor of a pass: rows of values, each with its number, counted over dimensions 1 and 2; None stands for a gap.

    `total` is the sum that is printed below it; `every` means that it is known to be of all values.
    """

    point: str
    sizes: tuple[int, int, int, int]
    rows: list[tuple[int, list[float | None]]] = field(default_factory=list)
    total: float = np.nan
    every: bool = False
    at: int = 0  # number of the next row

    @property
    def square(self) -> bool:
        """Whether it is [cells, T, H], attention over the cache's cells; otherwise [n, T], or [d, H, T]."""
        known = parse(self.point).known
        return known is not None and "t+1" in known.row

    @property
    def tokens(self) -> int:
        """How many positions it covers."""
        _, across, deep, _ = self.sizes
        return across if self.square or not self._of_heads() else deep

    def _of_heads(self) -> bool:
        return self.sizes[2] > 1 or self.point.endswith("_rope")

    def elements(self, first: int) -> dict[int, dict[int, float]]:
        """Position -> element of its row -> value; `first` is the position of the first token.

        Of attention, only the cells up to the position itself belong to its row.
        """
        width, across, deep, _ = self.sizes
        elements: dict[int, dict[int, float]] = {}
        for number, values in self.rows:
            outer, inner = divmod(number, across)
            if self.square:
                head, token = outer, inner
            else:
                token, head = (outer, inner) if self._of_heads() else (number, 0)
            if token >= self.tokens or head >= max(across, deep):
                continue
            position = first + token
            row = position + 1 if self.square else width
            at = elements.setdefault(position, {})
            cut = values.index(None) if None in values else len(values)
            for i, value in enumerate(values):
                # What comes after the gap is counted from the row's end.
                index = i if i < cut else width - (len(values) - i)
                if value is not None and 0 <= index < row:
                    at[head * row + index] = value
        return {position: at for position, at in elements.items() if at}

    def shape(self, position: int) -> tuple[int, ...]:
        """The shape of a position's row."""
        width, across, deep, _ = self.sizes
        if self.square:
            return (deep, position + 1)
        return (width * across,) if self._of_heads() else (width,)

    def sums_more(self) -> bool | None:
        """Whether the sum covers more than the printed values; None if all are printed, or if the sum does not decide it."""
        printed = [value for _, values in self.rows for value in values if value is not None]
        if not np.isfinite(self.total) or not np.isfinite(printed).all() or len(printed) >= np.prod(self.sizes):
            return None
        size = float(np.abs(printed).sum())
        # Half a step a value, and float32's rounding of the sum itself.
        return abs(self.total - float(np.sum(printed))) > len(printed) * _QUANTUM / 2 + 1e-6 * size


class Printed(Struct):
    """The records of one point: by position its pass, its values by element, its row's shape, its statistics."""

    records: dict[int, tuple[int, dict[int, float], tuple[int, ...], dict[str, float]]] = field(default_factory=dict)

    def add(self, tensor: PrintedTensor, first: int, step: int) -> None:
        """Add the rows of a tensor whose first token is at position `first`; earlier rows there are replaced."""
        printed = tensor.elements(first)
        last = first + tensor.tokens - 1
        for position, elements in printed.items():
            stats = {PASS_SUM: tensor.total, PASS_ROWS: float(tensor.tokens)} if position == last and not tensor.square else {}
            self.records[position] = step, elements, tensor.shape(position), stats

    def rows(self, point: str, *, sums: bool) -> Rows:
        """All of them as scattered records; `sums`: the printed sums are of all values."""
        positions = sorted(self.records)
        given = [self.records[position] for position in positions]
        counts = np.array([len(elements) for _, elements, _, _ in given], dtype=np.int64)
        values = np.full((len(given), int(counts.max())), np.nan, dtype=np.float32)
        indices = np.full(values.shape, -1, dtype=np.int64)
        for r, (_, elements, _, _) in enumerate(given):
            values[r, : len(elements)] = list(elements.values())
            indices[r, : len(elements)] = list(elements)
        steps = np.array([step for step, _, _, _ in given], dtype=np.int64)
        stats = {name: np.array([stats.get(name, np.nan) for _, _, _, stats in given]) for name in (PASS_SUM, PASS_ROWS)}
        return Rows(
            point=point,
            seq=np.zeros(len(given), dtype=np.int64),
            token_idx=np.array(positions, dtype=np.int64),
            step=steps,
            decode=steps > 0,
            shapes=tuple(shape for _, _, shape, _ in given),
            values=values,
            counts=counts,
            stats=stats if sums and np.isfinite(stats[PASS_SUM]).any() else {},
            indices=indices,
            quantum=np.where(indices >= 0, _QUANTUM, 0.0),
        )


def sums_of_all(verdicts: list[bool]) -> bool:
    """Whether a log's sums are of all values, given the answers for single tensors."""
    return bool(verdicts) and sum(verdicts) > _MOST * len(verdicts)
