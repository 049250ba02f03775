"""Mutants of every format, read as `parity lint` and `parity diff` read them.

Run: python benchmarks/fuzz.py [-n 10000] [--only KIND] [--first SEED]; models: python benchmarks/fuzz.py gguf (`fuzz_gguf`);
the two readers of lines compared with each other: python benchmarks/fuzz.py readers (`fuzz_readers`)

Each must end in a verdict or in a one-line error, within ten CPU seconds and 1 GiB; the seeds of those that do not are listed.
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import process_time

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mutants import KINDS, cases
from reading import peak

SECONDS = 10
_SHOWN = 12  # failures of a kind that are listed
MEMORY = 1 << 30  # bytes of address space beyond what the modules take


class HangError(BaseException):
    """A case that took too long; no `except Exception` stops it."""


def _hang(*_: object) -> None:
    raise HangError


def row(kind: str, first: int, count: int) -> str:
    """The table's row of a kind, and a line for each case that failed."""
    warnings.simplefilter("error")
    signal.signal(signal.SIGPROF, _hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    before = peak()
    answers: Counter[str] = Counter()
    failures = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed, answer in cases(kind, range(first, first + count), Path(folder)):
            began = process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                answers[answer()] += 1
            except (Exception, HangError) as error:
                failures.append(f"  {kind} {seed}: {type(error).__name__}: {str(error)[:150]}")
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, process_time() - began)
        os.chdir("/")
    grown = peak() - before
    counts = count, answers["parity"], answers["divergence"], answers["unusable"], answers["refused"], len(failures)
    text = f"| {kind} | {' | '.join(f'{x:,}' for x in counts)} | {slowest:.2f} | {grown:.0f} |"
    return "\n".join([text, *failures[:_SHOWN]])


def main() -> None:
    """Print the table; exit 1 where a case failed."""
    if sys.argv[1:2] == ["gguf"]:
        import fuzz_gguf

        fuzz_gguf.main(sys.argv[2:])
    if sys.argv[1:2] == ["readers"]:
        import fuzz_readers

        fuzz_readers.main(sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=10_000)
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    print("| format | mutants | parity | divergence | unusable | one line | failed | slowest, s | memory, MiB |")
    print("|---" * 9 + "|")
    failed = False
    for kind in given.only or KINDS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # each in a process of its own, for its memory
            text = pool.submit(row, kind, given.first, given.n).result()
        print(text, flush=True)
        failed |= "\n" in text
    sys.exit(failed)


if __name__ == "__main__":
    main()
