"""How fast dumps are read, and in how much memory. Run: python benchmarks/reading.py [seconds per row]

The fastest and the median of the passes that fit into that many seconds (10), since the machine may be shared: CPU time
where one process reads, the clock's where one process per core does. Each row has a process of its own, for its memory. The
last column is what the numbers alone take in simdjson, which is one process's floor.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
import orjson
import simdjson

from checkpoints.formats import load
from checkpoints.jsonl import Writer
from checkpoints.reading.parallel import Sharing
from checkpoints.reading.scan import Scan
from checkpoints.record import Header, Rows
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


def streamed(path: Path, processes: int | None = 0) -> tuple[int, int]:
    """Records and values of a stream through the file."""
    sizes = [(len(rows), rows.values.size) for rows in Scan(path, Sharing(processes=processes)) if isinstance(rows, Rows)]
    return sum(n for n, _ in sizes), sum(v for _, v in sizes)


def by_all_cores(path: Path) -> tuple[int, int]:
    """The same by a process per core."""
    return streamed(path, None)


def whole(path: Path) -> tuple[int, int]:
    """The same, read as the commands read it."""
    dump = load(path)
    return dump.records, sum(rows.values.size for rows in dump.points.values())


def peak() -> float:
    """The most memory that this process has had, MiB (getrusage would count its parent's before exec too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(read: Callable[[Path], tuple[int, int]], path: Path, seconds: float) -> tuple[float, float, int, int, float]:
    """Seconds of the fastest and of the median pass, its records and values, and the memory that all of them took, MiB."""
    before = peak()
    clock = process_time if read is streamed else perf_counter
    durations: list[float] = []
    until = perf_counter() + seconds
    records = values = 0
    while perf_counter() < until or not records:
        began = clock()
        records, values = read(path)
        durations.append(clock() - began)
    return min(durations), median(durations), records, values, peak() - before


def numbers(path: Path, seconds: float) -> float:
    """Million values a CPU second of simdjson alone, some hundred thousand at a time, as the reader gives them."""
    lines = path.read_bytes()[: 1 << 24].split(b"\n")[:-1]
    texts = [
        line[line.index(b"[", line.index(b'"values"')) :].partition(b"]")[0] + b"]" for line in lines if b'"values"' in line
    ]
    step = max(1, (1 << 19) // len(texts[0]))
    blocks = [b"[" + b",".join(texts[i : i + step]) + b"]" for i in range(0, len(texts), step)]
    count = sum(text.count(b",") + 1 for text in texts)
    parser = simdjson.Parser()
    best, until = np.inf, perf_counter() + seconds
    while perf_counter() < until:
        began = process_time()
        for block in blocks:
            records = parser.parse(block)
            records.as_buffer(of_type="d")
            del records
        best = min(best, process_time() - began)
    return count / best / 1e6


def table(seconds: float) -> Iterator[tuple[str, str, str, float, float]]:
    """(what, records/s, Mfloat/s: fastest and median; MiB; Mfloat/s of simdjson alone) for each kind of file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.jsonl"
        for name, make, read in (
            ("bare lines, 16 values", lambda: foreign(path, 16, 120_000), streamed),
            ("bare lines, 16 values, ten times as many", lambda: foreign(path, 16, 1_200_000), streamed),
            ("the same by a process per core", lambda: None, by_all_cores),
            ("bare lines, 16 values, %f", lambda: foreign(path, 16, 120_000, printf=True), streamed),
            ("format 1, 16 values, statistics, sketch", lambda: own(path, 3000), streamed),
            ("format 1, 16 values, read whole", lambda: own(path, 3000), whole),
            ("bare lines, 896 values", lambda: foreign(path, 896, 8_000), streamed),
            ("bare lines, 896 values, ten times as many", lambda: foreign(path, 896, 80_000), streamed),
            ("the same by a process per core", lambda: None, by_all_cores),
            ("bare lines, 896 values, %f", lambda: foreign(path, 896, 4_000, printf=True), streamed),
            ("bare lines, 151,936 values", lambda: foreign(path, 151_936, 60), streamed),
        ):
            make()
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                best, usual, records, values, memory = pool.submit(measure, read, path, seconds).result()
                floor = pool.submit(numbers, path, seconds / 3).result()
            rates = f"{records / best:,.0f}, {records / usual:,.0f}"
            yield name, rates, f"{values / best / 1e6:.1f}, {values / usual / 1e6:.1f}", memory, floor


if __name__ == "__main__":
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; fastest pass, median pass")
    print(f"{'file':<44}{'records/s':>20}{'Mfloat/s':>12}{'MiB':>8}{'numbers alone':>16}")
    for what, rate, floats, peak_mib, alone in table(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0):
        print(f"{what:<44}{rate:>20}{floats:>12}{peak_mib:>8.0f}{alone:>16.1f}", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")
