"""What a comparison of three sides prints."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .comparison_output import folder_line, report
from .options import Format
from .output import DIVERGENCE_CODE, PARITY_CODE

if TYPE_CHECKING:
    from checkpoints.answers.three_way import ThreeWay
    from checkpoints.record import Dump

    from ..run.session import Outcome


def finish_three(outcome: "Outcome", third: "Dump", three_way: "ThreeWay", output_format: Format) -> int:
    """Print a run's answer, write diff.json and the report beside the dumps, and return the exit code.

    The report draws ours and the reference, as that of every run, with what the third side says as a table.
    """
    from checkpoints.answers.diff import INCOMPLETE
    from checkpoints.structs import as_dict
    from checkpoints.whole_file import put
    from reports.html import write_html
    from reports.sentences import answer as answer_of_two
    from reports.three_way import as_json, section

    dumps = outcome.ours, outcome.ref, third
    answer: dict[str, Any] = {"folder": str(outcome.folder), "seconds": round(outcome.seconds, 3)}
    # An engine that stops halfway agrees with both others as far as it goes.
    incomplete = bool(three_way) and outcome.verdict.verdict == INCOMPLETE
    if incomplete:
        answer |= {"verdict": INCOMPLETE, "uncompared": as_dict(outcome.verdict.uncompared)}
    put(outcome.folder / "diff.json", (json.dumps(as_json(three_way) | answer, indent=1) + "\n").encode())
    said = answer_of_two(outcome.verdict) if incomplete else ""
    code = show_three(three_way, dumps, output_format, extra=answer, said=said)
    whole = report(outcome.verdict, outcome.ours, outcome.ref, outcome.picture, [section(three_way, said)])
    write_html(whole, outcome.folder / "report.html")
    if output_format is Format.TEXT:
        print(folder_line(outcome))
    return DIVERGENCE_CODE if incomplete else code


def show_three(
    three_way: "ThreeWay",
    dumps: "tuple[Dump, Dump, Dump]",
    output_format: Format,
    extra: Mapping[str, Any] | None = None,
    said: str = "",
) -> int:
    """Print the answer, or what is `said` in its place, and return the exit code."""
    from reports.three_way import as_json, heads, lines

    if output_format is Format.JSON:
        print(json.dumps(as_json(three_way) | dict(extra or {})))
        return PARITY_CODE if three_way else DIVERGENCE_CODE
    from rich.console import Console

    from reports.header import print_header, print_lines

    console = Console()
    ours, ref, third = (dump.header for dump in dumps)
    written = "".join(token.text for token in dumps[1].tokens)
    first, second, last = heads(three_way.sides)
    print_header(console, ours, ref, written, {last: third}, (first, second))
    print_lines(console, lines(three_way, console.width, said))
    return PARITY_CODE if three_way else DIVERGENCE_CODE
