"""What a run costs on the CPU. One command, a table last:  python benchmarks/cpu.py

Every ratio is of two things measured in turns within this run; every time is the median of several.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

PROMPT = "Once upon a time"
REPEATS = 7
PREFILL = 32
# llama-cpp-python alone: start, load the same file, decode the same prompt.
ALONE = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], verbose=False, logits_all=True)
model.eval(model.tokenize(sys.argv[2].encode()))
"""


def main() -> None:
    """Measure every row and print the table."""
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PARITY_CACHE"] = str(folder / "cache")
        rows += start_up(folder)
        model = folder / "half-billion.gguf"
        parity("synth", "--like", "qwen2.5-0.5b", "--type", "f16", "-o", model)
        rows += prefill(model, folder)
        rows += memory(model, folder)
        rows += many_records()
        rows += large_vocabulary(folder)
    print(environment())
    print("\n| what | measured | to reach |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def start_up(folder: Path) -> list[tuple[str, str, str]]:
    """Wall times of whole commands, and of `parity run` against llama-cpp-python alone."""
    from parity.models.embedded import path

    out = folder / "run"
    commands = {
        "help": command("--help"),
        "run": command("run", "--prompt", PROMPT, "--out", out),
        "diff": command("diff", out / "ours.jsonl", out / "ref.jsonl"),
        "alone": [sys.executable, "-c", ALONE, str(path()), PROMPT],
    }
    subprocess.run(commands["run"], check=True, stdout=subprocess.DEVNULL)  # makes the twin and the compiled modules
    durations = in_turns({name: (lambda words=words: wall(words)) for name, words in commands.items()})
    return [
        ("`parity --help`", f"{durations['help']:.2f} s", "≤ 0.25 s"),
        ("`parity diff` of two default dumps", f"{durations['diff']:.2f} s", "≤ 0.6 s"),
        (
            "`parity run` on the stories model / llama-cpp-python alone",
            f"{durations['run']:.2f} s / {durations['alone']:.2f} s = {durations['run'] / durations['alone']:.2f}",
            "≤ 3",
        ),
    ]


def many_records() -> list[tuple[str, str, str]]:
    """A comparison of 100,000 records of 16 values against one of a tenth of them: no loop over records shows as 10."""
    import numpy as np

    from checkpoints.record import Dump
    from checkpoints.summary import summarise
    from parity.diff.compare import compare

    def dump(positions: int) -> Dump:
        rng = np.random.default_rng(0)
        names = ("embd", *(f"blk.{layer}.l_out" for layer in range(355)), "output_norm", "logits")
        rows = (
            summarise(name, rng.standard_normal((positions, 32)).astype(np.float32), np.arange(positions)) for name in names
        )
        return Dump("dump", None, {summary.point: summary for summary in rows})

    def once(sides: tuple[Dump, Dump]) -> float:
        began = time.perf_counter()
        compare(*sides)
        return time.perf_counter() - began

    large, small = (dump(280), dump(280)), (dump(28), dump(28))
    durations = in_turns({"large": lambda: once(large), "small": lambda: once(small)})
    return [
        (
            "comparing 100,000 records / 10,000",
            f"{durations['large']:.2f} s / {durations['small']:.2f} s = {durations['large'] / durations['small']:.1f}",
            "≤ 5 s",
        )
    ]


def large_vocabulary(folder: Path) -> list[tuple[str, str, str]]:
    """Opening a file with a vocabulary of 151,936 tokens."""
    from engine.weights.gguf_model import GgufModel

    path = folder / "vocabulary.gguf"
    parity("synth", "--like", "tiny", "--vocab", 151936, "--layers", 1, "--type", "f16", "-o", path)

    def once() -> float:
        began = time.perf_counter()
        GgufModel(path)
        return time.perf_counter() - began

    return [("opening a model with 151,936 tokens", f"{1000 * in_turns({'open': once})['open']:.0f} ms", "≤ 500 ms")]


def prefill(model: Path, folder: Path) -> list[tuple[str, str, str]]:
    """Our prefill with resident float32 weights against llama.cpp's on the F32 twin, same cores."""
    import llama_cpp

    from engine.backend import choose
    from engine.transformer import Transformer
    from engine.weights.gguf_model import GgufModel

    ids = list(range(100, 100 + PREFILL))
    engine = Transformer(GgufModel(model), choose("numpy"))
    twin = folder / "twin.gguf"
    parity("twin", model, "-o", twin)
    theirs = llama_cpp.Llama(
        str(twin), n_ctx=PREFILL, n_batch=PREFILL, n_ubatch=PREFILL, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(),
        logits_all=True, flash_attn=False, type_k=0, type_v=0, verbose=False,
    )  # fmt: skip

    def ours_once() -> float:
        began = time.perf_counter()
        engine.forward(ids, engine.start())
        return time.perf_counter() - began

    def theirs_once() -> float:
        theirs.reset()
        began = time.perf_counter()
        theirs.eval(ids)
        return time.perf_counter() - began

    ours_once(), theirs_once()  # weights are dequantised and pages touched in the first pass
    durations = in_turns({"ours": ours_once, "theirs": theirs_once})
    ratio = durations["ours"] / durations["theirs"]
    return [
        (
            f"prefill of {PREFILL} tokens, 0.5 B shape: our engine / llama.cpp F32",
            f"{1000 * durations['ours']:.0f} ms / {1000 * durations['theirs']:.0f} ms = {ratio:.2f}",
            "≤ 1.5",
        )
    ]


def memory(model: Path, folder: Path) -> list[tuple[str, str, str]]:
    """The highest sum of the proportional set sizes of `parity run` and its child."""
    from engine.weights.gguf_model import GgufModel

    size = 4 * sum(prod(info.shape) for info in GgufModel(model).tensors.values())
    ids = ",".join(str(number) for number in range(100, 100 + PREFILL))
    words = command("run", "--model", model, "--tokens", ids, "--out", folder / "big")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    peak = 0
    began = time.perf_counter()
    done = threading.Event()
    threading.Thread(target=lambda: (process.wait(), done.set())).start()
    while not done.wait(0.02):
        peak = max(peak, sum(map(proportional_set_size, tree(process.pid))))
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} exited {process.returncode}")
    return [
        (
            f"`parity run`, 0.5 B shape, F16, {PREFILL} tokens: peak memory / F32 size of the weights",
            f"{peak / 2**30:.2f} GiB / {size / 2**30:.2f} GiB = {peak / size:.2f}",
            "≤ 2.5",
        ),
        (f"`parity run`, 0.5 B shape, F16, {PREFILL} tokens, twin made and loaded", f"{seconds:.1f} s", ""),
    ]


