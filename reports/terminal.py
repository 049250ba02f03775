"""A verdict as text: one screen, the answer last, every line earns its place. Colour only where the console has it."""

from collections.abc import Iterator
from itertools import pairwise

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, default_layers, in_layer
from checkpoints.record import Header
from checkpoints.verdict import AGREES, FRESH, GROWN, INHERITED, Difference, Missing, PointSummary, Verdict

from .numbers import clean, count, error, limit, of_limit, ranges, token, values

_ROWS = 24  # rows of points, stretches that are left out included
_STYLE = {AGREES: "", FRESH: "bold red", INHERITED: "red", GROWN: "yellow"}
_LABEL = 16  # columns of the names in front of what explains a divergence


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print the points, then the verdict with what explains it."""
    if verdict.points:
        console.print(points(verdict), highlight=False)
        console.print()
    for block in explanation(verdict, console.width):
        # What is to be copied is never broken into lines.
        console.print(block, highlight=False, soft_wrap=isinstance(block, Text))


def print_header(console: Console, ours: Header | None, ref: Header | None) -> None:
    """Print which model, tokens and sides are compared."""
    rows = list(_header(ours, ref))
    if rows:
        console.print(_grid(rows), highlight=False)
        console.print()


def _header(ours: Header | None, ref: Header | None) -> Iterator[tuple[str, Text]]:
    either = ref or ours
    if either is None:
        return
    model = either.model
    shape = ", ".join(
        part for part in (clean(model.architecture), count(model.layers, "layer") if model.layers else "") if part
    )
    named = " · ".join(part for part in (clean(model.name), shape, clean(model.file_type)) if part)
    if named:
        yield "model", Text(named)
    if either.tokens:
        pieces = clean("".join(either.pieces))
        text = f"{len(either.tokens)}  {pieces if len(pieces) <= 60 else pieces[:59] + '…'}"
        yield "tokens", Text(text.rstrip())
    for name, side in (("ours", ours), ("ref", ref)):
        if side is not None:
            yield name, Text(_side(side))
        else:
            yield name, Text("no header: source, model and arithmetic are not known")


def _side(side: Header) -> str:
    build = side.build
    shown = [build.get(key) for key in ("version", "backend", "device")]
    threads = build.get("threads")
    made = [
        " ".join(clean(str(part)) for part in (side.source, shown[0]) if part),
        " ".join(dict.fromkeys(clean(str(part)) for part in shown[1:] if part)),
        count(threads, "thread") if isinstance(threads, int) else "",
        clean(side.compute),
        f"KV {clean(side.kv_type)}" if side.kv_type else "",
    ]
    return " · ".join(part for part in made if part)


def points(verdict: Verdict) -> Table:
    """One row a point; of many points the telling ones, and a row for each stretch that is left out."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("positions", justify="right", no_wrap=True)
    table.add_column("worst NMSE", justify="right", no_wrap=True)
    table.add_column("of limit", justify="right", no_wrap=True)
    table.add_column("at", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    hidden: list[PointSummary] = []
    chosen = _chosen(verdict)
    for number, point in enumerate(verdict.points):
        if number not in chosen:
            hidden.append(point)
            continue
        _stretch(table, hidden)
        hidden = []
        worst = point.worst
        place = f"{worst.token_idx} {token(worst.token)}".rstrip() if worst.of_limit else ""
        table.add_row(
            clean(point.checkpoint),
            str(point.records),
            error(worst.nmse),
            of_limit(worst.of_limit),
            place,
            _remark(verdict, point),
            style=_STYLE[point.status],
        )
    _stretch(table, hidden)
    return table


def _stretch(table: Table, hidden: list[PointSummary]) -> None:
    if not hidden:
        return
    worst = max((point.worst for point in hidden), key=lambda found: found.of_limit)
    failed = sum(point.failed > 0 for point in hidden)
    said = "agree" if not failed else (INHERITED if failed == len(hidden) else f"{failed} of them wrong")
    table.add_row(
        f"… {count(len(hidden), 'point')}",
        str(sum(point.records for point in hidden)),
        error(worst.nmse),
        of_limit(worst.of_limit),
        "",
        said,
        style="dim",
    )


def _remark(verdict: Verdict, point: PointSummary) -> str:
    said: list[str] = []
    if point.failed:
        first = verdict.first_divergence
        origins = {origin.first.checkpoint for origin in verdict.origins}
        if first is not None and first.checkpoint == point.checkpoint:
            said.append("← first divergence")
        elif point.checkpoint in origins:
            said.append("← another origin")
        elif point.status == FRESH:
            said.append("jumps again")
        else:
            said.append(INHERITED)
        if point.failed < point.records:
            said.append(f"{point.failed} of {point.records} wrong")
    choices = verdict.choices
    if point.checkpoint == LOGITS and choices is not None:
        said.append(f"top-1 {choices.agree}/{choices.known}")
        if choices.kl is not None:
            said.append(f"KL {error(choices.kl)}")
    return " · ".join(said)


def _chosen(verdict: Verdict) -> set[int]:
    """Indices of the points that are shown, the telling ones first while there is room."""
    names = [point.checkpoint for point in verdict.points]
    if len(names) <= _ROWS:
        return set(range(len(names)))
    place = {name: number for number, name in enumerate(names)}
    wanted = [origin.first.checkpoint for origin in verdict.origins[:5]]
    wanted += [found.checkpoint for found in (verdict.last_agreement, verdict.worst) if found is not None]
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
    """Rows that these take, one for each stretch between them included."""
    places = sorted({-1, total, *chosen})
    return len(chosen) + sum(b - a > 1 for a, b in pairwise(places))


def explanation(verdict: Verdict, width: int) -> Iterator[RenderableType]:
    """The verdict's line and what explains it."""
    first = verdict.first_divergence
    if first is not None:
        place = f"position {first.token_idx} {token(first.token)}".rstrip()
        yield Text(f"divergence at {clean(first.checkpoint)}, {place}", style="bold red")
        rows = list(_reasons(verdict))
        if rows:
            yield Padding(_grid(rows, label=_LABEL), (0, 0, 0, 2))
        if first.ours or first.ref:
            yield Padding(_both(first, width - 2), (0, 0, 0, 2))
        if verdict.next:
            yield Padding(_grid([("next", Text("record these on both sides and run diff again:"))], label=_LABEL), (0, 0, 0, 2))
            yield Text(" " * (_LABEL + 2) + f"--points '{clean(verdict.next)}'", style="bold")
    rest = list(_remarks(verdict))
    if rest:
        yield _grid(rest)
    mode = f"{verdict.mode} mode, " if verdict.mode else ""
    held = f"{mode}limit {limit(verdict.limits.operations)}"
    if verdict.limits.logits != verdict.limits.operations:
        held += f", logits {limit(verdict.limits.logits)}"
    if verdict.limits.assumed:
        held += " (assumed)"
    if verdict:
        yield Text(f"parity: {verdict.compared:,} of {count(verdict.compared, 'record')} agree, {held}", style="bold green")
    else:
        wrong = sum(point.failed for point in verdict.points)
        what = (
            f"{wrong:,} of {count(verdict.compared, 'record')} differ"
            if wrong
            else (f"{count(verdict.compared, 'record')} compared" if first is not None else "records are missing")
        )
        yield Text(f"divergence: {what}, {held}", style="bold red")


def _reasons(verdict: Verdict) -> Iterator[tuple[str, Text]]:
    found = verdict.last_agreement
    if found is not None and verdict.first_divergence is not None:
        where = (
            f"all {count(found.positions, 'position')}" if found.whole else f"its first {count(found.positions, 'position')}"
        )
        between = _between(found.checkpoint, verdict.first_divergence)
        yield "last agreement", Text(f"{clean(found.checkpoint)}, {where}{between}")
    if verdict.operation:
        yield "operation", Text(clean(verdict.operation), style="bold")
    if verdict.pattern is not None:
        yield "pattern", Text(clean(verdict.pattern.sentence))
    for origin in verdict.origins[1:4]:
        said = f"{clean(origin.first.checkpoint)}, {'position' if len(origin.positions) == 1 else 'positions'} "
        yield "also wrong", Text(f"{said}{ranges(origin.positions)}: not caused by the first")
    if len(verdict.origins) > 4:
        yield "", Text(f"and {count(len(verdict.origins) - 4, 'further point')} of origin")


def _between(last: str, first: Difference) -> str:
    from checkpoints.points import parse

    before, after = parse(last).layer, first.layer
    if last == EMBD:
        before = -1
    if before is None or after is None or after <= before:
        return ""
    low = before + 1 if parse(last).kind == "l_out" or last == EMBD else before
    return f": the fault lies in layer {after}" if low == after else f": the fault lies in layers {low} to {after}"


def _both(found: Difference, width: int) -> Table:
    """The values of both sides around the largest difference, as many as fit."""
    if found.checkpoint == "tokens":
        mine, theirs = [[str(int(x)) for x in row] for row in (found.ours, found.ref)]
    else:
        mine, theirs = values(found.ours, found.ref)
    cell = max((len(text) for text in (*mine, *theirs)), default=1) + 2
    room = max(2, (width - _LABEL) // cell)
    longest = max(len(mine), len(theirs))
    index = found.index if found.index is not None and found.index < longest else 0
    start = max(0, min(index - room // 2, longest - room))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", width=_LABEL - 2, no_wrap=True)
    base = found.token_idx if found.checkpoint == "tokens" else 0
    shown = range(start, min(start + room, longest))
    for number in shown:
        table.add_column(str(base + number), justify="right", no_wrap=True)
    for name, row in (("ours", mine), ("ref", theirs)):
        table.add_row(name, *(row[number] if number < len(row) else "" for number in shown))
    return table


def _remarks(verdict: Verdict) -> Iterator[tuple[str, Text]]:
    for side, lacks in (("ours", verdict.missing_ours), ("the reference", verdict.missing_ref)):
        if lacks.records:
            yield "missing", Text(f"{side} lacks {count(lacks.records, 'record')}: {_lacking(lacks)}")
    if verdict.left_out:
        yield "left out", Text(f"{count(verdict.left_out, 'record')} after the tokens part")
    choices = verdict.choices
    if choices is not None and choices.differs_at is not None:
        said = f"after position {choices.differs_at} ours chooses {choices.ours_id}, the reference {choices.ref_id}"
        margin = f" (its margin: {choices.differs_margin:.2g})" if choices.differs_margin is not None else ""
        yield "first choice", Text(said + margin)
    if verdict.limits.assumed:
        yield "limit", Text(verdict.limits.source)
    for note in verdict.notes:
        yield "note", Text(clean(note))


def _lacking(lacks: Missing) -> str:
    said: list[str] = []
    if lacks.points:
        listed = ", ".join(clean(name) for name in lacks.points[:3])
        said.append(listed + (f" and {count(len(lacks.points) - 3, 'further point')}" if len(lacks.points) > 3 else ""))
    if lacks.positions:
        said.append(f"positions {ranges(lacks.positions)}" + (" of common points" if lacks.points else ""))
    return "; ".join(said)


def _grid(rows: list[tuple[str, Text]], *, label: int = 8) -> Table:
    """Names in a first column, sentences wrapped beside them; a name that repeats is printed once."""
    label = max(label, *(len(name) + 2 for name, _ in rows))
    table = Table.grid(padding=(0, 0))
    table.add_column(width=label, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    before = ""
    for name, text in rows:
        table.add_row("" if name == before else name, text)
        before = name
    return table
