"""Kills at random moments, disks that fill, models that crowd a small cache: what stood there before is whole or replaced.

Run: python benchmarks/kills.py [-n 200] [--only kills|disks|crowd]. The full disks need the right to mount a tmpfs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import ParityError
from checkpoints.gguf_file import contents
from checkpoints.reading.reader import read

_PROMPT = "5,6,7,8"
_CROWD = 8  # models at once


def start(words: list[object], cache: Path, folder: Path) -> "subprocess.Popen[bytes]":
    """A parity of its own process group, so that a kill takes llama.cpp's process, too."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "parity", *map(str, words)],
        cwd=folder,
        env=os.environ | {"PARITY_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill it and its children, at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def jobs(folder: Path) -> dict[str, tuple[list[object], Path]]:
    """What is killed, and the file or folder that stood there before."""
    return {
        "run": (["run", "--tokens", _PROMPT, "-o", "run"], folder / "run"),
        "synth": (["synth", "--width", 512, "--ff", 1024, "--layers", 4, "-o", "m.gguf"], folder / "m.gguf"),
        "convert": (["convert", "run/ref.jsonl", "-o", "c.jsonl"], folder / "c.jsonl"),
        "drift": (["drift", "record", "--prompts", "prompts.txt", "-o", "golden"], folder / "golden"),
    }


def whole(path: Path) -> str:
    """What is wrong with an output; empty where it is whole."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.name.startswith("."):
            continue  # left by the kill: the next run sweeps it
        try:
            if file.suffix == ".jsonl" and read(file).end is None:
                return f"{file.name} is cut short"
            if file.suffix == ".gguf":
                whole_file = contents(file)
                if whole_file.size < whole_file.data + max(tensor.offset for tensor in whole_file.tensors):
                    return f"{file.name} is cut short"
        except ParityError as error:
            return str(error)
    return ""


def kills(count: int, top: Path) -> Iterator[str]:
    """Each job killed so often, at moments spread over its usual length."""
    draw = random.Random(0)
    folder = top / "kills"
    folder.mkdir()
    (folder / "prompts.txt").write_text("Once upon a time\nThe dog\n")
    for name, (words, path) in jobs(folder).items():
        began = time.perf_counter()
        process = start(words, top / "warm", folder)
        message = process.communicate()[1]
        if process.returncode:
            yield f"{name}: exit {process.returncode} before any kill: {message[-200:]!r}"
            continue
        length = time.perf_counter() - began
        bad = 0
        for _ in range(count):
            cache = top / "cold"  # where `run` has to make the twin again
            shutil.rmtree(cache, ignore_errors=True)
            process = start(words, cache, folder)
            time.sleep(draw.uniform(0, 1.1) * length)
            end(process)
            if problem := whole(path):
                bad += 1
                yield f"{name}: {problem}"
            if draw.random() < 0.2:  # the next run is right, with whatever the kill left in the cache
                process = start(words, cache, folder)
                message = process.communicate()[1]
                if process.returncode:
                    bad += 1
                    yield f"{name}: exit {process.returncode} after a kill: {message[-200:]!r}"
        process = start(words, top / "warm", folder)
        process.communicate()
        left = [
            file.name
            for file in (path if path.is_dir() else folder).iterdir()
            if file.name.startswith(".") and "git" not in file.name
        ]
        if left:
            bad += 1
            yield f"{name}: {left} are left"
        print(f"| {name} killed at {count} moments of {length:.1f} s | {bad} |", flush=True)


@contextmanager
def disk(size: int, place: Path) -> Iterator[Path]:
    """A disk of so many bytes."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def disks(top: Path) -> Iterator[str]:
    """The cache, then the output, on disks that fill at ten places."""
    bad = 0
    for tenth in range(10):
        for where in ("cache", "output"):
            with disk((tenth * 6_500_000 if where == "cache" else tenth * 6_000) + 4096, top / "disk") as small:
                cache, out = (small, top / "whole") if where == "cache" else (top / "warm", small / "run")
                process = start(["run", "--tokens", _PROMPT, "-o", out], cache, top)
                message = process.communicate()[1].decode()
                if process.returncode not in (0, 2) or len(message.splitlines()) > 1:
                    bad += 1
                    yield f"{where} full at {tenth}: exit {process.returncode}: {message[-200:]!r}"
                elif process.returncode == 2 and where == "cache" and "PARITY_CACHE" not in message:
                    bad += 1
                    yield f"{where} full at {tenth} does not name PARITY_CACHE: {message!r}"
                if where == "cache" and (
                    left := [file.name for file in small.iterdir() if file.name.startswith(("tmp-", "."))]
                ):
                    bad += 1
                    yield f"{where} full at {tenth}: {left} are left"
    print(f"| disks that fill at 10 places, cache and output | {bad} |", flush=True)


def crowd(top: Path) -> Iterator[str]:
    """Eight models at once on a cache that holds none of them."""
    models = [top / f"crowd-{layers}.gguf" for layers in range(1, _CROWD + 1)]
    for layers, model in enumerate(models, 1):
        start(["synth", "--layers", layers, "-o", model], top / "warm", top).communicate()
    os.environ["PARITY_CACHE_GB"] = "0.0001"
    try:
        runs = [start(["run", "--model", m, "--tokens", _PROMPT, "-o", f"{m.stem}-run"], top / "crowd", top) for m in models]
        ends = [(run.communicate()[1], run.returncode) for run in runs]
    finally:
        del os.environ["PARITY_CACHE_GB"]
    bad = [message[-200:] for message, code in ends if code]
    yield from (f"crowd: {message!r}" for message in bad)
    print(f"| {_CROWD} models at once, room for none of their twins | {len(bad)} |", flush=True)


def main() -> None:
    """Print a row a trial and what went wrong; exit 1 where anything did."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--only", choices=("kills", "disks", "crowd"))
    given = parser.parse_args()
    print("| trial | failed |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        trials = {"kills": lambda: kills(given.n, top), "disks": lambda: disks(top), "crowd": lambda: crowd(top)}
        wrong = [line for name, trial in trials.items() if given.only in (None, name) for line in trial()]
    print("\n".join(wrong[:40]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
