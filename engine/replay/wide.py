"""The truth about a list of steps: the same steps computed in float64, from the same float32 weights.

Operations compute in the type of their operands, so nothing but float64 operands is needed. What the file and ggml define in float32
stays so: weights, epsilon, scales, and RoPE's angles, which ggml multiplies up step by step in float32. In float32 the same steps show
what rounding costs, with ggml's tables of float16 and without.
"""

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from .. import graph
from ..backend import Array, Backend, module_of
from ..ggml_ops.activations import looked_up
from ..graph import PASSES, POSITIONS, TOKENS, Step, WeightSource
from ..kv_cache import KvCache
from ..lift.node import GgmlOperation
from ..weights.matrices import Matrices

_ENTRY = 2.0**-10  # float16 keeps eleven bits: the next number is at most this far, in proportion


def is_looked_up(step: Step) -> bool:
    """Whether a step's value comes from ggml's table of float16."""
    if not isinstance(step.op, GgmlOperation):
        return False
    params = step.params["params"]
    return params.rounds is not False and looked_up(step.op.name, params)


def entry_errors(step: Step, inputs: Sequence[Array], weights: WeightSource) -> Array:
    """How far apart the values of neighbouring entries of the table are at each element of a step's value, float64.

    Args:
        inputs: the whole values that it reads, float64.
    """
    value = graph.compute(step, inputs, WideWeights(weights))
    # A gated activation is linear in its other operand, which is moved too.
    linear = isinstance(step.op, GgmlOperation) and step.op.name == "GLU"
    moved = []
    for factor in (1 + _ENTRY, 1 - _ENTRY):
        shifted = graph.compute(step, [factor * given for given in inputs], WideWeights(weights))
        moved.append(abs((shifted / factor if linear else shifted) - value))
    return np.maximum(*moved) + _ENTRY * abs(value)  # both entries are rounded


class _NextEntry(Struct, frozen=True):
    """An operation of ggml's with a table, one element of each row of which comes from a neighbouring entry: that which moves furthest."""

    op: GgmlOperation

    def __call__(self, *inputs: Array, **params: Any) -> Array:
        value = self.op(*inputs, **params)
        xp, factor = module_of(value), 1 + _ENTRY
        moved = self.op(*(given * factor for given in inputs), **params) / (factor if self.op.name == "GLU" else 1)
        error = abs(moved - value) + _ENTRY * abs(value)
        largest = xp.arange(value.shape[-1]) == error.argmax(axis=-1)[..., None]
        return xp.where(largest, value + error, value).astype(value.dtype)


def with_next_entries(steps: Sequence[Step]) -> list[Step]:
    """The steps with one element of each row of a table's values from a neighbouring entry, that which moves furthest."""
    return [
        replace(step, op=_NextEntry(step.op)) if isinstance(step.op, GgmlOperation) and is_looked_up(step) else step
        for step in steps
    ]


def coarse_points(steps: Sequence[Step], given: Collection[str] = ()) -> frozenset[str]:
    """The points that ggml itself computes coarsely: from a table of float16, or from such a point; `given` are coarse already."""
    coarse = set(given)
    for step in steps:
        if is_looked_up(step) or not coarse.isdisjoint(step.names):
            coarse.add(step.makes)
    return frozenset(coarse)


class Variant(Enum):
    """The arithmetic that a list of steps is computed in.

    `WIDE`: float64, the truth. `EXACT`: float32 without tables of float16. `TABLED`: float32 with ggml's tables.
    """

    WIDE = "float64"
    EXACT = "float32"
    TABLED = "float32 with ggml's tables"


def without_tables(steps: Sequence[Step]) -> list[Step]:
    """The steps with each function that ggml takes from a table of float16 computed in the type of its argument."""
    return [
        replace(step, params={**step.params, "params": replace(step.params["params"], rounds=False)})
        if is_looked_up(step)
        else step
        for step in steps
    ]


class WideWeights:
    """The float32 weights of another source as float64 arrays; none is kept, since they take twice the memory."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def raw(self, name: str) -> tuple[NDArray[np.uint8], int, tuple[int, ...]]:
        """The file's own bytes, their ggml type and the weight's shape."""
        return self._source.raw(name)

    def array(self, host: NDArray[Any]) -> Array:
        """A host array on the side where the steps compute; float64 if it has floating-point elements."""
        array = self._source.array(host)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def get(self, name: str) -> Array:
        """The whole weight, float64."""
        return self._source.get(name).astype(np.float64)

    def matrices(self, name: str) -> Matrices:
        """A weight of which single matrices are taken, each float64."""
        source = self._source.matrices(name)
        flat = source.reshape((prod(source.shape[:-2]), *source.shape[-2:]))
        return Matrices(lambda number: flat[(number,)].astype(np.float64), source.shape)

    def rows(self, name: str, ids: Array) -> Array:
        """The given rows of it, float64."""
        return self._source.rows(name, ids).astype(np.float64)


def values_of(
    variant: Variant,
    steps: Sequence[Step],
    tokens: Sequence[int],
    positions: Sequence[int],
    passes: Sequence[int],
    weights: WeightSource,
    backend: Backend,
    wanted: Collection[str],
    given: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> dict[str, NDArray[Any]]:
    """The wanted values in the given arithmetic, on the host, by name; names that no step makes are left out.

    One pass over all positions, as in `Replay`; steps after the last wanted one are not computed.

    Args:
        positions, passes: each token's position, and the number of the forward pass that it belongs to.
        given: further values that steps read but none makes, in the same arithmetic.
    """
    kept: dict[str, NDArray[Any]] = {}
    last = max((number for number, step in enumerate(steps) if step.makes in wanted), default=-1)

    def keep(name: str, value: Array) -> None:
        if name in wanted:
            kept[name] = backend.to_host(value)

    numbers = {TOKENS: tokens, POSITIONS: positions, PASSES: passes}
    values = {name: backend.array(np.asarray(of, dtype=np.int64)) for name, of in numbers.items()}
    values |= {name: backend.array(value) for name, value in given.items()}
    # A dump may have recorded what steps keep to themselves.
    steps = [replace(step, inner=False) if step.makes in wanted else step for step in steps]
    with np.errstate(all="ignore"):  # faults may overflow
        steps = without_tables(steps[: last + 1]) if variant is Variant.EXACT else steps[: last + 1]
        graph.run(steps, values, WideWeights(weights) if variant is Variant.WIDE else weights, KvCache(backend.xp), keep)
    return kept
