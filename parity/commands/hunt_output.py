"""What `parity run --hunt` prints: each run of the engine as it ends, then the cause."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from checkpoints.printable import printable

from .options import Format
from .output import DIVERGENCE_CODE, PARITY_CODE, progress_bar

if TYPE_CHECKING:
    from reference.client import Reference

    from ..hunt.hunt import Hunted, RoundReport
    from ..run.request import Request


def hunted(request: "Request", started: "Reference", output_format: Format) -> int:
    """Hunt, print results as they are found, write diff.json and the report, and return the exit code."""
    from rich.console import Console
    from rich.text import Text

    from reports import hunt as report
    from reports.header import print_header, print_lines

    console = Console()

    def print_round(step: "RoundReport") -> None:
        if output_format is Format.JSON:
            return
        if step.round.number == 1:
            print_header(console, step.ours.header, step.ref.header)
        print_lines(console, report.round_lines(step.round, console.width))

    result, answer = hunted_quietly(request, started, output_format, print_round)
    if output_format is Format.JSON:
        print(json.dumps(answer))
    else:
        print_lines(console, [Text(""), *report.lines(result.hunt, console.width)])
        print(f"{report.summary(result.hunt)}   {printable(str(result.outcome.folder), None)}/")
    return PARITY_CODE if result.hunt else DIVERGENCE_CODE


def hunted_quietly(
    request: "Request",
    started: "Reference",
    output_format: Format,
    report_round: "Callable[[RoundReport], None]" = lambda _: None,
) -> "tuple[Hunted, dict[str, Any]]":
    """Hunt and write diff.json and the report; what was found, and the answer as JSON."""
    from checkpoints.whole_file import put
    from reports import explanation
    from reports import hunt as report
    from reports.findings import finding
    from reports.html import write_html

    from ..hunt.hunt import hunt
    from .comparison_output import report as whole_report

    with progress_bar(output_format) as progress:
        result = hunt(request, progress, started, report_round)
    hunted, outcome = result.hunt, result.outcome
    answer = report.as_json(hunted) | {"folder": str(outcome.folder), "seconds": round(outcome.seconds, 3)}
    put(outcome.folder / "diff.json", (json.dumps(answer, indent=1) + "\n").encode())
    beside = [] if hunted.explanation is None else [finding(explanation.as_json(hunted.explanation), "explain")]
    write_html(
        whole_report(outcome.verdict, outcome.ours, outcome.ref, outcome.picture, beside), outcome.folder / "report.html"
    )
    return result, answer
