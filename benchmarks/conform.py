"""What a second worker brings to `parity conform`, and what a run costs after a fix:

    PYTHONPATH=tests python benchmarks/conform.py [--profile dense] [--architectures GLOBS] [--pairs 2] [--fix-only]

The engine is the one in C of the tests (llama and qwen2, F32 weights): most cells are a model that is made and refused. Runs with one
worker and with two take turns, each in a new folder, one thread a worker; after those with one worker the engine's file is changed and
the same command is given again. Wall time: nothing else should run. `--profile dense` takes 4 minutes on two cores. `--fix-only` leaves
the second worker out. The processor time of parity, llama.cpp and the engine is printed besides: it says the same on a busy machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from foreign import compile_engine


def processor() -> float:
    """Seconds of processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(engine: Path, axes: list[str], folder: str, workers: int) -> tuple[float, float, int]:
    """Wall seconds, processor seconds, and how many cells there are."""
    line = f"{engine} {{model}} {{tokens}} {{out}} '' {{points}}"
    words = ["conform", "--exec", line, *axes, "--workers", str(workers), "--threads", "1", "--out", folder, "--format", "json"]
    began, used = time.perf_counter(), processor()
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "parity", *words],
        cwd=engine.parent,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, used = time.perf_counter() - began, processor() - used
    if ran.returncode:
        sys.exit(ran.stderr)
    answer = json.loads(ran.stdout)
    if answer["kept"]:
        sys.exit(f"{answer['kept']} cells were kept from another run")
    return seconds, used, len(answer["cells"])


def main() -> None:
    """Measure in turns, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="dense")
    parser.add_argument("--architectures", default="")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--fix-only", action="store_true")
    options = parser.parse_args()
    axes = ["--profile", options.profile, *(["--architectures", options.architectures] if options.architectures else [])]
    load = os.getloadavg()[0]
    single, double, again = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        engine = compile_engine(Path(folder))
        for number in range(options.pairs):
            *first, cells = run(engine, axes, f"one-{number}", 1)
            single.append(first)
            if not options.fix_only:
                double.append(run(engine, axes, f"two-{number}", 2)[0])
            with engine.open("ab") as file:  # another build of it
                file.write(b"\0")
            again.append(run(engine, axes, f"one-{number}", 1)[:2])
    print(f"{options.profile}, {cells} cells, load {load:.1f} before, {options.pairs} times, worst ratios:")
    if double:
        ratio = min(seconds / faster for (seconds, _), faster in zip(single, double, strict=True))
        print(f"one worker {single[0][0]:.1f} s, two {double[0]:.1f} s: {ratio:.2f} times as fast")
    for unit, name in enumerate(("by the clock", "of processor time")):
        share = max(fixed[unit] / first[unit] for fixed, first in zip(again, single, strict=True))
        print(f"after a fix {again[0][unit]:.1f} of {single[0][unit]:.1f} s {name}: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