def in_turns(measures: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of measurements taken in turns, so that what slows the machine down slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(REPEATS):
        for name, measure in measures.items():
            taken[name].append(measure())
    return {name: statistics.median(values) for name, values in taken.items()}


def command(*arguments: object) -> list[str]:
    """The command line of `parity …` with this Python."""
    return [sys.executable, "-P", "-m", "parity", *map(str, arguments)]


def parity(*arguments: object) -> None:
    """Run a command that must succeed."""
    subprocess.run(command(*arguments), check=True, stderr=subprocess.DEVNULL)


def wall(words: Sequence[str]) -> float:
    """Seconds of a whole process."""
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def tree(pid: int) -> list[int]:
    """The process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(grandchild for child in children for grandchild in tree(int(child)))]


def proportional_set_size(pid: int) -> int:
    """Bytes: shared pages count in parts (`Pss` of smaps_rollup), so that the sum over processes counts each page once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def environment() -> str:
    """The machine and the versions that the numbers belong to."""
    from importlib.metadata import version

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("parity", "numpy", "llama-cpp-python", "typer"))
    return f"{time.strftime('%Y-%m-%d')} · {cpu}, {os.cpu_count()} cores · Python {sys.version.split()[0]} · {packages}"


if __name__ == "__main__":
    main()
