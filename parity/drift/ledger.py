"""The ledger of checks: one JSON line each, read back as margins over commits."""

import errno
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonlines
import orjson
from msgspec import convert

from checkpoints.answers.drift import Change, Closer, Entry, Margin
from checkpoints.errors import InputError
from checkpoints.record import Header
from checkpoints.regular import require_regular
from checkpoints.whole_file import lock
from reports.numbers import count

NAME = "ledger.jsonl"
SCHEMA = 1
_BEGIN = b'{"schema":'  # of every line, a torn one too

# An error that became this many times larger within its limit is a finding (the ticket's own number: a right engine's
# errors move by less, since one machine repeats them to the bit).
GROWTH = 10.0
# Below this share of the limit an error is the noise that CPUs and BLAS builds differ by. Measured (benchmarks/drift.py):
# the stored golden dumps against our engine on six kernel families of OpenBLAS, one and two threads: 0.0026 … 0.0068 of the
# limit, so that no move between machines is tenfold of it; where both sides are the same build, 0.
NOISE = 3e-3
_MOVED = 1.01  # times an earlier error: a smaller change is not worth mentioning
_NOTHING = 1e-6  # of the limit: errors below it count as none
# A margin below this is reported before the limit is reached.
NEAR = 0.1

_VERSIONS = ("version", "llama_cpp_python", "llama_cpp", "backend", "device", "threads", "system", "weights", "flash_attention")


_ADVICE = "Name a file with --ledger."


def append(path: Path, entry: Entry) -> None:
    """Add one line.

    Raises:
        InputError: the file cannot be written.
    """
    line = {
        "schema": SCHEMA,
        **entry.identity(),
        **entry.extra,
        "points": {
            name: {"nmse": _number(nmse), "limit": limit, "margin": _number(1 / of_limit) if of_limit else None}
            | ({"of_limit": _number(of_limit)} if nmse else {})
            for name, (nmse, limit, of_limit) in entry.points.items()
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append_line(path, json.dumps(line, allow_nan=False).encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.", "Choose another --ledger.", code="ledger") from error


def _append_line(path: Path, line: bytes) -> None:
    """Append a line, or nothing if the disk cannot take all of it.

    A last line that a killed run left unfinished is ended first, so that only that one is lost.
    """
    with path.open("a+b", buffering=0) as file:
        lock(file.fileno(), wait=True)  # no other process may append a line before this one is taken back
        size = file.seek(0, os.SEEK_END)
        cut_short = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        whole = b"\n" * cut_short + line + b"\n"
        written = 0
        try:
            written = file.write(whole)
        finally:
            if written < len(whole):
                os.ftruncate(file.fileno(), size)
        if written < len(whole):  # the disk was full after a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read(path: Path) -> tuple[list[Entry], int]:
    """All entries, and how many lines could not be read (torn, or of a newer schema).

    Raises:
        InputError: the file cannot be read, or is another one: a check would append a line to it.
    """
    try:
        require_regular(path, advice=_ADVICE)
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.", "Check --ledger.", code="ledger") from error
    entries: list[Entry] = []
    skipped = 0
    reader = jsonlines.Reader(lines, loads=orjson.loads)
    while True:
        try:
            entries.append(_entry(reader.read(type=dict, skip_empty=True)))
        except EOFError:
            break
        except (ValueError, TypeError, KeyError, AttributeError):  # jsonlines' errors of a line are ValueErrors
            skipped += 1
    if skipped and not entries and not any(line.startswith(_BEGIN) or (line and _BEGIN.startswith(line)) for line in lines):
        raise InputError(f"{path} is not a ledger of checks: none of its lines is an entry.", _ADVICE, code="ledger")
    return entries, skipped


def skipped_note(skipped: int, path: Path) -> str:
    """The note on lines that `read` could not read."""
    return f"{count(skipped, 'line')} of {path} skipped: not an entry of a ledger"


def comparable(entries: Iterable[Entry], source: str, golden: str) -> list[Entry]:
    """Earlier checks of the same side against the same golden numbers."""
    return [entry for entry in entries if entry.source == source and entry.golden == golden]


def best(entries: Sequence[Entry], point: str) -> float | None:
    """The smallest proportion of its limit that a point had in checks that passed; None if there are none."""
    shares = [entry.points[point][2] for entry in entries if point in entry.points and entry.verdict == "parity"]
    return min(shares, default=None)


def findings(points: Sequence[Margin]) -> list[str]:
    """Sentences on errors within their limits that have grown, or are close to them."""
    sentences: list[str] = []
    for point in points:
        if point.of_limit > 1:
            continue
        if point.before is not None and point.of_limit >= GROWTH * max(point.before, NOISE):
            was = f"{point.before:.2g}" if point.before else "none"
            sentences.append(f"{point.checkpoint}: the error is {point.of_limit:.2g} of its limit, {was} at its best")
        elif point.of_limit > NEAR:
            sentences.append(f"{point.checkpoint}: the error is near its limit, {point.of_limit:.2g} of it")
    return sentences


def closer(entries: Sequence[Entry], since: datetime) -> list[Closer]:
    """Points that came closer to their limits from the last check before `since` (else the first one) to the latest, most grown first.

    Args:
        entries: checks that can be compared with each other, oldest first.
        since: a time with its zone.
    """
    earlier = [entry for entry in entries if _time(entry.time) <= since] or list(entries[:1])
    if not earlier or earlier[-1] is entries[-1]:
        return []
    before, now = earlier[-1], entries[-1]
    moved = [
        Closer(name, before.points[name][2], figures[2], before.time)
        for name, figures in now.points.items()
        if name in before.points and figures[2] > _MOVED * max(before.points[name][2], _NOTHING)
    ]
    return sorted(moved, key=lambda moved: -moved.now / max(moved.before, _NOTHING))


def _time(text: str) -> datetime:
    """A time as a datetime. Raises ValueError if the text is not a time."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def versions(header: Header | None) -> dict[str, str]:
    """What could explain a change: versions, backend, device and threads from a dump's header."""
    if header is None:
        return {}
    build = {name: str(header.build[name]) for name in _VERSIONS if name in header.build}
    return {"source": header.source, "compute": header.compute, "kv_type": header.kv_type, **build}


def changes(before: dict[str, str], now: dict[str, str]) -> tuple[Change, ...]:
    """Versions and settings that changed. An older version's spelling ("f32 twin") is not a change."""
    return tuple(
        Change(name, before[name], now[name])
        for name in before
        if name in now and before[name].casefold() != now[name].casefold()
    )


def commit() -> tuple[str, bool]:
    """The commit that is checked out here and whether files differ from it; empty outside a repository."""
    if named := os.environ.get("GITHUB_SHA"):
        return named, False
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "", False
    return head, bool(dirty.strip())


def _entry(line: dict[str, Any]) -> Entry:
    if line["schema"] != SCHEMA:
        raise ValueError("a newer schema")
    _time(line["time"])
    return convert(line | {"points": {name: _figures(figures) for name, figures in line["points"].items()}, "extra": {}}, Entry)


def _figures(figures: dict[str, Any]) -> tuple[float, float, float]:
    nmse, limit, margin = float(figures["nmse"]), float(figures["limit"]), figures["margin"]
    of_limit = figures.get("of_limit")
    return nmse, limit, float(of_limit) if of_limit is not None else (1 / float(margin) if margin else 0.0)


def _number(value: float) -> float | str:
    return float(f"{value:.4g}") if abs(value) < float("inf") else "Infinity"
