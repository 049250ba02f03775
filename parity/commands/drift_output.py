"""What `parity drift` prints, and its exit codes."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec.structs import replace

from checkpoints.answers.drift import Drift, Entry, Margin
from checkpoints.errors import InputError
from checkpoints.printable import no_command

from ..drift import ledger
from .options import AnswerFormat, Format
from .output import DIVERGENCE_CODE, PARITY_CODE


def show(drift: Drift, output_format: AnswerFormat, junit: Path | None, summary: Path | None, *, strict: bool) -> int:
    """Print a check's answer, write its JUnit file, append to its summary, and return the exit code."""
    if summary is not None:
        from reports.files import append
        from reports.markdown import drift_as_markdown

        append(drift_as_markdown(drift), summary)
    if junit is not None:
        from reports.files import save
        from reports.junit import drift_as_junit

        save(drift_as_junit(drift), junit)
    if output_format is AnswerFormat.JSON:
        from reports.drift import drift_as_json

        print(json.dumps(drift_as_json(drift)))
    elif output_format is AnswerFormat.JUNIT:
        from reports.junit import drift_as_junit

        print(drift_as_junit(drift), end="")
    elif output_format is AnswerFormat.MARKDOWN:
        from reports.markdown import drift_as_markdown

        print("".join(map(no_command, drift_as_markdown(drift).splitlines(keepends=True))), end="")
    else:
        from rich.console import Console

        from reports.drift import lines
        from reports.header import print_lines

        console = Console()
        print_lines(console, lines(drift, console.width))
        if output_format is AnswerFormat.GITHUB:
            from reports.github import drift_annotations

            print("\n".join(drift_annotations(drift)))
    wrong = not drift and not drift.updated
    return DIVERGENCE_CODE if wrong or (strict and drift.findings) else PARITY_CODE


def show_history(
    folder: Path, book: Path | None, html: Path | None, output_format: Format, *, strict: bool, since: str = "7d"
) -> int:
    """Print a ledger and return the exit code.

    Raises:
        InputError: there is no ledger, or it is empty; `since` is neither a number of days or weeks nor a date.
    """
    begin = _begin(since)
    path = book or folder / ledger.NAME
    from reports.history import closer_sentences, groups

    entries, skipped = ledger.read(path)
    if not entries:
        problem = "has no entry" if path.exists() else "is not there"
        raise InputError(f"{path} {problem}.", "`parity drift check` and `parity conform` write it.", code="ledger")
    findings = last_findings(entries)
    moved = [(label, ledger.closer(group, begin)) for label, group in groups(entries)]
    if html is not None:
        from reports.files import save
        from reports.history_html import history_html

        save(history_html(entries, findings), html)
    if output_format is Format.JSON:
        from reports.history import history_as_json

        print(json.dumps(history_as_json(entries, findings, moved)))
    else:
        from rich.console import Console

        from reports.header import print_lines
        from reports.history import lines
        from reports.layout import labelled

        console = Console()
        print_lines(console, list(lines(entries, console.width)))
        remarks = [("finding", finding) for finding in findings]
        remarks += [("note", ledger.skipped_note(skipped, path))] if skipped else []
        print_lines(console, labelled(remarks, console.width))
        print_lines(console, labelled([("closer", sentence) for sentence in closer_sentences(moved)], console.width))
    return DIVERGENCE_CODE if strict and findings else PARITY_CODE


def _begin(since: str) -> datetime:
    """The time that --since means."""
    try:
        if since[-1:] in ("d", "w"):
            return datetime.now(UTC) - timedelta(days=int(since[:-1]) * (7 if since[-1] == "w" else 1))
        time = datetime.fromisoformat(since)
        return time if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InputError(
            f"--since {since!r} is not a time.",
            "Use a number of days (7d), of weeks (2w), or a date (2026-11-19).",
            code="since",
        ) from None


def last_findings(entries: list[Entry]) -> list[str]:
    """What the latest check of each kind shows, compared with all earlier ones."""
    from reports.history import groups

    sentences: list[str] = []
    for label, group in groups(entries):
        points = [Margin(name, *figures) for name, figures in group[-1].points.items()]
        points = [replace(point, before=ledger.best(group[:-1], point.checkpoint)) for point in points]
        sentences += [f"{label}: {finding}" for finding in ledger.findings(points)]
    return sentences
