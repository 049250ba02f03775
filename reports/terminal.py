"""A verdict as text: one screen, with the answer at its end. Coloured only if the console is."""

from collections.abc import Iterator
from itertools import groupby, pairwise

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from checkpoints.answers.diff import AGREES, FRESH, GROWN, INHERITED, OTHERWISE, UNJUDGED, Difference, PointSummary, Verdict
from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, default_layers, in_layer

from .header import print_lines
from .layout import columns, cut, labelled, needed
from .numbers import clean, count, error, of_limit, token, values
from .sentences import MAP_LINE, RECORDED, answer, headline, reasons, remarks
from .status import status

_ROWS = 24  # rows of points, stretches that are left out included
_STYLE = {AGREES: "", FRESH: "bold red", INHERITED: "red", GROWN: "yellow", OTHERWISE: "yellow", UNJUDGED: "yellow"}
_PLACE = 20  # columns of a position and its token
_REMARK = 8  # columns of the names in front of what holds for parity, too
_LABEL = 16  # columns of the names in front of what explains a divergence


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print the points, then the verdict with what explains it."""
    print_lines(console, lines(verdict, console.width))


def lines(verdict: Verdict, width: int) -> list[Text]:
    """The whole answer, for a terminal of `width` columns."""
    table = points(verdict, width)
    return [*table, *([Text("")] if table else []), *explanation(verdict, width)]


def points(verdict: Verdict, width: int) -> list[Text]:
    """One row per point; of many points the most telling, with one row for each stretch that is left out.

    Notes are never cut: where they do not fit, the number of positions goes first (it is the same nearly everywhere), then the
    tokens' texts, then some words, then the NMSE (its proportion to the limit stays); what is still too long goes on below.
    """
    if not verdict.points:
        return []
    rows: list[tuple[str, ...]] = [("checkpoint", "positions", "worst NMSE", "of limit", "at", "")]
    styles = ["dim"]
    hidden: list[PointSummary] = []
    chosen = _chosen(verdict)
    for number, point in enumerate(verdict.points):
        if number not in chosen:
            hidden.append(point)
            continue
        if hidden:
            rows.append(_stretch(hidden))
            styles.append("dim")
            hidden = []
        rows.append(_point(verdict, point))
        styles.append(_STYLE[point.status])
    if hidden:
        rows.append(_stretch(hidden))
        styles.append("dim")
    right = frozenset({1, 2, 3})
    if needed(rows) > width:
        rows, right = [(row[0], *row[2:]) for row in rows], frozenset({1, 2})
    if needed(rows) > width:
        rows = [(*row[:3], row[3].partition(" ")[0], row[4]) for row in rows]
    if needed(rows) > width:
        rows = [(*row[:4], row[4].replace("first divergence", "first")) for row in rows]
    if needed(rows) > width:
        rows, right = [(row[0], *row[2:]) for row in rows], frozenset({1})
    rows, styles = _continued(rows, styles, width)
    return columns(rows, right, styles, width)


def _continued(rows: list[tuple[str, ...]], styles: list[str], width: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows, with notes that are too long broken at their dots into further rows."""
    room = width - needed([(*row[:-1], "") for row in rows])
    broken: list[tuple[str, ...]] = []
    colours: list[str] = []
    for row, style in zip(rows, styles, strict=True):
        parts = [row[-1]] if cell_len(row[-1]) <= room else _broken(row[-1], room)
        broken += [(*row[:-1], parts[0]), *(("",) * (len(row) - 1) + (part,) for part in parts[1:])]
        colours += [style] * len(parts)
    return broken, colours


def _broken(note: str, room: int) -> list[str]:
    lines: list[str] = []
    for part in note.split(" · "):
        if lines and cell_len(f"{lines[-1]} · {part}") <= room:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def _point(verdict: Verdict, point: PointSummary) -> tuple[str, ...]:
    worst = point.worst
    place = f"{worst.token_idx} {token(worst.token)}".rstrip() if worst.of_limit else ""
    return (
        clean(point.checkpoint),
        str(point.records),
        error(worst.nmse),
        of_limit(worst.of_limit),
        cut(place, _PLACE),
        _remark(verdict, point),
    )


def _stretch(hidden: list[PointSummary]) -> tuple[str, ...]:
    worst = max((point.worst for point in hidden), key=lambda worst_of: worst_of.of_limit)
    failed = sum(point.failed > 0 for point in hidden)
    otherwise = sum(point.status == OTHERWISE for point in hidden)
    words = "agree" if not failed else (INHERITED if failed == len(hidden) else f"{failed} of them wrong")
    if otherwise:
        worst = max(
            (point.worst for point in hidden if point.status != OTHERWISE),
            key=lambda difference: difference.of_limit,
            default=worst,
        )
        words += f", {otherwise} recorded otherwise"
    if unjudged := sum(point.status == UNJUDGED for point in hidden):
        words += f", {unjudged} {UNJUDGED}"
    return (
        f"… {count(len(hidden), 'point')}",
        str(sum(point.records for point in hidden)),
        error(worst.nmse),
        of_limit(worst.of_limit),
        "",
        words,
    )


