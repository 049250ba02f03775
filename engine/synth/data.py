"""A GGUF's data section, written tensor by tensor and a few rows at a time: a model of any size in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.room import cores

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
# Values that are made at once: 16 MiB of float32. Quantising them takes 0.02 to 1 s, so a thread is seldom idle.
PORTION = 1 << 22
Portions = Iterator[NDArray[np.float32]]
Part = tuple[int, Callable[[], NDArray[Any]]]  # so many values, and what computes their stored form
Convert = Callable[[NDArray[np.float32], int], NDArray[Any]]  # rows and a ggml type -> their stored form
Progress = Callable[[str, int, int | None], None]


class TensorData(Struct, frozen=True):
    """A tensor to write: its elements, and its parts in order, each of some rows."""

    elements: int
    parts: Callable[[], Iterator[Part]]


def converted(elements: int, kind: int, values: Callable[[], Portions], convert: Convert) -> TensorData:
    """A tensor of a ggml type from its values, some rows at a time."""
    return TensorData(elements, lambda: ((rows.size, partial(convert, rows, kind)) for rows in values()))


def normal(rng: np.random.Generator, dims: tuple[int, ...], scale: float) -> Portions:
    """A matrix N(0, scale²), a few rows at a time: the same numbers as from a single call, since the generator returns them in order."""
    columns = dims[-1]
    rows = int(np.prod(dims[:-1]))
    step = max(PORTION // columns, 1)
    for first in range(0, rows, step):
        portion = rng.standard_normal((min(step, rows - first), columns), dtype=np.float32)
        portion *= np.float32(scale)
        yield portion


def ahead() -> int:
    """How many portions are held: one more than there are threads, so that each has its next rows while this thread makes more."""
    return cores() + 1


def append(out: Path, tensors: Iterable[TensorData], progress: Progress | None = None) -> None:
    """Write the tensors behind the table of contents that `out` consists of so far, each padded to 32 bytes.

    All cores compute parts; the file does not depend on their number. `progress` is told how many values of all are written.

    Raises:
        OSError: the disk refuses it.
    """
    tensors = list(tensors)
    total, done = sum(tensor.elements for tensor in tensors), 0
    with out.open("ab") as file, ThreadPoolExecutor(cores()) as pool:
        _pad(file)
        for tensor in tensors:
            for size, stored in _computed(pool, tensor.parts(), ahead()):
                file.write(np.ascontiguousarray(stored).data)  # not `tofile`, which may not notice that the disk is full
                done += size
                if progress is not None:
                    progress("weights", done, total)
            _pad(file)


def _computed(pool: ThreadPoolExecutor, parts: Iterator[Part], ahead: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(values, their stored form) of each part, in order; at most `ahead` of them are in memory."""
    waiting: deque[tuple[int, Future[NDArray[Any]]]] = deque()
    while True:
        waiting.extend((size, pool.submit(compute)) for size, compute in islice(parts, ahead - len(waiting)))
        if not waiting:
            return
        size, future = waiting.popleft()
        yield size, future.result()


def _pad(file: IO[bytes]) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
