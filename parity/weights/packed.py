"""Weights that a folder keeps with scales of their own: a few rows at a time become float32.

Mirrors `dequant_model` of llama.cpp's converter (conversion/base.py), and for MXFP4 `repack_mxfp4` (conversion/gpt_oss.py).
"""

import mmap
from collections.abc import Iterator
from copy import copy
from math import prod
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Array = NDArray[Any]
FOUR_BITS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1


class Rows(Protocol):
    """Something that gives the rows of a matrix, and what usual mistakes would give in their place, each in words."""

    def rows(self, start: int, stop: int) -> Floats:
        """[stop − start, columns]."""
        ...

    def mistakes(self) -> "Iterator[tuple[str, Rows]]":
        """(what was done, what it gives)."""
        ...


class Packed:
    """Values that are computed when they are read.

    `places` stands for them: an array of their shape whose elements are never read. Views of it (halves, heads, transposes) say by
    their addresses which of the values they mean, so that whatever takes tensors apart works with it as with any array.
    """

    def __init__(self, shape: tuple[int, ...], source: Rows) -> None:
        self.source, self._columns = source, shape[-1]
        # Read-only pages that nobody touches take no memory.
        self.places: Array = np.frombuffer(mmap.mmap(-1, max(prod(shape), 1), prot=mmap.PROT_READ), np.uint8)[: prod(shape)]
        self._first = byte_bounds(self.places)[0]
        self.places = self.places.reshape(shape)
        self._kept: tuple[int, int, Floats] | None = None

    def instead(self, source: Rows) -> "Packed":
        """Other values in the same places."""
        other = copy(self)
        other.source, other._kept = source, None
        return other

    def values(self, view: Array) -> Floats:
        """What a view of `places` stands for, in its shape."""
        if not view.size:
            return np.empty(view.shape, np.float32)
        low, high = (address - self._first for address in byte_bounds(view))
        if not 0 <= low < high <= self.places.size:
            raise ValueError("an array that is no view of a packed tensor's places")
        start, stop = low // self._columns, -(-high // self._columns)
        values = self._rows(start, stop, whole=view.size == (stop - start) * self._columns).reshape(-1)
        begin, strides = low - start * self._columns, tuple(4 * stride for stride in view.strides)
        meant: Floats = as_strided(values[begin:], view.shape, strides, writeable=False)
        return meant

    def _rows(self, start: int, stop: int, *, whole: bool) -> Floats:
        """Rows; those of which only a part was asked for are kept, since a transposed matrix asks for them again and again."""
        if self._kept is not None and self._kept[:2] == (start, stop):
            return self._kept[2]
        rows = np.ascontiguousarray(self.source.rows(start, stop), np.float32)
        self._kept = None if whole else (start, stop, rows)
        return rows


def _eight_bits(exponent_bits: int, bias: int, *, infinities: bool) -> Floats:
    """The values of the 256 codes of a float of 8 bits."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = (codes & 0x7F) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    if infinities:  # as IEEE 754 has them
        top = exponent == (1 << exponent_bits) - 1
        values[top] = np.where(mantissa[top] > 0, np.nan, np.inf)
    else:
        values[(codes & 0x7F) == 0x7F] = np.nan
    signed: Floats = np.where(codes > 127, -values, values).astype(np.float32)
    return signed


E4M3 = _eight_bits(4, 7, infinities=False)
E5M2 = _eight_bits(5, 15, infinities=True)
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}


class Scaled(Struct, frozen=True):
    """Codes [matrices · rows, columns], each times the scale of its block, scale [matrices, rows / block, columns / block].

    `table` gives the codes' values, None where they are whole numbers; `height` is the number of rows of a matrix, `block` that
    of a block's rows and columns.
    """

    codes: Array
    table: Floats | None
    scale: Floats
    height: int
    block: tuple[int, int]
    divide: bool = False

    def rows(self, start: int, stop: int) -> Floats:
        """`dequant_simple`."""
        codes = self.codes[start:stop]
        values = codes.astype(np.float32) if self.table is None else self.table[codes]
        matrix, row = np.divmod(np.arange(start, stop), self.height)
        scale = self.scale[matrix, row // self.block[0]]
        if scale.shape[1] > 1:
            scale = np.repeat(scale, self.block[1], axis=1)[:, : values.shape[1]]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            return np.asarray(values / scale if self.divide else values * scale, np.float32)

    def mistakes(self) -> Iterator[tuple[str, Rows]]:
        """Scales left out, or taken for what is divided by, as their name in FP8 folders suggests."""
        yield "without the scales that the folder keeps beside it", replace(self, scale=np.ones_like(self.scale))
        yield "divided by the folder's scales instead of multiplied", replace(self, divide=True)


class FourBits(Struct, frozen=True):
    """Pairs of 4-bit floats [rows, columns / 2], the first in the low half, and a scale for each group of columns [rows, groups]."""

    codes: Array
    scales: Array
    scale_table: Floats
    first: int = 0

    def rows(self, start: int, stop: int) -> Floats:
        """MXFP4 and NVFP4."""
        codes, scale = self.codes[start:stop], self.scale_table[self.scales[start:stop]]
        halves = (FOUR_BITS[codes & 15], FOUR_BITS[codes >> 4])
        values = np.stack((halves[self.first], halves[1 - self.first]), axis=-1).reshape(*scale.shape, -1)
        return np.asarray((values * scale[..., None]).reshape(len(codes), -1), np.float32)

    def mistakes(self) -> Iterator[tuple[str, Rows]]:
        """The halves of a byte exchanged, or ggml's order taken for the folder's."""
        yield "the high half of each byte first, where the folder keeps the low half first", replace(self, first=1)
        yield "in the order of ggml's blocks, whose bytes were copied as they are", GgmlOrder(self)


class GgmlOrder(Struct, frozen=True):
    """A mistake's values: bytes whose low halves are a group's first half of values, as ggml's blocks have them."""

    right: FourBits

    def rows(self, start: int, stop: int) -> Floats:
        """As `FourBits`, in the other order."""
        rows = self.right.rows(start, stop)
        groups = self.right.scales.shape[1]
        return np.ascontiguousarray(rows.reshape(len(rows), groups, -1, 2).swapaxes(2, 3)).reshape(rows.shape)

    def mistakes(self) -> Iterator[tuple[str, Rows]]:
        """None of its own."""
        return iter(())


