"""What the fast mode costs on a device, with llama.cpp's CUDA backend beside it.

    python benchmarks/gpu.py --llama-bench PATH [--folder DIR]

`PATH` is a llama-bench built with GGML_CUDA from the source package of the pinned llama-cpp-python. Models are made in DIR
(3 GB). Every row says the worst of five runs, or of so many as it names; llama-bench's figures are its own means of five; the better of
its two kinds of attention counts. What starts anew is the Python that runs this: in an environment without other packages it is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.jsonl import Writer
from checkpoints.record import Rows, Token
from engine.backend import choose
from engine.capture.device import DeviceStage
from engine.capture.tap import Capture
from engine.fast.transformer import FastTransformer
from engine.synth import shape_like, synthesize
from engine.weights.gguf_model import GgufModel
from parity.run.ours import chosen_points

STEPS = 128  # as llama-bench's tg128
PROMPT = 512  # as its pp512
REPEATS = 5
FIRST_TOKEN = """
import sys
from pathlib import Path
from engine.backend import choose
backend = choose("cupy")
from engine.fast.transformer import FastTransformer
from engine.weights.gguf_model import GgufModel
engine = FastTransformer(GgufModel(Path(sys.argv[1])), backend)
print("token", engine.forward(range(1, 1 + int(sys.argv[2])), engine.start()).argmax(), flush=True)
"""


class Sink:
    """Counts records; `delay` seconds a batch make it slow."""

    def __init__(self, delay: float = 0) -> None:
        self.count = 0
        self.delay = delay

    def rows(self, rows: Rows) -> None:
        """Take the records of one point."""
        if self.delay:
            time.sleep(self.delay)
        self.count += len(rows)

    def token(self, token: Token) -> None:
        """Take a token."""


def main() -> None:
    """Measure every row and print each as it comes: a run that is cut short keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "parity-gpu")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{environment()}\n\n| what | measured | to reach |\n|---|---|---|", flush=True)
    for kind in ("f16", "q8_0", "q4_k_m"):
        path = model(options.folder, kind)
        if path is None:
            print_rows([(f"{kind} decode", "no such model here", "")])
            continue
        engine = FastTransformer(GgufModel(path), choose("cupy"), positions=1024)
        theirs = llama(options.llama_bench, path)
        print_rows(decode(engine, kind, theirs))
        if kind == "f16":
            print_rows(prefill(engine, theirs))
            print_rows(slow_writer(engine))
            print_rows(load(path, options.llama_bench))
        del engine


def print_rows(rows: Sequence[tuple[str, str, str]]) -> None:
    """Rows of the table."""
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def model(folder: Path, kind: str) -> Path | None:
    """The 0.5 B model with weights of that type; llama.cpp's quantiser makes Q4_K_M."""
    path = folder / f"q05-{kind}.gguf"
    if path.exists():
        return path
    if kind == "q4_k_m":
        try:
            from reference.client import Reference

            with Reference() as reference:
                reference.quantize(folder / "q05-f16.gguf", "Q4_K_M", path)
        except (ImportError, OSError):
            return None
        return path
    synthesize(path, shape_like("qwen2.5-0.5b"), weight_type=kind)
    return path


def llama(bench: Path | None, path: Path) -> dict[str, float]:
    """llama-bench's tokens per second for prompt and generation, the better of flash attention off and on."""
    if bench is None:
        return {}
    command = [str(bench), "-m", str(path), "-p", str(PROMPT), "-n", str(STEPS), "-ngl", "99", "-fa", "0,1", "-o", "json"]
    figures: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "prefill": max(test["avg_ts"] for test in figures if test["n_prompt"]),
        "decode": max(test["avg_ts"] for test in figures if test["n_gen"]),
    }


def timed(engine: FastTransformer, points: str, sink: Any, *, each: bool = False) -> list[float]:
    """Milliseconds of 128 steps after a prompt of 8, recording these points: of each one, or of all of them together.

    An event between two steps keeps the next from starting before the last has ended, as they do otherwise.
    """
    from cupy.cuda import Event, get_elapsed_time

    names = chosen_points(engine, points, None) if points != "none" else []
    with Capture(DeviceStage(sink, names, engine.backend)) as tap:
        sequence = engine.start()
        engine.forward(list(range(100, 108)), sequence, tap)
        engine.generate(4, sequence, tap)
        engine.stream.synchronize()
        events = [Event() for _ in range(STEPS + 1 if each else 2)]
        events[0].record(engine.stream)
        for event in events[1:]:
            for _ in range(1 if each else STEPS):
                engine.generate_one(sequence, tap)
            event.record(engine.stream)
        events[-1].synchronize()
    return [get_elapsed_time(a, b) for a, b in pairwise(events)]


def mean_step(engine: FastTransformer, points: str) -> float:
    """Milliseconds a step of one run, records to a file for the default points."""
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder) / "ours.jsonl") as writer:
        return timed(engine, points, writer if points == "default" else Sink())[0] / STEPS


