"""NaN and infinities of one side: whether an agreeing value, which would otherwise be lost as well, shows that the engine did not
compute with them."""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.record import Rows

from ..measured.align import Pair
from ..measured.dataflow import Flow
from ..measured.measure import Measured
from ..measured.operations import ELEMENTWISE

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# Arithmetic in which what is not finite stays so (IEEE 754), element by element or over the row that a norm divides by.
_CARRY = frozenset({"ADD", "SUB", "MUL", "SCALE", "SQR", "ROPE", "RMS_NORM", "NORM", "L2_NORM", "REPEAT", "ADD_ID"})
# NaN in these gives NaN, and an infinity may give zero.
_CARRY_NAN = frozenset({"DIV", "SQRT"})
# Where the whole row of the result is known: each element is made from all of a row, or copied; the rows of a cache that a position
# reads include its own.
_CARRY_SOMEWHERE = frozenset({"MUL_MAT", "MUL_MAT_ID", "SUM_ROWS", "CONCAT", "CONT", "CPY", "DUP", "CACHE"})
# The same for NaN alone: a soft max of NaN is a row of NaN, and bounds give NaN or a bound of it, while both make something of an infinity;
# a state that forgets by exp(−∞) is finite.
_CARRY_NAN_SOMEWHERE = frozenset(
    {"SOFT_MAX", "CLAMP", "SSM_CONV", "SSM_SCAN", "RWKV_WKV6", "RWKV_WKV7", "GATED_LINEAR_ATTN", "GATED_DELTA_NET"}
)
_FUNCTIONS_OF_NAN = frozenset(
    {"SILU", "SIGMOID", "TANH", "GELU", "GELU_ERF", "GELU_QUICK", "SWIGLU", "GEGLU", "GEGLU_ERF", "GEGLU_QUICK"}
)
_FUNCTIONS_OF_NAN |= {"EXP", "EXPM1", "SOFTPLUS", "NEG", "ABS"}
# Operations of single elements whose functions or bounds may make a number of what is none: 0, ±1, or a bound, the same for many elements.
_BOUNDING = frozenset({"UNARY", "GLU", "CLAMP"})
# How far a value has to be from such a number, in proportion to its row's root mean square or to 1, for one that is made from infinity
# to be seen as another one: a choice, ten thousand times what NMSE 1e-10 hides in a row of a hundred elements.
_APART = 1e-2


class LostNumbers(Struct, frozen=True):
    """Judges values that are not finite by the points made from them: `measured` are records of the points of `model`."""

    model: Flow
    measured: Measured

    def lost(self, name: str, records: Ints) -> Bools:
        """The values of these records of ours that are NaN or infinite though the reference's are not: bool [len(records), N]."""
        pair, rows = self._pair(name), self.measured.row[records]
        ours, ref = (side.take(rows) for side in (pair.ours, pair.ref))
        width = min(ours.values.shape[1], ref.values.shape[1])
        inside = np.arange(width) < np.minimum(ours.counts, ref.counts)[:, None]
        return np.asarray(~np.isfinite(ours.values[:, :width]) & np.isfinite(ref.values[:, :width]) & inside)

    def would_be_lost(self, name: str, child: str, record: int, other: int, *, whole: bool) -> bool:
        """Whether record `other` of a consumer, which agrees, could not agree if it were made from the non-finite values of `record`.

        Args:
            whole: the consumer's record is known as a whole row.
        """
        pair, row = self._pair(name), int(self.measured.row[record])
        nan = bool(np.isnan(pair.ours.values[row]).any())
        seen = whole or self._seen(name, child, record, other)
        taken = bool(pair.ours.full()[row]) and not np.isfinite(pair.ours.values[row, : pair.ours.counts[row]]).any()

        def carries(node: str) -> bool:
            if taken and self.model.whole.computations[node].op == "GET_ROWS":
                return True  # whichever elements are taken
            return self._carries(node, nan=nan, somewhere=whole)

        if seen and self.model.reaches(name, child, carries):
            return True
        return self._unlike_a_bound(name, child, record, other)

    def _pair(self, name: str) -> Pair:
        return self.measured.pairs[self.measured.names.index(name)]

    def _carries(self, node: str, *, nan: bool, somewhere: bool) -> bool:
        """Whether NaN (`nan`) or an infinity in leading values of an operand makes a node's own leading values non-finite.

        Functions that compare (ReLU, bounds) and operations that take or move parts of rows do not count; attention, states and caches
        only if something `somewhere` in the whole row of the same position suffices.
        """
        how = self.model.whole.computations[node]
        if how.op in _CARRY or (nan and (how.op in _CARRY_NAN or how.function in _FUNCTIONS_OF_NAN)):
            return True
        if somewhere and (how.op in _CARRY_SOMEWHERE or (nan and how.op in _CARRY_NAN_SOMEWHERE)):
            return True
        return how.op == "MUL_MAT" and bool(how.weights or (not nan and len(how.reads) == 1))

    def _seen(self, name: str, child: str, record: int, other: int) -> bool:
        """Whether the first NaN or infinity of a record would show in the recorded values of a consumer."""
        if any(side.indices is not None for point in (name, child) for side in self._sides(point)):
            return False
        place = int(self.lost(name, np.array([record]))[0].argmax())
        below = int(self.measured.row[other])
        # The first element is made from the first one, however a narrow row is spread over a wide one.
        return place == 0 or (
            self._as_wide(name, child, record, other) and place < min(int(side.counts[below]) for side in self._sides(child))
        )

    def _unlike_a_bound(self, name: str, child: str, record: int, other: int) -> bool:
        """Whether a function of single elements gave the right value where it would give the same for any infinity or NaN.

        That is 0, ±1, or a bound, which is the largest or the smallest of a row.
        """
        before = self.model.path(name, child) - {child}
        if (
            self.model.whole.computations[child].op not in _BOUNDING
            or not self.model.operations(before) <= _CARRY & ELEMENTWISE
        ):
            return False
        if not self._as_wide(name, child, record, other) or any(
            side.indices is not None for point in (name, child) for side in self._sides(point)
        ):
            return False
        below = int(self.measured.row[other])
        values = self._pair(child).ref.values[below, : min(int(side.counts[below]) for side in self._sides(child))]
        places = np.flatnonzero(self.lost(name, np.array([record]))[0][: len(values)])
        if not np.isfinite(values).all():
            return False
        size = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
        right = values[places].astype(np.float64)
        inner = (right < values.max()) & (right > values.min()) & (np.abs(right) > _APART * size)
        return bool((inner & (np.abs(np.abs(right) - 1) > _APART)).any())

    def _as_wide(self, name: str, child: str, record: int, other: int) -> bool:
        """Whether a record and that of a consumer have as many elements, each made from the one at its own place."""
        n, of = (self._pair(point).ref.stats.get("n") for point in (name, child))
        return n is not None and of is not None and bool(n[self.measured.row[record]] == of[self.measured.row[other]])

    def _sides(self, name: str) -> tuple[Rows, Rows]:
        pair = self._pair(name)
        return pair.ours, pair.ref
