"""What a second worker brings to `parity conform`, and what a run costs after a fix. One line at the end:

    python benchmarks/conform.py [--profile dense] [--architectures GLOBS] [--pairs 2]

The engine is the one in C of the tests (llama and qwen2, F32 weights): most cells are a model that is made and refused. Runs with one
worker and with two take turns, each in a new folder, one thread a worker; after those with one worker the engine's file is changed and
the same command is given again. Wall time: nothing else should run. `--profile dense` takes 4 minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from foreign import compile_engine


def run(engine: Path, axes: list[str], folder: str, workers: int) -> tuple[float, int]:
    """Wall seconds, and how many cells there are."""
    line = f"{engine} {{model}} {{tokens}} {{out}} '' {{points}}"
    words = ["conform", "--exec", line, *axes, "--workers", str(workers), "--threads", "1", "--out", folder, "--format", "json"]
    began = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "parity", *words],
        cwd=engine.parent,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if ran.returncode:
        sys.exit(ran.stderr)
    answer = json.loads(ran.stdout)
    if answer["kept"]:
        sys.exit(f"{answer['kept']} cells were kept from another run")
    return seconds, len(answer["cells"])


def main() -> None:
    """Measure in turns, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="dense")
    parser.add_argument("--architectures", default="")
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    axes = ["--profile", options.profile, *(["--architectures", options.architectures] if options.architectures else [])]
    load = os.getloadavg()[0]
    one, two, again = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        engine = compile_engine(Path(folder))
        for number in range(options.pairs):
            seconds, cells = run(engine, axes, f"one-{number}", 1)
            one.append(seconds)
            two.append(run(engine, axes, f"two-{number}", 2)[0])
            with engine.open("ab") as file:  # another build of it
                file.write(b"\0")
            again.append(run(engine, axes, f"one-{number}", 1)[0])
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    fixed = [a / b for a, b in zip(again, one, strict=True)]
    print(
        f"{options.profile}, {cells} cells, load {load:.1f} before: one worker {one[0]:.1f} s, two {two[0]:.1f} s, worst ratio "
        f"{min(ratios):.2f} of {options.pairs}; after a fix {again[0]:.1f} s, at most {100 * max(fixed):.1f} % of the first run"
    )


if __name__ == "__main__":
    main()
