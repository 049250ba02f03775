"""What checkpoints inside a captured CUDA graph cost: the default points of a decode step, every replay recorded.

    python benchmarks/graphs.py [--passes 10000] [--python-passes 1000] [--shape "0.5 B"]

The engines are those of the tests, tests/graph_engine.cu (compiled with nvcc) and tests/graph_engine.py under torch.cuda.graph; with
and without checkpoints in turns, five times. Every row says the median and the worst ratio of the five, and beside them the worst
ratio of two runs without checkpoints, which is what the host alone makes of it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from parity import emit

TESTS = Path(__file__).parent.parent / "tests"
SHAPES = {  # layers, width, feed-forward, vocabulary of Qwen2.5
    "0.5 B": ("24", "896", "4864", "151936"),
    "1.5 B": ("28", "1536", "8960", "151936"),
}
REPEATS = 5


def main() -> None:
    """Measure both engines and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=10_000)
    parser.add_argument("--python-passes", type=int, default=1_000, help="0: only C")
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "parity_dump.h").write_text(emit.source("c"))
        (folder / "parity_dump.py").write_text(emit.source("python"))
        compiler = [
            "nvcc",
            "-O2",
            "-std=c++17",
            "-I",
            str(folder),
            str(TESTS / "graph_engine.cu"),
            "-o",
            str(folder / "engine"),
        ]
        subprocess.run(compiler, check=True)
        script = [sys.executable, str(TESTS / "graph_engine.py"), "torch"]
        print(
            "| engine | replays | ms a replay, without | with / without, median | worst of five | without, twice, worst of five |\n"
            "|---|---|---|---|---|---|"
        )
        engine = str(folder / "engine")
        for name, shape in SHAPES.items():
            if options.shape not in (None, name):
                continue
            row(f"C, parity_dump.h, {name}", folder, options.passes, lambda mode, n, s=shape: [engine, "c.jsonl", mode, n, *s])
            if options.python_passes:
                row(
                    f"PyTorch, parity_dump.py, {name}",
                    folder,
                    options.python_passes,
                    lambda mode, n, s=shape: [*script, mode, n, *s, "p"],
                )


def row(name: str, folder: Path, passes: int, command: Callable[[str, str], list[str]]) -> None:
    """Print one engine's row."""
    plain, ratios, unchanged = [], [], []
    for _ in range(REPEATS):
        bare, recorded, again = (milliseconds(folder, command(mode, str(passes))) for mode in ("bare", "graph", "bare"))
        plain.append(bare)
        ratios.append(recorded / bare)
        unchanged.append(again / bare)
    print(
        f"| {name} | {passes:,} | {statistics.median(plain):.3f} | {statistics.median(ratios):.4f} | {max(ratios):.4f} "
        f"| {max(unchanged):.4f} |",
        flush=True,
    )


def milliseconds(folder: Path, command: list[str]) -> float:
    """What an engine prints."""
    return float(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
