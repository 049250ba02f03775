"""Lines read one by one, as the careful reader does: what tests and `benchmarks/fuzz_readers.py` compare the fast reader with."""

import numpy as np

from checkpoints.reading.bulk import BulkParser, Taken
from checkpoints.record import Rows

# How engines print numbers, at the ends of float32's and float64's ranges as well.
NUMBERS = (
    "0",
    "-0",
    "1",
    "-2.5",
    "0.1",
    "1e-7",
    "3.4028235e38",
    "1e39",
    "5e-324",
    "0.30000001192092896",
    "1" * 18,
    "1E+2",
    "-1.5000",
)


def all_left(_: BulkParser, block: bytes) -> Taken:
    """A replacement of `BulkParser.lines`: no line is read together with others."""
    return Taken([], [], np.zeros(0, np.int64), list(enumerate(block.split(b"\n")[:-1])))


def fields_of(rows: Rows) -> list[object]:
    """Everything in a batch of records, to the bit."""
    held = vars(rows) | {"stats": sorted(rows.stats.items())}
    return [x.tolist() if isinstance(x, np.ndarray) else x for x in held.values()]
