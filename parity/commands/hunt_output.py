"""What `parity run --hunt` prints: each run of the engine as it ends, then the cause."""

import json
from typing import TYPE_CHECKING

from checkpoints.printable import printable

from .options import Format
from .output import DIVERGENCE_CODE, PARITY_CODE, progress_bar

if TYPE_CHECKING:
    from reference.client import Reference

    from ..hunt.hunt import Heard
    from ..run.request import Request


def hunted(request: "Request", started: "Reference", output_format: Format) -> int:
    """Hunt, print results as they are found, write diff.json and the report, and return the exit code."""
    from rich.console import Console
    from rich.text import Text

    from checkpoints.whole_file import put
    from reports import explanation
    from reports import hunt as report
    from reports.findings import finding
    from reports.header import print_header, print_lines
    from reports.html import write_html

    from ..hunt.hunt import hunt
    from .comparison_output import report as whole_report

    console = Console()

    def heard(step: "Heard") -> None:
        if output_format is Format.JSON:
            return
        if step.round.number == 1:
            print_header(console, step.ours.header, step.ref.header)
        print_lines(console, report.round_lines(step.round, console.width))

    with progress_bar(output_format) as progress:
        result = hunt(request, progress, started, heard)
    answered, outcome = result.hunt, result.outcome
    answer = report.as_json(answered) | {"folder": str(outcome.folder), "seconds": round(outcome.seconds, 3)}
    put(outcome.folder / "diff.json", (json.dumps(answer, indent=1) + "\n").encode())
    if output_format is Format.JSON:
        print(json.dumps(answer))
    else:
        print_lines(console, [Text(""), *report.lines(answered, console.width)])
    beside = [] if answered.explanation is None else [finding(explanation.as_json(answered.explanation), "explain")]
    write_html(
        whole_report(outcome.verdict, outcome.ours, outcome.ref, outcome.picture, beside), outcome.folder / "report.html"
    )
    if output_format is Format.TEXT:
        print(f"{report.summary(answered)}   {printable(str(outcome.folder), None)}/")
    return PARITY_CODE if answered else DIVERGENCE_CODE
