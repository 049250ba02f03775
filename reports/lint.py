"""A lint report for the terminal and as JSON."""

from typing import Any

from rich.text import Text

from checkpoints.answers.lint import ERROR, LintReport
from checkpoints.structs import as_dict

from .as_json import SCHEMA, plain
from .layout import labelled
from .numbers import clean, count

_LABEL = 18


def as_json(report: LintReport) -> dict[str, Any]:
    """One JSON object: `schema`, `usable`, `records`, `notes`, `findings`."""
    return {
        "schema": SCHEMA,
        "usable": report.usable,
        "records": report.records,
        "notes": list(report.notes),
        "findings": [plain(as_dict(finding)) for finding in report.findings],
    }


def lines(report: LintReport, width: int) -> list[Text]:
    """The report as lines: each finding's rule and evidence, then, once per rule, its usual cause and what to do."""
    shown: list[Text] = []
    for number, finding in enumerate(report.findings):
        style = "bold red" if finding.severity == ERROR else "yellow"
        texts = labelled([(finding.rule, clean(finding.evidence))], width, label=_LABEL, indent=10)
        head = Text(finding.severity.ljust(10), style=style)
        texts[0] = head.append_text(texts[0][10:])
        shown += texts
        following = report.findings[number + 1].rule if number + 1 < len(report.findings) else None
        if following != finding.rule:  # the cause of several is said once, below them
            shown += labelled([("usual cause", finding.cause), ("do", finding.advice)], width, label=_LABEL, indent=10)
    shown += labelled([("note", clean(note)) for note in report.notes], width)
    shown.append(_answer(report))
    return shown


def _answer(report: LintReport) -> Text:
    if not report.usable:
        return Text(
            "unusable: no engine computes such values, so comparing this dump would say nothing about yours", style="bold red"
        )
    if report.suspicions:
        sentence = f"usable, with {count(len(report.suspicions), 'suspicion')}: captured wrong or computed wrong? `parity diff` decides"
        return Text(sentence, style="bold yellow")
    if report.findings:
        return Text(
            f"usable, with {count(len(report.findings), 'finding')} in {count(report.records, 'record')}", style="yellow"
        )
    return Text(f"clean: {count(report.records, 'record')}, no findings", style="bold green")
