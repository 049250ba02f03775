"""A node's parameters besides its operands: the 16 integers of `ggml_tensor.op_params`, and the type of its result."""

import struct
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ..backend import Array, module_of

Shape = tuple[int, int, int, int]
Operation = Callable[..., Array]  # operation(*operands: Array | None, params: OpParams, shape: Shape) -> Array

_Index = int  # inside the class `int` is the method


class OpParams(Struct, frozen=True):
    """`ggml_tensor.op_params`: raw int32, some of which are the bits of a float.

    Attributes:
        values: the integers; missing ones count as 0.
        kind: the ggml type of the node's result, which a copy is rounded to.
        rounds: whether to round where ggml rounds by definition (the table of GELU, copies to F16). None rounds only float32
            operands, so that float64 ones give the unrounded value.
    """

    values: tuple[int, ...] = ()
    kind: str = "f32"
    rounds: bool | None = None

    def int(self, index: _Index) -> _Index:
        """The integer at `index`."""
        return self.values[index] if index < len(self.values) else 0

    def float(self, index: _Index) -> float:
        """The float whose bits are at `index`."""
        value: float = struct.unpack("<f", struct.pack("<i", self.int(index)))[0]
        return value

    def changed(self, numbers: "Mapping[_Index, tuple[_Index, bool]]") -> "OpParams":
        """The same with other numbers at these indices, each stored as an integer or, where stated, as the bits of a float."""
        values = list(self.values)
        for index, (number, real) in numbers.items():
            values[index] = struct.unpack("<i", struct.pack("<f", number))[0] if real else number
        return replace(self, values=tuple(values))

    def rounded(self, x: Array) -> bool:
        """Whether a value like `x` is to be rounded where ggml rounds by definition."""
        return bool(x.dtype != np.float64) if self.rounds is None else self.rounds


def as_floats(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in the dtype that an operation computes in: float64 where one of them is, else float32 (F16 and BF16 are widened).

    A constant that has no operands (ARANGE) lies on the host; it follows the others to their device.
    """
    dtype = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
    there = [array for array in arrays if not isinstance(array, np.ndarray)]
    if there and len(there) < len(arrays):
        xp = module_of(*there)
        arrays = tuple(xp.asarray(array) for array in arrays)
    return tuple(array.astype(dtype, copy=False) for array in arrays)


def in_float64(operation: Callable[..., Array]) -> Callable[..., Array]:
    """An operation that carries a state from token to token, computed in float64 and rounded once at its end.

    Rounded at each token, NumPy's sums drift ten times as far from the truth as ggml's, which keeps more of them in one register.
    """

    @wraps(operation)
    def widened(*operands: Array, params: OpParams, shape: Shape) -> Array:
        floats = [operand for operand in operands if operand.dtype.kind == "f"]
        wide = [operand.astype(np.float64) if operand.dtype.kind == "f" else operand for operand in operands]
        result = operation(*wide, params=params, shape=shape)
        return result if any(operand.dtype == np.float64 for operand in floats) else result.astype(np.float32)

    return widened


def on_host(array: Array) -> NDArray[Any]:
    """A NumPy array of the same values."""
    xp = module_of(array)
    host: NDArray[Any] = np.asarray(array) if xp is np else xp.asnumpy(array)
    return host


def to_half(x: Array) -> Array:
    """Rounded to float16 (nearest even), in the dtype of `x`: GGML_CPU_FP32_TO_FP16 and back."""
    with np.errstate(over="ignore"):  # beyond 65,504 it becomes infinite, as in ggml
        return x.astype(np.float16).astype(x.dtype)


def to_brain(x: Array) -> Array:
    """Rounded to bfloat16 (nearest even), in the dtype of `x`: ggml_compute_fp32_to_bf16 and back."""
    xp = module_of(x)
    single = xp.ascontiguousarray(x, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded = np.where(np.isnan(single), bits | np.uint32(1 << 22), rounded)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(x.dtype, copy=False)
