"""The margins of a ledger over commits."""

from collections.abc import Iterator, Sequence
from math import log10
from typing import Any

from rich.text import Text

from checkpoints.answers.drift import Closer, Entry
from checkpoints.structs import as_dict

from .as_json import SCHEMA, plain
from .drift import shown_margin
from .layout import columns
from .numbers import clean, count, of_limit

_CONFORM = "conform "  # what a conformance run's source begins with
_BARS = "▁▂▃▄▅▆▇█"
_DECADES = 4.0  # below the limit that the bars tell apart: the lowest is 1e-4 of it and less, the highest beyond it
_MOST = 40  # points or cells that a screen lists: of more, those nearest to their limits
_NEAREST = 8  # that came closer to their limits and are named
_NARROW = 20  # commits that are drawn at least


def lines(entries: Sequence[Entry], width: int) -> Iterator[Text]:
    """The points of each side and set of golden dumps, one bar per check: the higher, the nearer to the limit."""
    for label, group in groups(entries):
        last = group[-1]
        began, ended = group[0].time[:10], last.time[:10]
        when = ended if began == ended else f"{began} to {ended}"
        yield Text(f"{label} · {count(len(group), 'check')}, {when}", style="bold")
        every = list(dict.fromkeys(name for entry in group for name in entry.points))
        nearest = sorted(every, key=lambda name: -last.points[name][2] if name in last.points else 0.0)[:_MOST]
        names = [name for name in every if name in set(nearest)]
        room = max(_NARROW, width - max(map(len, names), default=0) - 38)
        drawn = group[-room:]
        column = "cell" if group[0].source.startswith(_CONFORM) else "checkpoint"
        rows: list[tuple[str, ...]] = [(column, "first", "narrowest", "now", "█ beyond the limit")]
        for name in names:
            known = [entry.points[name][2] for entry in group if name in entry.points]
            bars = "".join(bar(entry.points[name][2]) if name in entry.points else " " for entry in drawn)
            rows.append((clean(name), *(shown_margin(margin(value)) for value in (known[0], max(known), known[-1])), bars))
        yield from columns(rows, frozenset({1, 2, 3}), ["dim", *[""] * (len(rows) - 1)], width)
        if len(every) > len(names):
            yield Text(f"and {len(every) - len(names)} further from their limits", style="dim")
        yield Text(f"last  {last.time}  {last.commit[:12] or 'no commit'}  {last.verdict}", style="dim")
        yield Text("")


def groups(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Checks that can be compared with each other: the same side against the same golden numbers."""
    series: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        series.setdefault((entry.source, entry.golden), []).append(entry)
    names = {"ours": "our engine", "ref": "llama.cpp", "exec": "an external engine", "dumps": "dumps of an external engine"}
    return [
        (clean(f"conformance of {source.removeprefix(_CONFORM)} ({group[-1].versions.get('source', '')})"), group)
        if source.startswith(_CONFORM)
        else (f"{names.get(source, clean(source))} against golden dumps {clean(golden)[:8]}", group)
        for (source, golden), group in series.items()
    ]


def closer_sentences(moved: Sequence[tuple[str, Sequence[Closer]]]) -> list[str]:
    """What came nearer to its limit on each side, one sentence each; what grew most comes first."""
    sentences: list[str] = []
    for label, every in moved:
        side = f" of {label}" if len(moved) > 1 else ""
        sentences += [
            f"{clean(closer.name)}{side}: {_of_its_limit(closer.now)}, {of_limit(closer.before)} on {closer.since[:10]}"
            for closer in every[:_NEAREST]
        ]
        sentences += [f"and {len(every) - _NEAREST} more{side} (--format json lists them)"] if len(every) > _NEAREST else []
    return sentences


def _of_its_limit(proportion: float) -> str:
    return f"{of_limit(proportion)}{' of' if proportion <= 1 else ''} its limit"


def bar(proportion: float) -> str:
    """One bar for an error in proportion to its limit, on a log scale."""
    if proportion <= 0:
        return _BARS[0]
    if proportion > 1:
        return _BARS[-1]
    height = 1 + log10(proportion) / _DECADES
    return _BARS[max(0, min(len(_BARS) - 2, int(height * (len(_BARS) - 1))))]


def margin(proportion: float) -> float | None:
    """How many times larger an error may become that is this proportion of its limit; None if there is no error."""
    return 1 / proportion if proportion else None


def history_as_json(
    entries: Sequence[Entry], findings: Sequence[str], moved: Sequence[tuple[str, Sequence[Closer]]] = ()
) -> dict[str, Any]:
    """One JSON object: `checks`, oldest first, each with `points` and their `margin`; `findings` of the last ones; `closer`."""
    closer = plain([{"side": label, **as_dict(closer_point)} for label, every in moved for closer_point in every])
    checks = [
        {
            **entry.identity(),
            "points": {
                name: {"nmse": nmse, "limit": limit, "of_limit": proportion, "margin": margin(proportion)}
                for name, (nmse, limit, proportion) in entry.points.items()
            },
        }
        for entry in entries
    ]
    return {"schema": SCHEMA, "checks": plain(checks), "findings": list(findings), "closer": closer}
