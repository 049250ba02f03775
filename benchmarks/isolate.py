"""What proving operations and weights costs. One command, a table last:  python benchmarks/isolate.py

Ratios are of whole commands measured in turns; peak memory is that of the command's process alone.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from cpu import command, environment, in_turns, parity, wall

# 32 ids of the embedded model's vocabulary.
TOKENS = ",".join(str(3 + 61 * number % 2000) for number in range(32))
_MIB = 1 << 20
PEAK = """
import resource, sys
from parity.__main__ import run
run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def main() -> None:
    """Measure every row and print the table."""
    with tempfile.TemporaryDirectory() as name:
        rows = isolation(Path(name)) + weights(Path(name))
    print(environment())
    print("\n| what | measured | to reach |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def isolation(folder: Path) -> list[tuple[str, str, str]]:
    """`parity isolate` and `parity consistency` against `parity run`, stories model, 32 tokens."""
    commands = {
        "run": command("run", "--tokens", TOKENS, "--out", folder / "run"),
        "isolate": command("isolate", "--tokens", TOKENS),
        "consistency": command("consistency", "--tokens", TOKENS),
    }
    subprocess.run(commands["run"], check=True, stdout=subprocess.DEVNULL)  # makes the twin and the compiled modules
    seconds = in_turns({name: (lambda words=words: wall(words)) for name, words in commands.items()})
    ratio = seconds["isolate"] / seconds["run"]
    return [
        (
            "`parity isolate` / `parity run`, stories model, 32 tokens",
            f"{seconds['isolate']:.2f} s / {seconds['run']:.2f} s = {ratio:.1f}",
            "≤ 8",
        ),
        ("`parity consistency`, stories model, 32 tokens, every point", f"{seconds['consistency']:.2f} s", ""),
    ]


def weights(folder: Path) -> list[tuple[str, str, str]]:
    """`parity weights` on the 0.5 B shape: its time, and memory that does not grow with the file."""
    model = folder / "half-billion.gguf"
    parity("synth", "--like", "qwen2.5-0.5b", "--type", "q4_0", "-o", model)
    ran = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, "weights", "--model", str(model)], check=True, capture_output=True, text=True
    )
    seconds = wall(command("weights", "--model", model))
    peak = int(ran.stderr.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    size = model.stat().st_size
    return [
        (
            "`parity weights`, 0.5 B shape, Q4_0: time, peak memory (the file itself is mapped and counted)",
            f"{seconds:.1f} s, {peak / _MIB:,.0f} MiB of a file of {size / _MIB:,.0f} MiB",
            "≤ 2,048 MiB",
        )
    ]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
