"""A node of ggml's as a step's operation: operands brought into ggml's four dimensions, the result into the engine's layout."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from msgspec import Struct

from checkpoints.graph import MovingParam, Size

from ..backend import Array, module_of
from ..ggml_ops import OpParams, operation
from ..graph import bound

Shape = tuple[Size, ...]


class Operand(Struct, frozen=True, dict=True):
    """One operand of a node: which of the step's inputs it is, that input's shape, and the four dimensions it is read in.

    A matrix of which single rows are taken is a function ids -> rows and has no shape: `shape` is None.
    """

    index: int
    whole: Shape
    shape: Shape | None

    @cached_property
    def variable(self) -> bool:
        """Whether its shape depends on the length."""
        return any(not size.constant for size in self.whole)


class GgmlOperation(Struct, frozen=True):
    """A step's operation that is one of ggml's, by its name."""

    name: str

    @property
    def takes_matrices(self) -> bool:
        """Whether it takes single matrices of its weight, those of the chosen experts, and needs no whole array."""
        return self.name == "MUL_MAT_ID"

    def __call__(
        self,
        *inputs: Any,
        params: OpParams,
        operands: tuple[Operand | None, ...],
        shape: Shape,
        result_shape: Shape,
        positions: int | None = None,
        moving: tuple[MovingParam, ...] = (),
    ) -> Array:
        """The node's value in the shape `result_shape`; `shape` is ggml's, in NumPy's order; `positions` the input that only tells T;
        `moving` are the parameters that depend on the length."""
        t, s, e = lengths_of(operands, inputs)
        if positions is not None:  # no operand's shape tells T
            t = len(inputs[positions])
        if moving:
            params = params.changed({index: (size.at(t, s, e), real) for index, size, real in moving})
        arguments = [None if operand is None else _shaped(inputs[operand.index], operand, (t, s, e)) for operand in operands]
        result = self.compute(*arguments, params=params, shape=_at(shape, (t, s, e)))
        if positions is not None:  # made without operands, and so perhaps on the host
            result = module_of(inputs[positions]).asarray(result)
        if result.dtype.kind in "iu":  # ids: whatever reads them takes whole numbers of any type
            result = result.astype(np.float32)
        # Taps and views read its memory in order.
        contiguous: Array = module_of(result).ascontiguousarray(result.reshape(_at(result_shape, (t, s, e))))
        return contiguous

    def compute(self, *arguments: Any, params: OpParams, shape: tuple[int, ...]) -> Array:
        """The operation itself, in ggml's four dimensions."""
        return _function(self.name)(*arguments, params=params, shape=shape)


def lengths_of(operands: Sequence[Operand | None], inputs: Sequence[Any]) -> tuple[int, int, int]:
    """T, S and E of the operands of a node, as far as their shapes tell."""
    t = s = e = 0
    for operand in operands:
        if operand is not None and operand.variable:
            sizes = bound(operand.whole, inputs[operand.index].shape)
            t, s, e = max(t, sizes[0]), max(s, sizes[1]), max(e, sizes[2])
    return t, s, e


@lru_cache(maxsize=256)
def _function(name: str) -> Callable[..., Array]:
    return operation(name)


def _at(sizes: Shape, lengths: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple([size.at(*lengths) for size in sizes])


def _shaped(value: Any, operand: Operand, lengths: tuple[int, int, int]) -> Any:
    return value if operand.shape is None else value.reshape(_at(operand.shape, lengths))