def _remark(verdict: Verdict, point: PointSummary) -> str:
    words: list[str] = []
    if point.failed:
        origin = any(origin.first.checkpoint == point.checkpoint for origin in verdict.origins)
        words.append(f"{'← ' if origin else ''}{status(verdict, point)}")
        if point.failed < point.records:
            words.append(f"{point.failed} of {point.records} wrong")
    elif point.status == OTHERWISE:
        words += [RECORDED[fault.kind] for fault in verdict.record_faults if fault.checkpoint == point.checkpoint]
    elif point.status == UNJUDGED:
        words.append(UNJUDGED)
    choices = verdict.choices
    if point.checkpoint == LOGITS and choices is not None:
        words.append(f"top-1 {choices.agree}/{choices.known}")
        if choices.kl is not None:
            words.append(f"KL {error(choices.kl)}")
    return " · ".join(words)


def _chosen(verdict: Verdict) -> set[int]:
    """Indices of the points that are shown: the most telling ones, as far as there is room."""
    names = [point.checkpoint for point in verdict.points]
    if len(names) <= _ROWS:
        return set(range(len(names)))
    place = {name: number for number, name in enumerate(names)}
    wanted = [origin.first.checkpoint for origin in verdict.origins[:5]]
    wanted += [shown.checkpoint for shown in (verdict.last_agreement, verdict.worst) if shown is not None]
    wanted += [fault.checkpoint for fault in verdict.record_faults[:4]]
    wanted += [LOGITS, OUTPUT_NORM, EMBD]
    first = place.get(verdict.first_divergence.checkpoint) if verdict.first_divergence else None
    near = [] if first is None else [first + step for step in (-1, 1, -2, 2, -3, 3, 4, 5)]
    layers = max((point.layer or 0 for point in verdict.points), default=0) + 1
    chosen: set[int] = set()
    outputs = [in_layer(layer, "l_out") for layer in default_layers(layers)]
    for number in [*(place.get(name) for name in wanted), *near, *(place.get(name) for name in outputs)]:
        if number is not None and 0 <= number < len(names) and _height(chosen | {number}, len(names)) <= _ROWS:
            chosen.add(number)
    return chosen


def _height(chosen: set[int], total: int) -> int:
    """How many rows these take, with one for each stretch between them."""
    places = sorted({-1, total, *chosen})
    return len(chosen) + sum(b - a > 1 for a, b in pairwise(places))


def explanation(verdict: Verdict, width: int) -> Iterator[Text]:
    """The verdict's line and what explains it."""
    first = verdict.first_divergence
    if first is not None:
        yield Text(headline(verdict), style="bold red")
        yield from labelled(list(reasons(verdict)), width, label=_LABEL, indent=2)
        if first.ours or first.ref:
            yield from _values(first, width, verdict.truth.values if verdict.truth is not None else ())
        if verdict.next:
            yield from labelled([("next", "record these on both sides and run diff again:")], width, label=_LABEL, indent=2)
            wider = f" --slice {verdict.next_slice}" if verdict.next_slice else ""
            yield Text(
                " " * (_LABEL + 2) + f"--points '{clean(verdict.next)}'{wider}", style="bold"
            )  # to be copied: never broken
    lines = list(remarks(verdict))
    for copied, group in groupby(lines, key=lambda row: row[0] == MAP_LINE):
        rows = list(group)
        yield from [Text(f"  {line}", style="bold") for _, line in rows] if copied else labelled(rows, width, label=_REMARK)
    yield Text(answer(verdict), style="bold green" if verdict else "bold red")


def _values(difference: Difference, width: int, truth: tuple[float, ...]) -> list[Text]:
    """As many values as fit around the largest difference: of both sides, and of float64 if it is known."""
    named = {"ours": difference.ours, "ref": difference.ref} | ({"float64": truth} if truth else {})
    tokens = difference.checkpoint == "tokens"
    texts = [[str(int(x)) for x in row] for row in named.values()] if tokens else values(*named.values())
    cell = max((len(text) for row in texts for text in row), default=1) + 2
    room = max(2, (width - _LABEL - 2) // cell)
    longest = max(map(len, texts))
    index = difference.index if difference.index is not None and difference.index < longest else 0
    start = max(0, min(index - room // 2, longest - room))
    base = difference.token_idx if difference.checkpoint == "tokens" else 0
    shown = range(start, min(start + room, longest))
    rows = [
        ("", *(str(base + number) for number in shown)),
        *((name, *(row[n] if n < len(row) else "" for n in shown)) for name, row in zip(named, texts, strict=True)),
    ]
    padded = [(f"  {row[0]}".ljust(_LABEL), *row[1:]) for row in rows]
    return columns(padded, frozenset(range(1, len(rows[0]))), ["dim", *[""] * len(named)], width)
