"""What `parity score` prints, and the comparison at the worst position."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from checkpoints.errors import InputError

from .options import Format
from .output import DIVERGENCE_CODE, PARITY_CODE

if TYPE_CHECKING:
    from checkpoints.answers.score import Scored

    from ..run.request import Request


def show(score: "Scored", output_format: str) -> None:
    """Print the figures."""
    from reports import score as report

    if output_format == "json":
        print(json.dumps(report.as_json(score)))
    elif output_format == "markdown":
        print(report.markdown(score), end="")
    else:
        from rich.console import Console

        from reports.header import print_lines

        console = Console()
        print_lines(console, list(report.lines(score, console.width)))


def explained(run: "Request", source: str, leading: tuple[int, ...], *, quiet: bool) -> int:
    """Run both sides on the tokens that lead to the worst position, and return the exit code.

    Raises:
        InputError: the side is llama.cpp itself, which is the reference.
    """
    from ..run.sides import EXEC, REF

    if source == REF:
        raise InputError(
            "--explain-worst leads from your engine (or ours) to an operation.",
            "`parity isolate` judges llama.cpp's own.",
            code="usage",
        )
    request = replace(run, tokens=leading, positions="all")
    if source == EXEC:
        from reference.client import Reference

        from .hunt_output import hunted

        return hunted(request, Reference(threads=run.threads, verbose=run.verbose), Format.JSON if quiet else Format.TEXT)
    from ..run.session import run as compared
    from .comparison_output import finish

    outcome = compared(replace(request, points="all"))
    if quiet:
        return PARITY_CODE if outcome.verdict else DIVERGENCE_CODE
    print()
    return finish(outcome, Format.TEXT)
