"""The result of comparing an engine with itself, as text and as JSON."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from checkpoints.answers.consistency import Check, Consistency

from .as_json import verdict_as_json
from .layout import columns, labelled, needed
from .numbers import clean, count, error, limit
from .sentences import as_far_as_it_goes


def lines(consistency: Consistency, width: int) -> Iterator[Text]:
    """The whole answer, for a terminal of `width` columns."""
    yield from labelled([("engine", clean(consistency.engine))], width)
    yield Text("")
    rows: list[tuple[str, ...]] = [("check", "records", "worst NMSE", "result", "bits first differ at", "computed as")]
    rows += [_row(check) for check in consistency.checks]
    styles = ["dim", *("" if check.verdict is None or check.verdict else "bold red" for check in consistency.checks)]
    below: list[tuple[str, str]] = []
    if needed(rows) > width:  # no sentence is cut: they go below the table
        below = [(row[0], row[-1]) for row in rows[1:]]
        rows = [row[:-1] for row in rows]
    yield from columns(rows, frozenset({1, 2}), styles, width)
    if below:
        yield Text("")
        yield from labelled(below, width)
    yield Text("")
    for check in consistency.checks:
        if check.suspect:
            yield from labelled([("suspect", f"{check.suspect}: {clean(check.reason)} [{check.name}]")], width)
    yield from labelled([("not checked", clean(reason)) for reason in consistency.not_checked], width)
    yield _answer(consistency)


def _row(check: Check) -> tuple[str, ...]:
    if check.verdict is None:
        return (check.name, "–", "–", "not made", "", clean(check.reason))
    worst = check.verdict.worst
    answer = "agrees" if check.verdict else "differs"
    figures = f"{check.verdict.compared:,}", error(worst.nmse if worst else 0.0)
    return (check.name, *figures, answer, clean(check.differs) or "–", clean(check.what))


def _answer(consistency: Consistency) -> Text:
    failed = [check for check in consistency.checks if check.verdict is not None and not check.verdict]
    compared = [check for check in consistency.checks if check.verdict is not None]
    judged_by = (
        f", limit {limit(compared[0].verdict.limits.operations)}" if compared and compared[0].verdict is not None else ""
    )
    if failed:
        names = ", ".join(check.name for check in failed)
        return Text(f"inconsistent: {names} ({len(failed)} of {count(len(compared), 'check')}){judged_by}", style="bold red")
    far = next((far for check in compared if check.verdict is not None and (far := as_far_as_it_goes(check.verdict))), "")
    assumed = any(check.verdict is not None and check.verdict.limit_assumed for check in compared)
    far += " (limit assumed: --compute f32 judges exactly)" if assumed else ""
    return Text(f"consistent{far}: {count(len(compared), 'check')}{judged_by}", style="bold green")


def as_json(consistency: Consistency) -> dict[str, Any]:
    """Every check with its whole verdict."""
    return {
        "schema": 1,
        "verdict": "consistent" if consistency else "inconsistent",
        "engine": consistency.engine,
        "checks": [
            {
                "name": check.name,
                "what": check.what,
                "suspect": check.suspect,
                "reason": check.reason,
                "first_to_differ": check.differs,
                "diff": None if check.verdict is None else verdict_as_json(check.verdict),
            }
            for check in consistency.checks
        ],
        "not_checked": list(consistency.not_checked),
    }
