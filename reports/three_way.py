"""A comparison of three sides as text and as JSON."""

from dataclasses import asdict
from typing import Any

from rich.text import Text

from checkpoints.answers.three_way import PAIRS, ThreeWay, ThreeWayPoint

from .as_json import plain
from .layout import columns
from .numbers import clean, error

_SHORT = {"llama.cpp": "ref", "Hugging Face": "hf"}  # in the table's head, which would be wider than its figures
_ROWS = 24  # points that are shown; those where the sides differ come first


def lines(found: ThreeWay, width: int) -> list[Text]:
    """The table of points, then the answer, for a terminal of `width` columns."""
    shown = _shown(found)
    heads = [_SHORT.get(side, side) for side in found.sides]
    rows: list[tuple[str, ...]] = [("checkpoint", *(f"{heads[a]} – {heads[b]}" for a, b in PAIRS), "alone")]
    styles = ["dim"]
    for point in shown:
        who = found.sides[point.alone] if point.alone is not None else "?" if point.differs else ""
        rows.append((clean(point.checkpoint), *(error(value) for value in point.nmse), who))
        styles.append("red" if who else "")
    rest = len(found.points) - len(shown)
    table = columns(rows, frozenset({1, 2, 3}), styles, width)
    more = [Text(f"… {rest} more points", style="dim")] if rest else []
    notes = [Text(f"note  {note}", style="dim") for note in found.notes]
    return [*table, *more, Text(""), *notes, Text(sentence(found), style="bold")]


def sentence(found: ThreeWay) -> str:
    """The answer in one line."""
    if found.first is None:
        compared = ", ".join(f"{count:,}" for count in found.compared)
        return f"parity: {', '.join(found.sides[:2])} and {found.sides[2]} agree at {len(found.points)} points ({compared} records)"
    point = found.first
    if point.alone is None:
        worst = max(value for value in point.nmse if value is not None)
        return f"divergence at {clean(point.checkpoint)}: it cannot be told which side is alone, worst NMSE {error(worst)}"
    pair = next(number for number, sides in enumerate(PAIRS) if point.alone not in sides)
    first, second = (found.sides[side] for side in PAIRS[pair])
    value = point.nmse[pair]
    agreement = "exactly" if value == 0 else f"to {error(value)}"
    return (
        f"divergence at {clean(point.checkpoint)}: {first} and {second} agree {agreement}, {found.sides[point.alone]} is alone"
    )


def _shown(found: ThreeWay) -> list[ThreeWayPoint]:
    """The points that tell most, in dataflow order: where a side is alone, then the embedding, layers and logits."""
    if len(found.points) <= _ROWS:
        return list(found.points)
    ranked = sorted(
        range(len(found.points)),
        key=lambda number: (
            not found.points[number].differs,
            not found.points[number].checkpoint.endswith((".l_out", "embd", "output_norm", "logits")),
            number,
        ),
    )
    return [found.points[number] for number in sorted(ranked[:_ROWS])]


def as_json(found: ThreeWay) -> dict[str, Any]:
    """The answer as one JSON object."""

    def point(made: ThreeWayPoint) -> dict[str, Any]:
        return asdict(made) | {"alone": found.sides[made.alone] if made.alone is not None else None}

    answer = {
        "schema": 1,
        "verdict": "parity" if found else "divergence",
        "sides": list(found.sides),
        "compared": list(found.compared),
        "pairs": [[found.sides[a], found.sides[b]] for a, b in PAIRS],
        "first_divergence": point(found.first) if found.first is not None else None,
        "points": [point(made) for made in found.points],
        "answer": sentence(found),
        "notes": list(found.notes),
    }
    return {key: plain(value) for key, value in answer.items()}
