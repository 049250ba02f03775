"""How long `parity diff` takes for a pair of dumps with arrays: 24 layers, every point, 512 positions, 235,008 records on each side.

Run: python benchmarks/binary.py [times]. Seconds of processor time, since the machine may be shared, the worst of that many runs (5):
reading one dump as the commands read it, and the whole command, start of the interpreter included. The command's own time by the
clock stands beside it.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from checkpoints.formats import load

_PARITY = (sys.executable, "-m", "parity")


def make(folder: Path) -> None:
    """Both sides of the embedded model over 512 random ids."""
    ids = ",".join(map(str, np.random.default_rng(0).integers(5, 2047, 512).tolist()))
    for side in ("ref", "ours"):
        wanted = ("--tokens", ids, "--points", "all", "--binary", "-o", str(folder / f"{side}.jsonl"))
        subprocess.run([*_PARITY, "dump", side, *wanted], check=True, capture_output=True)


def read(path: Path) -> tuple[float, int, int]:
    """Seconds that reading a dump takes, its records, and the numbers of all its arrays."""
    began = process_time()
    dump = load(path)
    seconds = process_time() - began
    arrays = [array for rows in dump.points.values() for array in (rows.values, rows.sketch, *rows.stats.values())]
    return seconds, dump.records, sum(array.size for array in arrays if array is not None)


def compare(folder: Path) -> tuple[float, float]:
    """Seconds of processor time and of the clock that `parity diff` takes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    subprocess.run([*_PARITY, "diff", "ours.jsonl", "ref.jsonl"], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, perf_counter() - began


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make(place)
        for name in ("ours", "ref"):
            passes = [read(place / f"{name}.jsonl") for _ in range(times + 1)][1:]  # the first one imports the libraries
            slowest, records, numbers = max(passes)
            print(
                f"{name}: {records:,} records, {numbers / 1e6:.1f} million numbers in {slowest:.3f} s: "
                f"{records / slowest / 1e6:.2f} million records/s, {numbers / slowest / 1e6:.0f} Mfloat/s"
            )
        compare(place)  # modules are compiled once
        runs = [compare(place) for _ in range(times)]
        listed = ", ".join(f"{processor:.2f}" for processor, _ in sorted(runs))
        print(f"parity diff: {listed} s of processor time; by the clock at most {max(clock for _, clock in runs):.2f} s")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; the worst of {times}")
