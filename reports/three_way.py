"""A comparison of three sides as text and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from checkpoints.answers.three_way import PAIRS, ThreeWay, ThreeWayPoint
from checkpoints.structs import as_dict

from .as_json import plain
from .findings import ReportSection
from .layout import columns, labelled
from .numbers import clean, count, error

_SHORT = {"llama.cpp": "ref", "Hugging Face": "hf"}  # in the table's head, which would be wider than its figures
_PLACES, _NUMBERS, _LONGEST = ("ours", "ref", "third"), ("first", "second", "third"), 12
_ROWS = 24  # points that are shown; those where the sides differ come first


def lines(three_way: ThreeWay, width: int, said: str = "") -> list[Text]:
    """The table of points, then the answer, or `said` in its place, for a terminal of `width` columns."""
    rows = _rows(three_way)
    styles = ["dim", *("red" if row[-1] else "" for row in rows[1:])]
    rest = len(three_way.points) - (len(rows) - 1)
    table = columns(rows, frozenset({1, 2, 3}), styles, width)
    more = [Text(f"… {count(rest, 'further point')}", style="dim")] if rest else []
    recorded = [("recorded", text) for text in _recorded(three_way)]
    notes = labelled([*recorded, *(("note", clean(note)) for note in three_way.notes)], width)
    return [*table, *more, Text(""), *notes, Text(said or sentence(three_way), style="bold")]


def section(three_way: ThreeWay, said: str = "") -> ReportSection:
    """The same table as a section of a report; `said` replaces the answer if a side is incomplete."""
    head, *rows = _rows(three_way)
    answer = said or sentence(three_way)
    text = "; ".join((answer, *_recorded(three_way), *map(clean, three_way.notes)))
    return ReportSection("Three sides", text, head, tuple(rows), verdict=(answer, bool(three_way) and not said))


def heads(sides: Sequence[str]) -> list[str]:
    """Short names of the sides for narrow columns: a long name is replaced by its place; all are, if two would be the same."""
    short = [_SHORT.get(side, side if len(side) <= _LONGEST else place) for side, place in zip(sides, _PLACES, strict=True)]
    return short if len(set(short)) == len(short) else list(_NUMBERS)


def _recorded(three_way: ThreeWay) -> list[str]:
    """What was recorded otherwise, and by which side: one sentence for all points that share it."""
    points: dict[str, list[str]] = {}
    for recorded in three_way.record_faults:
        side = "" if recorded.side is None else f" of {three_way.sides[recorded.side]}"
        points.setdefault(f"{side}: {clean(recorded.fault.sentence)}", []).append(clean(recorded.fault.checkpoint))
    return [f"{', '.join(names[:4])}{' and more' if len(names) > 4 else ''}{text}" for text, names in points.items()]


def _rows(three_way: ThreeWay) -> list[tuple[str, ...]]:
    """The table's head, and a row for each point that is shown."""
    names = heads(three_way.sides)
    head = ("checkpoint", *(f"{names[a]} – {names[b]}" for a, b in PAIRS), "alone")
    shown = _shown(three_way)
    return [head, *((clean(point.checkpoint), *map(error, point.nmse), _accused(names, point)) for point in shown)]


def sentence(three_way: ThreeWay) -> str:
    """The answer in one line."""
    if three_way.first is None:
        compared = ", ".join(f"{count:,}" for count in three_way.compared)
        sides = f"{', '.join(three_way.sides[:2])} and {three_way.sides[2]}"
        otherwise = sum(recorded.fault.records for recorded in three_way.record_faults)
        recorded = f", {otherwise:,} recorded otherwise" if otherwise else ""
        points = f"{len(three_way.points)} point{'s' * (len(three_way.points) != 1)}"
        return f"parity: {sides} agree at {points} ({compared} records{recorded})"
    point = three_way.first
    if point.wrong or any(far is not None for far in point.truth):
        return f"divergence at {clean(point.checkpoint)}: {_by_truth(three_way, point)}"
    if point.alone is None:
        figures = [value for value in point.nmse if value is not None]
        worst = f", worst NMSE {error(max(figures))}" if figures else ""
        return f"divergence at {clean(point.checkpoint)}: which side disagrees with the others is undecided{worst}"
    pair = next(number for number, sides in enumerate(PAIRS) if point.alone not in sides)
    first, second = (three_way.sides[side] for side in PAIRS[pair])
    value = point.nmse[pair]
    agreement = "exactly" if value == 0 or value is None else f"to {error(value)}"  # tokens have no error
    alone = f"divergence at {clean(point.checkpoint)}: {first} and {second} agree {agreement}, {three_way.sides[point.alone]} is alone"
    return alone if value is None else f"{alone}; the two may share a fault (--model M.gguf lets float64 decide)"


def _accused(names: Sequence[str], point: ThreeWayPoint) -> str:
    """The sides that are wrong at a point according to float64; without it, the one that is alone."""
    if point.wrong:
        return ", ".join(names[side] for side in point.wrong)
    return names[point.alone] if point.alone is not None else "?" if point.differs else ""


def _by_truth(three_way: ThreeWay, point: ThreeWayPoint) -> str:
    """How far each side is from float64, and who is wrong."""
    far = [f"{side} {error(value)}" for side, value in zip(three_way.sides, point.truth, strict=True) if value is not None]
    off = " and ".join(three_way.sides[side] for side in point.wrong)
    is_wrong = f"{off} {'are' if len(point.wrong) > 1 else 'is'} wrong" if off else "rounding, amplified by this model"
    return f"{is_wrong}: from the same steps in float64 {', '.join(far)}"


def _shown(three_way: ThreeWay) -> list[ThreeWayPoint]:
    """The most telling points, in dataflow order: those at which a side is alone, then the embedding, layers and logits."""
    if len(three_way.points) <= _ROWS:
        return list(three_way.points)
    ranked = sorted(
        range(len(three_way.points)),
        key=lambda number: (
            not three_way.points[number].differs,
            not three_way.points[number].checkpoint.endswith((".l_out", "embd", "output_norm", "logits")),
            number,
        ),
    )
    return [three_way.points[number] for number in sorted(ranked[:_ROWS])]


def as_json(three_way: ThreeWay) -> dict[str, Any]:
    """The answer as one JSON object."""

    def point(summary: ThreeWayPoint) -> dict[str, Any]:
        alone = three_way.sides[summary.alone] if summary.alone is not None else None
        return as_dict(summary) | {"alone": alone, "wrong": [three_way.sides[side] for side in summary.wrong]}

    answer = {
        "schema": 1,
        "verdict": "parity" if three_way else "divergence",
        "sides": list(three_way.sides),
        "compared": list(three_way.compared),
        "pairs": [[three_way.sides[a], three_way.sides[b]] for a, b in PAIRS],
        "first_divergence": point(three_way.first) if three_way.first is not None else None,
        "points": [point(entry) for entry in three_way.points],
        "record_faults": [
            as_dict(recorded.fault) | {"side": None if recorded.side is None else three_way.sides[recorded.side]}
            for recorded in three_way.record_faults
        ],
        "answer": sentence(three_way),
        "notes": list(three_way.notes),
    }
    return {key: plain(value) for key, value in answer.items()}
