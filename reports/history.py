"""The margins of a ledger over commits."""

from collections.abc import Iterator, Sequence
from math import log10
from typing import Any

from rich.text import Text

from checkpoints.answers.drift import Entry

from .as_json import SCHEMA, plain
from .drift import factor
from .layout import columns
from .numbers import clean, count

_BARS = "▁▂▃▄▅▆▇█"
_DECADES = 4.0  # below the limit that the bars tell apart: the lowest is 1e-4 of it and less, the highest beyond it
_NARROW = 20  # commits that are drawn at least


def lines(entries: Sequence[Entry], width: int) -> Iterator[Text]:
    """The points of each side and set of golden dumps, one bar per check: the higher, the nearer to the limit."""
    for label, group in groups(entries):
        last = group[-1]
        yield Text(f"{label} · {count(len(group), 'check')}, {group[0].time[:10]} to {last.time[:10]}", style="bold")
        names = list(dict.fromkeys(name for entry in group for name in entry.points))
        room = max(_NARROW, width - max(map(len, names), default=0) - 38)
        drawn = group[-room:]
        rows: list[tuple[str, ...]] = [("checkpoint", "first", "narrowest", "now", "█ beyond the limit")]
        for name in names:
            known = [entry.points[name][2] for entry in group if name in entry.points]
            bars = "".join(bar(entry.points[name][2]) if name in entry.points else " " for entry in drawn)
            rows.append((clean(name), *(factor(margin(value)) for value in (known[0], max(known), known[-1])), bars))
        yield from columns(rows, frozenset({1, 2, 3}), ["dim", *[""] * (len(rows) - 1)], width)
        yield Text(f"last  {last.time}  {last.commit[:12] or 'no commit'}  {last.verdict}", style="dim")
        yield Text("")


def groups(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Checks that can be compared with each other: of one side, against the same golden numbers."""
    made: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        made.setdefault((entry.source, entry.golden), []).append(entry)
    names = {"ours": "our engine", "ref": "llama.cpp", "exec": "a foreign engine", "dumps": "dumps of a foreign engine"}
    return [
        (f"{names.get(source, clean(source))} against golden dumps {clean(golden)[:8]}", group)
        for (source, golden), group in made.items()
    ]


def bar(of_limit: float) -> str:
    """One bar for an error in proportion to its limit, on a log scale."""
    if of_limit <= 0:
        return _BARS[0]
    if of_limit > 1:
        return _BARS[-1]
    height = 1 + log10(of_limit) / _DECADES
    return _BARS[max(0, min(len(_BARS) - 2, int(height * (len(_BARS) - 1))))]


def margin(of_limit: float) -> float | None:
    """How many times larger an error may become; None where there is none."""
    return 1 / of_limit if of_limit else None


def history_as_json(entries: Sequence[Entry], findings: Sequence[str]) -> dict[str, Any]:
    """One JSON object: `checks`, oldest first, each with `points` and their `margin`; `findings` of the last ones."""
    checks = [
        {
            "time": entry.time,
            "commit": entry.commit,
            "verdict": entry.verdict,
            "source": entry.source,
            "golden": entry.golden,
            "versions": entry.versions,
            "points": {
                name: {"nmse": nmse, "limit": limit, "of_limit": proportion, "margin": margin(proportion)}
                for name, (nmse, limit, proportion) in entry.points.items()
            },
        }
        for entry in entries
    ]
    return {"schema": SCHEMA, "checks": plain(checks), "findings": list(findings)}
