"""Kills at random moments, disks that fill, models that crowd a small cache: what stood there before is whole or replaced.

Run: python benchmarks/kills.py [-n 200] [--seed 0] [--only kills|disks|crowd]. The full disks need the right to mount a tmpfs.

Commands are forked from a process that has imported everything (`forked`), so that kills fall into their work. Each writes where
another answer stands: afterwards every file is the old one or the whole new one, an answer lies only beside its own dumps, and
the next run ends as if nothing had happened and leaves nothing behind.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import forked

SECONDS = 120  # for one command on a busy machine
_CROWD = 8  # models at once
_DUMPS = ("ours.jsonl", "ref.jsonl")
_ANSWERS = ("diff.json", "report.html")
_CHANGING = re.compile(
    rb'"(created|time|seconds|folder|ago)": ?("[^"]*"|[\d.]+)'
)  # from run to run, in files that are otherwise the same
Files = dict[str, bytes]


@dataclass(frozen=True)
class Job:
    """A command that is killed while it writes over an earlier answer, all of it below one folder.

    Attributes:
        words: the command; "{folder}" stands for the folder.
        old: the commands that make the earlier answer and its inputs.
        path: the file or folder that both write, in the folder.
        spoil: makes the earlier answer differ, where the commands alone don't.
        code: what the command ends with when it is let.
    """

    words: tuple[str, ...]
    old: tuple[tuple[str, ...], ...]
    path: str
    spoil: Callable[[Path], None] = lambda _: None
    code: int = 0


def _moved(folder: Path) -> None:
    """A golden dump of which every record of one point differs from what the model computes."""
    path = folder / "golden" / "000.jsonl"
    path.write_bytes(re.sub(rb'("checkpoint":"embd".*?"values":\[)[^,]*', rb"\g<1>1.5", path.read_bytes()))


_RECORD = ("drift", "record", "--prompts", "{folder}/prompts.txt", "-o", "{folder}/golden")
JOBS = {
    "run": Job(
        ("run", "--tokens", "5,6,7,8", "-o", "{folder}/run"), (("run", "--tokens", "5,6", "-o", "{folder}/run"),), "run"
    ),
    "synth": Job(
        ("synth", "--width", "512", "--layers", "4", "-o", "{folder}/m.gguf"), (("synth", "-o", "{folder}/m.gguf"),), "m.gguf"
    ),
    "convert": Job(
        ("convert", "{folder}/run/ref.jsonl", "-o", "{folder}/c.jsonl"),
        (
            ("run", "--tokens", ",".join(["5"] * 64), "--points", "all", "-o", "{folder}/run"),
            ("convert", "{folder}/run/ours.jsonl", "-o", "{folder}/c.jsonl"),
        ),
        "c.jsonl",
    ),
    "drift record": Job(_RECORD, ((*_RECORD, "--slice", "8"),), "golden"),
    "drift check --update": Job(("drift", "check", "{folder}/golden", "--update"), (_RECORD,), "golden", _moved),
}


def ended(words: tuple[str, ...], cache: Path, folder: Path, seconds: float = SECONDS) -> tuple[int, str]:
    """Exit code and stderr of a command. Raises TimeoutError after it was killed, llama.cpp's process with it."""
    return forked.command([word.format(folder=folder) for word in words], cache, seconds)


