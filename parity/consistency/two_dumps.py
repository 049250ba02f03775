"""Two finished dumps of one engine, which computed the same tokens in different portions: each sequence is compared by itself."""

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.consistency import Check, Consistency
from checkpoints.errors import DumpError
from checkpoints.formats import load
from checkpoints.record import Dump, Header, Rows

from ..diff.compare import compare
from ..run.request import Request
from ..run.session import comparison_options
from .suspects import BATCH, MORE_POINTS, OTHERS, among_others, first_to_differ, suspected
from .ways import portions_text, starts_of

HOW_TO_STEP = 'Record the number of the pass: "step" in a line, parity_pass in C.'


def two_dumps(run: Request, left: Path, right: Path) -> Consistency:
    """Two dumps of an external engine over the same tokens, computed in different portions.

    Raises:
        DumpError: a dump cannot be read, or both were computed in the same portions.
    """
    a, b = (stated(load(path, run.mapping), run.compute) for path in (left, right))
    in_left, in_right = (_portions(dump) for dump in (a, b))
    of_all = [_together(dump) for dump in (a, b)]  # sequences one by one or in one batch: of each the portions are the same
    if in_left == in_right and of_all[0] == of_all[1]:
        each = " and ".join(dict.fromkeys(map(portions_text, in_left.values())))
        raise DumpError(
            f"{left.name} and {right.name} were computed in the same portions ({each}).",
            f"Dump once with the prompt in one pass and once with decode steps or chunks. {HOW_TO_STEP}",
            code="portions",
        )
    both = sorted(in_left.keys() & in_right.keys())
    options = comparison_options(run)
    if len(both) < 2:
        verdicts = {number: compare(a, b, options) for number in both or [0]}
    else:
        verdicts = {number: compare(_of(a, number), _of(b, number), options) for number in both}
    agreeing = [number for number, verdict in verdicts.items() if verdict]
    checks = []
    for number, verdict in verdicts.items():
        before, after = in_left.get(number, []), in_right.get(number, [])
        suspect, reason = suspected(verdict, starts_of(max(before, after, key=len)), MORE_POINTS)
        others = [other for other in both if other != number]
        exchanged = [other for other in others if suspect and compare(_of(a, number), _of(b, other, number), options)]
        if exchanged:
            suspect = OTHERS
            reason = f"what {left.name} has here, {right.name} has of sequence {exchanged[0]}: they are numbered differently"
        elif suspect and (before == after or (others and (agreeing or suspect == BATCH))):
            suspect, reason = among_others(verdict, agreeing)
        shown = [portions_text(portions) for portions in (of_all if before == after else (before, after))]
        title = f"{left.name} ({shown[0]}) against {right.name} ({shown[1]})"
        name = f"sequence {number}" if others else "two dumps"
        checks.append(Check(name, title, verdict, suspect, reason, first_to_differ(verdict)))
    source = next((dump.header.source for dump in (a, b) if dump.header is not None and dump.header.source), "")
    alone = sorted(in_left.keys() ^ in_right.keys())
    not_checked = [f"sequence {number}: only one of the dumps has it" for number in alone]
    if len(both) < 2:
        not_checked.append("padding and batches: dump these and compare them with `parity diff`")
    return Consistency(source or "a foreign engine", tuple(checks), tuple(not_checked))


def stated(dump: Dump, compute: str | None) -> Dump:
    """The dump with what --compute says of its engine: both dumps are of the same one."""
    if compute is None:
        return dump
    return replace(dump, header=replace(dump.header or Header(""), compute=compute))


def passes_of(dump: Dump) -> list[int]:
    """How many positions each forward pass of the first sequence had, in order."""
    return next(iter(_portions(dump).values()))


def _portions(dump: Dump) -> dict[int, list[int]]:
    """How many positions each forward pass had, in order, by sequence: from the point with the most records."""
    rows = _longest(dump)
    return {
        int(number): [int(n) for n in np.unique(rows.step[rows.seq == number], return_counts=True)[1]]
        for number in np.unique(rows.seq)
    }


def _together(dump: Dump) -> list[int]:
    """How many positions of all sequences each forward pass had, in order."""
    return [int(n) for n in np.unique(_longest(dump).step, return_counts=True)[1]]


def _longest(dump: Dump) -> Rows:
    return max(dump.points.values(), key=len)


def _of(dump: Dump, number: int, called: int | None = None) -> Dump:
    """The records of one sequence, under its own number or another."""
    points = {name: rows.take(np.flatnonzero(rows.seq == number)) for name, rows in dump.points.items()}
    points = {name: rows for name, rows in points.items() if len(rows)}
    if called is not None:
        points = {name: replace(rows, seq=np.full_like(rows.seq, called)) for name, rows in points.items()}
    return replace(dump, points=points)
