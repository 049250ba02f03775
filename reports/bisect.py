"""Which layers are wrong given right inputs, as text and as JSON."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from checkpoints.answers.bisect import NOT_JUDGED, RIGHT, Bisected, JudgedPart
from checkpoints.answers.diff import DIVERGENCE, INCOMPLETE, PARITY
from checkpoints.structs import as_dict

from .as_json import plain
from .layout import columns
from .numbers import clean, count, error, of_limit, ranges


def lines(bisected: Bisected, width: int) -> Iterator[Text]:
    """One row for each wrong part, with its first wrong point; then a sentence on the others."""
    if any(part.point for part in bisected.wrong):
        rows: list[tuple[str, ...]] = [("part", "first wrong point", "worst NMSE", "of limit", "position")]
        rows += [_row(part) for part in bisected.wrong]
        yield from columns(rows, frozenset({2, 3, 4}), ["dim", *["red"] * len(bisected.wrong)], width)
    for part in bisected.parts:
        if part.status == NOT_JUDGED:
            yield Text(f"{clean(part.name)} is not judged: {clean(part.reason)}", style="dim")
    yield from (Text(f"note  {clean(note)}", style="dim") for note in bisected.notes)
    yield Text(sentence(bisected), style="bold")
    yield Text(
        f"{count(bisected.runs, 'run')} of {clean(bisected.engine)}, {bisected.seconds:.1f} s   {clean(bisected.folder)}/",
        style="dim",
    )


def _row(part: JudgedPart) -> tuple[str, ...]:
    share = part.nmse / part.limit if part.nmse is not None and part.limit else float("inf")
    return clean(part.name), clean(part.point), error(part.nmse), of_limit(share), str(part.token_idx)


def sentence(bisected: Bisected) -> str:
    """The answer in one line."""
    if (tokens := next((part for part in bisected.wrong if not part.point), None)) is not None:
        return f"divergence at {clean(tokens.name)}, position {tokens.token_idx}: {clean(tokens.reason)} (no layer was judged)"
    right = sum(part.status == RIGHT for part in bisected.parts)
    judged = right + len(bisected.wrong)
    if not bisected.wrong and judged < len(bisected.parts):
        return (
            f"incomplete: {right} of {len(bisected.parts)} parts are right given llama.cpp's inputs, the others are not judged"
        )
    if not bisected.wrong:
        return f"all {judged} parts are right, given llama.cpp's inputs"
    verb = "are" if len(bisected.wrong) > 1 else "is"
    others = (
        f"the other {right} of {judged} parts are right"
        if right > 1
        else "one other part is right"
        if right
        else "no part is right"
        if judged == len(bisected.parts)
        else "no other part was judged"
    )
    return f"{_named([part.name for part in bisected.wrong])} {verb} wrong given llama.cpp's inputs; {others}"


def _named(wrong: list[str]) -> str:
    """Parts in the order of computation: "embd, layers 1–2 and output"."""
    layers = tuple(int(name.removeprefix("blk.")) for name in wrong if name.startswith("blk."))
    within = [f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"] if layers else []
    others = [name for name in wrong if not name.startswith("blk.") and name != "embd"]
    *first, last = (*(["embd"] if "embd" in wrong else []), *within, *others)
    return f"{', '.join(first)} and {last}" if first else last


def as_json(bisected: Bisected) -> dict[str, Any]:
    """Every part, and the names of the wrong ones."""
    answer = as_dict(bisected) | {
        "schema": 1,
        "verdict": PARITY if bisected else DIVERGENCE if bisected.wrong else INCOMPLETE,
        "wrong": [part.name for part in bisected.wrong],
        "answer": sentence(bisected),
    }
    fields: dict[str, Any] = plain(answer)
    return fields
