"""What commands print: the answer on stdout, progress on stderr and only to a terminal."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .commands.options import AnswerFormat, Format

if TYPE_CHECKING:
    from rich.text import Text

    from checkpoints.explanation import Explanation
    from checkpoints.finding import LintReport
    from checkpoints.picture import Picture
    from checkpoints.record import Dump
    from checkpoints.verdict import Verdict
    from reference.jobs import Tokens
    from reports.findings import Finding
    from reports.report import Report

    from .session import Outcome, Progress

PARITY_CODE = 0
DIVERGENCE_CODE = 1


def finish(outcome: "Outcome", form: Format) -> int:
    """Print a run's answer, write diff.json beside the dumps, and return the exit code."""
    from reports.as_json import verdict_as_json
    from reports.html import write_html

    answer = verdict_as_json(outcome.verdict) | {"folder": str(outcome.folder), "seconds": round(outcome.seconds, 3)}
    (outcome.folder / "diff.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    code = show(outcome.verdict, outcome.ours, outcome.ref, form, extra=answer)
    # The answer is on the screen before the report is drawn.
    write_html(report(outcome.verdict, outcome.ours, outcome.ref, outcome.picture), outcome.folder / "report.html")
    if form is Format.TEXT:
        files = "  ".join(path.name for path in sorted(outcome.folder.iterdir(), reverse=True) if path.is_file())
        print(f"{outcome.folder}/  {files}   {outcome.seconds:.1f} s")
    return code


def report(verdict: "Verdict", ours: "Dump", ref: "Dump", picture: "Picture", found: "Sequence[Finding]" = ()) -> "Report":
    """A comparison with everything that belongs beside it."""
    from reports.report import Report

    return Report(verdict, ours, ref, picture, tuple(found))


def findings(paths: Sequence[Path]) -> "list[Finding]":
    """JSON answers of other commands as parts of a report.

    Raises:
        InputError: a file cannot be read, or is no such answer.
    """
    from checkpoints.errors import InputError
    from reports.findings import finding

    made: list[Finding] = []
    for path in paths:
        try:
            made.append(finding(json.loads(path.read_text(encoding="utf-8")), str(path)))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}.", "Check --include.", code="include") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON.", "Write one with --format json > FILE.", code="include") from error
    return made


def show_report(whole: "Report", form: AnswerFormat, *, html: Path | None, junit: Path | None) -> int:
    """Print a comparison's answer in any of CI's formats, write the files that were asked for, return the exit code."""
    from reports.files import save
    from reports.html import write_html

    if html is not None:
        write_html(whole, html)
    if junit is not None or form is AnswerFormat.JUNIT:
        from reports.junit import junit as as_junit

        text = as_junit(whole.verdict)
        if junit is not None:
            save(text, junit)
        if form is AnswerFormat.JUNIT:
            print(text, end="")
    if form is AnswerFormat.MARKDOWN:
        from reports.markdown import markdown

        print(markdown(whole), end="")
    elif form is not AnswerFormat.JUNIT:
        show(whole.verdict, whole.ours, whole.ref, Format.JSON if form is AnswerFormat.JSON else Format.TEXT)
    if form is AnswerFormat.GITHUB:
        from reports.github import annotations

        print("\n".join(annotations(whole.verdict)))
    return PARITY_CODE if whole.verdict else DIVERGENCE_CODE


def show(verdict: "Verdict", ours: "Dump", ref: "Dump", form: Format, extra: Mapping[str, Any] | None = None) -> int:
    """Print a comparison's answer and return the exit code."""
    if form is Format.JSON:
        from reports.as_json import verdict_as_json

        print(json.dumps(verdict_as_json(verdict) | dict(extra or {})))
    else:
        from rich.console import Console

        from reports.header import print_header
        from reports.terminal import print_verdict

        console = Console()
        print_header(console, ours.header, ref.header, "".join(token.text for token in ref.tokens))
        print_verdict(console, verdict)
    return PARITY_CODE if verdict else DIVERGENCE_CODE


class Report(Protocol):
    """A room of `reports` that shows one kind of answer."""

    def lines(self, found: Any, width: int) -> Iterable["Text"]:
        """As text, for a terminal of `width` columns."""

    def as_json(self, found: Any) -> dict[str, Any]:
        """As one JSON object."""


