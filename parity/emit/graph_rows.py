"""What a captured graph's replays leave: rows of a replay, the checkpoint and position that each one is, and memory for them."""

import mmap
import os
import sys
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import parse


class DeviceRow:
    """A device array as the graph copies it: its address, and how the host reads its bytes."""

    def __init__(self, value: Any) -> None:
        bfloat = str(value.dtype) == "torch.bfloat16"
        name = "uint16" if bfloat else str(value.dtype).removeprefix("torch.")
        if name not in ("float32", "float16", "uint16", "int32", "int64") or (name == "uint16" and not bfloat):
            raise TypeError(
                f"values of {value.dtype} cannot be recorded in a captured graph; give float32, float16 or bfloat16"
            )
        # If it isn't contiguous this adds nodes to the graph. The graph reads it at every replay: it must not be freed.
        self.value = value.contiguous() if hasattr(value, "contiguous") else sys.modules["cupy"].ascontiguousarray(value)
        self.shape = tuple(int(size) for size in value.shape)
        self.dtype, self.bfloat = np.dtype(name), bfloat
        self.size = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self.pointer = int(self.value.data_ptr() if hasattr(self.value, "data_ptr") else self.value.data.ptr)

    def read(self, brought: bytes) -> "NDArray[Any]":
        """The array from a replay's bytes."""
        flat = np.frombuffer(brought, self.dtype)
        if self.bfloat:
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


class Slot:
    """One checkpoint of one graph (without a name: the position of its pass), and its place among a replay's rows."""

    def __init__(self, point: str, row: DeviceRow, place: "Slot | None", at: int) -> None:
        self.point, self.row, self.place, self.at = point, row, place, at

    def of(self, rows: "NDArray[np.uint8]") -> bytes:
        """Its bytes among those of a replay."""
        return rows[self.at : self.at + self.row.size].tobytes()


class Replayed:
    """A value and the place of its pass as a replay left them."""

    def __init__(self, slot: Slot, place: Slot, rows: "NDArray[np.uint8]") -> None:
        self.slot, self.place, self._rows, self.size = slot, place, rows, slot.row.size

    def rows(self) -> "tuple[NDArray[np.float32], list[int]]":
        """The value, and its positions: as they are, or one after the other from the only one that there is."""
        value = self.slot.row.read(self.slot.of(self._rows)).astype(np.float32)
        positions = self.place.row.read(self.place.of(self._rows)).ravel()
        rows = _rows_in(self.slot.point, value.shape)
        at = positions if positions.size == rows else positions[0] + np.arange(rows)
        return value, [int(position) for position in at]


def _rows_in(point: str, shape: "tuple[int, ...]") -> int:
    """How many positions a value has: [n], [T, n], [B, T, n], [B, T, heads, n]; scores and weights are [H, T, S] or [B, H, T, S]."""
    known = parse(point).known
    heads_first = known is not None and known.row == ("H", "t+1")
    return 1 if len(shape) < 2 else shape[-2] if heads_first or len(shape) == 2 else shape[1]


def in_memory(size: int) -> "NDArray[np.uint8]":
    """So many bytes, uninitialised."""
    return np.empty(size, np.uint8)


def in_file_of_its_own(size: int) -> "NDArray[np.uint8]":
    """Memory whose pages the system may write to a temporary file, which is gone with it."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
        return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
