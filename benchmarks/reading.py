"""How fast dumps are read, and in how much memory. Run: python benchmarks/reading.py"""

import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import orjson

from checkpoints.jsonl import Writer
from checkpoints.reader import read
from checkpoints.record import Header, Rows
from checkpoints.scan import Scan
from checkpoints.summary import summarise


def foreign(path: Path, values: int, records: int, *, printf: bool = False) -> None:
    """Bare lines as engines print them; with `printf`, values as %f."""
    rows = np.random.default_rng(0).standard_normal((min(records, 2000), values)).astype(np.float32)
    with path.open("wb") as file:
        for i in range(records):
            row = rows[i % len(rows)]
            text = (
                b"[" + ",".join(f"{x:f}" for x in row).encode() + b"]"
                if printf
                else orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
            )
            file.write(
                b'{"ts":"2026-01-01T00:00:00Z","team":"worker","checkpoint":"layer_%d","token_idx":%d,"dtype":"f32","shape":"[1,%d]",'
                b'"values":%b,"source":"worker"}\n' % (i % 24, i // 24, values, text)
            )


def own(path: Path, positions: int) -> None:
    """Format 1 with statistics and sketches: 16 of 896 values."""
    rows = np.random.default_rng(0).standard_normal((positions, 896)).astype(np.float32)
    with Writer(path, Header("engine")) as writer:
        for layer in range(24):
            writer.rows(summarise(f"blk.{layer}.l_out", rows, np.arange(positions)))


def measure(path: Path) -> tuple[float, int, int]:
    """Seconds of the fastest of three streams through the file, its records and values."""
    best, records, values = np.inf, 0, 0
    for _ in range(2):
        began = perf_counter()
        sizes = [(len(rows), rows.values.size) for rows in Scan(path) if isinstance(rows, Rows)]
        best = min(best, perf_counter() - began)
        records, values = sum(n for n, _ in sizes), sum(v for _, v in sizes)
    return best, records, values


def table() -> Iterator[tuple[str, float, float, float]]:
    """(what, records/s, Mfloat/s, peak MiB so far) for each kind of file, small files before large ones."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.jsonl"
        for name, make in (
            ("bare lines, 16 values", lambda: foreign(path, 16, 240_000)),
            ("bare lines, 16 values, %f", lambda: foreign(path, 16, 240_000, printf=True)),
            ("format 1, 16 values, statistics, sketch", lambda: own(path, 5000)),
            ("bare lines, 896 values", lambda: foreign(path, 896, 20_000)),
            ("bare lines, 896 values, ten times as many", lambda: foreign(path, 896, 200_000)),
            ("bare lines, 151,936 values", lambda: foreign(path, 151_936, 60)),
        ):
            make()
            seconds, records, values = measure(path)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            yield name, records / seconds, values / seconds / 1e6, peak
        own(path, 5000)
        began = perf_counter()
        found = read(path)
        yield (
            "format 1, read whole",
            found.records / (perf_counter() - began),
            found.records * 16 / 1e6 / (perf_counter() - began),
            (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        )


if __name__ == "__main__":
    print(f"{'file':<44}{'records/s':>12}{'Mfloat/s':>10}{'peak MiB':>10}")
    for what, records, floats, peak in table():
        print(f"{what:<44}{records:>12,.0f}{floats:>10.1f}{peak:>10.0f}")