class Gptq(Struct, frozen=True):
    """Whole numbers packed along the inputs: qweight [in / n, out], qzeros [groups, out / n], scales [groups, out], g_idx [in]."""

    weight: Array
    zeros: Array
    scales: Floats
    groups: Array  # of each input
    bits: int
    offset: int

    def mistakes(self) -> Iterator[tuple[str, Rows]]:
        """Zero points of the other version, or groups in the order of inputs where the folder has another."""
        yield (
            f"zero points off by 1: this folder's are stored {'less 1' * self.offset or 'as they are'}",
            replace(self, offset=1 - self.offset),
        )
        in_turn = np.arange(len(self.groups)) * len(self.scales) // len(self.groups)
        yield "the groups in the order of inputs, where the folder's g_idx has another", replace(self, groups=in_turn)

    def rows(self, start: int, stop: int) -> Floats:
        """`dequant_gptq`: one row for each output."""
        mask, each = (1 << self.bits) - 1, 32 // self.bits
        shifts = np.arange(each, dtype=np.int32) * self.bits
        columns = np.arange(start, stop)
        numbers = ((self.weight[:, None, start:stop] >> shifts[:, None]) & mask).reshape(-1, stop - start)
        zeros = ((self.zeros[:, columns // each] >> shifts[columns % each]) & mask) + self.offset
        return np.asarray((self.scales[self.groups, start:stop] * (numbers - zeros[self.groups]).astype(np.float32)).T)


class Grouped(Struct, frozen=True):
    """Whole numbers packed along the columns: codes [rows, columns / n], scale [rows, groups], zeros [rows / n, groups] or None."""

    codes: Array
    scale: Floats
    zeros: Array | None
    bits: int
    group: int
    columns: int

    def mistakes(self) -> Iterator[tuple[str, Rows]]:
        """Zero points that are missing."""
        if self.zeros is not None:
            yield "without the zero points that the folder keeps beside it", replace(self, zeros=None)

    def rows(self, start: int, stop: int) -> Floats:
        """`dequant_packed`."""
        mask = (1 << self.bits) - 1
        shifts = np.arange(0, 32 - (self.bits - 1), self.bits, dtype=np.int32)
        numbers = ((self.codes[start:stop, :, None] >> shifts) & mask).reshape(stop - start, -1)[:, : self.columns]
        numbers = numbers.reshape(stop - start, -1, self.group)
        if self.zeros is None:
            numbers = numbers - (1 << (self.bits - 1))
        else:
            at = np.arange(start, stop)
            numbers = numbers - ((self.zeros[at // len(shifts)] >> shifts[at % len(shifts), None]) & mask)[..., None]
        return np.asarray((numbers.astype(np.float32) * self.scale[start:stop, :, None]).reshape(stop - start, -1))


class Ternary(Struct, frozen=True):
    """BitNet's −1, 0 and 1: codes [rows / 4, columns], of which each pair of bits is another quarter of the rows."""

    codes: Array
    scale: np.float32
    divide: bool = True

    def mistakes(self) -> Iterator[tuple[str, Rows]]:
        """A scale that multiplies."""
        yield "multiplied by the folder's scale instead of divided", replace(self, divide=False)

    def rows(self, start: int, stop: int) -> Floats:
        """`dequant_bitnet`: the scale divides."""
        quarter, row = np.divmod(np.arange(start, stop), len(self.codes))
        codes = (self.codes[row] >> (2 * quarter[:, None]).astype(np.uint8)) & 3
        trits = codes.astype(np.float32) - 1
        return np.asarray(trits / self.scale if self.divide else trits * self.scale, np.float32)
