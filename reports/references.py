"""What other versions of llama.cpp differ by, as text and as JSON."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from checkpoints.answers.references import Moved, MovedPoint, References
from checkpoints.structs import as_dict

from .as_json import plain
from .layout import columns
from .numbers import clean, count, error

_ROWS = 12  # kinds of points that are shown: those that moved most


def lines(references: References, width: int) -> Iterator[Text]:
    """A table of the kinds that moved most for each other reference, and a sentence on it."""
    for moved in references.moved:
        shown = sorted(moved.points, key=lambda point: -point.nmse)[:_ROWS]
        rows: list[tuple[str, ...]] = [("reference moved at", "records", "worst NMSE", "layer", "position")]
        rows += [_row(point) for point in moved.points if point in shown and point.nmse > 0]
        if len(rows) > 1:
            yield from columns(rows, frozenset({1, 2, 3, 4}), ["dim", *[""] * (len(rows) - 1)], width)
        rest = sum(point.nmse > 0 for point in moved.points) - (len(rows) - 1)
        if rest > 0:
            yield Text(f"… {rest} other kinds moved less", style="dim")
        yield Text(sentence(moved), style="bold")
    if references.within:
        yield Text(
            f"our side is nowhere further from the reference than {references.times:g} times the difference between the references",
            style="bold",
        )


def _row(point: MovedPoint) -> tuple[str, ...]:
    layer = "–" if point.layer is None else str(point.layer)
    return clean(point.kind), f"{point.records:,}", error(point.nmse), layer, str(point.token_idx)


def sentence(moved: Moved) -> str:
    """What moved, in one line."""
    pair = f"{clean(moved.other)} and {clean(moved.base)}"
    lacking = f"; {count(len(moved.missing), 'point')} only in {clean(moved.base)}" if moved.missing else ""
    if moved.worst is None:
        alike = (
            "; both were compiled for the same instructions: they may be the same library" if moved.same_instructions else ""
        )
        return f"references: {pair} are identical in {moved.compared:,} records{lacking}{alike}"
    first = f", first at {clean(moved.first.kind)}" if moved.first is not None else ""
    floor = "" if moved.rounding else "; more than rounding explains: a different formula, which excuses nothing in your engine"
    where = f"{clean(moved.worst.kind)} by {error(moved.worst.nmse)}"
    return f"references: between {pair} the reference moved at {where}{first}{floor}{lacking}"


def as_json(references: References) -> dict[str, Any]:
    """Everything, with the sentences."""
    moved = [as_dict(reference) | {"answer": sentence(reference)} for reference in references.moved]
    answer: dict[str, Any] = plain(as_dict(references) | {"moved": moved})
    return answer
