"""The same steps, each disturbed by as much as float32's rounding: running them measures how far a model amplifies rounding.

They run in float64, where nothing else is rounded: the result differs from the truth only by the noise that was added, amplified where
a scan's terms cancel or two attention scores nearly tie (Monte Carlo arithmetic; D. S. Parker, 1997).
"""

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..lift.node import GgmlOperation

# NMSE of a product, whose terms every engine sums in its own order: the worst of llama.cpp's products against float64, over all types
# (`parity.isolate.isolate`, 24 layers, 28 tokens).
PRODUCT = 3e-13
# The relative error of one rounding to float32.
ELEMENT = 2.0**-24
_PRODUCTS = (ops.linear, ops.attention_scores, ops.weighted_values)


class _Disturbed(Struct, frozen=True):
    """An operation whose result is off by rounding: in a product by a share of each row's norm, elsewhere of each element.

    Values that are whole numbers, such as ids of experts, carry no rounding and stay. The type stays as well, because ggml's tables of
    float16 are for float32.
    """

    op: Callable[..., Array]
    seed: tuple[int, int]
    product: bool

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        value = self.op(*inputs, **params)
        if value.dtype.kind != "f":
            return value
        xp = module_of(value)
        # Ids are whole numbers of a floating-point type here, and are cut to integers: one a little smaller would name another expert.
        if bool((value == xp.rint(value)).all()):
            return value
        noise = xp.asarray(np.random.default_rng(self.seed).standard_normal(value.shape))
        if not self.product:
            return (value * (1 + ELEMENT * noise)).astype(value.dtype)
        finite = xp.where(xp.isfinite(value), value, 0)
        size = xp.sqrt(PRODUCT * xp.mean(finite * finite, axis=-1, keepdims=True))
        return (value + size * noise).astype(value.dtype)


def disturbed(steps: Sequence[Step], seed: int) -> list[Step]:
    """The steps with noise of the size of rounding added to each value; the same for the same seed."""
    return [replace(step, op=_Disturbed(step.op, (seed, crc32(step.makes.encode())), _sums(step))) for step in steps]


def _sums(step: Step) -> bool:
    return step.op in _PRODUCTS or (isinstance(step.op, GgmlOperation) and step.op.name in ("MUL_MAT", "MUL_MAT_ID"))