def answer(found: Any, report: Report, form: Format) -> int:
    """Print an answer that is true where nothing is wrong, and return the exit code."""
    if form is Format.JSON:
        print(json.dumps(report.as_json(found)))
    else:
        from rich.console import Console

        from reports.header import print_lines

        console = Console()
        print_lines(console, list(report.lines(found, console.width)))
    return PARITY_CODE if found else DIVERGENCE_CODE


def show_lint(report: "LintReport", form: Format) -> int:
    """Print a lint report and return the exit code: 0 clean, 1 findings."""
    from reports.lint import lint_as_json, print_lint

    if form is Format.JSON:
        print(json.dumps(lint_as_json(report)))
    else:
        from rich.console import Console

        print_lint(Console(), report)
    return PARITY_CODE if report else DIVERGENCE_CODE


def explained(found: "Explanation", form: Format) -> int:
    """Print what `parity explain` found and return the exit code."""
    from reports.explanation import explanation_as_json, print_explanation

    if form is Format.JSON:
        print(json.dumps(explanation_as_json(found)))
    else:
        from rich.console import Console

        print_explanation(Console(), found)
    return PARITY_CODE if found else DIVERGENCE_CODE


def catalogue_as(form: Format) -> None:
    """Print the catalogue of known faults."""
    from engine.faults import CATALOGUE

    if form is Format.JSON:
        faults = [
            {"fault": fault.name, "group": fault.group, "symptom": fault.symptom, "fix": fault.fix, "seen": fault.seen}
            for fault in CATALOGUE.values()
        ]
        print(json.dumps({"schema": 1, "faults": faults}))
        return
    from rich.console import Console

    from reports.explanation import print_catalogue

    rows = [(fault.group, fault.name, fault.symptom, fault.fix, fault.seen) for fault in CATALOGUE.values()]
    print_catalogue(Console(), rows)


def written(path: Path) -> None:
    """Say on stderr what was written, so that stdout stays the answer's."""
    size = path.stat().st_size
    print(f"{path}  {size / 2**20:,.1f} MiB" if size >= 1 << 20 else f"{path}  {size / 2**10:,.1f} KiB", file=sys.stderr)


@contextmanager
def progress_bar(form: Format) -> Iterator["Progress | None"]:
    """A bar on stderr while a run computes; nothing where stderr is no terminal or the answer is for machines."""
    if form is Format.JSON or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(side: str, done: int, total: int | None) -> None:
            if side not in tasks:
                tasks[side] = bar.add_task(side, total=total)
            bar.update(tasks[side], completed=done, total=total)

        yield update


def print_facts(facts: Mapping[str, Any], form: Format) -> None:
    """Named facts, one a line; nested ones indented."""
    if form is Format.JSON:
        print(json.dumps({"schema": 1, **facts}))
        return
    for line in _lines(facts, 0):
        print(line)


def _lines(facts: Mapping[str, Any], indent: int) -> Iterator[str]:
    width = max((len(str(name)) for name in facts), default=0)
    for name, value in facts.items():
        head = " " * indent + str(name)
        if isinstance(value, Mapping):
            yield head
            yield from _lines(value, indent + 2)
        else:
            yield f"{head:<{indent + width}}  {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def print_tokens(tokens: "Tokens", form: Format) -> None:
    """Ids and pieces, one a line."""
    if form is Format.JSON:
        facts = {"ids": list(tokens.ids), "pieces": list(tokens.pieces), "bos": tokens.bos, "eos": tokens.eos}
        print(
            json.dumps({"schema": 1, **facts, "add_bos": tokens.add_bos, "add_eos": tokens.add_eos, "n_vocab": tokens.n_vocab})
        )
        return
    for position, (number, piece) in enumerate(zip(tokens.ids, tokens.pieces, strict=True)):
        print(f"{position:>6}  {number:>8}  {json.dumps(piece, ensure_ascii=False)}")
    added = "added in front of every prompt" if tokens.add_bos else "not added"
    print(f"{len(tokens.ids)} tokens of a vocabulary of {tokens.n_vocab:,}; BOS {tokens.bos} is {added}")
