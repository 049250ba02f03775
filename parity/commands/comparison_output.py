"""What `run`, `diff` and `drift` print and write: a comparison in any format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.printable import no_command, printable

from .options import AnswerFormat, Format
from .output import DIVERGENCE_CODE, PARITY_CODE

if TYPE_CHECKING:
    from checkpoints.answers.diff import Verdict
    from checkpoints.answers.picture import Picture
    from checkpoints.answers.references import References
    from checkpoints.record import Dump
    from reports.findings import ReportSection
    from reports.report import Report

    from ..run.session import Outcome


def prepare(output_format: Format) -> None:
    """Import what `finish` will use and compile the report's template, to do so while llama.cpp computes."""
    from reports.html import template

    template("report.html")
    if output_format is Format.TEXT:
        import rich.console  # noqa: F401

        import reports.terminal  # noqa: F401


def finish(outcome: "Outcome", output_format: Format, references: "References | None" = None) -> int:
    """Print a run's answer, write diff.json beside the dumps, and return the exit code."""
    from checkpoints.whole_file import put
    from reports.as_json import verdict_as_json
    from reports.html import write_html

    answer = verdict_as_json(outcome.verdict) | {"folder": str(outcome.folder), "seconds": round(outcome.seconds, 3)}
    if references is not None:
        from reports import references as room

        answer["references"] = room.as_json(references)
    put(outcome.folder / "diff.json", (json.dumps(answer, indent=1) + "\n").encode())
    whole = report(outcome.verdict, outcome.ours, outcome.ref, outcome.picture)
    code = show(whole, output_format, extra=answer)
    if references is not None and output_format is Format.TEXT:
        from rich.console import Console

        from reports.header import print_lines

        console = Console()
        print_lines(console, [*room.lines(references, console.width)])
    # The answer is on the screen before the report is drawn.
    write_html(whole, outcome.folder / "report.html")
    if output_format is Format.TEXT:
        print(folder_line(outcome))
    return code


def folder_line(outcome: "Outcome") -> str:
    """The last line of a run: its folder, the files in it, and how long it took."""
    files = "  ".join(path.name for path in sorted(outcome.folder.iterdir(), reverse=True) if path.is_file())
    return no_command(f"{printable(str(outcome.folder), None)}/  {printable(files, 1000)}   {outcome.seconds:.1f} s")


def report(
    verdict: "Verdict", ours: "Dump", ref: "Dump", picture: "Picture", findings: "Sequence[ReportSection]" = ()
) -> "Report":
    """A comparison with everything that belongs beside it."""
    from reports.report import Report

    return Report(verdict, ours, ref, picture, tuple(findings))


def findings(paths: Sequence[Path]) -> "list[ReportSection]":
    """JSON answers of other commands as parts of a report.

    Raises:
        InputError: a file cannot be read, or is not such an answer.
    """
    from checkpoints.errors import InputError
    from checkpoints.given_json import decoded
    from checkpoints.regular import read_text
    from reports.findings import finding

    read: list[ReportSection] = []
    for path in paths:
        try:
            read.append(finding(decoded(read_text(path)), str(path)))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}.", "Check --include.", code="include") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON.", "Write one with --format json > FILE.", code="include") from error
    return read


def show_report(whole: "Report", output_format: AnswerFormat, *, html: Path | None, junit: Path | None) -> int:
    """Print a comparison's answer in one of CI's formats, write the requested files, return the exit code."""
    from reports.files import save
    from reports.html import write_html

    if html is not None:
        write_html(whole, html)
    if junit is not None or output_format is AnswerFormat.JUNIT:
        from reports.junit import junit as as_junit

        text = as_junit(whole.verdict)
        if junit is not None:
            save(text, junit)
        if output_format is AnswerFormat.JUNIT:
            print(text, end="")
    if output_format is AnswerFormat.MARKDOWN:
        from reports.markdown import markdown

        print("".join(map(no_command, markdown(whole).splitlines(keepends=True))), end="")
    elif output_format is not AnswerFormat.JUNIT:
        show(whole, Format.JSON if output_format is AnswerFormat.JSON else Format.TEXT)
    if output_format is AnswerFormat.GITHUB:
        from reports.github import annotations

        print("\n".join(annotations(whole.verdict)))
    return PARITY_CODE if whole.verdict else DIVERGENCE_CODE


def show(whole: "Report", output_format: Format, extra: Mapping[str, Any] | None = None) -> int:
    """Print a comparison's answer and return the exit code."""
    if output_format is Format.JSON:
        from reports.as_json import verdict_as_json

        print(json.dumps(verdict_as_json(whole.verdict) | dict(extra or {})))
    else:
        from rich.console import Console

        from reports.beside import lines
        from reports.header import print_header, print_lines
        from reports.terminal import print_verdict

        console = Console()
        print_header(console, whole.ours.header, whole.ref.header, "".join(token.text for token in whole.ref.tokens))
        print_lines(console, lines(whole, console.width))
        print_verdict(console, whole.verdict)
    return PARITY_CODE if whole.verdict else DIVERGENCE_CODE