def files(path: Path) -> Files:
    """The contents of a file or a folder's files, hidden ones left out: a kill leaves these for the next run to sweep."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".") and file.is_file()}


def hidden(path: Path) -> list[str]:
    """What a run has left under a temporary name beside its outputs."""
    folder = path if path.is_dir() else path.parent
    return [file.name for file in folder.iterdir() if file.name.startswith(".") and file.name != ".gitattributes"]


def _plain(content: bytes) -> bytes:
    return _CHANGING.sub(b"", content)


def problem(now: Files, old: Files, new: Files) -> str:
    """What is wrong with the files that a kill or a full disk left; empty where each is the old or the new one."""
    for name, content in now.items():
        if name == "ledger.jsonl":  # grows by whole lines
            whole = content.startswith(old.get(name, b"")) and content.endswith(b"\n")
        elif name == "report.html":
            whole = content.endswith(b"</html>")
        elif name == "drift.json":
            whole = content.endswith(b"}\n")
        else:
            whole = content == old.get(name) or _plain(content) == _plain(new.get(name, b""))
        if not whole:
            return f"{name} is neither the old one nor the new"
    if gone := [name for name in old if name not in now and name not in _ANSWERS]:
        return f"{', '.join(gone)} lost"
    if "diff.json" in now and len({now[name] == old[name] for name in (*_DUMPS, "diff.json")}) > 1:
        return "the answer is of other dumps than lie beside it"
    return ""


class Trial:
    """A job in a folder of its own, which can be put back to where the earlier answer stands."""

    def __init__(self, job: Job, top: Path) -> None:
        self.job, self._top, self._ready = job, top, top / "ready"
        self._ready.mkdir(parents=True)
        (self._ready / "prompts.txt").write_text("Once\nThe\n")
        for words in job.old:
            code, message = ended(words, top / "warm", self._ready)
            if code:
                raise SystemExit(f"{' '.join(words)}: exit {code}: {message}")
        job.spoil(self._ready)
        self.old = files(self._ready / job.path)
        folder = self.reset()
        began = time.perf_counter()
        self.ended(top / "warm", folder)
        ended_cold = time.perf_counter() - began
        self.new = files(folder / job.path)
        began = time.perf_counter()
        shutil.rmtree(top / "cold", ignore_errors=True)
        self.ended(top / "cold", self.reset())
        self.length = max(ended_cold, time.perf_counter() - began)

    def reset(self, folder: Path | None = None) -> Path:
        """A folder where the earlier answer stands."""
        folder = folder or self._top / "now"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self._ready, folder))

    def ended(self, cache: Path, folder: Path) -> None:
        """Let it end. Raises ValueError where it does not end as it should."""
        code, message = ended(self.job.words, cache, folder)
        if code != self.job.code:
            raise ValueError(f"exit {code}: {message[-200:]!r}")

    def right_after(self, cache: Path, folder: Path) -> str:
        """What is wrong with the next run; empty where nothing is."""
        try:
            self.ended(cache, folder)
        except ValueError as error:
            return f"the next run: {error}"
        now = files(folder / self.job.path)
        if left := hidden(folder / self.job.path):
            return f"the next run leaves {left}"
        trouble = problem(now, self.old, self.new)
        return f"the next run: {trouble}" if trouble else ("" if now.keys() >= self.new.keys() else "the next run lacks files")


def kills(count: int, seed: int, top: Path) -> Iterator[str]:
    """Each job killed so often, at moments spread over its usual length; a cold cache each time."""
    for name, job in JOBS.items():
        draw = random.Random(f"{name} {seed}")
        trial = Trial(job, top / f"kills-{job.path}-{len(name)}")
        killed = bad = 0
        for number in range(count):
            cache, folder = trial._top / "cold", trial.reset()
            shutil.rmtree(cache, ignore_errors=True)
            try:
                ended(job.words, cache, folder, draw.uniform(0, 1.1) * trial.length)
            except TimeoutError:
                killed += 1
            wrong = problem(files(folder / job.path), trial.old, trial.new) or (
                trial.right_after(cache, folder) if number % 4 == 0 else ""
            )
            if wrong:
                bad += 1
                yield f"{name}, kill {number}: {wrong}"
        print(f"| {name}, killed {killed} times in {count} within {trial.length:.1f} s | {bad} |", flush=True)


@contextmanager
def disk(size: int, place: Path) -> Iterator[Path]:
    """A disk of so many bytes."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _size(path: Path) -> int:
    """Bytes of its files in whole pages, as a tmpfs counts them."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in path.rglob("*") if file.is_file())


def disks(top: Path) -> Iterator[str]:
    """The cache, then the output, on disks that fill at ten places."""
    for name, job in JOBS.items():
        trial = Trial(job, top / f"disks-{job.path}-{len(name)}")
        trial.ended(trial._top / "cold", trial.reset())
        cache_size, needed = _size(trial._top / "cold"), _size(trial.reset())
        written = sum(map(len, trial.new.values()))
        for where in ("cache", "output"):
            full = bad = 0
            if where == "cache" and name in ("synth", "convert"):
                continue  # they use none
            for tenth in range(10):
                size = tenth * cache_size // 10 + 4096 if where == "cache" else needed + tenth * written // 10 + 8192
                with disk(size, top / "disk") as small:
                    cache = small if where == "cache" else trial._top / "warm"
                    folder = trial.reset(small / "now" if where == "output" else None)
                    code, message = ended(job.words, cache, folder)
                    full += code == 2
                    wrong = problem(files(folder / job.path), trial.old, trial.new)
                    if code not in (job.code, 2) or (code == 2 and len(message.splitlines()) > 1):
                        wrong = f"exit {code}: {message[-200:]!r}"
                    elif code == 2 and where == "cache" and "PARITY_CACHE" not in message:
                        wrong = f"it does not name PARITY_CACHE: {message!r}"
                    elif left := hidden(folder / job.path) if where == "output" else hidden(small):
                        wrong = f"{left} are left"
                    if not wrong and code:
                        subprocess.run(["mount", "-o", f"remount,size={1 << 30}", small], check=True)
                        wrong = trial.right_after(cache, folder)
                if wrong:
                    bad += 1
                    yield f"{name}, {where} full at {tenth}: {wrong}"
            print(f"| {name}, {where} on a disk that fills at 10 places ({full} times before the end) | {bad} |", flush=True)


def _at_once(runs: list[tuple[str, ...]], cache: Path, top: Path, seconds: float) -> list[tuple[int, str]]:
    """The ends of commands that run side by side; -9 where one was killed."""
    children = []
    for number, words in enumerate(runs):
        pid = os.fork()
        if pid == 0:
            try:
                code, message = ended(words, cache, top, seconds)
            except TimeoutError:
                code, message = -9, ""
            (top / f"end-{number}").write_text(f"{code} {message}")
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    texts = [(top / f"end-{number}").read_text().partition(" ") for number in range(len(runs))]
    return [(int(code), message) for code, _, message in texts]


def crowd(count: int, seed: int, top: Path) -> Iterator[str]:
    """Eight models at once on a cache that holds none of them; then all eight killed at one moment, and again to their ends."""
    draw = random.Random(f"crowd {seed}")
    models = [top / f"crowd-{layers}.gguf" for layers in range(1, _CROWD + 1)]
    for layers, model in enumerate(models, 1):
        ended(("synth", "--layers", str(layers), "-o", str(model)), top / "warm", top)
    runs = [("run", "--model", str(m), "--tokens", "5,6,7", "-o", str(top / f"{m.stem}-run")) for m in models]
    os.environ["PARITY_CACHE_GB"] = "0.0001"
    bad = killed = 0
    try:
        began = time.perf_counter()
        ends = _at_once(runs, top / "crowd", top, SECONDS)
        length = time.perf_counter() - began
        for _ in range(count):
            killed += sum(code == -9 for code, _ in _at_once(runs, top / "crowd", top, draw.uniform(0, 1.1) * length))
            ends += _at_once(runs, top / "crowd", top, SECONDS)
        left = hidden(top / "crowd")
    finally:
        del os.environ["PARITY_CACHE_GB"]
    for code, message in ends:
        if code:
            bad += 1
            yield f"crowd: exit {code}: {message[-200:]!r}"
    if left:
        bad += 1
        yield f"crowd: {left} are left"
    print(
        f"| {_CROWD} models at once, room for none of their twins, {killed} of them killed in {count} rounds | {bad} |",
        flush=True,
    )


def main() -> None:
    """Print a row a trial and what went wrong; exit 1 where anything did."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "disks", "crowd"))
    given = parser.parse_args()
    forked.warm()
    print("| trial | failed |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        trials = {
            "kills": lambda: kills(given.n, given.seed, top),
            "disks": lambda: disks(top),
            "crowd": lambda: crowd(max(given.n // 20, 1), given.seed, top),
        }
        wrong = [line for name, trial in trials.items() if given.only in (None, name) for line in trial()]
    print("\n".join(wrong[:40]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