def decode(engine: FastTransformer, kind: str, theirs: dict[str, float]) -> list[tuple[str, str, str]]:
    """Tokens a second with the default checkpoints, and what capture costs: runs in turns, so that each ratio is of neighbours."""
    wanted = ("none", "default", "all") if kind == "f16" else ("none", "default")
    rounds = [{points: mean_step(engine, points) for points in wanted} for _ in range(REPEATS)]
    steps = sorted(times["default"] for times in rounds)
    other = theirs.get("decode", float("nan"))
    slowest, ours = 1000 / steps[-1], 1000 / statistics.median(steps)
    goal = "≥ 3,000 tokens/s and ≥ 3.9 × llama.cpp" if kind == "f16" else "≥ 2.5 × llama.cpp"
    figures = f"{ours:,.0f} tokens/s (slowest run {slowest:,.0f}), llama.cpp {other:,.0f}: {slowest / other:.2f} ×"
    rows = [(f"{kind} decode, default checkpoints", figures, goal)]
    plain = statistics.median(times["none"] for times in rounds)
    for points, label, limit in (("default", "default", 1.02), ("all", "every point", 1.20)):
        if points in wanted:
            ratios = sorted(times[points] / times["none"] for times in rounds)
            figures = f"median {statistics.median(ratios):.3f}, worst {ratios[-1]:.3f} ({plain:.4f} ms without)"
            rows.append((f"{kind} capture: {label} / none", figures, f"≤ {limit:.2f}"))
    return rows


def slow_writer(engine: FastTransformer) -> list[tuple[str, str, str]]:
    """How much longer a step is with a writer that takes 5 ms a batch, until the ring is full."""
    plain = statistics.median(timed(engine, "none", Sink(), each=True))
    added = sorted(step - plain for step in timed(engine, "default", Sink(delay=0.005), each=True))
    return [("99th percentile of the added time, slow writer", f"{added[int(0.99 * len(added))]:.3f} ms", "≤ 0.1 ms")]


def prefill(engine: FastTransformer, theirs: dict[str, float]) -> list[tuple[str, str, str]]:
    """Tokens a second of a prompt of 512 with the default checkpoints, until the last value is computed."""
    prompt = np.random.default_rng(0).integers(0, engine.hp.n_vocab, PROMPT).tolist()
    names = chosen_points(engine, "default", None)
    runs = []
    for _ in range(4 * REPEATS):
        with Capture(DeviceStage(Sink(), names, engine.backend)) as tap:
            engine.forward(prompt[:PROMPT], engine.start(), tap)  # slab and staging are there afterwards
            sequence = engine.start()
            engine.stream.synchronize()
            start = time.perf_counter()
            engine.forward(prompt, sequence, tap)
            runs.append(time.perf_counter() - start)
    ours, slowest, other = PROMPT / statistics.median(runs), PROMPT / max(runs), theirs.get("prefill", float("nan"))
    return [
        (
            "prefill of 512, default checkpoints",
            f"{ours:,.0f} tokens/s (slowest of {len(runs)} {slowest:,.0f}), llama.cpp {other:,.0f}: {ours / other:.2f} ×",
            "≥ 0.7 ×",
        )
    ]


def load(path: Path, bench: Path | None) -> list[tuple[str, str, str]]:
    """Seconds from the start of a process to its first token, after a prompt of one; llama-bench's until it prints its test.

    Cold is without compiled kernels and without Python's bytecode, which an installed package has. A prompt of eight loads cuBLAS.
    """
    with tempfile.TemporaryDirectory() as cache:
        times = [first_token(path, cache) for _ in range(REPEATS + 1)]
        eight = min(first_token(path, cache, 8) for _ in range(REPEATS))
    theirs = ""
    if bench is not None:
        single = [str(bench), "-m", str(path), "-p", "0", "-n", "1", "-ngl", "99", "-r", "1", "--no-warmup"]
        others = [seconds_until("tg1 ", single) for _ in range(REPEATS)]
        theirs = f"; llama.cpp {min(others):.2f} to {max(others):.2f} s"
    ours = f"cold {times[0]:.2f} s, warm {min(times[1:]):.2f} to {max(times[1:]):.2f} s (prompt of eight: {eight:.2f} s)"
    return [("new process to first token", f"{ours}{theirs}", "warm ≤ llama.cpp")]


def first_token(path: Path, cache: str, prompt: int = 1) -> float:
    """Seconds until a new process has loaded the model and chosen one token after a prompt of so many."""
    there = {**os.environ, "CUPY_CACHE_DIR": cache, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    return seconds_until("token", [sys.executable, "-c", FIRST_TOKEN, str(path), str(prompt)], there)


def seconds_until(mark: str, command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Seconds from the start of a process to the line of its output that has `mark`."""
    start, seconds = time.perf_counter(), float("nan")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if mark in line:
                seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def environment() -> str:
    """Device, driver and versions."""
    import cupy

    runtime = cupy.cuda.runtime
    versions: Sequence[str] = (
        f"CuPy {cupy.__version__}",
        f"CUDA runtime {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}",
        f"NumPy {np.__version__}",
    )
    return f"{time.strftime('%Y-%m-%d')}, {runtime.getDeviceProperties(0)['name'].decode()}, {', '.join(versions)}"


if __name__ == "__main__":
    main()
