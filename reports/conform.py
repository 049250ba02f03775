"""A conformance run as text, JSON and Markdown: one letter per cell, one line per cause."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from checkpoints.answers.conform import (
    CRASHED,
    DIVERGENCE,
    LOWER,
    NO_REFERENCE,
    PARITY,
    REFUSED,
    TIMED_OUT,
    UNDECIDED,
    UNUSABLE,
    CellResult,
    Conformance,
    SharedCause,
    axis,
)

from .as_json import plain
from .layout import labelled
from .numbers import clean, count, error

# Verdict -> its letter and what it says, the worst first: a place of the screen shows the worst of its prompts and modes.
LETTERS = {
    CRASHED: ("!", "crashed"),
    TIMED_OUT: ("t", "timed out"),
    DIVERGENCE: ("✗", "divergence"),
    UNUSABLE: ("?", "unusable dump"),
    UNDECIDED: ("~", "undecided: its arithmetic's noise is as large as the values"),
    LOWER: ("h", "parity in a lower arithmetic"),
    PARITY: ("✓", "parity"),
    REFUSED: ("–", "refused"),
    NO_REFERENCE: ("·", "llama.cpp has no such model"),
}
_STYLE = {
    CRASHED: "bold red",
    TIMED_OUT: "bold red",
    DIVERGENCE: "bold red",
    UNUSABLE: "red",
    UNDECIDED: "yellow",
    LOWER: "yellow",
    PARITY: "green",
}
_CAUSES = 8  # lines of causes on a screen; --format json and the report list all
_LISTED = 4  # names in one of them


def kind(verdict: str) -> str:
    """The verdict without the arithmetic."""
    return LOWER if verdict.startswith(LOWER) else verdict


def lines(conformance: Conformance, width: int) -> Iterator[Text]:
    """Everything that a terminal shows of a run."""
    yield from matrix(conformance, width)
    yield Text("")
    for number, cause in enumerate(conformance.causes[:_CAUSES]):
        yield from labelled([("causes" if not number else "", clean(cause_line(cause, conformance)))], width, label=8)
    if len(conformance.causes) > _CAUSES:
        yield from labelled([("", f"and {len(conformance.causes) - _CAUSES} more (--format json lists them)")], width, label=8)
    if refusals := _refusals(conformance):
        yield from labelled([("refused", refusals)], width, label=9)
    yield Text(
        summary(conformance),
        style="bold green" if conformance and conformance.counts[PARITY] else "bold red" if not conformance else "",
    )


def matrix(conformance: Conformance, width: int) -> Iterator[Text]:
    """Architectures down, types across: the worst verdict of each place, and below what the letters stand for."""
    types = axis(conformance.results, "type")
    names = axis(conformance.results, "architecture")
    if not types:
        return
    first = max(len(name) for name in names)
    for number, block in enumerate(_blocks(types, width - first)):
        if number:
            yield Text("")
        yield Text(" " * first + "".join(f"{_GAP}{name:>{_LEAST}}" for name in block), style="dim")
        for name in names:
            line = Text(f"{clean(name):<{first}}")
            for column in block:
                worst = worst_of(conformance, name, column)
                line.append(" " * (_column(column) - 1))
                line.append(LETTERS[worst][0] if worst else " ", style=_STYLE.get(worst, "dim"))
            line.rstrip()
            yield line
    yield Text(" · ".join(legend(conformance)), style="dim")


_GAP = "  "
_LEAST = 4


def _column(name: str) -> int:
    return len(_GAP) + max(_LEAST, len(name))


def _blocks(types: Sequence[str], room: int) -> list[list[str]]:
    """The types of each block: as many as fit beside each other."""
    blocks: list[list[str]] = [[]]
    for name in types:
        if blocks[-1] and sum(map(_column, [*blocks[-1], name])) > room:
            blocks.append([])
        blocks[-1].append(name)
    return blocks


def worst_of(conformance: Conformance, architecture: str, type_name: str) -> str:
    """The verdict that a place of the screen shows; "" where no cell was run."""
    here = {kind(r.verdict) for r in conformance.results if (r.cell.architecture, r.cell.type) == (architecture, type_name)}
    return next((name for name in LETTERS if name in here), "")


def legend(conformance: Conformance) -> list[str]:
    """What the letters that occur stand for."""
    seen = {kind(result.verdict) for result in conformance.results}
    return [f"{letter} {words}" for name, (letter, words) in reversed(LETTERS.items()) if name in seen]


def cause_line(cause: SharedCause, conformance: Conformance) -> str:
    """One cause in a line: what, how many cells, which."""
    parts = (_axis(name, [str(getattr(cell, name)) for cell in cause.cells], conformance) for name in _AXES)
    return " · ".join([f"{cause.cause}: {count(len(cause.cells), 'cell')}", *filter(None, parts)])


_AXES = {"architecture": "all architectures", "type": "all types", "prompt": "", "mode": ""}


def _axis(name: str, values: Sequence[str], conformance: Conformance) -> str:
    """The values of an axis in words; empty if it has only one."""
    here = list(dict.fromkeys(values))
    every = axis(conformance.results, name)
    if len(here) == len(every):
        return "" if len(every) == 1 else _AXES[name]
    if name == "architecture" and (rope := _rope_of(here, conformance)):
        return f"all {rope} architectures"
    shown = ", ".join(here[:_LISTED]) + (f" and {len(here) - _LISTED} more" if len(here) > _LISTED else "")
    return shown if name in ("architecture", "type") else f"{name} {shown}"


def _rope_of(architectures: Sequence[str], conformance: Conformance) -> str:
    """The kind of RoPE that exactly these of the compared architectures have; "" if there is none, or only one of them has it."""
    kinds = {result.cell.architecture: result.rope for result in conformance.results if result.compared}
    kind = kinds.get(architectures[0], "")
    alike = {name for name, rope in kinds.items() if rope == kind}
    return kind if kind and len(alike) > 1 and alike == set(architectures) and len(alike) < len(kinds) else ""


def _refusals(conformance: Conformance) -> str:
    reasons: dict[str, int] = {}
    for result in conformance.results:
        if result.verdict == REFUSED:
            reasons[clean(result.reason)] = reasons.get(clean(result.reason), 0) + 1
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    listed = " · ".join(f"{reason.rstrip('.')} ({count(number, 'cell')})" for reason, number in ranked[:3])
    return listed + (f" · {len(ranked) - 3} other reasons" if len(ranked) > 3 else "")


def nothing_compared(conformance: Conformance) -> str:
    """Why a run in which nothing failed says nothing: whether the engine refused every cell, and why."""
    refused = [result for result in conformance.results if result.verdict == REFUSED]
    if len(refused) < len(conformance.results):
        return f"nothing was compared: {outcome(conformance.results[0]).rstrip('.')}."
    reasons = {clean(result.reason.rstrip(".")) for result in refused}
    words = refused[0].reason.rstrip(".") if len(reasons) == 1 else f"{len(reasons)} reasons, e.g. {min(reasons)}"
    cells = "its only cell" if len(refused) == 1 else f"all {count(len(refused), 'cell')}"
    return clean(f"the engine refused {cells}, so nothing was compared: {words}.")


def summary(conformance: Conformance) -> str:
    """Counts, time, and where the report lies."""
    counts: dict[str, int] = {}
    for verdict, number in conformance.counts.items():
        counts[kind(verdict)] = counts.get(kind(verdict), 0) + number
    parts = [
        f"{counts[name]} {LETTERS[name][0]}"
        for name in (PARITY, LOWER, DIVERGENCE, CRASHED, TIMED_OUT, UNUSABLE)
        if name in counts
    ]
    parts += [
        f"{counts[name]} {words}"
        for name, words in ((UNDECIDED, "undecided"), (REFUSED, "refused"), (NO_REFERENCE, "without a reference"))
        if name in counts
    ]
    if conformance.not_run:
        parts.append(f"{len(conformance.not_run)} not run")
    sentence = f"{count(len(conformance.results), 'cell')}: {', '.join(parts)}"
    kept = f", {conformance.kept} kept from before" if conformance.kept else ""
    if conformance.unkept:
        kept += f", {conformance.unkept} not kept since a file of the engine changed meanwhile"
    workers = f", {conformance.workers} workers" if conformance.workers > 1 else ""
    return f"{sentence} · {conformance.seconds:.0f} s{workers}{kept} · {conformance.folder}/index.html"


def first_failure(result: CellResult) -> str:
    """A failing cell in one line, shown as soon as it is found."""
    return f"{result.cell.name}: {outcome(result)}"


def outcome(result: CellResult) -> str:
    """The result of a cell, in one line."""
    if result.verdict == DIVERGENCE:
        place = f" at {result.checkpoint}, position {result.token_idx}" if result.checkpoint else ""
        return clean(f"divergence{place}{f' ({result.cause})' if result.cause else ''}")
    if result.reason:
        return clean(f"{result.verdict}: {result.reason}")
    return clean(f"{result.verdict}, {result.compared} records, worst NMSE {error(result.nmse)} at {result.worst}")


def as_json(conformance: Conformance) -> dict[str, Any]:
    """Every cell, and every cause with its cells."""
    return {
        "schema": 1,
        "verdict": "conforms" if conformance else "fails",
        "side": conformance.side,
        "counts": dict(conformance.counts),
        "cells": [_cell(result) for result in conformance.results],
        "causes": [
            {"cause": cause.cause, "sentence": cause.sentence, "cells": [cell.name for cell in cause.cells]}
            for cause in conformance.causes
        ],
        "not_run": [cell.name for cell in conformance.not_run],
        "kept": conformance.kept,
        "workers": conformance.workers,
        "seconds": round(conformance.seconds, 3),
        "folder": conformance.folder,
    }


def _cell(result: CellResult) -> dict[str, Any]:
    facts = plain(result.as_dict())
    place = {"checkpoint": facts.pop("checkpoint"), "token_idx": facts.pop("token_idx")}
    return {**facts, "first_divergence": place if place["checkpoint"] else None}


def markdown(conformance: Conformance) -> str:
    """For a job summary or a pull request; ends with a line break."""
    types = axis(conformance.results, "type")
    rows = [f"| | {' | '.join(types)} |", f"|---|{':-:|' * len(types)}"]
    for name in axis(conformance.results, "architecture"):
        letters = [LETTERS[worst][0] if (worst := worst_of(conformance, name, column)) else "" for column in types]
        rows.append(f"| {clean(name)} | {' | '.join(letters)} |")
    causes = [f"- `{clean(cause_line(cause, conformance)).replace('`', chr(39))}`" for cause in conformance.causes]
    head = "## Conformance: " + (
        "nothing is wrong" if conformance else f"{sum(r.wrong for r in conformance.results)} cells fail"
    )
    return "\n".join(
        [head, "", *rows, "", " · ".join(legend(conformance)), *([""] if causes else []), *causes, "", summary(conformance), ""]
    )
