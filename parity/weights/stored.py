"""One tensor of a Hugging Face folder, of which a few rows at a time are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .packed import Array, Floats, Packed


class Stored(Struct, frozen=True):
    """One tensor as a view, in PyTorch's order, and the numbers by which a converter multiplies it, one after the other.

    `array` is a view of a memory map, or of the places of a packed tensor. bfloat16 is kept as its bits, uint16; `kind` is the
    type's name in the file. Of types of 8 bits and of whole numbers without a known scale only the shape is known.
    """

    array: Array
    kind: str = ""
    factors: tuple[float, ...] = ()
    packed: Packed | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return self.array.shape

    @property
    def readable(self) -> bool:
        """Whether its values are known."""
        return self.packed is not None or self.array.dtype in (np.float32, np.float16, np.float64, np.uint16)

    def view(self, array: Array) -> "Stored":
        """A view of the array in place of the whole."""
        return replace(self, array=array)

    def mistakes(self) -> "Iterator[tuple[str, Stored]]":
        """What usual mistakes with the scales would have given, in words and as a tensor."""
        if self.packed is not None:
            for words, source in self.packed.source.mistakes():
                yield words, replace(self, packed=self.packed.instead(source))

    def part(self, index: Any = ...) -> Floats:
        """`tensor[index]` as float32; only its bytes are read."""
        taken = self.array[index]
        if self.packed is not None:
            taken = self.packed.values(taken)
        elif taken.dtype == np.uint16:
            taken = (taken.astype(np.uint32) << np.uint32(16)).view(np.float32)
        values = np.asarray(taken, dtype=np.float32)
        for factor in self.factors:
            values = values * np.float32(factor)
        return values
